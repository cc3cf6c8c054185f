"""NF4 weights as bitsandbytes stores them, and their dequantisation.

Storage (kernels.md section 1.1): W [N, K] is flattened row by row; byte j holds code[2j] in its high and code[2j + 1]
in its low nibble; one scale (absmax) per `blocksize` elements of the flat tensor, itself either fp32 or, "nested",
an 8-bit index into code2 with one fp32 scale per 256 blocks and one offset.
Deliberately not here: quantisation (bitsandbytes does it), FP4, other nested block sizes than 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    code2 fp32 [256], absmax2 fp32 [ceil(blocks / 256)] and offset fp32 []. blocksize: a power of two >= 32.
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


def dequantize_stack(weights: tuple[NF4Weight, ...], dtype: torch.dtype) -> Tensor:
    """The weights below each other, [sum N, K]."""
    return torch.cat([dequantize_reference(weight, dtype) for weight in weights])
