"""Who is measured by `bench kernels`, and on what: one function per kernel, returning a timed call for each contender.

Imported in a process of its own per contender, because Unsloth patches torch and transformers globally.
Deliberately not here: timing (kernels.py), any choice of ours by timing (dispatch.py ships a table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qmedtune.bench.elementwise import elementwise

CONTENDERS = ("limit", "qmedtune", "cublas", "bitsandbytes", "torch", "liger", "unsloth")
PACKAGES = {"bitsandbytes": "bitsandbytes", "liger": "liger_kernel", "unsloth": "unsloth"}

# Llama-3.1-8B: (name, out_features, in_features)
LINEARS = (("q/o", 4096, 4096), ("k/v", 1024, 4096), ("gate/up", 14336, 4096), ("down", 4096, 14336))
ROWS = (1, 4, 8, 16, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Timed:
    """One thing to time. setup() makes one set of buffers and the call on them; buffers are rotated to keep L2 cold."""

    kernel: str
    shape: str
    setup: Callable[[], Callable[[], object]]
    bytes: float  # least traffic with memory, the roofline's numerator
    flops: float = 0.0
    error: Callable[[], float] | None = None  # ||out - ref|| / ||ref|| against the plain reference


def half() -> torch.dtype:
    if torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float16


def quantize(n: int, k: int):
    """A random nested NF4 weight: (packed, quant state, NF4Weight)."""
    import bitsandbytes.functional as bnb
    from qmedtune_kernels import NF4Weight

    w = torch.randn(n, k, device="cuda", dtype=half()) / k**0.5
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    two = state.state2
    assert two is not None
    return packed, state, NF4Weight(packed, state.absmax, 64, (n, k), two.code, two.absmax, state.offset)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def cases(contender: str, quick: bool) -> Iterator[Timed]:
    """Everything that this contender can do; `quick` keeps one shape of each."""
    linears, few, many = LINEARS, ROWS, (4096, 8192)
    if quick:
        linears, few, many = LINEARS[2:3], (16, 256), (4096,)
    for name, n, k in linears:
        yield from dequantize(contender, name, n, k)
        for m in few:
            yield from multiply(contender, name, (n, k), m)
    for m in many:
        yield from layer(contender, m)
        yield from norms(contender, m, 4096)
        for row in elementwise(contender, m, half(), "cuda"):
            yield Timed(*row)


# --------------------------------------------------------------------- NF4


def dequantize(contender: str, name: str, n: int, k: int) -> Iterator[Timed]:
    import bitsandbytes.functional as bnb
    from qmedtune_kernels import nf4

    moved = n * k * (2 + 0.5 + 0.0159)
    shape = f"{name} {n}x{k}"

    def timed(kernel: str, call: Callable, exact: bool = True) -> Timed:
        def setup():
            packed, state, weight = quantize(n, k)
            out = torch.empty(n, k, dtype=half(), device="cuda")
            return lambda: call(packed, state, weight, out)

        def error() -> float:
            packed, state, weight = quantize(n, k)
            out = torch.full((n, k), float("nan"), dtype=half(), device="cuda")
            result = call(packed, state, weight, out)
            if result is None:
                result = out
            return relative_error(result, nf4.dequantize_reference(weight, half()))

        if not exact:
            return Timed(kernel, shape, setup, moved)
        return Timed(kernel, shape, setup, moved, error=error)

    if contender == "qmedtune":
        decodes = ["gather"]
        if torch.cuda.get_device_capability() >= (8, 0):
            decodes.append("shuffle")
        for decode in decodes:
            yield timed(f"dequantize:{decode}", lambda p, s, w, out, d=decode: nf4.dequantize(w, half(), out, d))
    elif contender == "bitsandbytes":
        yield timed("dequantize", lambda p, s, w, out: bnb.dequantize_4bit(p, s))
    elif contender == "unsloth":
        from unsloth.kernels.utils import fast_dequantize  # pyright: ignore[reportMissingImports]

        yield timed("dequantize", lambda p, s, w, out: fast_dequantize(p, s))
    elif contender == "limit":
        source = int(moved / 2)

        def copy():
            a = torch.empty(source, dtype=torch.uint8, device="cuda")
            b = torch.empty_like(a)
            return lambda: b.copy_(a)

        yield Timed("dequantize", shape, copy, moved)


def multiply(contender: str, name: str, weight: tuple[int, int], m: int) -> Iterator[Timed]:
    """Of x [m, k] with a weight of [n, k] elements."""
    from qmedtune_kernels import matmul, nf4

    n, k = weight
    moved, flops = n * k * 0.5159 + 2 * m * (n + k), 2.0 * m * n * k
    capable = torch.cuda.get_device_capability() >= (8, 0)

    def timed(kernel: str, call: Callable, backward: bool = False) -> Timed:
        width = k
        if backward:
            width = n

        def setup():
            packed, state, weight = quantize(n, k)
            x = torch.randn(m, width, dtype=half(), device="cuda")
            return lambda: call(x, packed, state, weight)

        def error() -> float:
            packed, state, weight = quantize(n, k)
            x = torch.randn(m, width, dtype=half(), device="cuda")
            w = nf4.dequantize_reference(weight, torch.float32).double()
            if not backward:
                w = w.t()
            return relative_error(call(x, packed, state, weight), x.double() @ w)

        return Timed(kernel, f"{name} {n}x{k} M={m}", setup, moved, flops, error)

    if contender == "qmedtune":
        if capable:
            yield timed("matmul", lambda x, p, s, w: matmul.matmul(x, w, path="fused"))
            yield timed("matmul backward", lambda x, p, s, w: matmul.matmul_backward(x, w, "fused"), True)
        if m <= 4:
            yield timed("matmul:few_rows", lambda x, p, s, w: matmul.matmul(x, w, path="few_rows"))
    elif contender == "cublas":
        decode = "gather"
        if capable:
            decode = "shuffle"  # the faster one, whatever is trusted yet
        wide = lambda w, x: nf4.dequantize_stack((w,), x.dtype, decode)  # noqa: E731
        yield timed("matmul", lambda x, p, s, w: F.linear(x, wide(w, x)))
        yield timed("matmul backward", lambda x, p, s, w: x @ wide(w, x), True)
    elif contender == "bitsandbytes":
        from bitsandbytes.autograd._functions import matmul_4bit

        def forward(x, packed, state, weight):
            with torch.no_grad():
                return matmul_4bit(x, packed.t(), quant_state=state)

        yield timed("matmul", forward)
    elif contender == "unsloth" and m == 1:
        from unsloth.kernels.utils import fast_gemv  # pyright: ignore[reportMissingImports]

        yield timed("matmul", lambda x, p, s, w: fast_gemv(x[None], p, s)[0])


# --------------------------------------------------------------------- the seven LoRA linears of a layer

GROUPS = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))


def layer(contender: str, m: int, rank: int = 16) -> Iterator[Timed]:
    """q/k/v, o, gate/up, down of Llama-3.1-8B, forward and forward + backward, r = 16."""
    if contender not in ("qmedtune", "cublas", "limit", "unsloth"):
        return
    flops, moved = 0.0, 0.0
    for widths, k in GROUPS:
        flops += 2.0 * m * sum(widths) * k
        moved += 0.5159 * sum(widths) * k + 2 * m * (sum(widths) + k)
    linear = {"qmedtune": _grouped, "cublas": _one_by_one, "limit": _bare, "unsloth": _unsloth}[contender]
    for kernel in ("lora layer forward", "lora layer forward+backward"):

        def setup(backward: bool = kernel.endswith("backward")):
            calls = []
            for widths, k in GROUPS:
                x = torch.randn(m, k, dtype=half(), device="cuda", requires_grad=backward)
                grads = [torch.randn(m, n, dtype=half(), device="cuda") for n in widths]
                calls.append((linear(widths, k, rank), x, grads))

            def run():
                for call, x, grads in calls:
                    with torch.set_grad_enabled(backward):
                        outputs = call(x)
                    if backward:
                        torch.autograd.backward(outputs, grads)

            return run

        passes = 1
        if kernel.endswith("backward"):
            passes = 2
        yield Timed(kernel, f"M={m} r={rank}", setup, moved, flops * passes)


def _adapters(widths: tuple[int, ...], k: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for n in widths:
        a = torch.randn(rank, k, device="cuda").div_(k**0.5).requires_grad_()
        b = torch.randn(n, rank, device="cuda").requires_grad_()
        pairs.append((a, b))
    return pairs


def _grouped(widths: tuple[int, ...], k: int, rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from qmedtune_kernels import Adapter, lora

    weights = tuple(quantize(n, k)[2] for n in widths)
    pairs, start = [], 0
    for n, (a, b) in zip(widths, _adapters(widths, k, rank), strict=True):
        pairs.append(Adapter(a, b, 2.0, start))
        start += n
    return lambda x: lora.linear(x, weights, pairs).split(widths, dim=-1)


class _Sequence(torch.autograd.Function):
    """The usual sequence: dequantise, cuBLAS, addmm_; per linear, dX accumulated by addmm_."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, a: Tensor, b: Tensor) -> Tensor:
        from qmedtune_kernels import nf4

        ctx.weight = weight
        ctx.save_for_backward(x, a, b)
        y = x @ nf4.dequantize_stack((weight,), x.dtype).t()
        return y.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=2.0)

    @staticmethod
    def backward(ctx, dy: Tensor):
        from qmedtune_kernels import nf4

        x, a, b = ctx.saved_tensors
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        dxa = dy @ b16
        da = (dxa.t() @ x).float().mul_(2.0)
        db = (dy.t() @ (x @ a16.t())).float().mul_(2.0)
        dx = dy @ nf4.dequantize_stack((ctx.weight,), x.dtype)
        return dx.addmm_(dxa, a16, alpha=2.0), None, da, db


def _one_by_one(widths: tuple[int, ...], k: int, rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    parts = [(quantize(n, k)[2], *pair) for n, pair in zip(widths, _adapters(widths, k, rank), strict=True)]
    return lambda x: tuple(_Sequence.apply(x, *part) for part in parts)


def _bare(widths: tuple[int, ...], k: int, rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """16-bit weights and no LoRA: what cuBLAS alone takes."""
    weights = [torch.randn(n, k, dtype=half(), device="cuda") for n in widths]
    return lambda x: tuple(F.linear(x, weight) for weight in weights)


def _unsloth(widths: tuple[int, ...], k: int, rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from unsloth.kernels.fast_lora import LoRA_W  # pyright: ignore[reportMissingImports]

    parts = [(*quantize(n, k)[:2], *pair) for n, pair in zip(widths, _adapters(widths, k, rank), strict=True)]
    return lambda x: tuple(LoRA_W.apply(x[None], p, s, a, b, 2.0)[0] for p, s, a, b in parts)


# --------------------------------------------------------------------- norms


def norms(contender: str, m: int, columns: int) -> Iterator[Timed]:
    """Forward (least traffic 4 D bytes a row), backward with a frozen weight (6 D), residual add + norm (8 D)."""
    forward = _norm(contender)
    if contender == "limit":
        for kernel, elements in (("rms_norm forward", 2), ("rms_norm backward", 3), ("add_rms_norm forward", 4)):
            count = m * columns * elements

            def copy(count: int = count):
                a = torch.empty(count, dtype=torch.uint8, device="cuda")
                b = torch.empty_like(a)
                return lambda: b.copy_(a)

            yield Timed(kernel, f"{m}x{columns}", copy, 2.0 * count)
        return
    if forward is None:
        return
    shape = f"{m}x{columns}"
    make = lambda: torch.randn(m, columns, dtype=half(), device="cuda")  # noqa: E731
    weight = torch.rand(columns, dtype=half(), device="cuda")

    def forward_setup():
        x = make()
        return lambda: forward(x, weight)

    def backward_setup():
        x, dy = make().requires_grad_(), make()
        y = forward(x, weight)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)

    def add_setup():
        x, residual = make(), make()
        if contender == "qmedtune":
            from qmedtune_kernels.rms_norm import add_rms_norm

            return lambda: add_rms_norm(x, residual, weight, 1e-5)
        return lambda: forward(x + residual, weight)

    yield Timed("rms_norm forward", shape, forward_setup, 4.0 * m * columns)
    yield Timed("rms_norm backward", shape, backward_setup, 6.0 * m * columns)
    yield Timed("add_rms_norm forward", shape, add_setup, 8.0 * m * columns)


def _norm(contender: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    if contender == "qmedtune":
        from qmedtune_kernels.rms_norm import rms_norm

        return lambda x, weight: rms_norm(x, weight, 1e-5)
    if contender == "torch":
        return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5)
    if contender == "liger":
        from liger_kernel.transformers.functional import liger_rms_norm  # pyright: ignore[reportMissingImports]

        return lambda x, weight: liger_rms_norm(x, weight, 1e-5, 0.0, "llama", False)
    if contender == "unsloth":
        from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm  # pyright: ignore[reportMissingImports]

        return lambda x, weight: Fast_RMS_Layernorm.apply(x, weight, 1e-5, False)
    return None
