"""Linear layers with LoRA on a frozen weight: Y = X W^T + b + sum_i s_i (X A_i^T) B_i^T, forward and backward.

All projections that read one X (q, k, v; gate, up) are one call: their weights are stacked along the output, their
adapters along the rank, so X is read once and dX written once. The LoRA side traffic of the usual sequence costs more
than the 4-bit decode at training sizes.
A and B are fp32 masters; the products run in X's dtype; dA and dB come back in the masters' dtype. Only X (or what it
can be made from again: `Remake`), X A^T and the 16-bit copies of A and B are kept; W is dequantised again.
Adapters join a product in one of two ways: `addmm_` reads and writes the whole result once more (4 M N bytes forward),
or the input is copied beside its low-rank part (4 M K) and one GEMM contracts over both: [X | X A^T] [W | B]^T.
Deliberately not here: gradients of W, DoRA and other LoRA variants, dropout (the caller drops X: see `linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, matmul, nf4
from .nf4 import NF4Weight

Weight = Tensor | tuple[NF4Weight, ...] | None
Copies = dict[torch.dtype, tuple[Tensor, Tensor]]
"""What `stack_a` and `stack_b` gave for the adapters of one call, by dtype."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair. a [r, K], b [n, r], any float dtype; it adds to output columns start .. start + n."""

    a: Tensor
    b: Tensor
    scaling: float
    start: int = 0


@dataclass(frozen=True)
class Remake:
    """How to make x again in the backward pass instead of keeping it: function(*tensors) gives the same [M, K]."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def out_features(weight: Weight, adapters: Sequence[Adapter]) -> int:
    """Width of the stacked output; without a weight, as far as the adapters reach."""
    if isinstance(weight, Tensor):
        return weight.shape[0]
    if weight is not None:
        return sum(w.shape[0] for w in weight)
    return max(adapter.start + adapter.b.shape[0] for adapter in adapters)


def _times(
    x: Tensor, weight: Tensor | tuple[NF4Weight, ...], bias: Tensor | None, path: str, trains: bool = True
) -> Tensor:
    """X W^T + bias [M, N]; few rows through the fused matmul, else NF4 goes to a scratch buffer and one GEMM."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    way = matmul.choose(x, weight[0], path, trains)
    if way in ("reference", "dequantize"):
        return F.linear(x, nf4.dequantize_stack(weight, x.dtype, path), bias)
    parts = [matmul.matmul(x, part, None, way) for part in weight]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if bias is None else y.add_(bias)


def _times_transposed(dy: Tensor, weight: Tensor | tuple[NF4Weight, ...], path: str) -> Tensor:
    """dY W [M, K]. A group contracts over all its rows at once, so dX is written once."""
    if isinstance(weight, Tensor):
        return dy @ weight
    if len(weight) == 1 and matmul.choose(dy, weight[0], path) == "fused":
        return matmul.matmul_backward(dy, weight[0], "fused")
    return dy @ nf4.dequantize_stack(weight, dy.dtype, "triton" if path == "fused" else path)


ALIGN = 64  # elements: rows start on 128 bytes, a line of L2; Triton's stores of W ask for 16 elements, TMA for 8


def _widens(x: Tensor, weight: Weight, path: str, read: int, written: int, trains: bool = True) -> bool:
    """Whether adapters join the contraction: copying the input (`read` columns) must cost less than passing over the
    result (`written` columns), and W must be decoded into a buffer that has room beside it."""
    if not isinstance(weight, tuple) or matmul.choose(x, weight[0], path, trains) not in ("dequantize", "reference"):
        return False
    return dispatch.widens(x.device, read, written)


def _beside(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """([x | x factor^T | 0], the middle part as a view), the width a multiple of ALIGN."""
    (m, k), r = x.shape, factor.shape[0]
    wide = x.new_empty(m, k + -(-r // ALIGN) * ALIGN)
    wide[:, :k] = x
    wide[:, k + r :] = 0
    torch.mm(x, factor.t(), out=wide[:, k : k + r])
    return wide, wide[:, k : k + r]


def _wide_product(x: Tensor, weight: tuple[NF4Weight, ...], bias: Tensor | None, a: Tensor, b: Tensor, path: str):
    """(Y, X, X A^T) of [X | X A^T] [W | B]^T + bias; X and X A^T are views of one buffer."""
    wide, xa = _beside(x, a)
    k, r = x.shape[1], a.shape[0]
    stacked = nf4.dequantize_stack(weight, x.dtype, path, beside=wide.shape[1] - k)
    stacked[:, k : k + r], stacked[:, k + r :] = b, 0
    return F.linear(wide, stacked, bias), wide[:, :k], xa


def _wide_product_transposed(dy: Tensor, weight: tuple[NF4Weight, ...], a: Tensor, b: Tensor, path: str):
    """(dX, dY B) of [dY | dY B] [W ; A]."""
    wide, dxa = _beside(dy, b.t())
    n, r = dy.shape[1], a.shape[0]
    stacked = nf4.dequantize_stack(weight, dy.dtype, path, below=wide.shape[1] - n)
    stacked[n : n + r], stacked[n + r :] = a, 0
    return wide @ stacked, dxa


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous [n_i, K] tensors of one dtype as one [sum n_i, K] view, where they lie behind each other in memory."""
    first = tensors[0]
    end, rows = first.data_ptr(), 0
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.numel() * tensor.element_size()
        rows += tensor.shape[0]
    if first.storage_offset() + rows * first.shape[1] > first.untyped_storage().nbytes() // first.element_size():
        return None
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def lay_together(tensors: Sequence[Tensor]) -> None:
    """Move the data of [n_i, K] tensors of one dtype into one buffer, so that `adjacent` finds them."""
    joined = torch.cat([tensor.detach() for tensor in tensors])
    start = 0
    for tensor in tensors:
        tensor.data = joined[start : start + tensor.shape[0]]
        start += tensor.shape[0]


def stack_a(adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """[R, K]: s_i A_i on top of each other. The scaling is folded in before rounding, so it costs no pass over Y."""
    together = None
    if len(adapters) == 1:
        together = adapters[0].a.detach()
    elif len({adapter.scaling for adapter in adapters}) == 1:
        together = adjacent([adapter.a for adapter in adapters])
    if together is not None:  # one operation in place of three
        a = together.float()
        return torch.mul(a, adapters[0].scaling, out=torch.empty_like(a, dtype=dtype))
    stacked = torch.cat([adapter.a.detach() for adapter in adapters]).float()
    return _scale_rows(stacked, [(adapter.scaling, adapter.a.shape[0]) for adapter in adapters]).to(dtype)


def _scale_rows(stacked: Tensor, parts: Sequence[tuple[float, int]]) -> Tensor:
    """Multiply in place each part of (scaling, rows) by its scaling; one operation where all are equal."""
    if len({scaling for scaling, _ in parts}) == 1:
        return stacked.mul_(parts[0][0])
    row = 0
    for scaling, rows in parts:
        stacked[row : row + rows].mul_(scaling)
        row += rows
    return stacked


def stack_b(adapters: Sequence[Adapter], rows: int, dtype: torch.dtype) -> Tensor:
    """[N, R]: B_i at its output rows and its rank columns, zero elsewhere."""
    first = adapters[0].b.detach()
    if len(adapters) == 1 and first.shape[0] == rows:
        return first.to(dtype)
    stacked = first.new_zeros(rows, sum(adapter.b.shape[1] for adapter in adapters), dtype=dtype)
    column = 0
    for adapter in adapters:
        n, r = adapter.b.shape
        stacked[adapter.start : adapter.start + n, column : column + r] = adapter.b.detach()
        column += r
    return stacked


def _stacked(
    adapters: Sequence[Adapter], rows: int, dtype: torch.dtype, copies: Copies | None
) -> tuple[Tensor, Tensor]:
    """(stack_a, stack_b), made once where there is a place to keep them."""
    if copies is None:
        return stack_a(adapters, dtype), stack_b(adapters, rows, dtype)
    if dtype not in copies:
        copies[dtype] = stack_a(adapters, dtype), stack_b(adapters, rows, dtype)
    return copies[dtype]


def _mm32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32. On the CPU a 16-bit product is rounded once more: its GEMM has no fp32 output."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


class _Linear(torch.autograd.Function):
    """Positional: x [M, K], weight, bias, layout = ((scaling, start), ...), path, trains, remake, copies, A_1, B_1,
    A_2, ..."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Weight, bias: Tensor | None, layout, path: str, trains: bool, remake, copies,
        *ab: Tensor,
    ) -> Tensor:  # fmt: skip
        adapters = [Adapter(ab[2 * i], ab[2 * i + 1], *where) for i, where in enumerate(layout)]
        trains_a, trains_b = any(ctx.needs_input_grad[8::2]), any(ctx.needs_input_grad[9::2])
        a = b = xa = None
        kept_x = x
        if not adapters:
            assert weight is not None
            y = _times(x, weight, bias, path, trains)
        else:
            n = out_features(weight, adapters)
            a, b = _stacked(adapters, n, x.dtype, copies)
            if isinstance(weight, tuple) and _widens(x, weight, path, x.shape[1], n, trains):
                y, kept_x, xa = _wide_product(x, weight, bias, a, b, path)
                xa = xa if trains_a and remake is None else xa.clone()  # a view would keep the whole buffer
            else:
                xa = x @ a.t()
                y = xa @ b.t() if weight is None else _times(x, weight, bias, path, trains).addmm_(xa, b.t())
        kept = () if not (adapters and trains_a) else (kept_x,) if remake is None else remake.tensors
        kept_weight = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(xa if trains_b else None, a, b, kept_weight, *(tensor.detach() for tensor in kept))
        ctx.path, ctx.nf4 = path, None if isinstance(weight, Tensor) else weight
        ctx.remake = None if remake is None else remake.function
        ctx.adapters = [(*where, *b.shape) for where, b in zip(layout, ab[1::2], strict=True)]
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        xa, a, b, weight, *kept = ctx.saved_tensors
        weight = ctx.nf4 if weight is None else weight
        needs = ctx.needs_input_grad
        dx, dxa = _input_gradient(dy.contiguous(), weight, a, b, ctx.path, needs[0])
        da = db = None
        if kept and dxa is not None:
            x = ctx.remake(*kept).to(dxa.dtype).view(len(dxa), -1) if ctx.remake else kept[0]
            da = _mm32(dxa.t(), x)
        if xa is not None:
            db = _mm32(dy.contiguous().t(), xa)
        dbias = dy.float().sum(0) if needs[2] else None
        return dx, None, dbias, None, None, None, None, None, *_split(ctx.adapters, da, db, needs[8:])


def _input_gradient(dy: Tensor, weight: Weight, a: Tensor | None, b: Tensor | None, path: str, wanted: bool):
    """(dX or None, dY B or None): dX = dY W + (dY B) A."""
    if a is None or b is None:
        return (_times_transposed(dy, weight, path) if wanted and weight is not None else None), None
    if wanted and isinstance(weight, tuple) and _widens(dy, weight, path, dy.shape[1], a.shape[1]):
        return _wide_product_transposed(dy, weight, a, b, path)
    dxa = dy @ b
    if not wanted:
        return None, dxa
    return dxa @ a if weight is None else _times_transposed(dy, weight, path).addmm_(dxa, a), dxa


def _split(adapters, da: Tensor | None, db: Tensor | None, needs: Sequence[bool]):
    """Cut the stacked gradients apart: dA_i = s_i (dY B)_i^T X, dB_i = dY_i^T (s_i X A_i^T), in fp32."""
    if da is not None:
        da = _scale_rows(da.float(), [(scaling, r) for scaling, _, _, r in adapters])
    column = 0
    for index, (_, start, n, r) in enumerate(adapters):
        rank = slice(column, column + r)
        yield da[rank] if da is not None and needs[2 * index] else None
        yield db[start : start + n, rank].float() if db is not None and needs[2 * index + 1] else None
        column += r


def _described(weight: Weight) -> str:
    """For messages alone: making it at each call took longer than the check."""
    if isinstance(weight, Tensor):
        return f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
    return ", ".join(f"{list(part.shape)} on {part.packed.device}" for part in weight or ())


def _check(x: Tensor, weight: Weight, adapters: Sequence[Adapter], bias: Tensor | None) -> None:
    if x.dtype not in nf4.DTYPES:
        raise ValueError(f"x: given {x.dtype}; allowed bf16, fp16 or fp32")
    if not adapters and (weight is None or isinstance(weight, tuple) and not weight):
        raise ValueError("weight: given none, and no adapters; allowed at least one of them")
    rows, columns = out_features(weight, adapters), x.shape[-1]
    if isinstance(weight, Tensor):
        fits = weight.dim() == 2 and weight.shape[1] == columns and (weight.dtype, weight.device) == (x.dtype, x.device)
    else:
        parts = weight or ()
        fits = all(part.shape[1] == columns and part.packed.device == x.device for part in parts)
    if not fits:
        given = _described(weight)
        raise ValueError(f"weight: given {given}; allowed [N, {columns}] on {x.device}, in {x.dtype} if dense, as x is")
    for adapter in adapters:
        (r, k), (n, r2) = adapter.a.shape, adapter.b.shape
        devices = adapter.a.device, adapter.b.device
        if k != columns or r != r2 or adapter.start < 0 or adapter.start + n > rows or {*devices} != {x.device}:
            raise ValueError(
                f"adapters: given A [{r}, {k}] on {devices[0]}, B [{n}, {r2}] on {devices[1]} at {adapter.start}; "
                f"allowed A [r, {columns}], B [n, r] on {x.device} with 0 <= start and start + n <= {rows}"
            )
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise ValueError(f"bias: given {tuple(bias.shape)} on {bias.device}; allowed ({rows},) on {x.device}")


def linear(
    x: Tensor,
    weight: Weight,
    adapters: Sequence[Adapter] = (),
    bias: Tensor | None = None,
    path: str = "auto",
    remake: Remake | None = None,
    *,
    copies: Copies | None = None,
) -> Tensor:
    """Y = X W^T + bias + sum_i s_i (X A_i^T) B_i^T, differentiable in x, bias, A and B.

    x [..., K] bf16, fp16 or fp32; weight: a dense [N, K] in x's dtype, NF4 weights to be stacked along N, or None for
    the LoRA part alone (dropout: add `linear(dropout(x), None, [adapter])` to the rest); returns [..., N] in x's dtype.
    Under autocast x and a dense weight are first cast to the autocast dtype. path: "auto", "triton" or "reference"
    (dispatch.py), or "fused": the fused matmul whatever the number of rows (a group's backward still dequantises).
    remake: how to make x again in the backward pass; then x is not kept (what it is made from is).
    copies: where the stacked A and B are kept for the next call with the same adapters; for whoever knows that nothing
    has written to A and B since.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        weight = weight.to(x.dtype) if isinstance(weight, Tensor) else weight
        with torch.autocast(device, enabled=False):
            return linear(x, weight, adapters, bias, path, remake, copies=copies)
    _check(x, weight, adapters, bias)
    bias = bias if bias is None else bias.to(x.dtype)
    layout = tuple((adapter.scaling, adapter.start) for adapter in adapters)
    tensors = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
    wanted = (x, *tensors) if bias is None else (x, bias, *tensors)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, layout, path, trains, remake, copies, *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])
