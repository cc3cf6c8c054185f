"""Which path is taken, the check of the first use, and what keeps several GPUs, streams and CUDA graphs apart."""

import ast
from pathlib import Path

import pytest
import torch
from qmedtune_kernels import NF4Weight, cross_entropy, dispatch, lora, matmul, nf4, rms_norm, rope, swiglu, tiles

CPU = torch.device("cpu")
SOURCES = Path(nf4.__file__).parent


@pytest.fixture
def fresh():
    """self_check answers once per device and process: forget it before and after."""
    for check in (dispatch.self_check, dispatch.asm_check):
        check.cache_clear()
    yield
    for check in (dispatch.self_check, dispatch.asm_check):
        check.cache_clear()


@pytest.fixture
def as_if_sm_90(monkeypatch, fresh):
    """The decisions of an H100 with verified assembly; the interpreter decodes without it."""
    plain = nf4.dequantize
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(nf4, "dequantize", lambda *a, path="auto", **o: plain(*a, path="gather", **o))


def weight(n=64, k=128) -> NF4Weight:
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8)
    return NF4Weight(packed, torch.rand(n * k // 64) + 0.1, 64, (n, k))


def test_the_first_use_compares_decode_and_both_products_to_the_bit(as_if_sm_90):
    assert dispatch.self_check(CPU) == "" and dispatch.asm_check(CPU) == ""
    assert dispatch.asm_trusted(CPU) and dispatch.describe(CPU)["dequantize"].startswith("triton shuffle")


def test_the_first_use_runs_every_kernel_on_flat_and_nested_scales(as_if_sm_90, monkeypatch):
    ran, nested = set(), set()
    launchers = ((rms_norm, "_launch_forward"), (rms_norm, "_launch_backward"), (swiglu, "_launch_forward"),
                 (swiglu, "_launch_backward"), (rope, "_launch"), (cross_entropy, "_launch"),
                 (matmul, "_launch_few_rows"), (matmul, "_launch"))  # fmt: skip
    for module, name in launchers:
        real, key = getattr(module, name), (module.__name__, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, key=key, **k: ran.add(key) or real(*a, **k))
    decode = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda w, *a, **k: nested.add(w.nested) or decode(w, *a, **k))
    assert dispatch.self_check(CPU) == "" and nested == {True, False}
    assert dispatch.asm_check(CPU) == "" and len(ran) == len(launchers)


def test_a_wrong_product_means_the_reference_path_by_name(as_if_sm_90, monkeypatch):
    right = matmul.matmul

    def wrong(x, weight, path):
        return right(x, weight, path=path) + (len(x) == 64) * torch.eye(64, dtype=torch.bfloat16)[: len(x)]

    monkeypatch.setattr(matmul, "matmul", wrong)
    differs = "64 elements of the fused matmul of 64 rows (flat) differ"
    assert dispatch.uses_triton(CPU)  # plain kernels are right
    assert not dispatch.asm_trusted(CPU) and dispatch.fused_rows(CPU, 4096, 4096) == 0
    found = dispatch.describe(CPU)
    assert found["matmul"].startswith("dequantise + cuBLAS") and differs in found["matmul"]
    assert found["dequantize"].startswith("triton gather: no inline assembly: ")


def test_a_wrong_plain_kernel_means_the_reference_path_by_name(as_if_sm_90, monkeypatch):
    right = rms_norm._launch_forward
    monkeypatch.setattr(rms_norm, "_launch_forward", lambda *a: (right(*a)[0] * 1.5, *right(*a)[1:]))
    assert not dispatch.uses_triton(CPU)
    assert dispatch.describe(CPU)["rms_norm"].startswith("reference: RMSNorm is off by 5.0e-01")
    with pytest.raises(ValueError, match="kernels: triton given, but RMSNorm is off by 5.0e-01; allowed here"):
        dispatch.uses_triton(CPU, "triton")


def test_a_card_that_cannot_run_the_first_kernel_says_so_and_takes_the_reference(as_if_sm_90, monkeypatch):
    def refused(*arguments):
        raise RuntimeError("Triton Error [CUDA]\nout of resource: shared memory, Required: 65536")

    monkeypatch.setattr(rms_norm, "_launch_forward", refused)
    why = "reference: the first kernel did not run (RuntimeError: out of resource: shared memory, Required: 65536)"
    assert set(dispatch.describe(CPU).values()) == {why}


def test_an_architecture_whose_tests_failed_gets_no_assembly(as_if_sm_90, monkeypatch):
    monkeypatch.setitem(dispatch.TABLE, "asm_refused", ["sm_90"])
    assert dispatch.dequantize_path(CPU, "auto") == "gather"
    assert "GPU tests of it failed on sm_90" in dispatch.describe(CPU)["matmul"]


def test_few_rows_without_a_gradient_take_bitsandbytes_until_it_is_beaten(as_if_sm_90, monkeypatch):
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    two = state.state2
    w = NF4Weight(packed, state.absmax, 64, (64, 128), two.code, two.absmax, state.offset)
    x = torch.randn(3, 128).bfloat16()
    assert matmul.choose(x, w, "auto", trains=False) == "bitsandbytes"
    expected = matmul.reference(x, w).float()
    for y in (matmul.matmul(x, w), lora.linear(x, (w,))):
        assert (y.float() - expected).norm() <= 4e-3 * expected.norm()
    assert matmul.choose(x, w, "auto") == "fused" and matmul.choose(x[:1].expand(9, -1), w, "auto", False) == "fused"
    monkeypatch.setitem(dispatch.TABLE, "beats_gemm_4bit", ["sm_90"])
    assert matmul.choose(x, w, "auto", trains=False) == "fused"


def test_what_trains_is_asked_with_the_gradient(as_if_sm_90, monkeypatch):
    asked = []
    real = matmul.choose
    monkeypatch.setattr(
        matmul, "choose", lambda x, w, path, trains=True: asked.append(trains) or real(x, w, "reference")
    )
    a, b = torch.randn(4, 128), torch.randn(64, 4).requires_grad_()
    with torch.no_grad():
        lora.linear(torch.randn(2, 128).bfloat16(), (weight(),), [lora.Adapter(a, b, 1.0)])
    assert set(asked) == {False}
    lora.linear(torch.randn(2, 128).bfloat16(), (weight(),), [lora.Adapter(a, b, 1.0)])
    assert asked[-1]


def test_split_k_gives_every_processor_two_programs():
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        for processors in (132, 128, 82, 108):
            t = tiles.tile(1, 64, True)
            count, steps = -(-n // t["BN"]), k // t["BK"]
            each = -(-steps // tiles.splits(count, steps, processors))
            assert count * -(-steps // each) >= 2 * processors, (n, k, processors)


def test_rows_of_a_widened_operand_start_on_128_bytes():
    for r in (16, 32, 48):
        wide, low_rank = lora._beside(torch.randn(3, 4096).bfloat16(), torch.randn(r, 4096).bfloat16())
        assert wide.stride(0) * wide.element_size() % 128 == 0 and low_rank.shape == (3, r)


def test_the_first_use_is_compared_with_bitsandbytes_where_it_is_imported(as_if_sm_90, monkeypatch):
    import bitsandbytes  # noqa: F401

    calls = []
    ours = nf4.dequantize_reference
    monkeypatch.setattr(nf4, "dequantize_reference", lambda w, dtype: calls.append(1) or ours(w, dtype) * 2)
    assert dispatch.self_check(CPU) == "" and dispatch.asm_check(CPU) == ""
    assert not calls  # our reference is wrong here, and nobody asked it


def test_fused_rows_come_from_the_nearest_measured_shape(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "asm_check", lambda device: "")
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
    assert len(found) == 9
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
