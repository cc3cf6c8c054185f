"""The fused dequantise-matmul, forward and backward, against float64 products of the unrounded NF4 weight."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmedtune_kernels import nf4, tiles
from qmedtune_kernels.matmul import _aligned, matmul, matmul_backward, reference

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}


def quantize(n, k, nested, device, blocksize=64):
    import bitsandbytes.functional as bnb

    w = torch.randn(n, k, device=device) * torch.rand(n, 1, device=device)
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    two = state.state2
    return nf4.NF4Weight(
        packed, state.absmax, blocksize, (n, k), *((two.code, two.absmax, state.offset) if nested else ())
    )


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm()) if expected.numel() else 0.0


# The limit is on ||out - ref|| / ||ref|| over at least this many outputs. Over the 8 outputs of M = 1, N = 8, K = 64 it
# says little, because a sum can cancel: with W rounded to bf16 once (as bitsandbytes dequantises) and then multiplied
# exactly, 6.7 % of 64,000 random draws exceed 4e-3 (at most 1.8e-2); over 32 outputs .3 % of 16,000, over 256 none of
# 2,000 (at most 3.0e-3). So small shapes are drawn again until there are enough outputs; the limit is the same.
OUTPUTS = 256


def check(m, n, k, dtype, nested, device, path="fused", blocksize=64, bias=True):
    draws = -(-OUTPUTS // (m * n)) if m else 1
    pairs = [_draw(m, n, k, dtype, nested, device, path, blocksize, bias) for _ in range(draws)]
    for outputs in zip(*pairs, strict=True):  # Y of every draw, then dX
        actual, expected = (torch.stack(part) for part in zip(*outputs, strict=True))
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


def _draw(m, n, k, dtype, nested, device, path, blocksize, bias):
    """((Y, its float64 reference), (dX, its reference)) of a fresh weight and fresh inputs."""
    weight = quantize(n, k, nested, device, blocksize)
    exact = nf4.dequantize_reference(weight, torch.float32).double()
    x, dy = torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    b = torch.randn(n, device=device).to(dtype) if bias else None
    y, dx = matmul(x, weight, b, path), matmul_backward(dy, weight, path)
    assert y.shape == (m, n) and dx.shape == (m, k) and y.dtype == dx.dtype == dtype
    return (y, x.double() @ exact.t() + (b.double() if bias else 0.0)), (dx, dy.double() @ exact)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 130, 64), (9, 128, 256), (33, 72, 192), (0, 64, 64)])
def test_against_float64(m, n, k, dtype, device):
    check(m, n, k, dtype, True, device)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_flat_scales_and_other_block_sizes(blocksize, device):
    check(5, 64, 256, torch.float16, False, device, blocksize=blocksize)


@pytest.mark.parametrize("path", ["reference", "dequantize"])
def test_the_other_paths(path, device):
    check(7, 40, 96, torch.float16, True, device, path)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_without_tensor_cores(m, dtype, device):
    check(m, 50, 512, dtype, m % 2 == 0, device, "few_rows")


def test_few_rows_refuses_more_rows():
    with pytest.raises(ValueError, match="given 5 rows"):
        matmul(torch.randn(5, 64), quantize(8, 64, True, "cpu"), path="few_rows")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 16, 17, 64, 128, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (4096, 14336), (14336, 4096), (200, 320)])
def test_real_shapes(m, n, k, dtype):
    check(m, n, k, dtype, True, torch.device("cuda"), bias=m % 2 == 0)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.integers(0, 40), n=st.integers(8, 200), k=st.integers(1, 6).map(lambda i: 64 * i), nested=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(m, n, k, nested, dtype, bias):
    check(m, n, k, dtype, nested, HERE, bias=bias)


def _poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def test_split_k_is_deterministic_and_covers_poisoned_memory(device, monkeypatch):
    weight = quantize(64, 2048, True, device)
    x = torch.randn(3, 2048, device=device).half()
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **options: _poison(empty(*size, **options)))
    first = matmul(x, weight, path="fused")
    assert tiles.splits(1, 32, 4) > 1, "this shape must be split"
    assert not first.isnan().any()
    assert torch.equal(first, matmul(x, weight, path="fused"))


def test_splits_cover_the_contraction_once():
    for count in (1, 5, 32, 300):
        for steps in (1, 3, 4, 64, 224):
            ways = tiles.splits(count, steps, 132)
            per_split = -(-steps // ways)
            assert 1 <= ways <= tiles.MOST_SPLITS and ways * per_split >= steps


def test_strided_input(device):
    weight = quantize(64, 128, True, device)
    x = torch.randn(6, 160, device=device).half()
    assert torch.equal(matmul(x[:, :128], weight, path="fused"), matmul(x[:, :128].contiguous(), weight, path="fused"))
    wide = torch.randn(128, 6, device=device).half().t()
    assert torch.equal(matmul(wide, weight, path="fused"), matmul(wide.contiguous(), weight, path="fused"))


@pytest.mark.parametrize("first", [1, 3])
def test_rows_that_start_anywhere(first, device):
    weight = quantize(72, 128, True, device)
    for columns, product in ((128, lambda x: matmul(x, weight, path="fused")),
                             (72, lambda dy: matmul_backward(dy, weight, "fused"))):  # fmt: skip
        apart = torch.randn(6 * 161, device=device).half()[first:]
        for rows in (apart[: 6 * columns].view(6, columns), apart[: 6 * 160].view(6, 160)[:, :columns]):
            assert torch.equal(product(rows), product(rows.clone()))
            assert _aligned(rows).data_ptr() % 16 == 0 and _aligned(rows).stride() == (columns, 1)
    whole = torch.randn(6, 160, device=device).half()
    assert _aligned(whole[:, :128]).data_ptr() == whole.data_ptr()  # nothing to gain: no copy


def test_more_rows_than_a_grid_has_are_refused():
    weight = quantize(8, 64, True, "cpu")
    for columns, name, product in ((64, "x", matmul), (8, "dy", matmul_backward)):
        rows = torch.zeros(1, columns, dtype=torch.half).expand(65535 * 64 + 1, columns)
        with pytest.raises(ValueError, match=f"^{name}: given 4194241 rows; the fused path allows 4194240"):
            product(rows, weight, path="fused")


def test_auto_on_the_cpu_is_the_reference():
    weight = quantize(64, 128, True, "cpu")
    x = torch.randn(6, 128)
    assert torch.equal(matmul(x, weight), reference(x, weight))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 127), "x: given"),
        (torch.randn(2, 128).double(), "x: given"),
        (torch.randn(128), "x: given"),
        (torch.randn(2, 128, device="meta"), "x: given"),
    ],
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        matmul(x, quantize(64, 128, True, "cpu"))


def test_rows_that_start_inside_a_block_are_refused_by_the_fused_path():
    with pytest.raises(ValueError, match="weight: given K = 96 .* use path='dequantize'"):
        matmul(torch.randn(2, 96), quantize(64, 96, True, "cpu"), path="fused")
    with pytest.raises(ValueError, match="bias: given"):
        matmul(torch.randn(2, 128), quantize(64, 128, True, "cpu"), torch.zeros(63))


def test_kernels_folder_is_not_a_python_package():
    root = Path(__file__).parents[1]
    assert not (root / "__init__.py").exists() and not (root / "tests" / "__init__.py").exists()
