"""Signs of life between the processes of one run, through their store.

A process that ended is noticed by its pid on its own machine, and by torchrun. One that hangs, or whose machine is
gone, is noticed here: sums between GPUs would wait for it until their timeout. Looks are counted, not seconds, so that
a run which was stopped as a whole (Ctrl-Z, a suspended machine) finds all of its processes alive when it goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

BEAT_S = 5.0
SILENT_LOOKS = 60  # without a new sign, one every BEAT_S: five minutes


class Pulse:
    """Of the process `rank`, which watches `others` (their ranks). Raises RuntimeError where the store is gone."""

    def __init__(self, store: Any, rank: int, others: Collection[int]):
        self.store, self.rank = store, rank
        self.beats = 0
        self.seen = dict.fromkeys(others, b"")
        self.missed = dict.fromkeys(others, 0)

    def beat(self) -> list[int]:
        """Give a sign; ranks of the others that have given none in the last SILENT_LOOKS looks."""
        self.beats += 1
        self.store.set(f"pulse/{self.rank}", str(self.beats))
        silent: list[int] = []
        for rank, before in self.seen.items():
            key = f"pulse/{rank}"
            now = self.store.get(key) if self.store.check([key]) else b""
            # Before its first sign a process imports torch, which from a cold network disk takes minutes.
            unchanged = bool(now) and now == before
            self.missed[rank] = self.missed[rank] + 1 if unchanged else 0
            self.seen[rank] = now
            if self.missed[rank] >= SILENT_LOOKS:
                silent.append(rank)
        return silent
