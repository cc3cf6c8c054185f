"""RMSNorm and residual-add + RMSNorm, forward and backward, with the weight frozen or trained.

Rounding follows transformers' LlamaRMSNorm: the normalised row is rounded to the input dtype, then multiplied by the
weight. The add variant returns the sum too, because the residual stream goes on with it; its backward adds the two
gradients in the same pass (8 D bytes a row instead of 12 D).
Deliberately not here: LayerNorm, Gemma's (1 + w) rounding, quantised outputs.
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


def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch forward: x [..., D] -> (y [..., D] in x's dtype, rstd [..., 1] in fp32)."""
    x32 = x.float()
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * rstd).to(x.dtype) * weight.to(x.dtype), rstd


def reference_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, ds: Tensor | None) -> Tensor:
    """dX [..., D] in x's dtype; `ds` is the gradient that reached the sum directly, added here."""
    m = dy.float() * weight.float()
    xhat = x * rstd  # promoted to fp32
    dot = (m * xhat).mean(-1, keepdim=True)
    dx = m.sub_(xhat.mul_(dot)).mul_(rstd)
    if ds is not None:
        dx += ds
    return dx.to(x.dtype)


def reference_dweight(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dW [D] in fp32: the sum over rows of dY times the normalised row as it was rounded forward."""
    normed = (x * rstd).to(x.dtype)
    return (dy.float() * normed).flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, triton_path: bool) -> Tensor:
        y, rstd, _ = _launch_forward(x, None, weight, eps) if triton_path else (*reference(x, weight, eps), x)
        ctx.save_for_backward(x, weight, rstd)
        ctx.triton_path = triton_path
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (*_backward(ctx, dy, None, ctx.needs_input_grad[1]), None, None)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, triton_path: bool):
        if triton_path:
            y, rstd, total = _launch_forward(x, residual, weight, eps)
        else:
            total = x + residual
            y, rstd = reference(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.triton_path = triton_path
        ctx.set_materialize_grads(False)  # behind the last layer nobody else reads the sum: no zeros to be added
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor | None, ds: Tensor | None):
        if dy is None:
            return ds, ds, None, None, None
        dx, dw = _backward(ctx, dy, ds, ctx.needs_input_grad[2])
        return dx, dx, dw, None, None


def _backward(ctx, dy: Tensor, ds: Tensor | None, wants_dweight: bool) -> tuple[Tensor, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    if ctx.triton_path:
        return _launch_backward(dy, x, weight, rstd, ds, wants_dweight)
    dx = reference_backward(dy, x, weight, rstd, ds)
    return dx, reference_dweight(dy, x, rstd).to(weight.dtype) if wants_dweight else None


def _path(x: Tensor, weight: Tensor, path: str, residual: Tensor | None = None) -> bool:
    """Whether Triton runs; ValueError on tensors that do not fit together."""
    if x.shape[-1:] != weight.shape or x.dtype not in DTYPES or x.device != weight.device:
        raise ValueError(
            f"x, weight: given {tuple(x.shape)} {x.dtype} on {x.device} and {tuple(weight.shape)} on {weight.device}; "
            "allowed [..., D] in bf16, fp16 or fp32 and [D] on one device"
        )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        given = f"{tuple(residual.shape)} {residual.dtype} on {residual.device}"
        raise ValueError(f"residual: given {given}; allowed {tuple(x.shape)} {x.dtype} on {x.device}, as x")
    return dispatch.uses_triton(x.device, path) and x.numel() > 0 and x.shape[-1] <= MAX_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, eps: float, path: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, differentiable in x and weight.

    x [..., D] bf16, fp16 or fp32; weight [D] of any of these (rounded to x's dtype); returns [..., D] in x's dtype.
    path: "auto", "triton" or "reference" (dispatch.py). Raises ValueError where shapes, dtypes or devices do not fit.
    """
    return _RMSNorm.apply(x, weight, eps, _path(x, weight, path))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, path: str = "auto") -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both differentiable; x and residual [..., D] of one dtype."""
    return _AddRMSNorm.apply(x, residual, weight, eps, _path(x, weight, path, residual))


# --------------------------------------------------------------------- kernels

MAX_COLUMNS = 32768  # one program holds a row; wider rows take the reference
PARTIAL_PROGRAMS = 256  # dW: programs that each sum a strip of rows, then one reduction in fixed order


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr, columns, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One row per program; 8 D bytes with the add, 4 D without. No constant depends on the number of rows."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(x_ptr + row + column, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row + column, mask=mask, other=0.0)
        x = cast(x.to(tl.float32) + residual.to(tl.float32), TY, EMULATE)
        tl.store(total_ptr + row + column, x, mask=mask)
    x = x.to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0, eviction_policy="evict_last")
    weight = cast(weight.to(tl.float32), TY, EMULATE)
    normed = cast(x * rstd, TY, EMULATE).to(tl.float32)
    tl.store(y_ptr + row + column, cast(normed * weight.to(tl.float32), TY, EMULATE), mask=mask)


@triton.jit
def _backward_rows(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, ds_ptr, dx_ptr, columns,
    BLOCK: tl.constexpr, ADD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dX, one row per program: full occupancy, where Liger walks rows with one program per SM."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    dy = tl.load(dy_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    m = dy * weight
    xhat = x * rstd
    dx = rstd * (m - xhat * (tl.sum(m * xhat, axis=0) / columns))
    if ADD:
        dx += tl.load(ds_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row + column, cast(dx, TY, EMULATE), mask=mask)


@triton.jit
def _dweight_partial(dy_ptr, x_ptr, rstd_ptr, partial_ptr, rows, columns, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """Rows p, p + P, p + 2 P, ... of a strip of columns, summed in fp32."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64) * columns
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        dy = tl.load(dy_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        total += dy * cast(x * tl.load(rstd_ptr + row), TY, EMULATE).to(tl.float32)
        start += tl.num_programs(0).to(tl.int64) * columns
    tl.store(partial_ptr + tl.program_id(0) * columns + column, total, mask=mask)


def num_warps(block: int) -> int:
    """8 warps for rows of 4096 (48 of 64 warps resident by registers), 16 from 8192 on."""
    return min(16, max(1, block // 512))


@dispatch.on_its_device
def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    total = torch.empty_like(x) if residual is not None else x
    residual = residual.contiguous() if residual is not None else x
    _forward[(x.numel() // columns,)](
        x, residual, weight, total, y, rstd, columns, eps,
        BLOCK=block, ADD=total is not x, EMULATE=INTERPRET, num_warps=num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return y, rstd, total


@dispatch.on_its_device
def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, ds: Tensor | None, wants_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows, block = x.numel() // columns, triton.next_power_of_2(columns)
    dx = torch.empty_like(x)
    options = {"EMULATE": INTERPRET, "enable_fp_fusion": True}
    _backward_rows[(rows,)](
        dy, x, weight, rstd, dy if ds is None else ds.contiguous(), dx, columns,
        BLOCK=block, ADD=ds is not None, num_warps=num_warps(block), **options,
    )  # fmt: skip
    if not wants_dweight:
        return dx, None
    programs, strip = min(rows, PARTIAL_PROGRAMS), min(block, 1024)
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    grid = (programs, triton.cdiv(columns, strip))
    _dweight_partial[grid](dy, x, rstd, partial, rows, columns, BLOCK=strip, num_warps=4, **options)
    return dx, partial.sum(0).to(weight.dtype)
