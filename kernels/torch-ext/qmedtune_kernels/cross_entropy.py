"""Next-token loss of hidden states under a frozen output matrix, without the full logits: two products, not three.

A frozen head needs no gradient of its own, so the gradient of a token's loss in its hidden state is made in the forward
pass, while its logits are at hand: logits = h W^T, then (softmax - onehot) W. Recomputing them in the backward pass, as
the usual chunked losses do, multiplies a third time (3 % of a step of an 8B model).
A few rows at a time: on a GPU a kernel turns fp32 logits into loss and gradient in two passes; on a CPU the rows of a
piece stay in the cache. Deliberately not here: a trained head (modeling/loss.py), label smoothing, soft caps.
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

# Logits of one piece. CPU: 128 rows of 49,152 take 452 ms for 1,024 tokens where 32 rows take 626 and 256 take 530 (the
# two products alone 315; one thread of an EPYC, bf16). GPU: 512 rows of 128,256 in fp32 are 256 MiB.
CPU_LOGITS, GPU_LOGITS = 2**22 + 2**21, 2**26
BLOCK = 4096  # columns at a time; 8 warps, 16 elements a thread


def piece_rows(vocabulary: int, on_gpu: bool) -> int:
    """Rows whose logits are held at once."""
    return max(1, (GPU_LOGITS if on_gpu else CPU_LOGITS) // vocabulary)


def reference(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: fp32 logits [R, V] (overwritten), int64 targets [R] -> (loss fp32 [R], gradient [R, V])."""
    logs = logits.log_softmax(-1)
    loss = logs.gather(1, targets[:, None]).neg_()[:, 0]
    chances = logs.exp_()
    chances[torch.arange(len(targets), device=targets.device), targets] -= 1
    return loss, chances.to(dtype)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, triton_path: bool) -> Tensor:
        trains = ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if trains else None
        rows = piece_rows(weight.shape[0], hidden.is_cuda)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = _logits(hidden[piece], weight)
            if triton_path:
                losses[piece], dlogits = _launch(logits, targets[piece], hidden.dtype)
            else:
                losses[piece], dlogits = reference(logits, targets[piece], hidden.dtype)
            if gradient is not None:
                torch.mm(dlogits, weight, out=gradient[piece])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, dloss: Tensor):
        (gradient,) = ctx.saved_tensors
        scaled = torch.mul(gradient, dloss[:, None], out=torch.empty_like(gradient))  # in fp32, rounded once
        return scaled, None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 [R, V]; on a CPU 16-bit products are rounded once more, its GEMM has no fp32 output."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def frozen_head_nll(hidden: Tensor, weight: Tensor, targets: Tensor, path: str = "auto") -> Tensor:
    """Negative log-likelihood, fp32 [T], of targets int64 [T] under softmax(hidden weight^T); differentiable in hidden.

    hidden [T, D] bf16, fp16 or fp32; weight [V, D] in hidden's dtype, without a gradient. path: "auto", "triton" or
    "reference" (dispatch.py). Raises ValueError where shapes, dtypes or devices do not fit, or weight wants a gradient.
    """
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and hidden.dtype in DTYPES
    alike = (weight.dtype, weight.device, targets.device) == (hidden.dtype, hidden.device, hidden.device)
    if not (fits and alike and targets.shape == hidden.shape[:1]) or weight.requires_grad:
        raise ValueError(
            f"hidden, weight, targets: given {tuple(hidden.shape)} {hidden.dtype}, {tuple(weight.shape)} "
            f"{weight.dtype} and {tuple(targets.shape)}; allowed [T, D] and a frozen [V, D] of one dtype, and [T], on "
            "one device"
        )
    triton_path = dispatch.uses_triton(hidden.device, path) and hidden.numel() > 0
    return _FrozenHead.apply(hidden, weight, targets, triton_path)


# --------------------------------------------------------------------- kernels


@triton.jit
def _rows(
    logits_ptr, targets, losses, gradient_ptr, columns, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One row per program: largest logit and sum of exponentials on the way through, then the gradient."""
    TY: tl.constexpr = gradient_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: no lane subtracts infinities
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        x = tl.load(logits_ptr + row + start + at, mask=inside, other=-3.0e38)
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.where(inside, tl.exp(x - larger), 0.0)
        most = larger
    largest = tl.max(most, axis=0)
    lse = largest + tl.log(tl.sum(total * tl.exp(most - largest), axis=0))
    target = tl.load(targets + tl.program_id(0)).to(tl.int32)
    tl.store(losses + tl.program_id(0), lse - tl.load(logits_ptr + row + target))
    for start in range(0, columns, BLOCK):
        column = start + at
        x = tl.load(logits_ptr + row + column, mask=column < columns, other=0.0)
        chance = tl.exp(x - lse) - tl.where(column == target, 1.0, 0.0)
        tl.store(gradient_ptr + row + column, cast(chance, TY, EMULATE), mask=column < columns)


@dispatch.on_its_device
def _launch(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    losses, gradient = logits.new_empty(rows), torch.empty_like(logits, dtype=dtype)
    _rows[(rows,)](
        logits, targets.contiguous(), losses, gradient, columns,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)), EMULATE=INTERPRET, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return losses, gradient
