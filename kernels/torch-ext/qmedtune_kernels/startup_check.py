"""What the first use on a device runs: every kernel on small tensors, compared with what is known.

Decodes are compared to the bit, products too: scales are powers of two, so that 16-bit codes scaled in fp32 and codes
scaled before rounding have the same bits, and a product with rows of the identity shows W itself. The rest is compared
with the plain PyTorch reference, within its dtype's rounding. Launchers are called directly: the paths ask this check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cross_entropy, dispatch, matmul, nf4, rms_norm, rope, swiglu, tiles
from .nf4 import NF4Weight

N, K = 64, 128
ROUNDING = 1e-2  # relative, of bf16 and fp16 results that are rounded a few times


@dataclass(frozen=True)
class KernelOutput:
    """What a kernel gave beside what it should have given; exact: to the bit."""

    name: str
    actual: Tensor
    expected: Tensor
    exact: bool = True

    def difference(self) -> str:
        """ "" where they agree, else one clause."""
        if self.exact:
            count = int((self.actual != self.expected).sum())
            return f"{count} elements of {self.name} differ" if count else ""
        error = (self.actual.double() - self.expected.double()).norm() / self.expected.double().norm()
        return "" if float(error) <= ROUNDING else f"{self.name} is off by {float(error):.1e}"


def plain_difference(device: torch.device) -> str:
    """Of the kernels in plain Triton: decode, few rows, norms, SwiGLU, RoPE, loss."""
    return _told((*_decoded(device, "gather"), *_few_rows(device), *_elementwise(device), *_loss(device)))


def assembly_difference(device: torch.device) -> str:
    """Of the kernels with inline assembly: decode and fused products."""
    return _told((*_decoded(device, "shuffle"), *_products(device)))


def _told(found: tuple[KernelOutput, ...]) -> str:
    return "; ".join(filter(None, (one.difference() for one in found)))


def half(device: torch.device) -> torch.dtype:
    return torch.float16 if 0 < dispatch.capability(device) < 80 else torch.bfloat16


def _numbers(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, half(device))


def _weight(device: torch.device, offset: float | None) -> NF4Weight:
    """Flat scales (offset None), or nested ones as every recipe's default has; powers of two without an offset."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, generator=generator).to(device)
    blocks = N * K // 64
    powers = torch.randint(-4, 3, (256,), generator=generator).float().exp2().to(device)
    if offset is None:
        return NF4Weight(packed, powers[:blocks].clone(), 64, (N, K))
    index = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator).to(device)
    outer = torch.tensor([2.0], device=device)
    return NF4Weight(packed, index, 64, (N, K), powers, outer, torch.tensor(offset, device=device))


def _bits_of_bitsandbytes(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    if hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        scales = nf4.scales_reference(weight).contiguous()
        return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, scales, 64, "nf4", [N, K], dtype)
    return nf4.dequantize_reference(weight, dtype)


def _decoded(device: torch.device, path: str) -> Iterator[KernelOutput]:
    for label, offset in (("flat", None), ("nested", 0.3)):
        weight = _weight(device, offset)
        expected = _bits_of_bitsandbytes(weight, half(device))
        decoded = nf4.dequantize(weight, half(device), path=path)
        yield KernelOutput(f"the {path} decode ({label} scales)", decoded, expected)


def _few_rows(device: torch.device) -> Iterator[KernelOutput]:
    weight, x = _weight(device, 0.3), _numbers(3, K, device=device)
    expected = x.float() @ _bits_of_bitsandbytes(weight, half(device)).float().t()
    yield KernelOutput("the product of few rows", matmul.matmul(x, weight, path="few_rows"), expected, False)


def _products(device: torch.device) -> Iterator[KernelOutput]:
    for label, offset in (("flat", None), ("nested", 0.0)):
        weight = _weight(device, offset)
        expected = _bits_of_bitsandbytes(weight, half(device))
        for rows in tiles.heights(64):
            x, dy = (torch.eye(rows, size, dtype=half(device), device=device) for size in (K, N))
            forward, backward = matmul.matmul(x, weight, path="fused"), matmul.matmul_backward(dy, weight, "fused")
            yield KernelOutput(f"the fused matmul of {rows} rows ({label})", forward, expected.t()[:rows])
            yield KernelOutput(f"its backward of {rows} rows ({label})", backward, expected[:rows])


def _elementwise(device: torch.device) -> Iterator[KernelOutput]:
    x, residual, dy = (_numbers(rows, 576, device=device) for rows in (4, 4, 4))
    scale = _numbers(576, device=device)
    y, rstd, total = rms_norm._launch_forward(x, residual, scale, 1e-5)
    expected, wanted_rstd = rms_norm.reference(x + residual, scale, 1e-5)
    yield KernelOutput("the sum before a norm", total, x + residual)
    yield KernelOutput("RMSNorm", y, expected, False)
    dx, _ = rms_norm._launch_backward(dy, total, scale, rstd, x, False)
    yield KernelOutput("RMSNorm's gradient", dx, rms_norm.reference_backward(dy, total, scale, wanted_rstd, x), False)
    gate_up, dy = _numbers(3, 2 * 192, device=device), _numbers(3, 192, device=device)
    yield KernelOutput("SwiGLU", swiglu._launch_forward(gate_up), swiglu.reference(gate_up), False)
    gradient = swiglu._launch_backward(dy, gate_up)
    yield KernelOutput("SwiGLU's gradient", gradient, swiglu.reference_backward(dy, gate_up), False)
    heads = _numbers(1, 5, 6, 64, device=device)
    angle = torch.arange(5, device=device)[:, None] * torch.linspace(1, 0.01, 32, device=device)
    cos, sin = (f(torch.cat((angle, angle), dim=1))[None].to(half(device)) for f in (torch.cos, torch.sin))
    for name, sign in (("RoPE", 1.0), ("RoPE's gradient", -1.0)):
        turned = torch.empty_like(heads)
        rope._launch(heads, turned, cos, sin, sign)
        yield KernelOutput(name, turned, rope.rotate(heads, cos, sin, sign), False)


def _loss(device: torch.device) -> Iterator[KernelOutput]:
    logits = _numbers(3, 700, device=device).float()
    targets = torch.tensor([0, 699, 3], device=device)
    losses, gradient = cross_entropy._launch(logits, targets, half(device))
    expected = cross_entropy.reference(logits.clone(), targets, half(device))
    yield KernelOutput("the loss", losses, expected[0], False)
    yield KernelOutput("the loss's gradient", gradient, expected[1], False)
