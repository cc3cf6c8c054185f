"""What a tracker is given: the figures of a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Point:
    """Figures of one line. `step`: of the stage's optimiser; `at`: seconds since 1970."""

    step: int
    at: float
    figures: dict[str, float]


class Tracker(Protocol):
    def begin(self, stage: str) -> None:
        """Drop what is there of a stage."""

    def add(self, stage: str, points: Sequence[Point]) -> None: ...

    def close(self) -> None: ...
