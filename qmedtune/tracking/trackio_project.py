"""Curves as trackio reads them: a project with a run for each stage, in the folder that TRACKIO_DIR names.

Through trackio's storage, not through trackio.init: that asks the Hub who is logged in wherever a token lies on the
machine, and takes no time of a line but now.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports] - an extra

from qmedtune.tracking.points import Point


class TrackioProject:
    """Writer of a trackio project.

    Of one run, by its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def begin(self, stage: str) -> None:
        SQLiteStorage.delete_run(self._name, stage)

    def add(self, stage: str, points: Sequence[Point]) -> None:
        figures, steps, times = [], [], []
        for point in points:
            figures.append(point.figures)
            steps.append(point.step)
            times.append(datetime.fromtimestamp(point.at, UTC).isoformat())
        SQLiteStorage.bulk_log(self._name, stage, figures, steps=steps, timestamps=times)

    def close(self) -> None:
        """Nothing is left to write: each call of trackio's storage is a transaction."""
