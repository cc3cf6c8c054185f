"""Which path an operation takes on a device, and why. Decided from a shipped table, never by timing at run time.

Inline assembly (decode.py) is the default only on architectures whose correctness run is committed ("asm_verified" in
dispatch.json, written by kernels/benchmarks from a results file); elsewhere plain Triton decodes and cuBLAS multiplies.
The first use on a GPU compares small matrices bit by bit with bitsandbytes' own dequantisation (where it is imported;
else with the plain PyTorch reference); a difference means the reference path for the whole process, named in
`describe`, or a ValueError where Triton was asked for.
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
OPERATIONS = ("dequantize", "matmul", "lora", "rms_norm", "swiglu", "rope")
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


def asm_verified(device: torch.device) -> bool:
    """Whether this architecture has committed correctness results for the inline assembly."""
    return f"sm_{capability(device)}" in TABLE["asm_verified"]


def dequantize_path(device: torch.device, path: str) -> str:
    """The path ("reference", "gather" or "shuffle") for nf4.dequantize."""
    if path in ("gather", "shuffle"):
        require(device, path, 75 if path == "gather" else 80)
        return path
    if not uses_triton(device, path):
        return "reference"
    return "shuffle" if capability(device) >= 80 and asm_verified(device) else "gather"


@cache
def self_check(device: torch.device) -> str:
    """Empty when the kernels this device would take reproduce known results to the bit; else what differed. Raises
    RuntimeError during the capture of a CUDA graph, where nothing can be compared."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"kernels: the first use on {device} came during a CUDA graph capture; run once before it")
    try:
        return _difference(device)
    except Exception as error:  # whatever stops the first kernel (no compiler, an old driver): told in `describe`
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        return f"the first kernel did not run ({type(error).__name__}: {last})"


def _difference(device: torch.device) -> str:
    """Scales are powers of two, so that 16-bit codes scaled in fp32 and codes scaled before rounding have the same
    bits, and a product with rows of the identity shows W itself."""
    from . import matmul, nf4, tiles

    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (128 * 32, 1), dtype=torch.uint8, generator=generator).to(device)
    absmax = torch.randint(-4, 3, (128,), generator=generator).float().exp2().to(device)
    weight = nf4.NF4Weight(packed, absmax, 64, (64, 128))
    way = "shuffle" if capability(device) >= 80 and asm_verified(device) else "gather"
    dtype = torch.bfloat16 if capability(device) >= 80 else torch.float16
    wanted = nf4.dequantize_reference(weight, dtype)
    if hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        wanted = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", [64, 128], dtype)
    found = {f"the {way} decode": (nf4.dequantize(weight, dtype, path=way), wanted)}
    most = max(row[2] for row in _measured(device)) if way == "shuffle" else 0
    for rows in tiles.heights(most):
        x, dy = (torch.eye(rows, columns, dtype=dtype, device=device) for columns in (128, 64))
        found[f"the fused matmul of {rows} rows"] = matmul.matmul(x, weight, path="fused"), wanted.t()[:rows]
        found[f"its backward of {rows} rows"] = matmul.matmul_backward(dy, weight, "fused"), wanted[:rows]
    counts = {name: int((actual != expected).sum()) for name, (actual, expected) in found.items()}
    return "; ".join(f"{count} elements of {name} differ" for name, count in counts.items() if count)


def fused_rows(device: torch.device, n: int, k: int) -> int:
    """Largest M for which the fused matmul with W [n, k] is taken before dequantise + cuBLAS, by the nearest measured
    shape (in ratios of n and k); 0 = never. The same for bf16 and fp16: both take the same instructions."""
    if capability(device) < 75 or (capability(device) >= 80 and not asm_verified(device)):
        return 0  # below sm_80 the small-M kernel is plain Triton
    n, k = max(1, n), max(1, k)
    return min(_measured(device), key=lambda row: abs(log2(row[0] / n)) + abs(log2(row[1] / k)))[2]


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
    checked = "is" if asm_verified(device) else "is not"
    why = f"sm_{arch} {checked} among the architectures with committed correctness results for inline assembly"
    rows = sorted({fused_rows(device, n, k) for n, k, _ in _measured(device)})
    limit = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]} (by shape)"
    fused = f"fused up to {limit} rows, then " if rows[-1] else ""
    return {
        "dequantize": f"triton {dequantize_path(device, 'auto')}: {why}",
        "matmul": f"{fused}dequantise + cuBLAS: {why}",
        "lora": "grouped, one dequantise and one GEMM per group, adapters in its contraction or added by addmm_",
        **dict.fromkeys(("rms_norm", "swiglu", "rope"), "triton"),
    }
