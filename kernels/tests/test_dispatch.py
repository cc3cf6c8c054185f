"""Which path is taken, the check of the first use, and what keeps several GPUs, streams and CUDA graphs apart."""

import ast
from pathlib import Path

import pytest
import torch
from qmedtune_kernels import NF4Weight, dispatch, lora, matmul, nf4, rms_norm

CPU = torch.device("cpu")
SOURCES = Path(nf4.__file__).parent


@pytest.fixture
def fresh():
    """self_check answers once per device and process: forget it before and after."""
    dispatch.self_check.cache_clear()
    yield
    dispatch.self_check.cache_clear()


@pytest.fixture
def as_if_sm_90(monkeypatch, fresh):
    """The decisions of an H100 with verified assembly; the interpreter decodes without it."""
    plain = nf4.dequantize
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "asm_verified", lambda device: True)
    monkeypatch.setattr(nf4, "dequantize", lambda *a, path="auto", **o: plain(*a, path="gather", **o))


def weight(n=64, k=128) -> NF4Weight:
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8)
    return NF4Weight(packed, torch.rand(n * k // 64) + 0.1, 64, (n, k))


def test_the_first_use_compares_decode_and_both_products_to_the_bit(as_if_sm_90):
    assert dispatch.self_check(CPU) == ""


def test_a_wrong_product_means_the_reference_path_by_name(as_if_sm_90, monkeypatch):
    right = matmul.matmul

    def wrong(x, weight, path):
        return right(x, weight, path=path) + (len(x) == 64) * torch.eye(64, dtype=torch.bfloat16)[: len(x)]

    monkeypatch.setattr(matmul, "matmul", wrong)
    assert not dispatch.uses_triton(CPU)
    assert dispatch.describe(CPU)["matmul"] == "reference: 64 elements of the fused matmul of 64 rows differ"
    with pytest.raises(
        ValueError, match="kernels: triton given, but 64 elements of the fused matmul of 64 rows differ; allowed"
    ):
        dispatch.uses_triton(CPU, "triton")


def test_the_first_use_is_compared_with_bitsandbytes_where_it_is_imported(as_if_sm_90, monkeypatch):
    import bitsandbytes  # noqa: F401

    calls = []
    ours = nf4.dequantize_reference
    monkeypatch.setattr(nf4, "dequantize_reference", lambda w, dtype: calls.append(1) or ours(w, dtype) * 2)
    assert dispatch.self_check(CPU) == "" and calls  # our reference is wrong here, and nobody asked it


def test_fused_rows_come_from_the_nearest_measured_shape(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "asm_verified", lambda device: True)
    table = {"sm_90": [[4096, 4096, 16], [14336, 4096, 128], [4096, 14336, 8]], "default": [[1, 1, 1]]}
    monkeypatch.setitem(dispatch.TABLE, "fused_rows", table)
    assert dispatch.fused_rows(CPU, 4096, 4096) == 16 and dispatch.fused_rows(CPU, 28672, 8192) == 128
    assert dispatch.fused_rows(CPU, 8192, 28672) == 8
    monkeypatch.setattr(dispatch, "self_check", lambda device: "")
    assert dispatch.describe(CPU)["matmul"].startswith("fused up to 8 to 128 (by shape) rows, then dequantise")
    monkeypatch.setattr(dispatch, "capability", lambda device: 121)
    assert dispatch.fused_rows(CPU, 4096, 4096) == 1


def test_an_empty_batch_on_a_card_without_tensor_cores(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device: 75)
    monkeypatch.setattr(dispatch, "self_check", lambda device: "")
    assert matmul.choose(torch.empty(0, 128).half(), weight(), "auto") == "dequantize"
    assert matmul.choose(torch.empty(4, 128).half(), weight(), "auto") == "few_rows"
    assert matmul.matmul(torch.empty(0, 128).half(), weight(), path="few_rows").shape == (0, 64)


def launchers(tree: ast.Module):
    """Functions that launch a kernel: kernel[grid](...)."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            if any(isinstance(called, ast.Subscript) and isinstance(called.value, ast.Name) for called in calls):
                yield function


def test_every_launch_is_on_the_device_of_its_tensors():
    found = {}
    for file in SOURCES.glob("*.py"):
        for function in launchers(ast.parse(file.read_text())):
            found[file.name, function.name] = [ast.unparse(mark) for mark in function.decorator_list]
    assert len(found) == 8
    assert all(marks == ["dispatch.on_its_device"] for marks in found.values()), found


def test_a_launch_makes_its_tensors_device_current(monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device", Current)

    class OnSecond(torch.Tensor):
        device = torch.device("cuda", 1)

    launch = dispatch.on_its_device(lambda first, tensor, scale: (first, scale))
    assert launch("out", torch.ones(2).as_subclass(OnSecond), scale=3) == ("out", 3)
    assert entered == [torch.device("cuda", 1)]


def test_scratch_is_kept_apart_by_stream_and_outlives_a_captured_graph(monkeypatch):
    class Stream:
        cuda_stream = 7

    real, empty = torch.device("cpu"), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, device=real, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(nf4, "_SCRATCH", {})
    monkeypatch.setattr(nf4, "_CAPTURED", {})
    gpu = torch.device("cuda", 0)
    captured = nf4.scratch(gpu, torch.float16, 100)
    Stream.cuda_stream = 8
    other = nf4.scratch(gpu, torch.float16, 100)
    assert other.data_ptr() != captured.data_ptr()
    Stream.cuda_stream = 7
    assert nf4.scratch(gpu, torch.float16, 50).data_ptr() == captured.data_ptr()
    grown = nf4.scratch(gpu, torch.float16, 200)
    assert captured.data_ptr() in nf4._CAPTURED and grown.data_ptr() != captured.data_ptr()


def test_the_first_use_inside_a_graph_capture_is_refused(monkeypatch, fresh):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="first use on cuda:0 came during a CUDA graph capture"):
        dispatch.self_check(torch.device("cuda", 0))


def test_vectors_with_a_stride_are_read_by_it(device):
    w, x = weight(), torch.randn(5, 128).half()
    w = NF4Weight(w.packed.to(device), w.absmax.to(device), 64, w.shape)
    bias = torch.randn(64, 2, device=device).half()[:, 0]
    x = x.to(device)
    assert torch.equal(matmul.matmul(x, w, bias, "fused"), matmul.matmul(x, w, bias.clone(), "fused"))
    scale = torch.rand(128, 3, device=device).half()[:, 1]
    expected = rms_norm.rms_norm(x, scale.clone(), 1e-5, "triton")
    assert torch.equal(rms_norm.rms_norm(x, scale, 1e-5, "triton"), expected)


def test_a_product_that_would_lose_its_gradient_is_refused():
    with pytest.raises(ValueError, match="^x: given with requires_grad; .* lora.linear"):
        matmul.matmul(torch.randn(2, 128, requires_grad=True), weight())
    with torch.no_grad():
        matmul.matmul(torch.randn(2, 128, requires_grad=True), weight())


@pytest.mark.parametrize(
    ("weight", "adapters", "bias", "message"),
    [
        (torch.empty(48, 32, device="meta"), (), None, "^weight: given .* on meta; allowed .* on cpu"),
        (None, (), None, "^weight: given none"),
        ((), (), None, "^weight: given none"),
        (torch.zeros(48, 32), (lora.Adapter(torch.zeros(4, 32), torch.zeros(48, 4, device="meta"), 1.0),), None, "^ad"),
        (torch.zeros(48, 32), (lora.Adapter(torch.zeros(4, 32), torch.zeros(48, 4), 1.0, -1),), None, "^adapters: "),
        (torch.zeros(48, 32), (), torch.zeros(48, device="meta"), "^bias: given .* on meta"),
    ],
)
def test_devices_and_missing_parts_are_named(weight, adapters, bias, message):
    with pytest.raises(ValueError, match=message):
        lora.linear(torch.zeros(2, 32), weight, adapters, bias)


def test_dtypes_that_no_kernel_has_are_named():
    with pytest.raises(ValueError, match="^x: given torch.float64; allowed"):
        lora.linear(torch.zeros(2, 32).double(), torch.zeros(4, 32).double())
    with pytest.raises(ValueError, match="^dtype: given torch.float64; allowed"):
        nf4.dequantize(weight(), torch.float64)
    with pytest.raises(ValueError, match="^out: given .* rows apart"):
        nf4.dequantize(weight(), torch.float16, out=torch.zeros(1, 128).half().expand(64, 128))
    with pytest.raises(ValueError, match="^residual: given .* on meta"):
        rms_norm.add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 8, device="meta"), torch.ones(8), 1e-5)
