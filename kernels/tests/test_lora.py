"""lora.linear against float64: every gradient, groups, stacks, dtypes, paths, autocast, checkpointing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmedtune_kernels import Adapter, dispatch, lora, nf4
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}
WIDTHS = (64, 32, 32)  # q, k, v of grouped-query attention


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """A draw in a few thousand is beyond a tolerance of so few numbers."""
    torch.manual_seed(0)


def quantize(n, k, device="cpu"):
    import bitsandbytes.functional as bnb

    w = torch.randn(n, k, device=device) / k**0.5
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    two = state.state2
    return nf4.NF4Weight(packed, state.absmax, 64, (n, k), two.code, two.absmax, state.offset)


def adapters(widths, k, r=8, device="cpu", grad=True):
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [
        Adapter(
            (torch.randn(r, k, device=device) / k**0.5).requires_grad_(grad),
            torch.randn(n, r, device=device).requires_grad_(grad), 1.7, start,
        )
        for n, start in zip(widths, starts, strict=True)
    ]  # fmt: skip


def exact(x, w, pairs, bias, dy):
    """float64: y and the gradients of x and of every A, B."""
    leaves = [x.detach().double().requires_grad_()]
    for adapter in pairs:
        leaves += [adapter.a.detach().double().requires_grad_(), adapter.b.detach().double().requires_grad_()]
    y = leaves[0] @ w.double().t() + (0 if bias is None else bias.double())
    columns = []
    for adapter, a, b in zip(pairs, leaves[1::2], leaves[2::2], strict=True):
        delta = adapter.scaling * (leaves[0] @ a.t()) @ b.t()
        rest = y.shape[-1] - adapter.start - delta.shape[-1]
        columns.append(torch.nn.functional.pad(delta, (adapter.start, rest)))
    y = y + sum(columns) if columns else y
    return y.detach(), torch.autograd.grad(y, leaves, dy.double())


def relative_error(actual, expected) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


def outputs_and_exact(x, weight, w, pairs, bias, dtype, path):
    """(actual, float64 reference) of Y, dX and of every dA and dB, for a fresh dY."""
    x = x.detach().requires_grad_()
    dy = torch.randn(*x.shape[:-1], w.shape[0], device=x.device).to(dtype)
    y = lora.linear(x, weight, pairs, bias, path)
    y.backward(dy)
    wanted_y, grads = exact(x, w, pairs, bias, dy)
    assert y.dtype == x.grad.dtype == dtype
    leaves = [x] + [tensor for adapter in pairs for tensor in (adapter.a, adapter.b)]
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return [(y, wanted_y), *((leaf.grad, wanted) for leaf, wanted in zip(leaves, grads, strict=True))]


def check(x, weight, w, pairs, bias, dtype, path):
    for actual, wanted in outputs_and_exact(x, weight, w, pairs, bias, dtype, path):
        assert relative_error(actual, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("widths", [WIDTHS, (96,)])
def test_dense_weight_all_gradients(widths, dtype):
    w = (torch.randn(sum(widths), 64) / 8).to(dtype)
    x, bias = torch.randn(2, 9, 64).to(dtype), torch.randn(sum(widths)).to(dtype)
    check(x, w, w, adapters(widths, 64), bias, dtype, "auto")


@pytest.mark.parametrize("path", ["reference", "triton", "fused"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("widths", [WIDTHS, (96,)])
def test_nf4_weights_all_gradients(widths, dtype, path, device):
    weights = tuple(quantize(n, 128, device) for n in widths)
    w = torch.cat([nf4.dequantize_reference(weight, torch.float32) for weight in weights])
    x = torch.randn(2, 5, 128, device=device).to(dtype)
    check(x, weights, w, adapters(widths, 128, device=device), None, dtype, path)


@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("widths", [WIDTHS, (40,)])
def test_adapters_in_the_contraction_give_all_gradients(widths, dtype, r, device, monkeypatch):
    """[X | X A^T] [W | B]^T and [dY | dY B] [W ; A], in a scratch buffer full of NaN, ranks padded to 8."""
    used = []
    monkeypatch.setattr(dispatch, "widens", lambda *sizes: used.append(sizes) or True)
    weights = tuple(quantize(n, 128, device) for n in widths)
    w = torch.cat([nf4.dequantize_reference(weight, torch.float32) for weight in weights])
    x = torch.randn(2, 5, 128, device=device).to(dtype)
    nf4.scratch(device, dtype, 300 * 300).fill_(float("nan"))
    bias = torch.randn(sum(widths), device=device).to(dtype)
    check(x, weights, w, adapters(widths, 128, r, device), bias, dtype, "reference")
    assert [sizes[1:] for sizes in used] == [(128, sum(widths)), (sum(widths), 128)]


def test_adapters_join_the_contraction_where_that_moves_fewer_bytes(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    gpu = torch.device("cuda")
    assert dispatch.widens(gpu, 4096, 28672) and not dispatch.widens(gpu, 28672, 4096)  # gate/up forward, backward
    assert not dispatch.widens(gpu, 4096, 4096)
    monkeypatch.setattr(dispatch, "capability", lambda device: 0)
    assert not dispatch.widens(torch.device("cpu"), 4096, 28672)


@pytest.mark.parametrize("wide", [True, False])
def test_a_remade_input_is_not_kept_and_gives_the_same_gradients(wide, monkeypatch):
    monkeypatch.setattr(dispatch, "widens", lambda *_: wide)
    weight, pairs = quantize(96, 64), adapters((96,), 64)
    source = torch.randn(1000, 64, requires_grad=True)
    dy = torch.randn(1000, 96)
    grads, saved = [], []
    for remake in (None, lora.Remake(torch.tanh, (source.detach(),))):
        x = source.detach().tanh().requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            lora.linear(x, (weight,), pairs, remake=remake).backward(dy)
        grads.append([x.grad, *(tensor.grad.clone() for pair in pairs for tensor in (pair.a, pair.b))])
        for pair in pairs:
            pair.a.grad = pair.b.grad = None
    large = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.shape == (1000, 64)}
    assert large == {source.untyped_storage().data_ptr()}
    assert all(torch.equal(kept, remade) for kept, remade in zip(*grads, strict=True))


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.integers(1, 30), widths=st.lists(st.integers(8, 70), min_size=1, max_size=3), blocks=st.integers(1, 3),
    r=st.integers(1, 9), dtype=st.sampled_from(list(TOLERANCE)), path=st.sampled_from(["reference", "triton", "fused"]),
)  # fmt: skip
def test_any_shape(m, widths, blocks, r, dtype, path):
    """Small shapes are drawn again and judged together (see test_matmul.py). All of dA hangs on the m r numbers of
    dY B, all of dB on those of X A^T: with 160 or more of them the error's square varies by a sixth, and the largest
    is at half of its limit."""
    k = 64 * blocks
    draws = -(-160 // (m * r))
    pooled = []
    for _ in range(draws):
        weights = tuple(quantize(n, k, HERE) for n in widths)
        w = torch.cat([nf4.dequantize_reference(weight, torch.float32) for weight in weights])
        x = torch.randn(m, k, device=HERE).to(dtype)
        pooled.append(outputs_and_exact(x, weights, w, adapters(widths, k, r, HERE), None, dtype, path))
    for of_one in zip(*pooled, strict=True):
        actual, wanted = (torch.stack(part) for part in zip(*of_one, strict=True))
        assert relative_error(actual, wanted) <= TOLERANCE[dtype]


def test_frozen_and_active_adapters_on_the_same_rows():
    w = torch.randn(48, 32)
    frozen, active = adapters((48,), 32, grad=False)[0], adapters((48,), 32, r=3)[0]
    x = torch.randn(5, 32, requires_grad=True)
    dy = torch.randn(5, 48)
    lora.linear(x, w, [frozen, active]).backward(dy)
    _, (dx, _, _, da, db) = exact(x, w, [frozen, active], None, dy)
    assert frozen.a.grad is None and frozen.b.grad is None
    for actual, wanted in ((x.grad, dx), (active.a.grad, da), (active.b.grad, db)):
        assert relative_error(actual, wanted) <= 2e-5


def test_without_a_weight_it_is_the_adapter_alone():
    x, pair = torch.randn(4, 32), adapters((48,), 32)
    wanted, _ = exact(x, torch.zeros(48, 32), pair, None, torch.zeros(4, 48))
    assert relative_error(lora.linear(x, None, pair), wanted) <= 2e-5


def test_only_what_is_needed_is_saved():
    w, pair = torch.randn(48, 32), adapters((48,), 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        lora.linear(torch.randn(1000, 32, requires_grad=True), w, pair)
        assert sorted(saved) == [(8, 32), (48, 8), (48, 32), (1000, 8), (1000, 32)]
        saved.clear()
        lora.linear(torch.randn(1000, 32, requires_grad=True), w, adapters((48,), 32, grad=False))
        assert (1000, 32) not in saved and (1000, 8) not in saved


def test_autocast_computes_in_the_autocast_dtype():
    w, pair = torch.randn(48, 32).bfloat16(), adapters((48,), 32)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora.linear(x, w, pair)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == pair[0].a.grad.dtype == torch.float32
    assert torch.equal(y, lora.linear(x.bfloat16(), w, pair))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, lora.linear(x, w.float(), pair))  # as torch's own linear casts a weight in fp32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same_bits(reentrant):
    w, pair = torch.randn(48, 32), adapters((48,), 32)
    x = torch.randn(4, 32, requires_grad=True)
    lora.linear(x, w, pair).square().sum().backward()
    plain = [t.grad.clone() for t in (x, pair[0].a, pair[0].b)]
    for t in (x, pair[0].a, pair[0].b):
        t.grad = None
    checkpoint(lambda x: lora.linear(x, w, pair), x, use_reentrant=reentrant).square().sum().backward()
    for t, wanted in zip((x, pair[0].a, pair[0].b), plain, strict=True):
        assert torch.equal(t.grad, wanted)


def test_gradients_accumulate_in_fp32():
    w, pair = torch.randn(48, 32).bfloat16(), adapters((48,), 32)[0]
    for _ in range(2):
        lora.linear(torch.ones(4, 32).bfloat16(), w, [pair]).sum().backward()
    twice = pair.b.grad.clone()
    pair.b.grad = None
    lora.linear(torch.ones(4, 32).bfloat16(), w, [pair]).sum().backward()
    assert torch.equal(twice, 2 * pair.b.grad)


class Operations(TorchDispatchMode):
    """Names of what runs within it, views and new memory left out."""

    FREE = ("detach", "alias", "as_strided", "empty_like", "view")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_lie_together_are_stacked_in_one_operation_with_the_same_bits(dtype):
    pairs = adapters((96, 64, 64), 128)
    apart = lora.stack_a(pairs, dtype)
    factors = [torch.nn.Parameter(pair.a.detach().clone()) for pair in pairs]
    lora.lay_together(factors)
    together = [replace(pair, a=factor) for pair, factor in zip(pairs, factors, strict=True)]
    with Operations() as ran:
        stacked = lora.stack_a(together, dtype)
    assert ran.names == ["mul"] and stacked.dtype == dtype and torch.equal(stacked, apart)
    factors[1].data = factors[1].data.clone()  # moved on its own, as loading an adapter may
    assert torch.equal(lora.stack_a(together, dtype), apart)
    other = [together[0], replace(together[1], scaling=5.0), together[2]]
    assert not torch.equal(lora.stack_a(other, dtype), apart)


def test_no_rows():
    pair = adapters((48,), 32)
    y = lora.linear(torch.empty(0, 32, requires_grad=True), torch.randn(48, 32), pair)
    y.sum().backward()
    assert y.shape == (0, 48) and not pair[0].a.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.randn(48, 31)}, "^weight: given"),
        ({"weight": torch.randn(48, 32).half()}, "^weight: given"),
        ({"weight": (quantize(48, 64),)}, "^weight: given"),
        ({"bias": torch.zeros(47)}, "^bias: given"),
        ({"adapters": [replace(adapters((48,), 32)[0], start=1)]}, "^adapters: given"),
        ({"adapters": adapters((48,), 31)}, "^adapters: given"),
    ],
)
def test_misfits_are_named(changes, message):
    arguments = {"weight": torch.randn(48, 32), "adapters": [], "bias": None, **changes}
    with pytest.raises(ValueError, match=message):
        lora.linear(torch.randn(4, 32), **arguments)


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_training_with_kernels_and_references_gives_the_same_losses(steps, device):
    """A tiny LLaMA with NF4 linears and r=4 adapters, fp32: maximum and mean loss deviation within TRL's tolerances."""
    losses = {path: torch.tensor(_train(path, steps, device)) for path in ("reference", "triton")}
    deviation = (losses["reference"] - losses["triton"]).abs()
    assert losses["triton"][-1] < 0.8 * losses["triton"][0]
    assert deviation.max() <= 1e-3 and deviation.mean() <= 1e-5


def _train(mode: str, steps: int, device: torch.device) -> list[float]:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from qmedtune.modeling import fused

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parent in [model.model.layers[0].self_attn, model.model.layers[0].mlp]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32, True, "nf4")
                four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=four)
                setattr(parent, name, four.to(device))
    model = get_peft_model(model.to(device), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    facts = fused.install(model, mode)
    assert not facts.own_forward
    ids = torch.randint(0, 40, (1, 12), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
