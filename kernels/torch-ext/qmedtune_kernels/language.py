"""Triton where it is installed; where it is not (macOS, Windows, a slim CPU image), just enough to define kernels.

Kernels are module-level functions, so their modules must import either way; without Triton dispatch.py never launches
one, and the plain PyTorch references do the work. Deliberately not an emulator: TRITON_INTERPRET needs Triton itself.
"""

# pyright: reportMissingImports=false, reportAssignmentType=false

from __future__ import annotations

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    PRESENT = True
except ModuleNotFoundError:
    PRESENT = False
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["PRESENT", "tl", "triton"]
