"""Fused NF4 dequantise-matmul: Y = X W^T + b and its backward dX = dY W, on bitsandbytes' own storage.

W is never written out: 0.5 bytes an element are read instead of 4.5 (dequantise, write, read back), and no 16-bit
scratch is needed. It wins while the product is bound by memory (small M); above `dispatch.fused_rows` one-launch
dequantise + cuBLAS is faster, so that is what "auto" takes there.
Split-K is deterministic: partial sums go to fp32 workspace and are added in a fixed order by a second kernel.
Deliberately not here: repacked weights (5 % at best), LoRA (lora.py adds it).
"""

# Triton's annotations type kernels as plain functions of tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, nf4, tiles
from .decode import INTERPRET, block_scale, cast, codes, dot, weights
from .language import tl, triton
from .nf4 import NF4Weight, lookup


def reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch: x [M, K] -> [M, N] in x's dtype."""
    return F.linear(x, nf4.dequantize_reference(weight, x.dtype), bias)


def reference_backward(dy: Tensor, weight: NF4Weight) -> Tensor:
    """Plain PyTorch: dY [M, N] -> dX [M, K] in dY's dtype."""
    return dy @ nf4.dequantize_reference(weight, dy.dtype)


def matmul(x: Tensor, weight: NF4Weight, bias: Tensor | None = None, path: str = "auto") -> Tensor:
    """Y [M, N] = X [M, K] W^T + bias, in x's dtype (bf16, fp16, fp32), accumulated in fp32.

    path: "auto" (dispatch.py: bitsandbytes or fused for few rows, else dequantise + cuBLAS; the reference on a CPU),
    "fused", "few_rows" (M <= 4, no tensor cores), "bitsandbytes" (its own kernel), "dequantize" or "reference". Not
    differentiable: lora.py is. ValueError on shapes, dtypes and devices that do not fit, and on an x that wants a
    gradient.
    """
    _check(x, weight, "x", weight.shape[1])
    if bias is not None:
        if bias.shape != (weight.shape[0],) or bias.device != x.device:
            raise ValueError(
                f"bias: given {tuple(bias.shape)} on {bias.device}; allowed ({weight.shape[0]},) on {x.device}"
            )
        bias = bias.detach().to(x.dtype).contiguous()
    match choose(x, weight, path, trains=False):
        case "reference":
            return reference(x, weight, bias)
        case "bitsandbytes":
            return by_bitsandbytes(x, weight, bias)
        case "dequantize":
            return F.linear(x, nf4.dequantize_stack((weight,), x.dtype), bias)
        case "few_rows":
            return _launch_few_rows(x, weight, bias)
    return _launch(x, weight, bias, forward=True)


def matmul_backward(dy: Tensor, weight: NF4Weight, path: str = "auto") -> Tensor:
    """dX [M, K] = dY [M, N] W, in dY's dtype; paths and errors as `matmul`."""
    _check(dy, weight, "dy", weight.shape[0])
    match choose(dy, weight, path):
        case "reference":
            return reference_backward(dy, weight)
        case "dequantize" | "few_rows":
            return dy @ nf4.dequantize_stack((weight,), dy.dtype)
    return _launch(dy, weight, None, forward=False)


def by_bitsandbytes(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The same product by bitsandbytes' fused kernel (`gemm_4bit`, from 0.50 on), on whatever device it has one for."""
    scales = (weight.absmax, None, None, None)
    if weight.nested:
        scales = (weight.absmax2, weight.absmax, weight.code2, weight.offset)
    first, *nested = scales
    packed, shape = weight.packed.view(-1, 1), list(weight.shape)
    return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, first, weight.blocksize, "nf4", bias, *nested)


def fits(weight: NF4Weight) -> bool:
    """Whether the fused kernels read this layout: every row starts a scale block."""
    return weight.shape[1] % weight.blocksize == 0


def _check(x: Tensor, weight: NF4Weight, name: str, columns: int) -> None:
    assert weight.checked
    device = weight.packed.device
    if x.dim() != 2 or x.shape[1] != columns or x.dtype not in nf4.DTYPES or x.device != device:
        raise ValueError(
            f"{name}: given {tuple(x.shape)} {x.dtype} on {x.device}; "
            f"allowed [M, {columns}] in bf16, fp16 or fp32 on {device} for W {list(weight.shape)}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: given with requires_grad; allowed without: lora.linear is the differentiable form")


def choose(x: Tensor, weight: NF4Weight, path: str, trains: bool = True) -> str:
    """The path ("reference", "fused", "few_rows", "bitsandbytes" or "dequantize") for this x (or dy); see `matmul`.
    trains: a gradient will be asked for."""
    if path == "fused":
        if not fits(weight):
            raise ValueError(
                f"weight: given K = {weight.shape[1]} with blocks of {weight.blocksize}; "
                f"the fused path allows multiples of the block: use path='dequantize'"
            )
        dispatch.require(x.device, path, 80)
        return path
    if path == "few_rows":
        dispatch.require(x.device, path, 75)
        return path
    if path in ("dequantize", "bitsandbytes"):
        return path
    if not dispatch.uses_triton(x.device, path):
        return "reference"
    if not trains and dispatch.takes_bitsandbytes(x.device, x.shape[0]) and x.dtype != torch.float32:
        return "bitsandbytes"
    few = 0 < x.shape[0] <= dispatch.fused_rows(x.device, *weight.shape)
    if not few or not fits(weight) or x.dtype == torch.float32:
        return "dequantize"
    return "fused" if dispatch.capability(x.device) >= 80 else "few_rows"


# --------------------------------------------------------------------- kernels


@triton.jit
def _forward(
    x_ptr, packed, absmax, code2, absmax2, offset, code, bias, out, m, n, k, steps, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, POST: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile over `steps` K-steps of one split; bytes become pairs of 16-bit weights in registers.

    POST (few rows): codes rounded to 16 bit are multiplied as they are and each step's product is scaled in fp32.
    Otherwise W is made as `nf4.dequantize` makes it, which halves the accumulators.
    """
    TY: tl.constexpr = x_ptr.dtype.element_ty
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, n - 1)
    split = tl.program_id(2)
    first = split * steps * BK
    x_ptrs = x_ptr + rm[:, None].to(tl.int64) * x_stride + (first + tl.arange(0, BK))[None, :]
    w_ptrs = packed + row[:, None].to(tl.int64) * (k // 2) + (first // 2 + tl.arange(0, BK // 2))[None, :]
    block = row * (k // BLOCKSIZE)
    inside = rm[:, None] < m
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, tl.minimum(steps, (k - first) // BK)):
        x = tl.load(x_ptrs, mask=inside, other=0.0)
        q = tl.load(w_ptrs)
        s = block_scale(absmax, code2, absmax2, offset, block + (first + step * BK) // BLOCKSIZE, rn >= 0, NESTED)
        if POST:
            w = codes(q, code, TY, DECODE, EMULATE)
            acc += dot(x, tl.trans(w), tl.zeros([BM, BN], tl.float32), EMULATE) * s[None, :]
        else:
            w = weights(q, tl.broadcast_to(s[:, None], [BN, BK // 2]), code, TY, DECODE, EMULATE)
            acc = dot(x, tl.trans(w), acc, EMULATE)
        x_ptrs += BK
        w_ptrs += BK // 2
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    at = out + split.to(tl.int64) * m * n + rm[:, None].to(tl.int64) * n + rn[None, :]
    tl.store(at, acc if SPLIT else cast(acc, TY, EMULATE), mask=inside & (rn[None, :] < n))


@triton.jit
def _backward(
    dy_ptr, packed, absmax, code2, absmax2, offset, code, out, m, n, k, steps, dy_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    SPLIT: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One [BM, BK] tile of dX, contracted over N in steps of BN rows of W: the same storage, nothing repacked.

    The scale varies along the contraction, so W is made before the product, as `nf4.dequantize` makes it: rounded once.
    """
    TY: tl.constexpr = dy_ptr.dtype.element_ty
    SCALES: tl.constexpr = BK // BLOCKSIZE if BK > BLOCKSIZE else 1
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rk = tl.program_id(0) * BK + tl.arange(0, BK)
    rb = tl.program_id(0) * (BK // 2) + tl.arange(0, BK // 2)
    split = tl.program_id(2)
    first = split * steps * BN
    inside = rm[:, None] < m
    scale_column = tl.minimum((tl.program_id(0) * BK) // BLOCKSIZE + tl.arange(0, SCALES), k // BLOCKSIZE - 1)
    acc = tl.zeros([BM, BK], tl.float32)
    for step in range(0, tl.minimum(steps, (n - first + BN - 1) // BN)):
        rn = first + step * BN + tl.arange(0, BN)
        row = tl.minimum(rn, n - 1)
        dy = tl.load(
            dy_ptr + rm[:, None].to(tl.int64) * dy_stride + rn[None, :], mask=inside & (rn[None, :] < n), other=0.0
        )
        q = tl.load(packed + row[:, None].to(tl.int64) * (k // 2) + rb[None, :], mask=rb[None, :] < k // 2, other=0)
        block = row[:, None] * (k // BLOCKSIZE) + scale_column[None, :]
        s = block_scale(absmax, code2, absmax2, offset, block, block >= 0, NESTED)
        s = tl.reshape(tl.broadcast_to(s[:, :, None], [BN, SCALES, BK // 2 // SCALES]), [BN, BK // 2])
        acc = dot(dy, weights(q, s, code, TY, DECODE, EMULATE), acc, EMULATE)
    at = out + split.to(tl.int64) * m * k + rm[:, None].to(tl.int64) * k + rk[None, :]
    tl.store(at, acc if SPLIT else cast(acc, TY, EMULATE), mask=inside & (rk[None, :] < k))


@triton.jit
def _few_rows(
    x_ptr, packed, absmax, code2, absmax2, offset, code, out, n, k, steps, x_stride,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """M <= 4 rows without tensor cores (all a T4 has for this): fp32 products of exact codes, into fp32 partials.

    Plain Triton, every architecture. A row of W is summed over one block before it is scaled.
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, n - 1)
    split = tl.program_id(1)
    first = split * steps * BK
    half = tl.arange(0, BK // 2)
    table = tl.load(code + tl.arange(0, 16))
    acc0 = tl.zeros([BN], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for step in range(0, tl.minimum(steps, (k - first) // BK)):
        at = first + step * BK
        q = tl.load(packed + row[:, None].to(tl.int64) * (k // 2) + (at // 2 + half)[None, :]).to(tl.int32)
        s = block_scale(absmax, code2, absmax2, offset, row * (k // BLOCKSIZE) + at // BLOCKSIZE, rn >= 0, NESTED)
        even, odd = lookup(table, q >> 4), lookup(table, q & 15)
        acc0 += _row_product(x_ptr + at + 2 * half, even, odd) * s
        if M > 1:
            acc1 += _row_product(x_ptr + x_stride + at + 2 * half, even, odd) * s
        if M > 2:
            acc2 += _row_product(x_ptr + 2 * x_stride + at + 2 * half, even, odd) * s
        if M > 3:
            acc3 += _row_product(x_ptr + 3 * x_stride + at + 2 * half, even, odd) * s
    at = out + split * M * n + rn
    tl.store(at, acc0, mask=rn < n)
    if M > 1:
        tl.store(at + n, acc1, mask=rn < n)
    if M > 2:
        tl.store(at + 2 * n, acc2, mask=rn < n)
    if M > 3:
        tl.store(at + 3 * n, acc3, mask=rn < n)


@triton.jit
def _row_product(x_ptrs, even, odd):
    """Sum over a block of one row of X times decoded weights [BN, BK / 2] of even and odd columns."""
    x_even, x_odd = tl.load(x_ptrs).to(tl.float32), tl.load(x_ptrs + 1).to(tl.float32)
    return tl.sum(even * x_even[None, :] + odd * x_odd[None, :], axis=1)


@triton.jit
def _reduce(
    partial, bias, out, count, columns,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Sum of the splits in order 0, 1, 2, ...: the same bits every time."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * count + i, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + i % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, cast(total, out.dtype.element_ty, EMULATE), mask=inside)


GRID_ROWS = 65535  # CUDA's limit on the second dimension of a grid


def _aligned(x: Tensor) -> Tensor:
    """x, copied if its rows need not start at multiples of 16 bytes but could: loads of single elements spill 24 bytes
    at M <= 64 on sm_86."""
    whole_rows = x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) % 16 == 0)
    return x if whole_rows and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@dispatch.on_its_device
def _launch(x: Tensor, weight: NF4Weight, bias: Tensor | None, forward: bool) -> Tensor:
    x = _aligned(x)
    (n, k), m = weight.shape, x.shape[0]
    columns, contraction = (n, k) if forward else (k, n)
    arch, config = dispatch.capability(x.device), tiles.tile(m, weight.blocksize, forward, x.dtype)
    if m > (most := GRID_ROWS * config["BM"]):
        raise ValueError(f"{'x' if forward else 'dy'}: given {m} rows; the fused path allows {most}: use 'dequantize'")
    out = x.new_empty(m, columns)
    if m == 0:
        return out
    step, width = (config["BK"], config["BN"]) if forward else (config["BN"], config["BK"])
    steps, count = triton.cdiv(contraction, step), triton.cdiv(columns, width) * triton.cdiv(m, config["BM"])
    ways = tiles.splits(count, steps, tiles.processors(x.device))
    per_split = triton.cdiv(steps, ways)
    ways = triton.cdiv(steps, per_split)
    target = out if ways == 1 else x.new_empty(ways, m, columns, dtype=torch.float32)
    has_bias = bias is not None
    shared = (x, weight.packed, *nf4.scale_arguments(weight), nf4.code_table(x.device))
    where = (m, n, k, per_split, x.stride(0))
    options = {
        "BLOCKSIZE": weight.blocksize, "NESTED": weight.nested, "SPLIT": ways > 1,
        "DECODE": tiles.decode(arch, x.dtype, forward), "EMULATE": INTERPRET,
        "maxnreg": tiles.registers(arch, config["BM"], x.dtype, forward), "enable_fp_fusion": True, **config,
    }  # fmt: skip
    grid = (triton.cdiv(columns, width), triton.cdiv(m, config["BM"]), ways)
    if forward:
        _forward[grid](*shared, bias if has_bias else x, target, *where, BIAS=has_bias and ways == 1, **options)
    else:
        _backward[grid](*shared, target, *where, **options)
    if ways > 1:
        _reduce[(triton.cdiv(out.numel(), 1024),)](
            target, bias if has_bias else x, out, out.numel(), columns,
            SPLITS=ways, BLOCK=1024, BIAS=has_bias, EMULATE=INTERPRET, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@dispatch.on_its_device
def _launch_few_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    (n, k), m = weight.shape, x.shape[0]
    if m > 4 or not fits(weight):
        raise ValueError(f"x: given {m} rows, K = {k}; the few_rows path allows 4 rows and whole blocks per row")
    if m == 0:
        return x.new_empty(0, n)
    bn, bk = 16, min(64, weight.blocksize)
    steps = k // bk
    ways = tiles.splits(triton.cdiv(n, bn), steps, tiles.processors(x.device))
    per_split = triton.cdiv(steps, ways)
    ways = triton.cdiv(steps, per_split)
    partial = x.new_empty(ways, m, n, dtype=torch.float32)
    out = x.new_empty(m, n)
    _few_rows[(triton.cdiv(n, bn), ways)](
        x, weight.packed, *nf4.scale_arguments(weight), nf4.code_table(x.device), partial, n, k, per_split, k,
        M=m, BN=bn, BK=bk, BLOCKSIZE=weight.blocksize, NESTED=weight.nested, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _reduce[(triton.cdiv(out.numel(), 1024),)](
        partial, bias if bias is not None else x, out, out.numel(), n,
        SPLITS=ways, BLOCK=1024, BIAS=bias is not None, EMULATE=INTERPRET, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
