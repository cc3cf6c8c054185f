"""Curves as TensorBoard reads them: an event file for each stage, which is a run of its own there.

By TensorBoard's own record writer and messages. Its EventFileWriter is not taken: it puts the machine's name into the
file's. A file that is written anew gets a new name, since TensorBoard may have the old one open.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made at run time
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from qmedtune.tracking.points import Point

PATTERN = "events.out.tfevents.*.qmedtune"
VERSION = "brain.Event:2"  # the first record of every event file since TensorFlow 0.7


class EventFiles:
    """Writer of TensorBoard event files.

    Of one run, in `folder`. Figures are kept as fp32, as TensorBoard does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, RecordWriter] = {}

    def begin(self, stage: str) -> None:
        if stage in self._writers:
            self._writers.pop(stage).close()
        place = self._folder / stage
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob(PATTERN):
            old.unlink()
        opened = (place / PATTERN.replace("*", str(time.time_ns()))).open("xb")
        self._writers[stage] = RecordWriter(opened)
        self._writers[stage].write(Event(wall_time=time.time(), file_version=VERSION).SerializeToString())

    def add(self, stage: str, points: Sequence[Point]) -> None:
        writer = self._writers[stage]
        for point in points:
            summary = Summary()
            for name, value in point.figures.items():
                summary.value.add(tag=name, simple_value=value)
            writer.write(Event(wall_time=point.at, step=point.step, summary=summary).SerializeToString())
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
