"""fused.install against transformers + PEFT: same losses, same gradients, same saved adapters."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from small_llama import CONFIG, assert_close, step, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from qmedtune.modeling import activations, fused


@pytest.fixture
def ids():
    return torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}])
def test_loss_and_gradients_equal_peft(ids, config):
    stock = tiny(**config)
    ours = copy.deepcopy(stock)
    fused.install(ours)
    loss, grads = step(stock, ids)
    our_loss, our_grads = step(ours, ids)
    assert abs(loss - our_loss) < 1e-5
    assert_close(our_grads, grads, 2e-5)


def test_bf16_gradients_are_as_close_to_fp32_as_stock(ids):
    exact = step(tiny(embeddings=True), ids)[1]
    ours = tiny(dtype=torch.bfloat16, embeddings=True)
    fused.install(ours)
    grads = step(ours, ids)[1]
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert_close(grads, exact, 5e-2)


def test_dropout_draws_what_peft_draws(ids):
    stock = tiny(dropout=0.3)
    ours = copy.deepcopy(stock)
    fused.install(ours)
    torch.manual_seed(5)
    loss, grads = step(stock, ids)
    torch.manual_seed(5)
    our_loss, our_grads = step(ours, ids)
    assert abs(loss - our_loss) < 1e-5
    assert_close(our_grads, grads, 2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(ids, reentrant):
    model = tiny(dropout=0.2)
    fused.install(model)
    torch.manual_seed(5)
    loss, grads = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    model.base_model.model.model.layers[0].mlp.register_forward_pre_hook(count)
    torch.manual_seed(5)
    again, again_grads = step(model, ids)
    assert calls == 2, "the layer was not recomputed"
    assert loss == again
    assert_close(again_grads, grads, 1e-6)


def kept_bytes(model, ids):
    """Bytes that a forward pass of the layers leaves for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.model(input_ids=ids)
    return sum(size for size, _ in kept.values())


def test_every_way_of_the_layers_gives_the_same_bits_for_fewer_bytes(ids):
    """Offloading is seen here as a copy: on the CPU the host's memory is the device's."""
    model = tiny(dropout=0.2, num_hidden_layers=4)
    fused.install(model)
    model.train()
    found = {}
    for way in activations.WAYS:
        activations.set_ways(model, {way: 4})
        torch.manual_seed(5)
        found[way] = step(model, ids)
    activations.set_ways(model, {"offload": 1, "recompute": 1, "cheap": 1, "keep": 1})
    assert [layer.way for layer in model.base_model.model.model.layers] == ["offload", "recompute", "cheap", "keep"]
    torch.manual_seed(5)
    found["mixed"] = step(model, ids)
    for loss, grads in found.values():
        assert loss == found["keep"][0]
        assert all(torch.equal(grads[name], value) for name, value in found["keep"][1].items())


def test_an_mlp_in_tiles_gives_the_same_gradients(ids, monkeypatch):
    """Tiles of 5 tokens do not divide the rows; their last one is short."""
    model = tiny(num_hidden_layers=2)
    fused.install(model)
    activations.set_ways(model.train(), {"offload": 2})
    loss, grads = step(model, ids)
    seen = []
    for layer in model.base_model.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(fused, "tiled", partial(activations.tiled, tokens=5))
    again, again_grads = step(model, ids)
    assert max(seen) == 5 and ids.numel() % 5 and ids.numel() % 5 in seen
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert_close(again_grads, grads, 1e-5)


def test_each_way_keeps_what_the_plan_says(ids):
    model = tiny()
    fused.install(model)
    model.train()
    held = {}
    for way in activations.WAYS:
        activations.set_ways(model, {way: 2})
        held[way] = kept_bytes(model, ids)
    hidden, product = (4 * ids.numel() * CONFIG[name] for name in ("hidden_size", "intermediate_size"))
    # The first layer's norm needs no gradient: what it reads is kept only to be normed again.
    assert held["keep"] - held["cheap"] == 3 * hidden + 2 * product
    assert held["recompute"] - held["offload"] == 2 * hidden


@pytest.mark.parametrize("piece", [3, 2**25])
def test_offloaded_inputs_are_copies_that_come_back_in_turn(piece, monkeypatch):
    monkeypatch.setattr(activations, "PIECE", piece)
    monkeypatch.setattr(activations, "_LAST", [])  # no other test's graph comes before
    x = [torch.full((4,), float(i), requires_grad=True) for i in range(3)]
    seen = []

    def layer(x):
        seen.append(float(x.detach()[0]))
        return x * x

    outputs = [activations.recomputed(layer, value, {}, offload=True) for value in x]
    with torch.no_grad():
        for value in x:
            value.mul_(100)  # what is kept is the copy, not this
    for output in reversed(outputs):
        output.sum().backward()
    assert seen == [0, 1, 2, 2, 1, 0] and [float(value.grad[0]) for value in x] == [0, 2, 4]


class Stream:
    """What activations.py asks of a CUDA stream, written down."""

    def __init__(self, name: str, told: list):
        self.name, self.told, self.events = name, told, 0

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for copy {event}")


@pytest.fixture
def streams(monkeypatch):
    """CPU tensors taken for a GPU's: every wait between the two streams, in order."""
    told: list[str] = []
    pair = Stream("computing", told), Stream("copying", told)
    monkeypatch.setattr(activations, "_streams", lambda device: pair)
    monkeypatch.setattr(activations, "_on", lambda stream: nullcontext())
    monkeypatch.setattr(activations, "_LAST", [])
    monkeypatch.setattr(activations, "_LEAVING", [])
    return told


def copies_waited_for(told: list[str]) -> list[int]:
    return [int(line.split()[-1]) for line in told if line.startswith("computing")]


def test_offloading_holds_two_inputs_on_their_way_and_two_on_the_way_back(streams):
    alive = []

    def layer(x):
        alive.append(len(activations._LEAVING))
        return x * x

    x = torch.ones(4, requires_grad=True)
    hidden, held = x, []
    for _ in range(5):
        hidden = activations.recomputed(layer, hidden, {}, offload=True)
        held.append(activations._LAST[0])
    assert max(alive) <= 2 and len(activations._LEAVING) == 2  # copies 4 and 5 are on their way
    assert streams.count("copying waits for computing") == 5
    assert [line for line in streams if line.startswith("computing")] == [
        f"computing waits for copy {i}" for i in (1, 2, 3)
    ]
    streams.clear()
    coming = []
    real = activations._Offloaded.take

    def take(self):
        taken = real(self)
        coming.append(sum(one() is not None and one().back is not None for one in held))
        return taken

    activations._Offloaded.take = take
    try:
        hidden.sum().backward()
    finally:
        activations._Offloaded.take = real
    assert float(x.grad[0]) == 32
    assert coming == [1, 1, 1, 1, 0] and not activations._LEAVING  # besides the taken one, the next
    # The first two: inputs still leaving; then each copy back is waited for before it is read.
    assert [line for line in streams if line.startswith("computing")] == [
        f"computing waits for copy {i}" for i in range(4, 11)
    ]


def test_an_empty_tensor_is_not_offloaded(streams):
    """torch 2.11's checkpoint saves one beside each input."""
    empty = torch.empty(0)
    assert activations._unpack(activations._pack(empty)) is empty
    assert not streams and not activations._LAST


def test_a_copy_that_nobody_takes_is_waited_for_before_its_memory_is_used_again(streams):
    first = activations._Offloaded(torch.ones(4), None)
    second = activations._Offloaded(torch.ones(4), first)
    second.take()
    streams.clear()
    del first
    assert streams == ["computing waits for copy 4"]


def test_accumulation_equals_one_batch(ids):
    model = tiny()
    fused.install(model)
    _, whole = step(model, ids)
    model.zero_grad()
    for row in ids:
        (model(input_ids=row[None], labels=row[None]).loss / 2).backward()
    parts = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert_close(parts, whole, 1e-5)


def test_stacked_frozen_and_active_adapters(ids):
    stock = tiny()
    stock.add_adapter("sft", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", exclude_modules=["lm_head"]))
    torch.manual_seed(3)
    for name, parameter in stock.named_parameters():
        if "sft" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    stock.base_model.set_adapter(["default", "sft"])
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("sft" in name)
    ours = copy.deepcopy(stock)
    fused.install(ours)
    loss, grads = step(stock, ids)
    our_loss, our_grads = step(ours, ids)
    assert all("sft" in name for name in our_grads)
    assert abs(loss - our_loss) < 1e-5
    assert_close(our_grads, grads, 2e-5)


def test_disable_merge_unmerge_and_unload(ids):
    model = tiny().eval()
    fused.install(model)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        assert (adapted - base).abs().max() > 1e-2
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base, atol=1e-5, rtol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-4)


def test_adapters_move_between_the_paths(ids, tmp_path):
    from peft import PeftModel

    ours = tiny(embeddings=True)
    keys = set(ours.state_dict())
    fused.install(ours)
    assert set(ours.state_dict()) == keys
    with torch.no_grad():
        expected = ours.eval()(input_ids=ids).logits
    ours.save_pretrained(tmp_path)
    base = tiny().unload()
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_generation_with_a_cache_equals_stock(ids):
    stock = tiny().eval()
    ours = copy.deepcopy(stock)
    fused.install(ours)
    expected = stock.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False), expected)


def test_layers_with_hooks_or_lora_variants_keep_their_own_forward(ids):
    torch.manual_seed(0)
    stock = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**CONFIG)), LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    )
    ours = copy.deepcopy(stock)
    fused.install(ours)
    seen = []
    projection = next(module for module in ours.modules() if isinstance(module, LoraLayer))
    projection.register_forward_hook(lambda *_: seen.append(1))
    loss, grads = step(stock, ids)
    our_loss, our_grads = step(ours, ids)
    assert seen and abs(loss - our_loss) < 1e-5
    for name, value in grads.items():
        torch.testing.assert_close(our_grads[name], value, atol=1e-5, rtol=1e-4)


def test_projections_of_one_input_share_memory_and_are_not_copied():
    model = tiny()
    fused.install(model)
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = attention.q_proj.base_layer.weight, attention.k_proj.base_layer.weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * 4
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_facts_name_the_path_and_the_modules():
    facts = fused.install(tiny())
    assert facts.mode == "auto" and facts.paths["lora"] == "reference: cpu is no NVIDIA GPU of sm_75+"
    assert facts.modules == {"LlamaDecoderLayer": 2, "LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}
    assert facts.own_forward == {}


def test_facts_name_what_keeps_its_own_forward_and_why():
    model = tiny()
    layer = model.base_model.model.model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda *_: None)
    layer.self_attn.o_proj.base_layer.weight.requires_grad_()
    assert fused.install(model).own_forward == {"forward hooks": 1, "trained weights": 1}


def test_full_parameter_training_still_gets_every_gradient(ids):
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**CONFIG))
    ours = copy.deepcopy(stock)
    fused.install(ours)
    _, grads = step(stock, ids)
    _, our_grads = step(ours, ids)
    assert_close(our_grads, grads, 2e-5)


def test_fp16_weights_under_autocast_train(ids):
    """What a card without bf16 runs (loss scaling apart)."""
    exact = step(tiny(), ids)[1]
    ours = tiny(dtype=torch.float16)
    fused.install(ours)
    with torch.autocast("cpu", torch.float16):
        loss, grads = step(ours, ids)
    assert torch.isfinite(loss) and all(grad.dtype == torch.float32 for grad in grads.values())
    assert_close(grads, exact, 2e-2)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="kernels: given 'cuda'; allowed auto, triton, reference"):
        fused.install(tiny(), "cuda")


def test_train_evaluate_train_gives_the_same_gradients(ids):
    """bitsandbytes' CPU linears repack at the first eval forward and then train with wrong gradients; ours must not."""
    model = tiny(dtype=torch.bfloat16)
    fused.install(model)
    _, before = step(model.train(), ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    _, after = step(model.train(), ids)
    for name, grad in before.items():
        assert torch.equal(grad, after[name])
