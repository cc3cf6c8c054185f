"""The process beside a run that has `track:`: reads metrics.jsonl as it grows, and hands the figures to a tracker.

    python -m qmedtune.tracking.follow TRACKER RUN NAME STAGE ...

It looks every 2 s until the run says on its stdin that it has ended, or is gone, and once more; then it hands on the
scores, if the run came to them, as a stage of that name: step 0 is the base, 1 the result. What it writes is what
metrics.jsonl and run.json say: where a stage went back to a checkpoint, its curve is written anew, no step twice.
Deliberately left out: everything that is text, such as warnings.
"""

from __future__ import annotations

import json
import math
import select
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qmedtune import record
from qmedtune.results import Run
from qmedtune.store import building_of
from qmedtune.tracking.points import Point, Tracker

EVERY_S = 2.0
METRICS, SCORES = "metrics.jsonl", "scores"
NOT_FIGURES = ("stage", "step", "time", "warning", "validation")


def follow(run: Path, stages: Sequence[str], tracker: Tracker, ended: Callable[[], bool]) -> None:
    """Write the curves of `stages` until `ended`, which waits a while, says so; then once more."""
    written: dict[str, bytes] = {}
    last = False
    while not last:
        last = ended()
        for stage in stages:
            _catch_up(run, stage, tracker, written)
    if points := scores_of(record.read(run)):
        tracker.begin(SCORES)
        tracker.add(SCORES, points)
    tracker.close()


def _catch_up(run: Path, stage: str, tracker: Tracker, written: dict[str, bytes]) -> None:
    """Hand on what was added to the stage's metrics; all of them, where what was handed on is no longer there."""
    text = _read(run, stage)
    if text is None:
        return
    before = written.get(stage)
    if before is None or not text.startswith(before):
        tracker.begin(stage)
        before = b""
    points: list[Point] = []
    for line in text[len(before) :].splitlines():
        if point := point_of(line):
            points.append(point)
    if points:
        tracker.add(stage, points)
    written[stage] = text


def _read(run: Path, stage: str) -> bytes | None:
    """The whole lines of a stage's metrics, where it is built or where it is sealed; None where it has none."""
    for folder in (building_of(run / stage, run), run / stage):
        try:
            text = (folder / METRICS).read_bytes()
        except OSError:
            continue
        return text[: text.rfind(b"\n") + 1]  # a line may be half written
    return None


def point_of(line: bytes) -> Point | None:
    """The finite figures of a line of metrics.jsonl; None where there are none."""
    entry = json.loads(line)
    figures: dict[str, float] = {}
    for name, value in entry.items():
        if name not in NOT_FIGURES:
            _take(figures, f"train/{name}", value)
    for source, loss in (entry.get("validation") or {}).items():
        _take(figures, f"validation/{source}", loss)
    if not figures:
        return None
    return Point(entry["step"], entry.get("time") or time.time(), figures)  # lines of 0.1 have none


def _take(figures: dict[str, float], name: str, value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        figures[name] = value


def scores_of(run: Run | None) -> list[Point]:
    """The main metric of every task and the perplexity of every text: base, then result. Empty without scores."""
    if run is None or run.evaluation is None:
        return []
    base: dict[str, float] = {}
    final: dict[str, float] = {}
    for name, task in run.evaluation.tasks.items():
        for figures, score in ((base, task.base), (final, task.final)):
            if score is not None:
                _take(figures, f"{name}/{score.metric}", score.value)
            if score is not None and score.generation is not None:
                _take(figures, f"{name}/generation {score.generation.metric}", score.generation.value)
    for name, text in run.evaluation.perplexity.items():
        _take(base, f"perplexity/{name}", text.base)
        _take(final, f"perplexity/{name}", text.final)
    now = time.time()
    return [Point(step, now, figures) for step, figures in enumerate((base, final)) if figures]


def main() -> None:
    name_of_tracker, run, name, *stages = sys.argv[1:]

    def ended() -> bool:
        return bool(select.select([sys.stdin], [], [], EVERY_S)[0])

    follow(Path(run), stages, _tracker(name_of_tracker, Path(run), name), ended)


def _tracker(chosen: str, run: Path, name: str) -> Tracker:
    if chosen == "tensorboard":
        from qmedtune.tracking.event_files import EventFiles

        return EventFiles(run / chosen)
    from qmedtune.tracking.trackio_project import TrackioProject

    return TrackioProject(name)


if __name__ == "__main__":
    main()
