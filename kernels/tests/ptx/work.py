"""Pieces of work for the executor: every kernel variant, and its answer in float64 (or bitsandbytes' bits)."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from qmedtune_kernels import Adapter, NF4Weight, lora, matmul, nf4, startup_check
from qmedtune_kernels.cross_entropy import frozen_head_nll
from qmedtune_kernels.rms_norm import add_rms_norm, rms_norm
from qmedtune_kernels.rope import rotary_qkv, rotate
from qmedtune_kernels.swiglu import swiglu
from torch import Tensor

from .launch import Device, gpu
from .memory import Fault

TARGETS = (75, 80, 86, 89, 90, 120)
TENSOR_CORES = TARGETS[1:]  # the fused products and inline assembly
# ||out - ref|| / ||ref||, the output's own rounding included, as in kernels/tests
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
LARGEST = 4.0  # times the limit: what no element may be off by, of its size and the reference's rms
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Answer:
    """What a piece of work gave, and what it should: exact means to the bit."""

    given: Tensor
    wanted: Tensor
    exact: bool = False

    def error(self) -> float:
        """Share of elements that differ (exact), else the relative error."""
        if self.exact:
            return float((self.given != self.wanted).double().mean())
        return float((self.given.double() - self.wanted).norm() / self.wanted.norm())

    def is_right(self) -> bool:
        if self.exact:
            return torch.equal(self.given, self.wanted)
        limit = LIMITS[self.given.dtype]
        scale = self.wanted.abs() + self.wanted.square().mean().sqrt()
        off = ((self.given.double() - self.wanted).abs() / scale).max()
        return self.error() <= limit and float(off) <= LARGEST * limit


@dataclass(frozen=True)
class Work:
    """run: () -> answers, within a pretended device. fast: in the set of CI."""

    name: str
    run: Callable[[], list[Answer]]
    targets: tuple[int, ...] = TARGETS
    processors: int = 4
    fast: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """One row of the table; `kernels` in the order of their launches."""

    work: str
    target: str
    kernels: tuple[str, ...]
    elements: int
    error: float
    right: bool
    hazards: tuple[str, ...]


def perform(work: Work, arch: int, change: Callable[[str, str], str] = lambda name, text: text) -> Result:
    with gpu(Device(arch, work.processors, change)) as executed:
        answers = work.run()
    return Result(
        work.name, f"sm_{arch}", tuple(executed.kernels), sum(answer.given.numel() for answer in answers),
        max(answer.error() for answer in answers), all(answer.is_right() for answer in answers),
        tuple(executed.hazards),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ ingredients


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(n: int, k: int, nested: bool, blocksize: int = 64) -> NF4Weight:
    generator = torch.Generator().manual_seed(n + k)
    packed = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8, generator=generator)
    blocks = -(-n * k // blocksize)
    if not nested:
        return NF4Weight(packed, torch.rand(blocks, generator=generator) + 0.1, blocksize, (n, k))
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    code2 = torch.randn(256, generator=generator).sort()[0]
    absmax2 = torch.rand(-(-blocks // 256), generator=generator) + 0.1
    return NF4Weight(packed, absmax, blocksize, (n, k), code2, absmax2, torch.tensor(1.5))


def half_of(arch_dtype: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arch_dtype]


def far_apart(rows: int, columns: int, stride: int) -> Tensor:
    """fp16 zeros [rows, columns] whose rows lie `stride` elements apart; only pages that are touched take memory."""
    size = 2 * ((rows - 1) * stride + columns)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    flat = torch.from_numpy(np.frombuffer(pages, dtype=np.float16))
    return flat.as_strided((rows, columns), (stride, 1))


# ------------------------------------------------------------------------------------------------------------- NF4


def dequantised(w: NF4Weight, dtype: torch.dtype, path: str, out: Tensor | None = None) -> list[Answer]:
    given = nf4.dequantize(w, dtype, out, path)
    return [Answer(given, nf4.dequantize_reference(w, dtype), exact=True)]


def _dequantise_into_wider(w: NF4Weight, dtype: torch.dtype, path: str) -> list[Answer]:
    """Rows further apart than they are long; what lies between must stay."""
    n, k = w.shape
    wide = torch.full((n, k + 64), 7.0, dtype=dtype)
    answers = dequantised(w, dtype, path, wide[:, :k])
    return [*answers, Answer(wide[:, k:].clone(), torch.full((n, 64), 7.0, dtype=dtype), exact=True)]


def _dequantise_far_apart(path: str, stride: int = 2**29 + 64) -> list[Answer]:
    """The last row begins beyond 2^31 elements (2^32 bytes)."""
    w = weight(5, 128, True)
    return dequantised(w, torch.float16, path, far_apart(5, 128, stride))


def dequantise_work() -> Iterator[Work]:
    for path, targets in (("gather", TARGETS), ("shuffle", TENSOR_CORES)):
        for nested in (True, False):
            label = f"dequantise {path} {'nested' if nested else 'flat'}"
            for kind in ("bf16", "fp16"):
                dtype = half_of(kind)
                reached = targets if kind == "fp16" else tuple(arch for arch in targets if arch >= 80)
                fast = (reached[0], reached[-2]) if kind == ("fp16" if path == "gather" else "bf16") else ()
                yield Work(
                    f"{label} {kind}", lambda n=nested, d=dtype, p=path: dequantised(weight(96, 256, n), d, p),
                    reached, fast=fast,
                )  # fmt: skip
        yield Work(
            f"dequantise {path} into a wider buffer",
            lambda p=path: _dequantise_into_wider(weight(33, 192, True), torch.float16, p),
            targets, fast=(86,),
        )  # fmt: skip
        yield Work(f"dequantise {path}, rows far apart", lambda p=path: _dequantise_far_apart(p), targets, fast=(86,))
        for blocksize in (32, 128, 4096):
            yield Work(
                f"dequantise {path}, blocks of {blocksize}",
                lambda b=blocksize, p=path: dequantised(weight(8, 4096, True, b), torch.float16, p), targets,
            )  # fmt: skip
    odd = 2**29 + 63  # rows not on pairs: the kernel for any shape
    yield Work("dequantise ragged, rows far apart", lambda: _dequantise_far_apart("gather", odd), fast=(86,))
    for kind in ("bf16", "fp16", "fp32"):
        dtype = half_of(kind)
        yield Work(
            f"dequantise ragged {kind}", lambda d=dtype: dequantised(weight(7, 101, True), d, "gather"),
            TARGETS if kind != "bf16" else TENSOR_CORES, fast=(75, 90) if kind == "fp16" else (),
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- products


@dataclass(frozen=True)
class Sizes:
    """Of a product [m, k] x [k, n], and in what its NF4 weight and its numbers are kept."""

    m: int
    n: int = 128
    k: int = 256
    nested: bool = True
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    blocksize: int = 64

    @property
    def label(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        blocks = "" if self.blocksize == 64 else f" blocks of {self.blocksize}"
        scales = "nested" if self.nested else "flat"
        return f"M {self.m} N {self.n} K {self.k} {kind} {scales}{' bias' if self.bias else ''}{blocks}"


def _exact_weight(w: NF4Weight) -> Tensor:
    """W in float64, not rounded."""
    return nf4.dequantize_reference(w, torch.float32).double()


def multiplied(sizes: Sizes, path: str = "fused") -> list[Answer]:
    w, x = weight(sizes.n, sizes.k, sizes.nested, sizes.blocksize), numbers(sizes.m, sizes.k, dtype=sizes.dtype)
    bias = numbers(sizes.n, seed=3, dtype=sizes.dtype) if sizes.bias else None
    wanted = x.double() @ _exact_weight(w).t()
    wanted = wanted if bias is None else wanted + bias.double()
    return [Answer(matmul.matmul(x, w, bias, path), wanted)]


def multiplied_backward(sizes: Sizes) -> list[Answer]:
    w, dy = weight(sizes.n, sizes.k, sizes.nested, sizes.blocksize), numbers(sizes.m, sizes.n, dtype=sizes.dtype)
    return [Answer(matmul.matmul_backward(dy, w, "fused"), dy.double() @ _exact_weight(w))]


def _identity(rows: int) -> list[Answer]:
    """Rows of the identity show W itself: to the bit, with scales that are powers of two."""
    plain = weight(128, 128, False)
    w = replace(plain, absmax=torch.randint(-4, 3, plain.absmax.shape).float().exp2())
    x, wanted = torch.eye(rows, 128).bfloat16(), nf4.dequantize_reference(w, torch.bfloat16)
    forward, backward = matmul.matmul(x, w, path="fused"), matmul.matmul_backward(x, w, "fused")
    return [Answer(forward, wanted.t()[:rows].contiguous(), True), Answer(backward, wanted[:rows], True)]


def product_work() -> Iterator[Work]:
    for rows in (16, 64):
        yield Work(
            f"both products of {rows} rows of the identity", lambda r=rows: _identity(r), TENSOR_CORES, fast=(86, 90)
        )
    usual = [Sizes(m, nested=nested, dtype=dtype) for m in (16, 32, 64) for nested in (True, False) for dtype in HALVES]
    ragged = [Sizes(m, n=n, k=192, bias=True) for m, n in ((1, 100), (9, 130), (33, 100), (70, 260))]
    others = [Sizes(16, blocksize=32), Sizes(64, blocksize=32), Sizes(16, k=512, blocksize=128)]
    others += [Sizes(64, k=512, blocksize=256), Sizes(16, dtype=torch.float32), Sizes(9, n=100, dtype=torch.float32)]
    few = {Sizes(16), Sizes(64), Sizes(33, n=100, k=192, bias=True), Sizes(16, dtype=torch.float16)}
    for sizes in (*usual, *ragged, *others):
        fast = (86, 90) if sizes in few else ()
        yield Work(f"forward {sizes.label}", lambda s=sizes: multiplied(s), TENSOR_CORES, fast=fast)
        yield Work(f"backward {sizes.label}", lambda s=sizes: multiplied_backward(s), TENSOR_CORES, fast=fast)
    for m, n in ((16, 128), (64, 100)):
        split = Sizes(m, n, 1024, bias=True)
        many = replace(split, n=1024, k=128, bias=False)
        fast = (86,) if m == 16 else (90,)
        yield Work(f"forward split {split.label}", lambda s=split: multiplied(s), TENSOR_CORES, 16, fast)
        yield Work(f"backward split {many.label}", lambda s=many: multiplied_backward(s), TENSOR_CORES, 16, fast)
    for m in (1, 2, 3, 4):
        for nested in (True, False):
            sizes = Sizes(m, 40, 512, nested, torch.float16, bias=m == 4)
            work = Work(f"few rows {sizes.label}", lambda s=sizes: multiplied(s, "few_rows"), processors=8)
            yield replace(work, fast=(75,) if nested and m in (1, 4) else ())
            sizes = replace(sizes, dtype=torch.bfloat16)
            yield replace(work, name=f"few rows {sizes.label}", targets=TENSOR_CORES)
    yield Work("lora linear, q/k/v into one contraction", _lora_linear, TENSOR_CORES, fast=(90,))


def _lora_linear() -> list[Answer]:
    """The grouped linear, adapters in the contraction: W into a buffer with room beside it; forward and backward."""
    x = numbers(24, 128).requires_grad_()
    weights = tuple(weight(n, 128, True) for n in (128, 64, 64))
    starts, adapters = (0, 128, 192), []
    for seed, (part, start) in enumerate(zip(weights, starts, strict=True)):
        a, b = numbers(16, 128, seed=seed) * 0.1, numbers(part.shape[0], 16, seed=9 + seed) * 0.1
        adapters.append(Adapter(a.float().requires_grad_(), b.float().requires_grad_(), 2.0, start))
    y = lora.linear(x, weights, adapters)
    dy = numbers(*y.shape, seed=4)
    y.backward(dy)
    whole = torch.cat([_exact_weight(part) for part in weights])
    for adapter in adapters:
        rows = slice(adapter.start, adapter.start + adapter.b.shape[0])
        whole[rows] += 2.0 * adapter.b.detach().double() @ adapter.a.detach().double()
    assert x.grad is not None
    return [Answer(y.detach(), x.detach().double() @ whole.t()), Answer(x.grad, dy.double() @ whole)]


# ----------------------------------------------------------------------------------------------------- elementwise


def _norm(columns: int, dtype: torch.dtype, add: bool) -> list[Answer]:
    """Forward and backward, the weight trained; against float64 from the rounded sum on."""
    x, residual, dy, ds = (numbers(6, columns, seed=seed, dtype=dtype) for seed in range(4))
    scale = numbers(columns, seed=5, dtype=dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, scale)]
    total = (x.float() + residual.float()).to(dtype) if add else x
    wide = [tensor.double().requires_grad_() for tensor in (total, scale)]
    wanted = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[1]
    if add:
        y, s = add_rms_norm(leaves[0], leaves[1], leaves[2], 1e-5, "triton")
        torch.autograd.backward([y, s], [dy, ds])
        torch.autograd.backward([wanted, wide[0]], [dy.double(), ds.double()])
    else:
        y = rms_norm(leaves[0], leaves[2], 1e-5, "triton")
        y.backward(dy)
        wanted.backward(dy.double())
    grads = [leaves[0].grad, leaves[2].grad]
    return [Answer(y.detach(), wanted.detach())] + [Answer(g, w.grad) for g, w in zip(grads, wide, strict=True)]  # type: ignore[arg-type]


def _swiglu(columns: int, dtype: torch.dtype) -> list[Answer]:
    gate_up, dy = numbers(5, 2 * columns, dtype=dtype).requires_grad_(), numbers(5, columns, seed=1, dtype=dtype)
    y = swiglu(gate_up, "triton")
    y.backward(dy)
    wide = gate_up.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    wanted.backward(dy.double())
    return [Answer(y.detach(), wanted.detach()), Answer(gate_up.grad, wide.grad)]  # type: ignore[arg-type]


def _rope(head: int, dtype: torch.dtype) -> list[Answer]:
    """transformers' bits forward; the gradient against float64."""
    heads, kv_heads, tokens = 9, 3, 5
    qkv = numbers(2, tokens, (heads + 2 * kv_heads) * head, dtype=dtype)
    angle = torch.arange(tokens)[:, None] * 10000 ** (-torch.arange(head // 2) / (head // 2))
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1)[None].to(dtype) for f in (torch.cos, torch.sin))
    parts = qkv.view(2, tokens, -1, head).split((heads, kv_heads, kv_heads), dim=2)
    wanted = [rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]]
    wide = qkv.double().requires_grad_()
    wide_parts = wide.view(2, tokens, -1, head).split((heads, kv_heads, kv_heads), dim=2)
    leaf = qkv.clone().requires_grad_()
    given = rotary_qkv(leaf * 1, cos, sin, heads, kv_heads, "triton")
    exact = [Answer(g.detach().clone(), w.clone(), exact=True) for g, w in zip(given, wanted, strict=True)]
    gradients = [numbers(*part.shape, seed=i, dtype=dtype) for i, part in enumerate(given)]
    torch.autograd.backward(given, gradients)
    turned = [rotate(part, cos.double(), sin.double()) for part in wide_parts[:2]]
    torch.autograd.backward([*turned, wide_parts[2]], [g.double() for g in gradients])
    return [*exact, Answer(leaf.grad, wide.grad)]  # type: ignore[arg-type]


def elementwise_work() -> Iterator[Work]:
    for kind in ("bf16", "fp16"):
        dtype, targets = half_of(kind), TARGETS if kind == "fp16" else TENSOR_CORES
        for columns in (96, 576, 4096):
            fast = (targets[0], 90) if columns == 576 and kind == "bf16" else ()
            for add in (False, True):
                name = f"{'add-norm' if add else 'RMSNorm'} D {columns} {kind}"
                yield Work(name, lambda c=columns, d=dtype, a=add: _norm(c, d, a), targets, fast=fast)
        for columns in (100, 1536):
            fast = (targets[0], 90) if columns == 1536 and kind == "bf16" else ()
            yield Work(f"SwiGLU I {columns} {kind}", lambda c=columns, d=dtype: _swiglu(c, d), targets, fast=fast)
        for head in (64, 96, 128):
            fast = (targets[0], 90) if head == 64 else ()
            yield Work(f"RoPE D {head} {kind}", lambda h=head, d=dtype: _rope(h, d), targets, fast=fast)


def _loss(vocabulary: int, dtype: torch.dtype) -> list[Answer]:
    hidden, head = numbers(5, 32, dtype=dtype), numbers(vocabulary, 32, seed=1, dtype=dtype) * 0.2
    targets = torch.tensor([0, vocabulary - 1, 3, 2, 1])
    leaf = hidden.clone().requires_grad_()
    losses = frozen_head_nll(leaf, head, targets, "triton")
    losses.sum().backward()
    logits = (hidden @ head.t()).double()  # the CPU's product is rounded to 16 bit: not the kernel's matter
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    chances = logits.softmax(-1) - torch.nn.functional.one_hot(targets, vocabulary)
    assert leaf.grad is not None
    return [Answer(losses.detach(), wanted), Answer(leaf.grad, chances @ head.double())]


def _startup(check: Callable[[torch.device], str]) -> list[Answer]:
    """What the first use on a card runs, on the compiled kernels."""
    if different := check(torch.device("cpu")):
        raise Fault(different)
    return [Answer(torch.zeros(1), torch.zeros(1), exact=True)]


def whole_work() -> Iterator[Work]:
    for kind in ("bf16", "fp16"):
        targets, dtype = TARGETS if kind == "fp16" else TENSOR_CORES, half_of(kind)
        for vocabulary in (300, 9000):
            fast = (targets[0], 120) if vocabulary == 9000 else ()
            name = f"loss V {vocabulary} {kind}"
            yield Work(name, lambda v=vocabulary, d=dtype: _loss(v, d), targets, fast=fast)
    yield Work("first use, plain kernels", lambda: _startup(startup_check.plain_difference), TARGETS, fast=(75,))
    yield Work("first use, assembly", lambda: _startup(startup_check.assembly_difference), TENSOR_CORES, fast=(86,))


def all_work() -> list[Work]:
    return [*dequantise_work(), *product_work(), *elementwise_work(), *whole_work()]
