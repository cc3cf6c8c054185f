"""The highest resident memory of this process since it was last asked to forget: a step's own, not the run's so far.

Linux keeps the mark (VmHWM) and lets a process set it back to now. Where it may not, what was reached before stays in.
Deliberately not here: GPU memory, which torch counts itself.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset() -> None:
    """The mark falls to what is resident now."""
    with suppress(OSError):  # another system, or a container that keeps the file from us
        FORGET.write_text("5")


def resident_bytes() -> int:
    """Peak resident size of this process since `reset`, in bytes; files that it maps count as far as they were read."""
    with suppress(OSError):
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
