"""NF4 dequantisation to the bit against bitsandbytes' own, and the inline assembly against an emulation of it."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmedtune_kernels import NF4Weight, decode, nf4


def quantize(n: int, k: int, nested: bool, device="cpu", blocksize: int = 64, seed: int | None = None):
    """A fresh random weight, quantised by bitsandbytes: (NF4Weight, its quant state, its packed tensor)."""
    generator = torch.Generator().manual_seed(seed if seed is not None else torch.seed() % 2**32)
    w = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    packed, state = bnb.quantize_4bit(w.to(device), blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    two = state.state2
    weight = NF4Weight(
        packed, state.absmax, blocksize, (n, k),
        *((two.code, two.absmax, state.offset) if nested else ()),
    )  # fmt: skip
    return weight, packed, state


def bnb_dequantize(packed, state, dtype):
    """As one flat row: by rows, bitsandbytes 0.50.2's CPU kernel takes wrong scales when K % blocksize != 0."""
    shape, state.shape, state.dtype = state.shape, torch.Size([state.shape.numel()]), dtype
    flat = bnb.dequantize_4bit(packed, state)
    state.shape = shape
    return flat.reshape(shape)


HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(33, 192), (1, 4096), (7, 96), (3, 33), (1, 1)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reference_is_bit_equal_to_bitsandbytes(shape, nested, dtype):
    weight, packed, state = quantize(*shape, nested)
    assert torch.equal(nf4.dequantize_reference(weight, dtype), bnb_dequantize(packed, state, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_is_bit_equal_to_bitsandbytes(shape, nested, dtype, device):
    weight, packed, state = quantize(*shape, nested, device)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    nf4.dequantize(weight, dtype, out=out, path="gather")
    assert torch.equal(out, bnb_dequantize(packed, state, dtype))


@pytest.mark.parametrize("blocksize", [32, 128, 256, 512])
def test_other_block_sizes(blocksize, device):
    weight, packed, state = quantize(24, 512, True, device, blocksize)
    assert torch.equal(nf4.dequantize(weight, path="gather"), bnb_dequantize(packed, state, torch.bfloat16))


@pytest.mark.parametrize(("columns", "extra"), [(128, 32), (192, 1), (96, 8), (33, 7)])
def test_caller_buffer_with_row_stride_is_written_and_nothing_else(columns, extra, device):
    weight, packed, state = quantize(9, columns, True, device)
    buffer = torch.full((9, columns + extra), 7.0, dtype=torch.bfloat16, device=device)
    nf4.dequantize(weight, out=buffer[:, :columns], path="gather")
    assert torch.equal(buffer[:, :columns], bnb_dequantize(packed, state, torch.bfloat16))
    assert (buffer[:, columns:] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (64, 128), (33, 192)])
def test_shuffle_decode_is_bit_equal_on_the_gpu(shape, dtype, nested):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sm_80")
    weight, packed, state = quantize(*shape, nested, "cuda")
    out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    nf4.dequantize(weight, dtype, out=out, path="shuffle")
    assert torch.equal(out, bnb_dequantize(packed, state, dtype))


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 40), k=st.integers(1, 300), nested=st.booleans(), extra=st.integers(0, 9),
    blocksize=st.sampled_from([32, 64, 128]), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_any_shape_and_stride(n, k, nested, extra, blocksize, dtype):
    weight, packed, state = quantize(n, k, nested, HERE, blocksize)
    buffer = torch.full((n, k + extra), 7.0, dtype=dtype, device=HERE)
    nf4.dequantize(weight, dtype, out=buffer[:, :k], path="gather")
    assert torch.equal(buffer[:, :k], bnb_dequantize(packed, state, dtype))
    assert (buffer[:, k:] == 7.0).all()


def test_stack_reuses_one_scratch_buffer():
    weights = tuple(quantize(n, 128, True)[0] for n in (8, 4, 4))
    first = nf4.dequantize_stack(weights, torch.bfloat16)
    expected = torch.cat([nf4.dequantize_reference(weight, torch.bfloat16) for weight in weights])
    assert torch.equal(first, expected)
    assert nf4.dequantize_stack(weights[:1], torch.bfloat16).data_ptr() == first.data_ptr()


def test_saved_checkpoint_tensors_give_the_same_bits():
    """The tensors a bitsandbytes state dict holds (absmax, nested_absmax, ...) are enough to rebuild the weight."""
    _, packed, state = quantize(16, 128, True)
    saved = state.as_dict(packed=True)
    meta = next(value for key, value in saved.items() if "bitsandbytes__nf4" in key)
    import json

    offset = json.loads(bytes(meta.tolist()))["nested_offset"]
    weight = NF4Weight(
        packed, saved["absmax"], 64, (16, 128), saved["nested_quant_map"], saved["nested_absmax"], torch.tensor(offset)
    )
    assert torch.equal(nf4.dequantize_reference(weight, torch.float16), bnb_dequantize(packed, state, torch.float16))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"blocksize": 48}, "blocksize"),
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, "packed"),
        ({"absmax": torch.zeros(4, dtype=torch.float64)}, "absmax"),
        ({"offset": None}, "offset"),
        ({"code2": torch.zeros(255)}, "code2"),
        ({"shape": (16, 999)}, "packed"),
    ],
)
def test_bad_tensors_are_named(change, name):
    from dataclasses import replace

    weight, *_ = quantize(16, 128, True)
    with pytest.raises(ValueError, match=rf"^{name}: given .*; allowed "):
        nf4.dequantize(replace(weight, **change))


@pytest.mark.parametrize(
    "out", [torch.empty(16, 127), torch.empty(16, 128, dtype=torch.float16), torch.empty(128, 16).t()]
)
def test_bad_output_buffers_are_refused(out):
    weight, *_ = quantize(16, 128, True)
    with pytest.raises(ValueError, match="^out: given"):
        nf4.dequantize(weight, torch.float32, out=out)


def test_bad_path_and_cpu_assembly_are_refused():
    weight, *_ = quantize(16, 128, True)
    with pytest.raises(ValueError, match="kernels: given 'fastest'"):
        nf4.dequantize(weight, path="fastest")
    with pytest.raises(ValueError, match="path: shuffle given for device cpu"):
        nf4.dequantize(weight, path="shuffle")


def test_cpu_tensors_to_a_compiled_kernel_are_refused(monkeypatch):
    from qmedtune_kernels import dispatch

    monkeypatch.setattr(dispatch, "INTERPRET", False)
    weight, *_ = quantize(16, 128, True)
    with pytest.raises(ValueError, match="gather given for device cpu; it needs Triton and an NVIDIA GPU of sm_75"):
        nf4.dequantize(weight, path="gather")
    with pytest.raises(ValueError, match="kernels: triton given for device cpu"):
        nf4.dequantize(weight, path="triton")


# --------------------------------------------------------------------- emulation of the inline assembly


def emulate(asm: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the PTX of decode.py on arrays of uint32 (fp32 by bit pattern): one element per simulated thread."""
    r = dict(registers)

    def value(operand: str) -> np.ndarray:
        operand = operand.strip()
        if operand in r:
            return r[operand]
        return np.full_like(registers["$4"], int(operand, 0))

    def prmt(a, b, selector):
        source = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        out = np.zeros_like(a)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            shift = np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)
            byte = (source >> shift).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & 128, 255, 0).astype(np.uint32)
            out |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return out

    def rn16(x: np.ndarray, kind: str) -> np.ndarray:
        return bits16(x.view(np.float32), torch.bfloat16 if kind == "bf16" else torch.float16).astype(np.uint32)

    statements = asm.strip("{} ").split(";")
    for statement in (s.strip() for s in statements):
        if not statement or statement.startswith(".reg"):
            continue
        op, operands = statement.split(None, 1)
        d, *args = [part.strip() for part in operands.split(",")]
        match op.split("."):
            case ["and", _]:
                r[d] = value(args[0]) & value(args[1])
            case ["shr", _]:
                r[d] = value(args[0]) >> value(args[1])
            case ["lop3", _]:
                assert args[3] == "0xEA"  # (a & b) | c
                r[d] = (value(args[0]) & value(args[1])) | value(args[2])
            case ["prmt", _]:
                r[d] = prmt(*(value(arg) for arg in args))
            case ["mov", _]:
                r[d] = value(args[0])
            case ["setp", "ne", _]:
                r[d] = value(args[0]) != value(args[1])
            case ["selp", _]:
                r[d] = np.where(r[args[2]], value(args[0]), value(args[1]))
            case ["mul", "wide", _]:
                r[d] = value(args[0]) * np.uint32(int(args[1]))
            case ["add", "s64"]:
                r[d] = value(args[0]) + value(args[1])
            case ["ld", "global", "nc", "f32"]:  # the table lies at address 0
                r[d] = np.array(nf4.CODE, np.float32).view(np.uint32)[r[args[0].strip("[]")] // 4]
            case ["shfl", "sync", "idx", _]:
                lane = value(args[1]) & np.uint32(31)  # source lane; every 32 threads form a warp
                r[d] = value(args[0]).reshape(-1, 32)[np.arange(len(lane)) // 32, lane]
            case ["mul", "rn", "f32"]:
                r[d] = (value(args[0]).view(np.float32) * value(args[1]).view(np.float32)).view(np.uint32)
            case ["cvt", "rn", kind, "f32"]:
                high, low = (rn16(value(arg), kind.removesuffix("x2")) for arg in args)
                r[d] = (high << np.uint32(16)) | low
            case _:
                raise AssertionError(f"not emulated: {statement}")
    return r


def bits16(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)


def words(count: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)


def lanes(w: np.ndarray) -> np.ndarray:
    return np.arange(len(w), dtype=np.uint32) % 32


def nibbles(w: np.ndarray) -> np.ndarray:
    """[words, 8]: element order is byte by byte, high nibble first."""
    byte = (w[:, None] >> (8 * np.arange(4, dtype=np.uint32))) & 255
    return np.stack((byte >> 4, byte & 15), axis=2).reshape(len(w), 8)


def outputs(r: dict[str, np.ndarray]) -> np.ndarray:
    """The 16-bit halves of $0..$3, low half first: [words, 8]."""
    return np.stack([half for i in range(4) for half in (r[f"${i}"] & 0xFFFF, r[f"${i}"] >> 16)], axis=1)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_prmt_assembly_decodes_every_nibble(kind, dtype):
    w = words(20_000)
    expected = bits16(np.array(nf4.CODE, np.float32), dtype)[nibbles(w)]
    assert (outputs(emulate(decode.prmt_asm(kind), {"$4": w})) == expected).all()


@pytest.mark.parametrize("address", ["$6", ""])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_shuffle_assembly_gives_the_rounded_product(kind, dtype, address):
    w = words(32 * 600)
    scale = np.random.default_rng().random(len(w), dtype=np.float32) * 3
    registers = {"$4": w, "$5": scale.view(np.uint32), "$6": np.zeros_like(w), "%laneid": lanes(w)}
    product = np.array(nf4.CODE, np.float32)[nibbles(w)] * scale[:, None]
    assert (outputs(emulate(decode.shuffle_asm(kind, address=address), registers)) == bits16(product, dtype)).all()


@pytest.mark.parametrize("address", ["$9", ""])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_shuffle_assembly_multiplies_each_byte_by_its_own_scale(kind, dtype, address):
    w = words(32 * 600)
    scale = np.random.default_rng().random((len(w), 4), dtype=np.float32) * 3
    registers = {f"${5 + byte}": scale[:, byte].copy().view(np.uint32) for byte in range(4)}
    registers |= {"$4": w, "$9": np.zeros_like(w), "%laneid": lanes(w)}
    product = np.array(nf4.CODE, np.float32)[nibbles(w)] * scale.repeat(2, axis=1)
    result = outputs(emulate(decode.shuffle_asm(kind, by_byte=True, address=address), registers))
    assert (result == bits16(product, dtype)).all()


def test_a_kernel_that_does_not_compile_means_the_reference_path_by_name(monkeypatch):
    from qmedtune_kernels import dispatch

    def broken(*args, **kwargs):
        raise RuntimeError("ptxas fatal: Unsupported .version\nPTX JIT failed")

    device = torch.device("cpu")
    monkeypatch.setattr(nf4, "dequantize", broken)
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    dispatch.self_check.cache_clear()
    try:
        assert not dispatch.uses_triton(device)
        told = dispatch.describe(device)["lora"]
    finally:
        dispatch.self_check.cache_clear()
    assert told == "reference: the first kernel did not run (RuntimeError: PTX JIT failed)"
