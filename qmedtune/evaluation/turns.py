"""Who of several processes scores which part: parts of benchmarks and whole texts, in turn.

Parts are those that are written one by one (measure.py), so that a process scores what one process alone would score in
the same batches: the same numbers. What the others have written is read; what they have not, this process makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Turns:
    """Work of an evaluation shared out between processes, round-robin.

    Of the process `rank` of `size`. wait: returns when another has written a file, or will not any more. All walk
    the same parts in the same order, and count them."""

    rank: int = 0
    size: int = 1
    wait: Callable[[Path], object] = Path.exists
    counted: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mine(self) -> bool:
        """Whether the next part is this process's."""
        self.counted += 1
        return (self.counted - 1) % self.size == self.rank
