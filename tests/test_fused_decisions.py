"""What fused.py decides about a layer's linears: once, and anew whenever what it hangs on has changed."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from qmedtune_kernels import nf4
from small_llama import assert_close, step, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from qmedtune.modeling import activations, fused


@pytest.fixture
def ids():
    return torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def decisions(monkeypatch):
    """The groups that were decided about, in order."""
    found, decide = [], fused._decide
    monkeypatch.setattr(fused, "_decide", lambda projections: found.append(projections) or decide(projections))
    return found


def in_nf4(model):
    """The same model with its base's linears held by bitsandbytes."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            plain = layer.get_base_layer()
            four = Linear4bit(plain.in_features, plain.out_features, False, plain.weight.dtype, True, "nf4")
            four.weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=four)
            layer.base_layer = four.to("cpu")
    return model


@pytest.mark.parametrize(("quantised", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_a_group_is_decided_once_for_all_steps(ids, decisions, quantised, dropout):
    model = in_nf4(tiny(dropout)) if quantised else tiny(dropout)
    fused.install(model)
    step(model, ids)
    assert len(decisions) == 2 * (4 + 5 * (dropout > 0))  # q/k/v, o, gate/up, down of each layer; q, k, v, gate, up
    before = len(decisions)
    step(model, ids)
    model.gradient_checkpointing_enable()
    step(model, ids)
    assert len(decisions) == before


def test_a_layer_of_another_format_keeps_its_own_forward(ids):
    """Of which nothing is asked but that: not even its widths."""

    class Doubled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, None

        def forward(self, x):
            return 2 * torch.nn.functional.linear(x, self.weight)

    stock = tiny().unload()
    stock.model.layers[1].mlp.up_proj = Doubled(stock.model.layers[1].mlp.up_proj)
    ours = copy.deepcopy(stock)
    assert fused.install(ours).own_forward == {"a Doubled in another format than NF4": 1}
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def layer_of(model) -> LoraLayer:
    return model.base_model.model.model.layers[0].mlp.gate_proj


def hooked(model):
    layer_of(model).base_layer.register_forward_hook(lambda module, x, y: y * 1.5)


def hooked_before(model):
    layer_of(model).register_forward_pre_hook(lambda module, x: (x[0] * 1.5,))


def scaled(model):
    layer_of(model).scaling["default"] = 7.0


def more_adapters(model):
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", exclude_modules=["lm_head"]))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.base_model.set_adapter(["default", "second"])


def other_weights(model):
    base = layer_of(model).base_layer
    base.weight = torch.nn.Parameter(base.weight.data * 2, requires_grad=False)


def other_factors(model):
    """PEFT makes an adapter's modules anew when it is added again under its name."""
    layer = layer_of(model)
    layer.lora_A["default"] = copy.deepcopy(layer.lora_A["default"])
    layer.lora_A["default"].weight.data *= 2


def one_layer_disabled(model):
    layer_of(model).enable_adapters(False)


def merged(model):
    layer = layer_of(model)
    layer.merge()
    layer.requires_grad_(False)


def trained(model):
    layer_of(model).base_layer.weight.requires_grad_()


CHANGES = [
    hooked, hooked_before, scaled, more_adapters, other_weights, other_factors, one_layer_disabled, merged, trained
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_a_step_counts_in_the_next(ids, change):
    stock = tiny()
    ours = copy.deepcopy(stock)
    fused.install(ours)
    for model in (stock, ours):
        step(model, ids)
        change(model)
    loss, grads = step(stock, ids)
    our_loss, our_grads = step(ours, ids)
    assert abs(loss - our_loss) < 1e-5 and our_grads.keys() == grads.keys()
    assert_close(our_grads, grads, 2e-5)


def test_dropout_counts_from_the_step_on_in_which_the_model_trains(ids):
    model = tiny(dropout=0.3).eval()
    fused.install(model)
    with torch.no_grad():
        scored = model(input_ids=ids).logits
        trained = model.train()(input_ids=ids).logits
        assert (trained - scored).abs().max() > 1e-3
        assert torch.equal(model.eval()(input_ids=ids).logits, scored)


def test_quantised_weights_are_checked_once_and_again_after_they_changed(ids, monkeypatch):
    checked, check = [], nf4.check
    monkeypatch.setattr(nf4, "check", lambda weight: checked.append(weight.shape) or check(weight))
    model = in_nf4(tiny())
    fused.install(model)
    for _ in range(3):
        step(model, ids)
    assert len(checked) == 14
    linear = layer_of(model).base_layer
    linear.weight.data = linear.weight.data.clone()
    step(model, ids)
    assert len(checked) == 15
    linear.weight.quant_state.absmax = linear.weight.quant_state.absmax[:-1].clone()
    with pytest.raises(ValueError, match="^absmax: given"):
        step(model, ids)


def test_what_is_kept_holds_no_weight_that_was_moved_or_replaced(ids):
    model = in_nf4(tiny())
    fused.install(model)
    step(model, ids)
    linear = layer_of(model).base_layer
    kept = weakref.ref(vars(linear.weight)[fused.DESCRIBED][1])
    model.base_model.model.model.layers[0].mlp.to(torch.device("cpu"))
    gc.collect()
    assert kept() is None
    step(model, ids)
    kept = weakref.ref(vars(linear.weight)[fused.DESCRIBED][1])
    linear.weight = Params4bit(torch.randn(96, 64), requires_grad=False, quant_type="nf4").to("cpu")
    gc.collect()
    assert kept() is None


def test_a_copy_decides_for_itself(ids):
    model = tiny()
    fused.install(model)
    loss, grads = step(model, ids)
    other = copy.deepcopy(model)
    layer_of(other).scaling["default"] = 0.0
    assert step(other, ids)[0] != loss
    again, same = step(model, ids)
    assert again == loss
    assert all(torch.equal(same[name], grad) for name, grad in grads.items())


def test_the_low_rank_factors_of_one_input_lie_together_and_are_saved_apart(tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused.install(model)
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = attention.q_proj.lora_A["default"].weight, attention.k_proj.lora_A["default"].weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").stat().st_size
    factors = sum(p.numel() * 4 for name, p in model.named_parameters() if "lora_" in name)
    assert factors < saved < factors + 20_000


# ---- stacked adapters, kept from one micro-batch to the next ---------------------------------------------------------


class Operations(TorchDispatchMode):
    """How many run within it, views and new memory left out."""

    FREE = ("detach", "alias", "as_strided", "empty_like", "view", "t", "_unsafe_view", "slice", "split", "transpose")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] not in self.FREE
        return function(*args, **(kwargs or {}))


def micro_batches(model, ids, around):
    """Losses and gradients of three micro-batches, and the operations of each forward pass."""
    model.zero_grad()
    losses, counts = [], []
    with around:
        for part in (ids, ids.flip(0), ids[:1]):
            with Operations() as ran:
                loss = model(input_ids=part, labels=part).loss
            loss.backward()
            losses.append(loss.detach())
            counts.append(ran.count)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, counts


@pytest.mark.parametrize(("quantised", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_adapters_are_stacked_once_for_all_micro_batches_of_a_step(ids, quantised, dtype):
    model = in_nf4(tiny(dtype=dtype)) if quantised else tiny(dtype=dtype)
    fused.install(model)
    step(model.train(), ids)  # weights are described when first seen
    losses, grads, plain = micro_batches(model, ids, nullcontext())
    again, again_grads, counts = micro_batches(model, ids, fused.steady(model))
    assert again == losses and all(torch.equal(again_grads[name], grads[name]) for name in grads)
    # of each of two layers A is one operation in four groups; B is zeros and copies in q/k/v (4) and gate/up (3), and
    # one conversion in o and down, none where it has the dtype already
    saved = 2 * (4 + 4 + 3 + 2 * (dtype != torch.float32))
    assert [before - now for before, now in zip(plain, counts, strict=True)] == [0, saved, saved]


def test_what_is_stacked_is_given_up_at_the_end_of_a_step_and_where_one_fails(ids):
    """An optimiser may write through pointers, which no version counter sees."""
    model = tiny()
    fused.install(model)
    model.train()
    groups = [module for module in model.modules() if isinstance(module, fused.Grouped)]

    def held():
        return sum(len(found.copies) for group in groups for found in group.decided.values())

    with pytest.raises(ZeroDivisionError), fused.steady(model):
        first = step(model, ids)[0]
        assert held() == 8
        1 / 0  # noqa: B018
    assert held() == 0 and not any(group.steady for group in groups)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    with fused.steady(model):
        assert step(model, ids)[0] != first


def test_layers_that_are_recomputed_hold_no_copies(ids):
    model = tiny()
    fused.install(model)
    activations.set_ways(model.train(), {"recompute": 1, "cheap": 1})
    with fused.steady(model):
        step(model, ids)
        layers = model.base_model.model.model.layers
        told = [bool(found.copies) for layer in layers for found in layer.mlp.decided.values()]
    assert told == [False, False, True, True]
