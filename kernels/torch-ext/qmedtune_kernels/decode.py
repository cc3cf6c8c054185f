"""Decoding NF4 nibbles inside Triton kernels.

Three ways (why these three: instruction counts in NOTES.md):
  shuffle  exact fp32 codes: lane i of a warp holds code i, `shfl` looks it up, the product with the scale is rounded
           once, so W has bitsandbytes' bits. DECODE says where the lane's code comes from: "fetch" or "make".
  prmt     codes rounded to 16 bit and not scaled: a table of byte planes in registers, looked up with `prmt`.
  gather   plain Triton, exact, on every architecture and in the interpreter.
Every asm block is elementwise in its operands: Triton may move broadcasts and layouts past it without changing a bit.
EMULATE works around two faults of Triton's interpreter: casts to bf16 truncate, and `tl.dot` misreads bf16.
"""

# Triton's annotations type kernels as plain functions of tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import os

from .language import tl, triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Byte planes of the 16 NF4 codes rounded to 16 bit: (low bytes, high bytes), each codes 0-3, 4-7, 8-11, 12-15.
PLANES = {
    "bf16": ((0xCA063280, 0x00BA3D92, 0xAD7C25A3, 0x803910E2), (0xBEBFBFBF, 0x00BDBEBE, 0x3E3E3E3D, 0x3F3F3F3E)),
    "fp16": ((0x52339200, 0x00D4EA8D, 0x68E02618, 0x00C9800D), (0xB6B8B9BC, 0x00ADB1B4, 0x3533312D, 0x3C393837)),
}
# The same of the exact fp32 codes: lowest bytes first.
PLANES_FP32 = (
    (0xA030B100, 0x00713F4D, 0x3ADDE3FF, 0x00B3ABB8),
    (0x326B3900, 0x007835A2, 0x0304CAFA, 0x001307A4),
    (0xCA063280, 0x00BA3D91, 0xAD7C24A2, 0x803910E1),
    (0xBEBFBFBF, 0x00BDBEBE, 0x3E3E3E3D, 0x3F3F3F3E),
)
# prmt selectors that put (low, high) byte planes together as the pairs of elements (0, 1) and (2, 3) of a half word.
PAIR_SELECTORS = (0x4051, 0x6273)


def prmt_asm(kind: str) -> str:
    """PTX: $4 = four packed bytes (eight nibbles) -> $0..$3 = four pairs of 16-bit codes, in element order.

    prmt reads three bits of each selector nibble, so a 16-entry lookup is two 8-entry ones (s: low three bits) and a
    choice between them by the fourth bit (h).
    """
    lines = [
        "{ .reg .b32 s, s2, h, h2, a, b, L, H;",
        "and.b32 s, $4, 0x77777777; shr.b32 h, $4, 1; lop3.b32 h, h, 0x44444444, 0x32103210, 0xEA;",
        "shr.b32 s2, s, 16; shr.b32 h2, h, 16;",
    ]
    for half, (s, h) in enumerate((("s", "h"), ("s2", "h2"))):
        for plane, target in zip(PLANES[kind], ("L", "H"), strict=True):
            t = [f"0x{word:08x}" for word in plane]
            lines.append(f"prmt.b32 a, {t[0]}, {t[1]}, {s}; prmt.b32 b, {t[2]}, {t[3]}, {s};")
            lines.append(f"prmt.b32 {target}, a, b, {h};")
        for pair, selector in enumerate(PAIR_SELECTORS):
            lines.append(f"prmt.b32 ${2 * half + pair}, L, H, 0x{selector:04x};")
    return " ".join(lines) + " }"


def shuffle_asm(kind: str, by_byte: bool = False, address: str = "") -> str:
    """PTX: $4 = four packed bytes, $5 = their scale (fp32) -> $0..$3 = four pairs rn16(code * scale).

    by_byte: each byte has a scale of its own, $5..$8. address: the operand that holds the address of the fp32 table.
    The lane's entry t is fetched inside the block (passed as a tensor it could be given another layout), or, without
    an address, put together from byte planes: 27 instructions, which a compiler can move out of a loop but not always
    does.
    """
    lines = ["{ .reg .b32 n, l, a, b, c0, c1, c2, c3; .reg .b64 q; .reg .pred p; .reg .f32 t, x, y;"]
    lines += _fetch(address) if address else _make()
    for byte in range(4):
        scale = f"${5 + byte}" if by_byte else "$5"
        for target, shift in (("x", 8 * byte + 4), ("y", 8 * byte)):
            lines.append(f"shr.b32 n, $4, {shift}; shfl.sync.idx.b32 {target}, t, n, 0x1f, 0xffffffff;")
            lines.append(f"mul.rn.f32 {target}, {target}, {scale};")
        lines.append(f"cvt.rn.{kind}x2.f32 ${byte}, y, x;")
    return " ".join(lines) + " }"


def _fetch(address: str) -> list[str]:
    """t = the fp32 code of lane i mod 16, from memory."""
    return [
        "mov.u32 l, %laneid; and.b32 l, l, 15; mul.wide.u32 q, l, 4;",
        f"add.s64 q, q, {address}; ld.global.nc.f32 t, [q];",
    ]


def _make() -> list[str]:
    """The same from byte planes: for each, two 8-entry lookups and a choice by the lane's fourth bit."""
    lines = ["mov.u32 l, %laneid; and.b32 n, l, 8; setp.ne.u32 p, n, 0; and.b32 l, l, 7;"]
    for byte, plane in enumerate(PLANES_FP32):
        t = [f"0x{word:08x}" for word in plane]
        lines.append(f"prmt.b32 a, {t[0]}, {t[1]}, l; prmt.b32 b, {t[2]}, {t[3]}, l; selp.b32 c{byte}, b, a, p;")
    return [*lines, "prmt.b32 a, c0, c1, 0x0040; prmt.b32 b, c2, c3, 0x0040; prmt.b32 t, a, b, 0x5410;"]


PRMT_BF16 = tl.constexpr(prmt_asm("bf16"))
PRMT_FP16 = tl.constexpr(prmt_asm("fp16"))
WORDS_BF16 = tl.constexpr(shuffle_asm("bf16", address="$6"))
WORDS_FP16 = tl.constexpr(shuffle_asm("f16", address="$6"))
FETCH_BF16 = tl.constexpr(shuffle_asm("bf16", by_byte=True, address="$9"))
FETCH_FP16 = tl.constexpr(shuffle_asm("f16", by_byte=True, address="$9"))
MAKE_BF16 = tl.constexpr(shuffle_asm("bf16", by_byte=True))
MAKE_FP16 = tl.constexpr(shuffle_asm("f16", by_byte=True))


@triton.jit
def cast(x, TY: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> TY, round to nearest even, also in the interpreter."""
    if EMULATE and tl.bfloat16 == TY:
        bits = x.to(tl.uint32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(TY)
    return y


@triton.jit
def dot(a, b, acc, EMULATE: tl.constexpr):
    """acc + a @ b with fp32 accumulation; fp32 operands are not shortened to tf32."""
    if EMULATE:
        d = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        d = tl.dot(a, b, acc, input_precision="ieee")
    return d


@triton.jit
def join_pairs(even, odd):
    """[R, C] and [R, C] -> [R, 2 C], interleaved."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def unpack(pairs, TY: tl.constexpr):
    """int32 pairs [R, C] -> [R, 2 C] in a 16-bit type, low half first; costs no instruction."""
    low, high = pairs.to(tl.int16).to(TY, bitcast=True), (pairs >> 16).to(tl.int16).to(TY, bitcast=True)
    return join_pairs(low, high)


@triton.jit
def codes(q, code_ptr, TY: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr):
    """Packed bytes q [R, C] -> NF4 codes [R, 2 C] rounded to TY, not yet scaled."""
    if DECODE == "gather":
        even, odd = tl.load(code_ptr + (q >> 4).to(tl.int32)), tl.load(code_ptr + (q & 15).to(tl.int32))
        w = join_pairs(cast(even, TY, EMULATE), cast(odd, TY, EMULATE))
    else:
        ASM: tl.constexpr = PRMT_BF16 if TY == tl.bfloat16 else PRMT_FP16  # noqa: SIM300
        w = unpack(tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [q], dtype=tl.int32, is_pure=True, pack=4), TY)
    return w


@triton.jit
def weights(q, s, code_ptr, TY: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr):
    """Packed bytes q [R, C] and fp32 scales s [R, C] -> W = rn(code * scale) [R, 2 C] in TY: rounded once."""
    if DECODE == "gather":
        even, odd = tl.load(code_ptr + (q >> 4).to(tl.int32)), tl.load(code_ptr + (q & 15).to(tl.int32))
        w = join_pairs(cast(even * s, TY, EMULATE), cast(odd * s, TY, EMULATE))
    elif DECODE == "fetch":
        ASM: tl.constexpr = FETCH_BF16 if TY == tl.bfloat16 else FETCH_FP16  # noqa: SIM300
        table = code_ptr.to(tl.int64)
        w = unpack(
            tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,r,f,f,f,f,l,l,l,l", [q, s, table], dtype=tl.int32, is_pure=True, pack=4
            ), TY,
        )  # fmt: skip
    else:
        MADE: tl.constexpr = MAKE_BF16 if TY == tl.bfloat16 else MAKE_FP16  # noqa: SIM300
        w = unpack(
            tl.inline_asm_elementwise(MADE, "=r,=r,=r,=r,r,f,f,f,f", [q, s], dtype=tl.int32, is_pure=True, pack=4), TY
        )
    return w


@triton.jit
def block_scale(absmax, code2, absmax2, offset, block, mask, NESTED: tl.constexpr):
    """Scale of flat blocks `block`, fp32; nested scales are bit-exact only with enable_fp_fusion=False."""
    if NESTED:
        index = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax2 + (block >> 8), mask=mask, other=0.0)
        s = tl.load(code2 + index) * outer + tl.load(offset)
    else:
        s = tl.load(absmax + block, mask=mask, other=0.0)
    return s
