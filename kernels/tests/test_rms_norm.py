"""RMSNorm and add + RMSNorm: transformers' rounding, float64 gradients, one compiled kernel for every row count."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmedtune_kernels import layers
from qmedtune_kernels.rms_norm import add_rms_norm, rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}
PATHS = ["reference", "triton"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected.double()).norm() / expected.double().norm())


def exact(x, residual, weight, eps, dy, ds):
    """float64 gradients of the unrounded formula: (y, dx, dweight)."""
    total = (x.double() if residual is None else x.double() + residual.double()).requires_grad_()
    weight = weight.double().requires_grad_()
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight
    loss = (y * dy.double()).sum() + (0 if ds is None else (total * ds.double()).sum())
    return (y.detach(), *torch.autograd.grad(loss, (total, weight)))


def draw(shape, dtype, device, count):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 100), (1, 257)])
def test_forward_and_backward(shape, dtype, path, device):
    x, dy = draw(shape, dtype, device, 2)
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    x.requires_grad_()
    y = rms_norm(x, weight, 1e-5, path)
    y.backward(dy)
    expected = exact(x.detach(), None, weight.detach(), 1e-5, dy, None)
    for actual, wanted in zip((y, x.grad, weight.grad), expected, strict=True):
        assert relative_error(actual, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_add_forward_and_backward(dtype, path, device):
    x, residual, dy, ds = draw((3, 5, 96), dtype, device, 4)
    weight = (1 + 0.1 * torch.randn(96, device=device)).to(dtype)
    x.requires_grad_()
    residual.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, 1e-5, path)
    assert torch.equal(total, x + residual)
    torch.autograd.backward((y, total), (dy, ds))
    wanted_y, wanted_dx, _ = exact(x.detach(), residual.detach(), weight, 1e-5, dy, ds)
    assert relative_error(y, wanted_y) <= TOLERANCE[dtype]
    assert relative_error(x.grad, wanted_dx) <= TOLERANCE[dtype]
    assert torch.equal(x.grad, residual.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("used", ["the norm", "the sum"])
def test_only_one_result_of_add_is_used(used, path, device):
    """Behind the last layer nobody else reads the sum."""
    x, residual, dy = draw((3, 5, 96), torch.bfloat16, device, 3)
    weight = (1 + 0.1 * torch.randn(96, device=device)).bfloat16().requires_grad_()
    x.requires_grad_()
    residual.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, 1e-5, path)
    if used == "the sum":
        total.backward(dy)
        assert torch.equal(x.grad, dy) and torch.equal(residual.grad, dy) and weight.grad is None
        return
    y.backward(dy)
    _, wanted_dx, wanted_dw = exact(x.detach(), residual.detach(), weight.detach(), 1e-5, dy, None)
    assert relative_error(x.grad, wanted_dx) <= 4e-3 and relative_error(weight.grad, wanted_dw) <= 4e-3
    assert torch.equal(x.grad, residual.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_transformers(dtype, path, device):
    module = LlamaRMSNorm(128, 1e-5).to(device, dtype)
    torch.nn.init.normal_(module.weight, 1, 0.1)
    (x,) = draw((16, 128), dtype, device, 1)
    ours, theirs = rms_norm(x, module.weight, 1e-5, path), module(x)
    assert (ours != theirs).float().mean() <= 0.01  # an ulp apart where rsqrt is


@pytest.mark.parametrize("path", PATHS)
def test_weight_of_another_dtype(path, device):
    x = torch.randn(4, 64, device=device).to(torch.bfloat16)
    weight = torch.rand(64, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, path), rms_norm(x, weight.bfloat16(), 1e-5, path))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path, device):
    x = torch.empty(0, 64, device=device, requires_grad=True)
    y = rms_norm(x, torch.ones(64, device=device), 1e-5, path)
    y.sum().backward()
    assert y.shape == (0, 64) and x.grad.shape == (0, 64)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(1, 9), columns=st.integers(16, 600), dtype=st.sampled_from(list(TOLERANCE)))
def test_any_shape(rows, columns, dtype):
    test_forward_and_backward((rows, columns), dtype, "triton", HERE)


def test_hub_layer_is_a_pure_forward():
    module = LlamaRMSNorm(64, 1e-5)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layers.RMSNorm.forward(module, x), module(x))
    assert set(vars(layers.RMSNorm)) & {"__init__", "forward"} == {"forward"}


@pytest.mark.gpu
def test_row_count_does_not_recompile():
    from qmedtune_kernels import rms_norm as module

    def compiled() -> int:
        return sum(len(cache[0]) for cache in module._forward.device_caches.values())

    weight = torch.ones(256, device="cuda")
    x = torch.randn(4096, 256, device="cuda")
    add_rms_norm(x, x, weight, 1e-5, "triton")
    before = compiled()  # of the whole process: other tests' dtypes and widths are among them
    for rows in (1, 7, 16):
        add_rms_norm(x[:rows], x[:rows], weight, 1e-5, "triton")
    assert compiled() == before


def test_misfits_are_named():
    with pytest.raises(ValueError, match="x, weight: given"):
        rms_norm(torch.randn(2, 8), torch.ones(9), 1e-5)
    with pytest.raises(ValueError, match="x, weight: given"):
        rms_norm(torch.ones(2, 8, dtype=torch.int32), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="residual: given"):
        add_rms_norm(torch.randn(2, 8), torch.randn(2, 9), torch.ones(8), 1e-5)
