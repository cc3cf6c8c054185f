"""What a weight becomes in NF4: quantised and dequantised again, bit for bit as bitsandbytes does it on the CPU.

bitsandbytes 0.50 finds each 4-bit code by binary search (18 ns per value: 20 s for 1.1 billion weights on 2 cores); a
table over [-1, 1], of which no cell holds two of the 15 borders between codes, needs 2 ns. Block size 64 and the nested
8-bit scales (blocks of 256) are those of QLoRA (arXiv 2305.14314) and of training here.
Deliberately not packed: nothing is stored in 4 bits here.
"""

from __future__ import annotations

from functools import cache

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qmedtune.merging.parallel import Apply, in_fp32

BLOCKSIZE = 64
# 64 cells per unit: cells are narrower than the closest two borders (.077), and no border is nearer than 2e-4 to the
# edge of a cell, so that fp32 rounding cannot put a value on the wrong side of one.
CELLS = 64
# Blocks of quantisation handled at once: 1 Mi values. With 128 Ki, which stay in a second-level cache, threads spend
# half of their time handing the interpreter to each other (6.5 against 3.5 ms of CPU time for 1 Mi values).
STEP = (1 << 20) // BLOCKSIZE


def nf4_roundtrip(weight: Tensor, dtype: torch.dtype, *, double_quantization: bool, apply: Apply = map) -> Tensor:
    """dequantize(quantize(weight.to(dtype))) in `dtype`; weight: [out, in].

    `dtype` is the compute dtype, in which training loads the weights before it quantises them. `apply`: `map`, or the
    `map` of a pool of threads.
    """
    if weight.numel() % BLOCKSIZE:  # no LLaMA's
        nested = {"compress_statistics": double_quantization, "quant_type": "nf4", "blocksize": BLOCKSIZE}
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight.to(dtype).contiguous(), **nested))
    flat = weight.reshape(-1, BLOCKSIZE)
    blocks = [slice(i, i + STEP) for i in range(0, len(flat), STEP)]
    absmax = torch.cat(list(apply(lambda rows: _absmax(flat[rows].to(dtype)), blocks)))
    scales = _nested(absmax) if double_quantization else absmax
    out = torch.empty(flat.shape, dtype=dtype)

    def fill(rows: slice) -> None:
        inverse = absmax[rows].clamp(min=1e-38).reciprocal()  # as bitsandbytes guards a block of zeros
        scaled = in_fp32(flat[rows].to(dtype)).mul_(inverse[:, None])
        out[rows] = nearest_level(scaled.view(-1)).view_as(scaled).mul_(scales[rows, None])

    list(apply(fill, blocks))
    return out.view(weight.shape)


def _absmax(values: Tensor) -> Tensor:
    """Largest magnitude of each row, fp32. Floats without their sign are ordered as integers, of which 16-bit ones fill
    vectors best; halving rows by `maximum` is 5 times as fast as reducing rows of 64."""
    integer = torch.int16 if values.itemsize == 2 else torch.int32
    bits = values.view(integer) & torch.iinfo(integer).max
    while bits.shape[1] > 4:
        half = bits.shape[1] // 2
        bits = torch.maximum(bits[:, :half], bits[:, half:])
    return bits.amax(1).view(values.dtype).float()


def nearest_level(scaled: Tensor) -> Tensor:
    """The NF4 level (fp32) of each value of a 1-D fp32 tensor within [-1, 1]; a value on a border takes the lower.

    The sign bit of border - value, moved through the word, is -1 above the border and 0 elsewhere: a third of the time
    of a comparison, whose bools torch widens.
    """
    borders, levels = _tables()
    cells = scaled.mul(CELLS).add_(CELLS).to(torch.int32)
    above = torch.index_select(borders, 0, cells).sub_(scaled).view(torch.int32).bitwise_right_shift_(31)
    return torch.index_select(levels, 0, above.add_(cells, alpha=2))


def _nested(absmax: Tensor) -> Tensor:
    """The scales after their own 8-bit quantisation (fp32)."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return bnb.dequantize_blockwise(codes, state) + offset


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """Border of each cell (inf where none is in it), and levels: of cell c the lower at 2 c, the upper at 2 c - 1."""
    levels = bnb.get_4bit_type("nf4", device="cpu")
    borders = (levels[:-1] + levels[1:]) / 2
    edges = (torch.arange(2 * CELLS + 2, dtype=torch.float64) - CELLS) / CELLS
    passed = torch.bucketize(edges, borders.double()).clamp(max=len(borders))  # borders below each edge
    low, high = passed[:-1], passed[1:]
    inside = torch.where(high > low, borders[low.clamp(max=len(borders) - 1)], torch.inf)
    return inside, torch.stack([levels[high], levels[low]], dim=1).flatten().roll(-1)
