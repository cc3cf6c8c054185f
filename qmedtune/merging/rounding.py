"""From fp32 sums to the numbers that are written: the nearest one, or a seeded stochastic choice of the two around it.

bf16 keeps 8 bits. An update below half a unit in the last of them vanishes, and always in the same direction: after
short runs a part of what was learnt is gone in a right merge (docs/merging.md has a table). Stochastic rounding goes up
with the probability of the remainder, so what is added is right on average.
Its noise is a function of seed, tensor name and place of the element alone: a merge can be repeated and proven from the
file, whatever the number of threads or the size of blocks. Deliberately no state, and no generator of torch (whose
stream may change with a release).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17).
GAMMA, MIX_1, MIX_2 = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Bits of a format's significand, the leading one included, and the exponent of its smallest positive number.
PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
SMALLEST = {torch.bfloat16: -133, torch.float16: -24, torch.float32: -149}
PER_DRAW = 4  # noise values of 16 bits out of one draw of 64


@dataclass(frozen=True)
class Rounding:
    """Rounding mode of a merge: to nearest, or stochastic.

    How fp32 becomes `dtype`. seed None: to the nearest, ties to even; else stochastically.
    """

    dtype: torch.dtype
    seed: int | None = None

    @property
    def stochastic(self) -> bool:
        return self.seed is not None

    @property
    def name(self) -> Literal["nearest", "stochastic"]:
        """As `merge.rounding` spells it."""
        if self.stochastic:
            return "stochastic"
        return "nearest"

    def __call__(self, block: Tensor, name: str, first: int) -> Tensor:
        """`block`, fp32 and changed in place, as `dtype`. first: index of its first element in tensor `name`, flat."""
        if self.seed is None:
            return block.to(self.dtype, copy=True)
        fraction = self.noise(name, first, block.numel())
        return _up_or_down(block, fraction.view(block.shape), self.dtype)

    def noise(self, name: str, first: int, count: int) -> Tensor:
        """int32 [count] in [0, 2^bits): the noise of elements first, first + 1, ... in fractions of the last place."""
        assert self.seed is not None
        drawn = noise_bits(self.seed, name, first, count).astype(np.int32)
        return torch.from_numpy(drawn >> (16 - dropped_bits(self.dtype)))


def dropped_bits(dtype: torch.dtype) -> int:
    """Bits of an fp32 significand that `dtype` has no room for: 16 for bf16, 13 for fp16."""
    return PRECISION[torch.float32] - PRECISION[dtype]


def noise_bits(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """uint16 [count]: element k of a tensor takes the (k mod 4)th 16 bits, lowest first, of draw k // 4."""
    start, stop = first // PER_DRAW, -(-(first + count) // PER_DRAW)
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "<u8")
    with np.errstate(over="ignore"):
        state = np.arange(start + 1, stop + 1, dtype=np.uint64) * GAMMA + key
        state = (state ^ (state >> np.uint64(30))) * MIX_1
        state = (state ^ (state >> np.uint64(27))) * MIX_2
    drawn = (state ^ (state >> np.uint64(31))).astype("<u8", copy=False).view("<u2")
    return drawn[first - start * PER_DRAW :][:count]


def _up_or_down(block: Tensor, fraction: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds the noise to the bits that will be cut off: they carry into the last place as often as they are large.

    A carry out of the significand goes into the exponent, which is the next number. fp16 has fewer places below 2^-14:
    there 2^-14 is added to the magnitude for the while, so that the same 13 bits are cut off.
    """
    bits = dropped_bits(dtype)
    small = None
    if dtype == torch.float16:
        small = block.abs() < 2**-14
        block += torch.where(small, torch.copysign(torch.tensor(2.0**-14), block), 0.0)
    words = block.view(torch.int32)
    words += fraction
    words &= -(1 << bits)
    if small is not None:
        block -= torch.where(small, torch.copysign(torch.tensor(2.0**-14), block), 0.0)
    return block.to(dtype, copy=True)


def unit(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at fp64 magnitudes, fp64."""
    exponent = torch.frexp(magnitude.clamp(min=2.0**-1000)).exponent  # of 0 it would be that of 1/2
    places = (exponent - PRECISION[dtype]).clamp(min=SMALLEST[dtype])
    return torch.ldexp(torch.ones_like(magnitude), places)
