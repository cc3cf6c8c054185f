"""NF4 weights as bitsandbytes stores them, and their dequantisation.

Storage: W [N, K] is flattened row by row; byte j holds code[2j] in its high and code[2j + 1]
in its low nibble; one scale (absmax) per `blocksize` elements of the flat tensor, itself either fp32 or, "nested",
an 8-bit index into code2 with one fp32 scale per 256 blocks and one offset.
Deliberately not here: quantisation (bitsandbytes does it), FP4, other nested block sizes than 256.
"""

# Triton's annotations type kernels as plain functions of tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from . import dispatch
from .decode import INTERPRET, WORDS_BF16, WORDS_FP16, block_scale, cast
from .language import tl, triton

# QLoRA (Dettmers et al. 2023), appendix E; the fp32 values of bitsandbytes.functional.get_4bit_type("nf4")
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCKSIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class NF4Weight:
    """One quantised matrix W [N, K].

    packed: uint8, ceil(N K / 2) elements in any shape. absmax: fp32 [blocks], or uint8 [blocks] when nested, with
    code2 fp32 [256], absmax2 fp32 [ceil(blocks / 256)] and offset fp32 []. blocksize: a power of two from 32 to 4096.
    """

    packed: Tensor
    absmax: Tensor
    blocksize: int
    shape: tuple[int, int]
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.code2 is not None

    @cached_property
    def checked(self) -> bool:
        """True; ValueError on tensors that do not fit together. Looked at once: a training step asks per product."""
        check(self)
        return True


def scales_reference(weight: NF4Weight) -> Tensor:
    """absmax as fp32 [blocks]: product, then sum, each rounded once, as bitsandbytes does."""
    if weight.code2 is None or weight.absmax2 is None or weight.offset is None:
        return weight.absmax
    codes = weight.code2[weight.absmax.long()]
    outer = weight.absmax2.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return codes * outer + weight.offset


def dequantize_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`: fp32 code times fp32 scale, rounded once."""
    count = weight.shape[0] * weight.shape[1]
    packed = weight.packed.reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    code = torch.tensor(CODE, dtype=torch.float32, device=packed.device)
    scales = scales_reference(weight).repeat_interleave(weight.blocksize)[:count]
    return (code[nibbles.long()] * scales).to(dtype).reshape(weight.shape)


def dequantize(
    weight: NF4Weight, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None, path: str = "auto"
) -> Tensor:
    """W [N, K] in bf16, fp16 or fp32, bit-equal to bitsandbytes' `dequantize_4bit`, in one launch.

    out: a caller's buffer [N, K] of `dtype` with unit column stride and any row stride. path: "auto" (dispatch.py),
    "reference", or a decode of decode.py: "shuffle", "gather". Raises ValueError on tensors that do not fit together.
    """
    assert weight.checked
    device = weight.packed.device
    _require(dtype in DTYPES, "dtype", dtype, "torch.bfloat16, torch.float16 or torch.float32")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    n, k = weight.shape
    fits = tuple(out.shape) == (n, k) and out.dtype == dtype and out.device == device
    _require(
        fits and out.stride(1) == 1 and (n <= 1 or out.stride(0) >= k), "out",
        f"{tuple(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}",
        f"{(n, k)} {dtype} on {device} with column stride 1 and rows apart",
    )  # fmt: skip
    path = dispatch.dequantize_path(device, path)
    if path == "reference":
        return out.copy_(dequantize_reference(weight, dtype))
    if out.numel():
        _launch(weight, out, path)
    return out


def check(weight: NF4Weight) -> None:
    """Raise ValueError, naming argument, given and allowed, unless the tensors describe one W [N, K]."""
    count = weight.shape[0] * weight.shape[1]
    size = weight.blocksize
    _require(32 <= size <= 4096 and size & (size - 1) == 0, "blocksize", size, "a power of two from 32 to 4096")
    blocks = -(-count // size)
    wanted = [("packed", weight.packed, torch.uint8, -(-count // 2))]
    if weight.code2 is None:
        wanted.append(("absmax", weight.absmax, torch.float32, blocks))
    else:
        wanted.append(("absmax", weight.absmax, torch.uint8, blocks))
        wanted.append(("code2", weight.code2, torch.float32, 256))
        wanted.append(("absmax2", weight.absmax2, torch.float32, -(-blocks // NESTED_BLOCKSIZE)))
        wanted.append(("offset", weight.offset, torch.float32, 1))
    for name, tensor, dtype, numel in wanted:
        given = "None" if tensor is None else f"{tensor.numel()} x {tensor.dtype} on {tensor.device}"
        fits = tensor is not None and tensor.dtype == dtype and tensor.numel() == numel and tensor.is_contiguous()
        _require(
            fits and tensor.device == weight.packed.device, name, given,
            f"{numel} x {dtype}, contiguous, on {weight.packed.device} for W {list(weight.shape)}",
        )  # fmt: skip


def _require(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}: given {given}; allowed {allowed}")


def dequantize_stack(
    weights: tuple[NF4Weight, ...], dtype: torch.dtype, path: str = "auto", below: int = 0, beside: int = 0
) -> Tensor:
    """The weights below each other, [sum N + below, K + beside], in a scratch buffer per stream that the next call
    overwrites. The extra rows and columns are left for the caller to fill."""
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    size = (rows + below, columns + beside)
    stacked = scratch(weights[0].packed.device, dtype, size[0] * size[1]).view(size)
    start = 0
    for weight in weights:
        dequantize(weight, dtype, out=stacked[start : start + weight.shape[0], :columns], path=path)
        start += weight.shape[0]
    return stacked


_SCRATCH: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
_CAPTURED: dict[int, Tensor] = {}


def scratch(device: torch.device, dtype: torch.dtype, numel: int) -> Tensor:
    """A flat buffer that grows to the largest weight and is reused, so a training step allocates none of it.

    One for each CUDA stream, whose order keeps one product's W apart from the next one's; two threads must not share a
    stream. What a CUDA graph has captured stays allocated: its replays write there whatever happens here later.
    """
    on_gpu = device.type == "cuda"
    key = device, dtype, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    buffer = _SCRATCH.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = _SCRATCH[key] = torch.empty(numel, dtype=dtype, device=device)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _CAPTURED[buffer.data_ptr()] = buffer
    return buffer[:numel]


@cache
def code_table(device: torch.device) -> Tensor:
    """CODE as fp32 [16] on the device."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def scale_arguments(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, code2, absmax2, offset for a kernel; unread pointers repeat absmax when the scales are flat."""
    if weight.code2 is None or weight.absmax2 is None or weight.offset is None:
        return (weight.absmax,) * 4
    return weight.absmax, weight.code2, weight.absmax2, weight.offset


@dispatch.on_its_device
def _launch(weight: NF4Weight, out: Tensor, decode: str) -> None:
    n, k = weight.shape
    size, stride = weight.blocksize, out.stride(0) if n > 1 else k
    flat = stride == k
    whole_blocks = (n * k if flat else k) % size == 0
    paired = out.element_size() == 2 and stride % 2 == 0 and out.data_ptr() % 4 == 0 and n * stride < 2**32
    arguments = (weight.packed, *scale_arguments(weight), code_table(out.device), out)
    options = {"NESTED": weight.nested, "num_warps": 4, "enable_fp_fusion": False}
    if not (whole_blocks and paired):
        grid = (triton.cdiv(n * k, 2 * 1024),)
        _dequantize_bytes[grid](*arguments, n * k, k, stride, BLOCKSIZE=size, BYTES=1024, EMULATE=INTERPRET, **options)
        return
    rows, row_blocks = (1, n * k // size) if flat else (n, k // size)
    tile = max(1, 1024 // size)  # blocks per step: 128 words, one per thread
    chunks = triton.cdiv(row_blocks, 4 * tile)
    where = (row_blocks, chunks, stride)
    if decode == "shuffle" and weight.packed.data_ptr() % 4 == 0:
        _dequantize_words[(rows * chunks,)](*arguments, *where, WORDS=size // 8, ROWS=tile, STEPS=4, **options)
    else:  # the same work in one step: four words a thread by one load, and 11 barriers in place of 15
        steps = max(1, size // 1024)
        _dequantize_pairs[(rows * chunks,)](
            *arguments, *where, HALF=size // 2, ROWS=4 * tile // steps, STEPS=steps, EMULATE=INTERPRET, **options
        )


# --------------------------------------------------------------------- kernels


@triton.jit
def lookup(table, index):
    """table [16] at index [...]: `tl.gather` works on one axis, so the index is flattened around it."""
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), 0), index.shape)


@triton.jit
def _dequantize_words(
    packed, absmax, code2, absmax2, offset, code, out, row_blocks, chunks, out_stride,
    WORDS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """A word of eight nibbles per thread and step; 16-bit output stored as int32 pairs, 16 bytes a thread.

    Tile: [ROWS blocks, WORDS words of a block], so a scale is decoded once per block row. Loads are evicted first;
    stores are not: the matmul that follows finds W in L2.
    """
    TY: tl.constexpr = out.dtype.element_ty
    ASM: tl.constexpr = WORDS_BF16 if tl.bfloat16 == TY else WORDS_FP16
    row = tl.program_id(0) // chunks
    first = (tl.program_id(0) - row * chunks) * (ROWS * STEPS)
    words, pairs = packed.to(tl.pointer_type(tl.int32)), out.to(tl.pointer_type(tl.int32))
    table = tl.full([ROWS, WORDS], 0, tl.int64) + code.to(tl.int64)
    column = first + tl.arange(0, ROWS)
    block = row * row_blocks + column
    start = row * (out_stride // 2) + column * (WORDS * 4)
    # Steps are constants apart, which loads and stores take for nothing; an address of its own costs four instructions.
    word_ptrs = words + block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    pair_ptrs = pairs + start[:, None] + tl.arange(0, WORDS * 4)[None, :]
    for step in tl.static_range(STEPS):
        mask = column + step * ROWS < row_blocks
        w = tl.load(word_ptrs + step * ROWS * WORDS, mask=mask[:, None], other=0, eviction_policy="evict_first")
        s = block_scale(absmax, code2, absmax2, offset, block + step * ROWS, mask, NESTED)
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r,f,l", [w, tl.broadcast_to(s[:, None], [ROWS, WORDS]), table],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        y = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), [ROWS, WORDS * 4])
        tl.store(pair_ptrs + step * ROWS * (WORDS * 4), y, mask=mask[:, None])


@triton.jit
def _dequantize_pairs(
    packed, absmax, code2, absmax2, offset, code, out, row_blocks, chunks, out_stride,
    HALF: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The same tile by byte: each becomes one int32 pair of 16-bit values. Plain Triton; what a T4 runs."""
    TY: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) // chunks
    first = (tl.program_id(0) - row * chunks) * (ROWS * STEPS)
    pairs = out.to(tl.pointer_type(tl.int32))
    table = tl.load(code + tl.arange(0, 16))
    for step in tl.static_range(STEPS):
        column = first + step * ROWS + tl.arange(0, ROWS)
        block = row * row_blocks + column
        mask = column < row_blocks
        q = tl.load(
            packed + block[:, None] * HALF + tl.arange(0, HALF)[None, :],
            mask=mask[:, None], other=0, eviction_policy="evict_first",
        ).to(tl.int32)  # fmt: skip
        s = block_scale(absmax, code2, absmax2, offset, block, mask, NESTED)[:, None]
        high = cast(lookup(table, q >> 4) * s, TY, EMULATE).to(tl.uint16, bitcast=True).to(tl.int32)
        low = cast(lookup(table, q & 15) * s, TY, EMULATE).to(tl.uint16, bitcast=True).to(tl.int32)
        start = row * (out_stride // 2) + column * HALF
        tl.store(pairs + start[:, None] + tl.arange(0, HALF)[None, :], high | (low << 16), mask=mask[:, None])


@triton.jit
def _dequantize_bytes(
    packed, absmax, code2, absmax2, offset, code, out, count, columns, out_stride,
    BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Any shape, stride, alignment and output dtype: one byte per lane, two stores. Plain Triton."""
    TY: tl.constexpr = out.dtype.element_ty
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    even = 2 * byte
    inside = even < count
    q = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    table = tl.load(code + tl.arange(0, 16))
    s = block_scale(absmax, code2, absmax2, offset, even // BLOCKSIZE, inside, NESTED)
    high, low = cast(lookup(table, q >> 4) * s, TY, EMULATE), cast(lookup(table, q & 15) * s, TY, EMULATE)
    row = even // columns
    tl.store(out + row * out_stride + (even - row * columns), high, mask=inside)
    odd = even + 1
    row = odd // columns
    tl.store(out + row * out_stride + (odd - row * columns), low, mask=odd < count)
