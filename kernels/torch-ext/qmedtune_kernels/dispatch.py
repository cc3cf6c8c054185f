"""Which path an operation takes on a device, and why. Decided from a shipped table, never by timing at run time.

The first use on a GPU runs every kernel on small tensors (startup_check.py): decodes bit by bit against bitsandbytes'
own dequantisation (where it is imported; else the plain PyTorch reference). What differs is not used in this process
and named in `describe`: plain kernels mean the reference path, inline assembly (decode.py) means that plain Triton
decodes and cuBLAS multiplies. An architecture whose GPU tests of the assembly failed is in "asm_refused".
QMEDTUNE_KERNELS=triton|reference overrides the choice for every operation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache, wraps
from math import log2
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import language
from .decode import INTERPRET

TABLE = json.loads(Path(__file__).with_name("dispatch.json").read_text())
OPERATIONS = ("dequantize", "matmul", "lora", "rms_norm", "swiglu", "rope", "loss")
MODES = ("auto", "triton", "reference")
Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """Decorates a launcher: Triton launches on the current device, which need not be that of the first tensor (layers
    of one model on several GPUs)."""

    @wraps(launch)
    def launched(*arguments, **options):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if device.type != "cuda":
            return launch(*arguments, **options)
        with torch.cuda.device(device):
            return launch(*arguments, **options)

    return cast(Launch, launched)


@cache
def capability(device: torch.device) -> int:
    """75, 80, 86, 89, 90, ...; 0 for anything but an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def mode(requested: str = "auto") -> str:
    """The caller's mode, unless QMEDTUNE_KERNELS overrides it."""
    chosen = os.environ.get("QMEDTUNE_KERNELS", requested)
    if chosen not in MODES:
        raise ValueError(f"kernels: given {chosen!r}; allowed {', '.join(MODES)}")
    return chosen


def uses_triton(device: torch.device, requested: str = "auto") -> bool:
    """Whether Triton kernels run on `device`. Asking for them where they cannot run is a ValueError."""
    chosen = mode(requested)
    if chosen == "reference":
        return False
    runnable = language.PRESENT and (capability(device) >= 75 or INTERPRET)
    if chosen == "triton":
        if not runnable:
            if not language.PRESENT:
                raise ValueError("kernels: triton given, but it is not installed; allowed here: auto, reference")
            raise ValueError(f"kernels: triton given for device {device}; it needs an NVIDIA GPU of sm_75 or later")
        if capability(device) and (different := self_check(device)):
            raise ValueError(f"kernels: triton given, but {different}; allowed here: auto, reference")
        return True
    return language.PRESENT and capability(device) >= 75 and self_check(device) == ""


def require(device: torch.device, path: str, lowest: int) -> None:
    """ValueError unless `device` can run a path that needs sm_`lowest`; the interpreter runs what has no assembly."""
    if not language.PRESENT or (capability(device) < lowest and not (INTERPRET and path != "shuffle")):
        needs = f"Triton and an NVIDIA GPU of sm_{lowest} or later"
        raise ValueError(f"path: {path} given for device {device}; it needs {needs}")


def asm_trusted(device: torch.device) -> bool:
    """Whether the inline assembly runs here: from sm_80 on, where it gave the right bits at its first use."""
    return capability(device) >= 80 and not asm_check(device)


def dequantize_path(device: torch.device, path: str) -> str:
    """The path ("reference", "gather" or "shuffle") for nf4.dequantize."""
    if path in ("gather", "shuffle"):
        require(device, path, 75 if path == "gather" else 80)
        return path
    if not uses_triton(device, path):
        return "reference"
    return "shuffle" if asm_trusted(device) else "gather"


@cache
def self_check(device: torch.device) -> str:
    """Empty when the plain kernels reproduce known results on this device; else what differed. Raises RuntimeError
    during the capture of a CUDA graph, where nothing can be compared."""
    from . import startup_check

    return _checked(device, startup_check.plain_difference)


@cache
def asm_check(device: torch.device) -> str:
    """The same of the kernels with inline assembly: the decode, and the fused products of each tile's height."""
    from . import startup_check

    if f"sm_{capability(device)}" in TABLE["asm_refused"]:
        return f"GPU tests of it failed on sm_{capability(device)}"
    return _checked(device, startup_check.assembly_difference)


def _checked(device: torch.device, difference: Callable[[torch.device], str]) -> str:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"kernels: the first use on {device} came during a CUDA graph capture; run once before it")
    try:
        return difference(device)
    except Exception as error:  # no compiler, an old driver, too little shared memory: told in `describe`
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        return f"the first kernel did not run ({type(error).__name__}: {last})"


def fused_rows(device: torch.device, n: int, k: int) -> int:
    """Largest M for which the fused matmul with W [n, k] is taken before dequantise + cuBLAS, by the nearest measured
    shape (in ratios of n and k); 0 = never. The same for bf16 and fp16: both take the same instructions."""
    if capability(device) < 75 or (capability(device) >= 80 and not asm_trusted(device)):
        return 0  # below sm_80 the small-M kernel is plain Triton
    n, k = max(1, n), max(1, k)
    return min(_measured(device), key=lambda row: abs(log2(row[0] / n)) + abs(log2(row[1] / k)))[2]


# Rows up to which bitsandbytes 0.50 multiplies with a kernel of its own on every architecture (its table for 4096 x
# 4096 on sm_90; more on others): from there on it dequantises in three launches where nf4.dequantize takes one.
GEMM_4BIT_ROWS = 8


def takes_bitsandbytes(device: torch.device, rows: int) -> bool:
    """Whether few rows without a gradient go to bitsandbytes' own gemm_4bit: until the fused kernel was measured to be
    faster on this architecture, and where bitsandbytes is imported."""
    few = capability(device) >= 75 and 0 < rows <= GEMM_4BIT_ROWS
    beaten = f"sm_{capability(device)}" in TABLE["beats_gemm_4bit"]
    return few and not beaten and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def _measured(device: torch.device) -> list[list[int]]:
    """Rows of (out_features, in_features, largest M) for this architecture."""
    return TABLE["fused_rows"].get(f"sm_{capability(device)}", TABLE["fused_rows"]["default"])


def widens(device: torch.device, read: int, written: int) -> bool:
    """Whether adapters join a large product's contraction (lora.py), which copies `read` columns of its input, rather
    than pass over its `written` columns again. On a GPU where that moves fewer bytes; on a CPU the copy of W into a
    wider buffer, which it has decoded already, would cost more than it saves."""
    return capability(device) >= 75 and read < written


def _why_reference(device: torch.device, requested: str) -> str:
    if mode(requested) == "reference":
        return "asked for"
    if capability(device) < 75:
        return f"{device.type} is no NVIDIA GPU of sm_75+"
    return self_check(device) if language.PRESENT else "Triton is not installed"


def describe(device: torch.device, requested: str = "auto") -> dict[str, str]:
    """One line per operation for `doctor` and the run's facts: the path and the reason."""
    arch = capability(device)
    if not uses_triton(device, requested):
        why = _why_reference(device, requested)
        return dict.fromkeys(OPERATIONS, f"reference: {why}")
    asm = f"inline assembly, right on this sm_{arch} at its first use"
    if not asm_trusted(device):
        asm = f"no inline assembly: {asm_check(device)}" if arch >= 80 else f"sm_{arch} has no fused tensor-core path"
    rows = sorted({fused_rows(device, n, k) for n, k, _ in _measured(device)})
    limit = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]} (by shape)"
    fused = f"fused up to {limit} rows, then " if rows[-1] else ""
    own = f"; without gradients bitsandbytes up to {GEMM_4BIT_ROWS} rows" if takes_bitsandbytes(device, 1) else ""
    return {
        "dequantize": f"triton {dequantize_path(device, 'auto')}: {asm}",
        "matmul": f"{fused}dequantise + cuBLAS{own}: {asm}",
        "lora": "grouped, one dequantise and one GEMM per group, adapters in its contraction or added by addmm_",
        **dict.fromkeys(("rms_norm", "swiglu", "rope"), "triton"),
        "loss": "triton, two products; a trained head: TRL's",
    }
