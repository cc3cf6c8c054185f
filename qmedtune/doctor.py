"""`qmedtune doctor`: what this machine has, which kernel path a run would take and why, and what stands in the way.

Looks, and changes nothing: no network, no files written, no settings. Sizes are what is free now; what a recipe needs
is in `qmedtune plan`. Deliberately not here: measurements (`bench`) and proofs (`selftest`).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from qmedtune import __version__, store
from qmedtune.planning import machine
from qmedtune.record import versions
from qmedtune.units import size

# constraints.txt, for installed packages that do not have the file beside them; a test keeps them equal.
TESTED = {
    "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2",
    "bitsandbytes": "0.50.2", "datasets": "5.2.0", "accelerate": "1.15.0",
}  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
LOW_DISK_BYTES = 10 * machine.GIB  # a merged 1B model, its adapters, checkpoints and the base
LOW_HOST_BYTES = 8 * machine.GIB  # merging and evaluating a 1B model in 16 bit beside the Python libraries


class Cpu(TypedDict):
    name: str
    cores: int
    features: list[str]


class Gpu(TypedDict):
    """The card as the driver and torch see it. Where torch was built for CUDA and no card is there, the last two."""

    name: NotRequired[str]
    memory_bytes: NotRequired[int]
    free_bytes: NotRequired[int]
    capability: NotRequired[float | None]
    bf16: NotRequired[bool]
    torch_cuda: str | None
    usable: bool


class Version(TypedDict):
    installed: str | None
    tested: str | None


class Examined(TypedDict):
    """What `qmedtune doctor --json` prints."""

    qmedtune: str
    python: str
    system: str
    cpu: Cpu
    host_memory_bytes: int
    free_disk_bytes: int
    gpu: Gpu | None
    cards: list[str]
    versions: dict[str, Version]
    kernels: dict[str, str]
    folders: dict[str, str]
    offline: bool
    hub_login: bool
    advice: list[str]


def examine(folder: Path = Path()) -> Examined:
    """Everything as plain data. `folder`: where runs would be written. Imports torch (seconds)."""
    here = machine.this_machine()
    found: dict[str, Version] = {}
    for name, installed in versions().items():
        found[name] = {"installed": installed, "tested": TESTED.get(name)}
    facts: Examined = {
        "qmedtune": __version__,
        "python": platform.python_version(),
        "system": "-".join((os.uname().sysname, os.uname().release, os.uname().machine)),
        "cpu": {"name": here.name if not here.is_gpu else _cpu_name(), "cores": here.cores, "features": cpu_features()},
        "host_memory_bytes": here.host_bytes,
        "free_disk_bytes": _free_disk_bytes(folder),
        "gpu": _gpu(here),
        "cards": cards(),
        "versions": found,
        "kernels": _kernels(),
        "folders": folders(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"),
        "hub_login": _hub_login(),
        "advice": [],
    }
    facts["advice"] += advice(facts)
    return facts


def cpu_features() -> list[str]:
    """The flags that decide how fast the CPU path is."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text(encoding="utf-8", errors="replace").split()) if path.is_file() else set()
    return [flag for flag in CPU_FLAGS if flag in flags]


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _free_disk_bytes(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _gpu(here: machine.Machine) -> Gpu | None:
    """The card as the driver and torch see it; the two can differ, and then `advice` says what to do."""
    import torch

    built_for = torch.version.cuda
    if not here.is_gpu and not torch.cuda.is_available():
        return None if built_for is None else {"torch_cuda": built_for, "usable": False}
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else here.memory_bytes - here.used_bytes
    return {
        "name": here.name,
        "memory_bytes": here.memory_bytes,
        "free_bytes": free,
        "capability": here.capability,
        "bf16": here.bf16,
        "torch_cuda": built_for,
        "usable": torch.cuda.is_available(),
    }


def cards() -> list[str]:
    """Each GPU that torch sees, with the kernel path that a process on it would take: `NAME, sm_90, triton`."""
    import torch
    from qmedtune_kernels import dispatch

    found: list[str] = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        path = "triton" if dispatch.uses_triton(device) else "reference"
        found.append(f"{torch.cuda.get_device_name(index)}, sm_{dispatch.capability(device)}, {path}")
    return found


def _kernels() -> dict[str, str]:
    import torch
    from qmedtune_kernels import dispatch

    return dispatch.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def folders() -> dict[str, str]:
    """Where things are kept between runs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return {"built-in bases": str(store.cache_root()), "Hub models": HF_HUB_CACHE, "compiled kernels": triton}


def _hub_login() -> bool:
    from huggingface_hub.constants import HF_TOKEN_PATH

    return bool(os.environ.get("HF_TOKEN")) or Path(HF_TOKEN_PATH).is_file()


def advice(facts: Examined) -> Iterator[str]:
    """One line for each thing that stands in the way or slows a run down, with what to do."""
    gpu = facts["gpu"]
    if gpu is None:
        yield "no GPU is used: built-in recipes run in minutes, a real LLaMA would take days; try the flagship recipe"
    elif not gpu["usable"]:
        yield "torch sees no GPU: install a driver, or a torch build for your driver's CUDA; until then the CPU is used"
    elif not gpu["bf16"]:
        yield "this card has no bfloat16: `compute_dtype: auto` takes float16"
    unused = facts["kernels"]["lora"].removeprefix("reference: ")
    if gpu and gpu["usable"] and unused != facts["kernels"]["lora"]:
        yield f"this card runs plain PyTorch instead of the kernels: {unused}"
    if len(set(facts["cards"])) > 1:
        yield f"the cards differ ({'; '.join(facts['cards'])}): a run on all of them goes at the pace of the slowest"
    elif len(facts["cards"]) > 1:
        yield f"{len(facts['cards'])} cards: a run takes one, `--gpus auto` all; see `plan --gpus auto`"
    differing: list[str] = []
    for name, version in facts["versions"].items():
        if version["tested"] and (version["installed"] or "").split("+")[0] != version["tested"]:
            differing.append(name)
    if differing:
        yield f"not the tested versions: {', '.join(differing)}; the tested set: pip install -c constraints.txt -e ."
    if facts["free_disk_bytes"] < LOW_DISK_BYTES:
        yield f"{size(facts['free_disk_bytes'])} of disk left here; give --out a folder with more, `plan` says how much"
    if facts["host_memory_bytes"] < LOW_HOST_BYTES:
        yield f"{size(facts['host_memory_bytes'])} of memory: take small bases, or close other programs"
    if not facts["hub_login"]:
        yield "no Hub login: gated bases (Llama) need `hf auth login` once; built-in recipes do not"
    if sys.version_info >= (3, 14):
        yield "this Python is newer than the tested ones (3.11 to 3.13)"


def rows(facts: Examined) -> list[tuple[str, str]]:
    """The facts as (what, value) lines for people."""
    gpu = facts["gpu"]
    card = "none"
    if gpu is not None:
        card = f"{gpu.get('name', 'present')}, usable: {'yes' if gpu['usable'] else 'no'}"
    if gpu and "memory_bytes" in gpu:
        kind = "bfloat16" if gpu["bf16"] else "float16"
        card += f", {size(gpu['memory_bytes'])} ({size(gpu['free_bytes'])} free), sm_{gpu['capability']}, {kind}"
    cpu = facts["cpu"]
    lines = [
        ("qmedtune", f"{facts['qmedtune']}, Python {facts['python']}, {facts['system']}"),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'no vector features known'}"),
        ("memory", size(facts["host_memory_bytes"])),
        ("disk free", size(facts["free_disk_bytes"])),
        ("GPU", card),
    ]
    if len(facts["cards"]) > 1:
        for index, found in enumerate(facts["cards"]):
            lines.append((f"GPU {index}", found))
    for name, version in facts["versions"].items():
        lines.append((name, _version_text(version)))
    for name, path in facts["kernels"].items():
        lines.append((f"kernel {name}", path))
    lines += facts["folders"].items()
    lines.append(("network", "HF_HUB_OFFLINE is set: nothing is downloaded" if facts["offline"] else "not restricted"))
    return lines


def _version_text(found: Version) -> str:
    if found["installed"] is None:
        return f"not installed (tested: {found['tested']})" if found["tested"] else "not installed"
    same = found["tested"] is None or found["installed"].split("+")[0] == found["tested"]
    return found["installed"] if same else f"{found['installed']} (tested: {found['tested']})"
