"""SwiGLU on the stacked output of gate and up: silu(gate) * up, forward and backward, one launch each.

gate and up are the halves of one [M, 2 I] tensor, as `lora.linear` leaves them, and the gradient comes back as one: no
concatenation. Only that tensor is kept; silu(gate) is computed again (plain PyTorch operations keep it: I more).
Rounding follows transformers' LlamaMLP: silu is rounded to the input's dtype, then multiplied.
"""

# Triton's annotations type kernels as plain functions of tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .decode import INTERPRET, cast
from .language import tl, triton
from .nf4 import DTYPES

BLOCK = 1024  # 4 warps, 8 elements (16 bytes) a thread


def reference(gate_up: Tensor) -> Tensor:
    """Plain PyTorch: [..., 2 I] -> [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradients of gate and up side by side, [..., 2 I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up)
    dgate, dup = gradient.chunk(2, dim=-1)
    torch.mul(dy, F.silu(gate), out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return gradient


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, triton_path: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.triton_path = triton_path
        return _launch_forward(gate_up) if triton_path else reference(gate_up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (gate_up,) = ctx.saved_tensors
        return (_launch_backward if ctx.triton_path else reference_backward)(dy, gate_up), None


def swiglu(gate_up: Tensor, path: str = "auto") -> Tensor:
    """silu(gate) * up [..., I] of gate_up [..., 2 I] (gate first), differentiable; bf16, fp16 or fp32.

    path: "auto", "triton" or "reference" (dispatch.py). Raises ValueError on an odd width or another dtype.
    """
    if gate_up.shape[-1] % 2 or gate_up.dtype not in DTYPES:
        given = f"{tuple(gate_up.shape)} {gate_up.dtype}"
        raise ValueError(f"gate_up: given {given}; allowed [..., 2 I] in bf16, fp16 or fp32")
    return _SwiGLU.apply(gate_up, dispatch.uses_triton(gate_up.device, path) and gate_up.numel() > 0)


# --------------------------------------------------------------------- kernels


@triton.jit
def _forward(x_ptr, y_ptr, columns, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """One strip of a row of 6 I bytes (16 bit): gate and up in, product out."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate = tl.load(x_ptr + 2 * row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + 2 * row + columns + column, mask=mask, other=0.0).to(tl.float32)
    silu = cast(gate * tl.sigmoid(gate), TY, EMULATE).to(tl.float32)
    tl.store(y_ptr + row + column, cast(silu * up, TY, EMULATE), mask=mask)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, columns, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """10 I bytes a row (16 bit): dy, gate, up in, both gradients out."""
    TY: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    dy = tl.load(dy_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + 2 * row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + 2 * row + columns + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = cast(gate * sigmoid, TY, EMULATE).to(tl.float32)
    dsilu = cast(dy * up, TY, EMULATE).to(tl.float32)
    dgate = dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx_ptr + 2 * row + column, cast(dgate, TY, EMULATE), mask=mask)
    tl.store(dx_ptr + 2 * row + columns + column, cast(dy * silu, TY, EMULATE), mask=mask)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return rows, triton.cdiv(columns, BLOCK)


@dispatch.on_its_device
def _launch_forward(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    columns = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], columns)
    grid = _grid(y.numel() // columns, columns)
    _forward[grid](gate_up, y, columns, BLOCK=BLOCK, EMULATE=INTERPRET, num_warps=4, enable_fp_fusion=True)
    return y


@dispatch.on_its_device
def _launch_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    dx, columns = torch.empty_like(gate_up), gate_up.shape[-1] // 2
    grid = _grid(dy.numel() // columns, columns)
    _backward[grid](dy, gate_up, dx, columns, BLOCK=BLOCK, EMULATE=INTERPRET, num_warps=4, enable_fp_fusion=True)
    return dx
