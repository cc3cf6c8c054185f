"""The highest resident memory of this process since it was last asked to forget: a step's own, not the run's so far.

Linux keeps the mark (VmHWM) and lets a process set it back to now. Where it may not, what was reached before stays in.
Deliberately not here: GPU memory, which torch counts itself.
"""

from __future__ import annotations

import os
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


def host_memory_bytes() -> int:
    """RAM that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path).read_text().strip() if Path(path).is_file() else "max"
        if limit.isdigit():
            total = min(total, int(limit))
    return total
