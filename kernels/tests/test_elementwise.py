"""SwiGLU and rotary embedding: bits of transformers' own, gradients against float64, odd shapes, bad input."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmedtune_kernels import rope, swiglu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

DTYPES = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}
PATHS = ("reference", "triton")


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(3, 7, 96), (1, 2050), (0, 64), (2, 3000)])
def test_swiglu_and_its_gradient(shape, dtype, path, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y = swiglu.swiglu(x, path)
    gate, up = x.detach().chunk(2, dim=-1)
    stock = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y.detach(), stock, rtol=0 if path == "reference" else 2**-7, atol=1e-6)
    dy = torch.randn_like(stock)
    y.backward(dy)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(dy.double())
    assert x.grad.dtype == dtype
    if x.numel():
        assert relative_error(x.grad, exact.grad) <= DTYPES[dtype]


def test_swiglu_keeps_only_its_input():
    saved = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu.swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def qkv_and_angles(batch, tokens, heads, kv_heads, width, dtype, device, rows):
    qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    angles = torch.rand(rows, tokens, width // 2, device=device) * 6.3
    angles = torch.cat((angles, angles), dim=-1)
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype)


def stock_rotary(qkv, cos, sin, heads, kv_heads):
    """transformers' function, q, k and v as [B, S, heads, D]."""
    query, key, value = rope.split(qkv, heads, kv_heads, cos.shape[-1])
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return query.transpose(1, 2), key.transpose(1, 2), value


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", [(2, 5, 4, 2, 64, 2), (1, 9, 12, 12, 32, 1), (3, 4, 9, 3, 96, 1)])
def test_rotary_equals_transformers_to_the_bit(size, dtype, path, device):
    *shape, rows = size
    batch, tokens, heads, kv_heads, width = shape
    qkv, cos, sin = qkv_and_angles(*shape, dtype, device, rows)
    theirs, ours = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    expected = stock_rotary(theirs, cos, sin, heads, kv_heads)
    actual = rope.rotary_qkv(ours * 1, cos, sin, heads, kv_heads, path)
    grads = [torch.randn_like(part).transpose(1, 2).contiguous().transpose(1, 2) for part in expected]
    torch.autograd.backward(expected, grads)
    torch.autograd.backward(actual, grads)
    for ours_part, theirs_part in zip(actual, expected, strict=True):
        assert torch.equal(ours_part, theirs_part)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 9), kv_heads=st.integers(1, 3), groups=st.integers(1, 5),
    width=st.sampled_from([32, 64, 96]), dtype=st.sampled_from(list(DTYPES)),
)  # fmt: skip
def test_rotary_at_any_shape(batch, tokens, kv_heads, groups, width, dtype):
    heads = kv_heads * groups
    qkv, cos, sin = qkv_and_angles(batch, tokens, heads, kv_heads, width, dtype, torch.device("cpu"), batch)
    expected = stock_rotary(qkv, cos, sin, heads, kv_heads)
    for actual, wanted in zip(rope.rotary_qkv(qkv.clone(), cos, sin, heads, kv_heads, "triton"), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"^gate_up: given \(4, 7\)"):
        swiglu.swiglu(torch.randn(4, 7))
    with pytest.raises(ValueError, match="^gate_up: given .* torch.int64"):
        swiglu.swiglu(torch.ones(4, 8, dtype=torch.int64))
    qkv, cos, sin = qkv_and_angles(2, 5, 4, 2, 32, torch.float32, "cpu", 2)
    for wrong in ((qkv[..., 1:], cos, sin), (qkv, cos[:, 1:], sin[:, 1:]), (qkv, cos.half(), sin.half())):
        with pytest.raises(ValueError, match="^qkv, cos: given"):
            rope.rotary_qkv(*wrong, 4, 2)
