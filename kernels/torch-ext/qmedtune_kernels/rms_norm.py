"""RMSNorm and residual-add + RMSNorm, forward and backward, with the weight frozen or trained.

Rounding follows transformers' LlamaRMSNorm: the normalised row is rounded to the input dtype, then multiplied by the
weight. The add variant returns the sum too, because the residual stream goes on with it; its backward adds the two
gradients in the same pass (8 D bytes a row instead of 12 D, kernels.md section 3).
Deliberately not here: LayerNorm, Gemma's (1 + w) rounding, quantised outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch forward: x [..., D] -> (y [..., D] in x's dtype, rstd [..., 1] in fp32)."""
    x32 = x.float()
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * rstd).to(x.dtype) * weight.to(x.dtype), rstd


def reference_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, ds: Tensor | None) -> Tensor:
    """dX [..., D] in x's dtype; `ds` is the gradient that reached the sum directly, added here."""
    m = dy.float() * weight
    xhat = x.float().mul_(rstd)
    dot = (m * xhat).mean(-1, keepdim=True)
    dx = m.sub_(xhat.mul_(dot)).mul_(rstd)
    if ds is not None:
        dx += ds
    return dx.to(x.dtype)


def reference_dweight(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dW [D] in fp32: the sum over rows of dY times the normalised row as it was rounded forward."""
    normed = (x.float() * rstd).to(x.dtype)
    return (dy.float() * normed).flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, path: str) -> Tensor:
        y, rstd = reference(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.path = path
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (*_backward(ctx, dy, None), None, None)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, path: str) -> tuple[Tensor, Tensor]:
        total = x + residual
        y, rstd = reference(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.path = path
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, ds: Tensor):
        dx, dw = _backward(ctx, dy, ds)
        return dx, dx, dw, None, None


def _backward(ctx, dy: Tensor, ds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    wants_dw = ctx.needs_input_grad[1 if ds is None else 2]
    dx = reference_backward(dy, x, weight, rstd, ds)
    return dx, reference_dweight(dy, x, rstd).to(weight.dtype) if wants_dw else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, path: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, differentiable in x and weight.

    x [..., D] bf16, fp16 or fp32; weight [D] of any of these (rounded to x's dtype); returns [..., D] in x's dtype.
    """
    return _RMSNorm.apply(x, weight, eps, path)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, path: str = "auto") -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both differentiable; x and residual [..., D] of one dtype."""
    return _AddRMSNorm.apply(x, residual, weight, eps, path)
