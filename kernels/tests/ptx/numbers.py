"""PTX types as numpy arrays, and the roundings of its floating point."""

from __future__ import annotations

import re
import struct
from functools import cache

import numpy as np

UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}
FLOATS = {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}


@cache
def dtype_of(type_: str) -> np.dtype:
    """Of a PTX type; bf16 and the packed pairs (f16x2, bf16x2) are bits."""
    if type_ == "pred":
        return UNSIGNED[1]
    if type_ in FLOATS:
        return FLOATS[type_]
    if type_ in ("bf16x2", "f16x2", "tf32"):
        return UNSIGNED[32]
    bits = int(re.sub(r"\D", "", type_))
    return SIGNED[bits] if type_.startswith("s") else UNSIGNED[bits]


@cache
def number(text: str, dtype: np.dtype) -> np.generic:
    """An immediate as a value of `dtype`: 0f and 0d give the bits of a float."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
        if dtype.kind == "f":
            code, size = ("f", "I") if len(text) == 10 else ("d", "Q")
            return dtype.type(struct.unpack(code, struct.pack(size, bits))[0])
        return dtype.type(bits)
    if dtype.kind == "f":
        return dtype.type(float(text) if "x" not in text.lower() else int(text, 16))
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return dtype.type(value != 0)
    bits = 8 * dtype.itemsize
    return np.array([value & (2**bits - 1)], dtype=UNSIGNED[bits]).view(dtype)[0]


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, round to nearest even; NaN becomes 0x7fff, as `cvt` makes it."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(x: np.ndarray, type_: str) -> np.ndarray:
    """fp32 -> bits of f16 or bf16."""
    return bf16_bits(x) if type_ == "bf16" else x.astype(np.float16).view(np.uint16)


def from_half(bits: np.ndarray, type_: str) -> np.ndarray:
    """Bits of f16 or bf16 -> fp32."""
    return bf16_values(bits) if type_ == "bf16" else bits.view(np.float16).astype(np.float32)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32, rounded once: the sum in fp64 is rounded to odd first, so that fp32 sees what was lost."""
    product = a.astype(np.float64) * b
    total = np.atleast_1d(product + c)
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    move = np.isfinite(total) & (lost != 0) & even
    if move.any():
        total = np.where(move, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)
