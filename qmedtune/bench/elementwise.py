"""SwiGLU and RoPE for `bench kernels`, on an 8B layer's widths: against copying the least bytes, and plain PyTorch.

Deliberately not here: timing (kernels.py), the other kernels (contenders.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 14336, 32, 8, 128
Call = Callable[[], object]


def elementwise(contender: str, m: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, str, Callable, float]]:
    """(kernel, shape, setup, least bytes) of what this contender can do over `m` tokens."""
    swiglu_shape, rope_shape = f"{m}x{INTERMEDIATE}", f"{m}x{HEADS}+{KV_HEADS}x{HEAD_DIM}"
    swiglu = partial(_swiglu, contender, m, dtype, device)
    rows = [
        ("swiglu forward", swiglu_shape, partial(swiglu, backward=False), 6.0 * m * INTERMEDIATE),
        ("swiglu backward", swiglu_shape, partial(swiglu, backward=True), 10.0 * m * INTERMEDIATE),
        ("rope", rope_shape, lambda: _rope(contender, m, dtype, device), 4.0 * m * (HEADS + KV_HEADS) * HEAD_DIM),
    ]
    for kernel, shape, setup, moved in rows:
        if contender == "limit":
            yield kernel, shape, lambda moved=moved: _copy(int(moved / 2), device), moved
        elif contender in ("qmedtune", "torch"):
            yield kernel, shape, setup, moved


def _copy(count: int, device: str) -> Call:
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _swiglu(contender: str, m: int, dtype: torch.dtype, device: str, *, backward: bool) -> Call:
    from qmedtune_kernels import swiglu

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    function = swiglu.swiglu if contender == "qmedtune" else plain
    x = torch.randn(m, 2 * INTERMEDIATE, dtype=dtype, device=device).requires_grad_(backward)
    if not backward:
        return lambda: function(x)
    y = function(x)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def _rope(contender: str, m: int, dtype: torch.dtype, device: str) -> Call:
    from qmedtune_kernels import rope

    qkv = torch.randn(1, m, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype, device=device)
    angles = torch.rand(1, m, HEAD_DIM // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if contender == "qmedtune":
        return lambda: rope.rotary_qkv(qkv, cos, sin, HEADS, KV_HEADS)
    query, key, _ = rope.split(qkv, HEADS, KV_HEADS, HEAD_DIM)
    return lambda: (rope.rotate(query, cos, sin), rope.rotate(key, cos, sin))
