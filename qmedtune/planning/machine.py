"""What this machine has, read from the driver and the kernel, without importing torch (`plan` answers in < 3 s).

Totals, not what is free at the moment: choices that follow from them must be the same at every start of a run.
Deliberately not here: whether a kernel compiles or torch sees the card (`qmedtune doctor` asks torch).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from qmedtune.allowed import FloatDtype
from qmedtune.errors import RecipeError
from qmedtune.peak import host_memory_bytes

GIB = 1024**3
# The sizes in which cards are sold, GiB: T4/4080 16, 3090/4090/L4 24, A100 40/80, A6000/L40S 48, H200 141 (140 usable).
CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 140, 180)
MOST_CARDS = 1024  # of a run


@dataclass(frozen=True)
class Machine:
    """One accelerator (or the CPU) and its host. Memory in bytes; `memory_bytes` is the card's, or the RAM for a CPU.

    `capability` is CUDA's (8.9), None on a CPU. `bf16`: has the instructions, so that bf16 is no emulation.
    `present` is False for a card that is only planned for; `cards`: how many like it a run
    takes, of which `cards_here` are on this machine.
    """

    kind: str
    name: str
    memory_bytes: int
    host_bytes: int
    cores: int
    bf16: bool
    capability: float | None = None
    used_bytes: int = 0
    present: bool = True
    cards: int = 1
    cards_here: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def compute_dtype(self) -> FloatDtype:
        """What `model.compute_dtype: auto` takes: bf16, or what is fast where bf16 is emulated (why: resolve.py)."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.is_gpu else "float32"


@cache
def this_machine() -> Machine:
    """The first visible CUDA card with its host, else the CPU."""
    host = Machine("cpu", _cpu_name(), host_memory_bytes(), host_memory_bytes(), _cores(), cpu_has_bf16())
    return _card(host) or host


def card_of(gib: float, *, bf16: bool = True) -> Machine:
    """A card that is not here, with this machine's host around it."""
    host = this_machine()
    return replace(
        host,
        kind="cuda",
        name=f"a card of {gib:g} GiB (not on this machine)",
        memory_bytes=round(gib * GIB),
        bf16=bf16,
        capability=8.0 if bf16 else 7.5,
        used_bytes=0,
        present=False,
    )


def planned_cards(asked: str | None) -> int:
    """How many GPUs `--gpus` of a plan means: a number, which may be more than this machine has, or `auto`, all that it
    has. Raises RecipeError."""
    if asked is None:
        return 1
    if asked == "auto":
        return max(1, len(visible_cards()))
    return number_of_cards(asked)


def number_of_cards(asked: str) -> int:
    """`--gpus` as a number. Raises RecipeError."""
    if not asked.isdecimal() or not 1 <= int(asked) <= MOST_CARDS:
        raise RecipeError(f"--gpus {asked}: not a number of GPUs\nallowed: 1, 2, ... {MOST_CARDS} or auto")
    return int(asked)


def visible_cards() -> list[str]:
    """Index or name of each card that a run here may take, by the driver's tool; without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []


def _card(host: Machine) -> Machine | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = visible.split(",")[0].strip() if visible is not None else "0"
    if first in ("", "-1"):
        return None
    if shutil.which("nvidia-smi"):
        return _card_by_driver(host, first)
    # A container without the driver's tools: only torch can tell, and its import takes seconds.
    return _card_by_torch(host) if Path("/dev/nvidia0").exists() else None


def _card_by_driver(host: Machine, index: str) -> Machine | None:
    query = "--query-gpu=name,memory.total,memory.used,compute_cap"
    command = ["nvidia-smi", f"--id={index}", query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    fields = [field.strip() for field in answer.stdout.strip().split(",")]
    if answer.returncode != 0 or len(fields) != 4:
        return None  # no driver behind the tool, or no such card
    name, total, used, capability = fields
    mib = 1024**2
    return replace(
        host,
        kind="cuda",
        name=name,
        memory_bytes=int(total) * mib,
        used_bytes=int(used) * mib,
        bf16=float(capability) >= 8.0,
        capability=float(capability),
    )


def _card_by_torch(host: Machine) -> Machine | None:
    import torch

    if not torch.cuda.is_available():
        return None
    card = cast(Any, torch.cuda.get_device_properties(0))  # pyright: ignore[reportUnknownMemberType]
    capability = card.major + card.minor / 10
    return replace(
        host,
        kind="cuda",
        name=card.name,
        memory_bytes=card.total_memory,
        bf16=capability >= 8.0,
        capability=capability,
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX-BF16 on x86, the bf16 extension on ARM; without them bf16 is slower than fp32."""
    flags = set(_cpuinfo().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
