"""Curves of a run while it logs: loss, held-out losses, learning rate, gradient norm, speed, memory.

metrics.jsonl grows by a line per step. Each look reads what was added since the last one; where a file was replaced (a
stage that goes back to its checkpoint) it is read again. A step that is done again counts once, by its last line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from qmedtune.reporting.charts import Html, Series, line_chart
from qmedtune.reporting.unfinished import metrics_files
from qmedtune.results import Logged, Number
from qmedtune.watching.runs import Seen

LOSS = "loss"
Line = dict[int, float]  # step -> value


@dataclass(frozen=True)
class Quantity:
    """What is drawn beside the loss. `scale`: of the logged value to what the axis says."""

    key: str  # a field of Logged
    title: str
    axis: str
    scale: float = 1.0


QUANTITIES = (
    Quantity("lr", "Learning rate", "learning rate"),
    Quantity("grad_norm", "Gradient norm", "norm, before clipping"),
    Quantity("tokens_per_s", "Speed", "tokens per second"),
    Quantity("memory", "Peak memory", "GiB", 2.0**-30),
)


@dataclass
class StageCurves:
    """What one stage has logged so far."""

    lines: dict[str, Line] = field(default_factory=dict)
    held_out: dict[str, Line] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)  # an ordered set

    def take(self, entry: Logged) -> None:
        _note(self.lines, LOSS, entry.step, entry.loss)
        for quantity in QUANTITIES:
            _note(self.lines, quantity.key, entry.step, getattr(entry, quantity.key))
        for source, loss in (entry.validation or {}).items():
            _note(self.held_out, source, entry.step, loss)
        if entry.warning is not None:
            self.warnings[entry.warning] = None


def _note(lines: dict[str, Line], key: str, step: int, value: Number | None) -> None:
    if value is not None and math.isfinite(value):
        lines.setdefault(key, {})[step] = value


@dataclass
class _File:
    """One metrics.jsonl, as far as it was read."""

    inode: int = 0
    read: int = 0
    stages: dict[str, StageCurves] = field(default_factory=dict)


class Follower:
    """The curves of one run, kept up to date."""

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}

    def stages(self, seen: Seen) -> dict[str, StageCurves]:
        """What each stage has logged, in order."""
        paths = metrics_files(seen.folder, seen.run.model_copy(update={"status": seen.status}))
        self._files = {path: self._files.get(path) or _File() for path in paths}
        found: dict[str, StageCurves] = {}
        for path, file in self._files.items():
            self._follow(path, file)
            found |= file.stages
        return found

    def _follow(self, path: Path, file: _File) -> None:
        try:
            with path.open("rb") as opened:
                stat = path.stat()
                if stat.st_ino != file.inode or stat.st_size < file.read:
                    file.inode, file.read, file.stages = stat.st_ino, 0, {}
                opened.seek(file.read)
                added = opened.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]  # a line may be half written
        file.read += len(whole)
        for line in whole.splitlines():
            _take(file.stages, line)


def _take(stages: dict[str, StageCurves], line: bytes) -> None:
    try:
        entry = Logged.model_validate_json(line)
    except ValidationError:  # a kill in mid-line
        return
    stages.setdefault(entry.stage, StageCurves()).take(entry)


def loss_chart(stage: StageCurves, colors: dict[str, int]) -> Html:
    """Training and held-out losses. `colors`: of the sources."""
    series = [Series("training", points(stage.lines.get(LOSS, {})), 0)]
    for source, line in stage.held_out.items():
        series.append(Series(f"held-out {source}", points(line), colors.get(source, 1), dots=True))
    if not any(line.points for line in series):
        return Html('<p class="note">No step is logged yet.</p>')
    return line_chart(series, "optimiser step", "loss, nats per token")


def small_charts(stage: StageCurves) -> list[tuple[str, Html]]:
    """(title, chart) of everything else that the stage has logged."""
    found = []
    for quantity in QUANTITIES:
        line = stage.lines.get(quantity.key)
        if line:
            scaled = [(step, value * quantity.scale) for step, value in points(line)]
            chart = line_chart([Series(quantity.title, scaled, 1)], "optimiser step", quantity.axis)
            found.append((quantity.title, chart))
    return found


def points(line: Line) -> list[tuple[int, float]]:
    return sorted(line.items())
