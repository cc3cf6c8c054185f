"""Rotary position embedding on the stacked output of q, k and v, rotated in place; the gradient comes back stacked.

Plain PyTorch reads and writes q and k five times and concatenates three gradients; here q and k are rotated in place in
one launch, and the backward writes each gradient once, rotated, into the stacked buffer.
Rounding follows transformers' apply_rotary_pos_emb: both products are rounded, then their sum. Both halves of a head
turn by the same angles (all of LLaMA's rope types). Deliberately not here: interleaved pairs, partial rotation.
"""

# Triton's annotations type kernels as plain functions of tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .decode import INTERPRET, cast
from .language import tl, triton
from .nf4 import DTYPES

HEADS = 8  # per program: 8 heads of 128 are 16 bytes a thread in 2 warps
Parts = tuple[Tensor, Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """Plain PyTorch: x [B, S, heads, D] by cos, sin [B or 1, S, D]; sign -1 turns back (the gradient)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if sign < 0 else (-second, first), dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def split(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> Parts:
    """Views [B, S, heads, D] of qkv [B, S, (heads + 2 kv_heads) D]."""
    query, key, value = qkv.view(*qkv.shape[:2], -1, head_dim).split((heads, kv_heads, kv_heads), dim=2)
    return query, key, value


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, triton_path: bool) -> Parts:
        ctx.save_for_backward(cos, sin)
        ctx.layout = qkv.shape, heads, kv_heads, triton_path
        query, key, value = split(qkv.detach(), heads, kv_heads, cos.shape[-1])
        if triton_path:
            turned = qkv.detach().view(*qkv.shape[:2], -1, cos.shape[-1])[:, :, : heads + kv_heads]
            _launch(turned, turned, cos, sin, 1.0)
            return query, key, value
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    @staticmethod
    def backward(ctx, dquery: Tensor, dkey: Tensor, dvalue: Tensor):
        cos, sin = ctx.saved_tensors
        shape, heads, kv_heads, triton_path = ctx.layout
        gradient = dquery.new_empty(shape)
        parts = split(gradient, heads, kv_heads, cos.shape[-1])
        for part, d in zip(parts[:2], (dquery, dkey), strict=True):
            if triton_path:
                _launch(d, part, cos, sin, -1.0)
            else:
                part.copy_(rotate(d, cos, sin, -1.0))
        parts[2].copy_(dvalue)
        return gradient, None, None, None, None, None


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, path: str = "auto") -> Parts:
    """q [B, S, heads, D] and k [B, S, kv_heads, D] rotated, and v [B, S, kv_heads, D], of the stacked projections
    qkv [B, S, (heads + 2 kv_heads) D]; differentiable in qkv.

    cos, sin [B or 1, S, D] in qkv's dtype. On the Triton path qkv is overwritten: the caller must not read it again.
    path: "auto", "triton" or "reference" (dispatch.py). Raises ValueError where shapes, dtypes or devices do not fit.
    """
    wanted = (heads + 2 * kv_heads) * cos.shape[-1]
    fits = qkv.dim() == 3 and qkv.shape[-1] == wanted and cos.shape == sin.shape and cos.shape[1] == qkv.shape[1]
    alike = qkv.dtype in DTYPES and all((a.dtype, a.device) == (qkv.dtype, qkv.device) for a in (cos, sin))
    if not fits or cos.dim() != 3 or cos.shape[0] not in (1, qkv.shape[0]) or not alike:
        raise ValueError(
            f"qkv, cos: given {tuple(qkv.shape)} {qkv.dtype} on {qkv.device} and {tuple(cos.shape)} {cos.dtype} on "
            f"{cos.device}; allowed [B, S, {wanted}] and [B or 1, S, D], all bf16, fp16 or fp32, on one device"
        )
    uses_triton = dispatch.uses_triton(qkv.device, path) and qkv.numel() > 0 and cos.shape[-1] % 32 == 0
    return _RotaryQKV.apply(qkv.contiguous(), cos.contiguous(), sin.contiguous(), heads, kv_heads, uses_triton)


# --------------------------------------------------------------------- kernels


@triton.jit
def _rotate(
    x_ptr, y_ptr, cos_ptr, sin_ptr, heads, tokens, x_token, x_head, y_token, sign,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token; `tokens`: rows of cos and sin, over which batches repeat. x and y may be the same."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    angle = (token % tokens).to(tl.int64) * (2 * HALF) + column
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)[None, :] * sign
    at = x_ptr + token.to(tl.int64) * x_token + head[:, None] * x_head + column[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    left = cast(first * cos, TY, EMULATE).to(tl.float32) - cast(second * sin, TY, EMULATE).to(tl.float32)
    right = cast(second * cos, TY, EMULATE).to(tl.float32) + cast(first * sin, TY, EMULATE).to(tl.float32)
    to = y_ptr + token.to(tl.int64) * y_token + head[:, None] * (2 * HALF) + column[None, :]
    tl.store(to, cast(left, TY, EMULATE), mask=mask)
    tl.store(to + HALF, cast(right, TY, EMULATE), mask=mask)


@dispatch.on_its_device
def _launch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Write x [B, S, heads, D] rotated into y, whose heads lie behind each other and whose batches are dense."""
    batch, tokens, heads, width = x.shape
    if x.stride(3) != 1 or x.stride(0) != tokens * x.stride(1):
        x = x.contiguous()
    half = width // 2
    grid = (batch * tokens, triton.cdiv(heads, HEADS))
    _rotate[grid](
        x, y, cos, sin, heads, cos.shape[0] * tokens, x.stride(1), x.stride(2), y.stride(1), sign,
        HALF=half, BLOCK=triton.next_power_of_2(half), HEADS=HEADS, EMULATE=INTERPRET, num_warps=2,
        enable_fp_fusion=False,
    )  # fmt: skip
