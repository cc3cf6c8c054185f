"""The passes of a job as blocks of datatrove pipelines, for its local, Slurm and Ray executors.

    [Treat]  [Compare]  [Kept, <filters of datatrove>, Shards]  [Check]

One pipeline after another, each with as many tasks as `pipelines` says. An error leaves one line in errors/ below the
job's folder, because datatrove's own log of one prints the values of variables, and these hold text of patients: none
of ours reaches it with more than that line.
"""

# datatrove is an extra:
# pyright: reportMissingImports=false

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from qmedtune.data.hygiene.per_record import text_of
from qmedtune.data.reading.document import Record
from qmedtune.data.shards import passes
from qmedtune.data.shards.job import ShardJob
from qmedtune.disk import write_atomic
from qmedtune.errors import QmedtuneError

ERRORS = "errors"
ASKED_SHAPE = ("id", "text")


class ShardError(Exception):
    """What a worker tells of an error: the message that was written to errors/, and nothing else."""


class NothingTold:
    """A context that turns any error within into a `ShardError` without its frames. A class of its own, because
    contextlib passes the error through a line of its own, whose values a log would print."""

    def __init__(self, out: Path, what: str) -> None:
        self.place, self.what = out / ERRORS / f"{what}.txt", what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: object) -> None:
        if error is None:
            self.place.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            return
        message = self._message(error)
        self.place.parent.mkdir(exist_ok=True)
        write_atomic(self.place, message + "\n")
        raise ShardError(message) from None

    def _message(self, error: Exception) -> str:
        if isinstance(error, (QmedtuneError, ShardError)):
            return str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{self.what}: {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} ({frame.name})"


class BlockOfSource(PipelineStep):
    """A block for source `name` of the job in folder `out`."""

    def __init__(self, out: str, name: str):
        super().__init__()
        self.out, self.source = out, name

    def _told(self, rank: int) -> NothingTold:
        return NothingTold(Path(self.out), f"{self.source}-{type(self).__name__.lower()}-{rank:05d}")


class Treat(BlockOfSource):
    """Reads, cleans and searches the files of a shard (identifiers, benchmarks) and digests them for `Compare`."""

    type, name = "READER", "qmedtune: treat"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self._told(rank), self.track_time("shard"):
            self.stat_update("records", value=passes.treat(Path(self.out), self.source, rank))


class Compare(BlockOfSource):
    """Decides about all records of a source at once: versions, duplicates, near duplicates, benchmarks. One task."""

    type, name = "DEDUP", "qmedtune: compare"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self._told(rank), self.track_time("source"):
            records = passes.compare(Path(self.out), self.source).records
            for fate, count in records.as_json().items():
                self.stat_update(fate, value=count)


class Kept(BlockOfSource):
    """The kept records of a shard as documents; what is known beside id and text (patient, messages) is metadata."""

    type, name = "READER", "qmedtune: kept records"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self._told(rank):
            if passes.is_written(Path(self.out), self.source, rank):
                return
            for record in passes.kept_records(Path(self.out), self.source, rank):
                known = {key: value for key, value in record.items() if key not in ASKED_SHAPE}
                yield Document(text=text_of(record), id=record["id"], metadata=known)


class Shards(BlockOfSource):
    """Writes the documents that come as one shard that `data:` reads."""

    type, name = "WRITER", "qmedtune: shards"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self._told(rank), self.track_time("shard"):
            if not passes.is_written(Path(self.out), self.source, rank):
                written = passes.write(Path(self.out), self.source, rank, _records(data or ()))
                self.stat_update("records", value=written)


class Check(BlockOfSource):
    """Writes ledger.json once every shard is there. One task."""

    type, name = "STATS", "qmedtune: check"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self._told(rank):
            passes.check(Path(self.out), self.source)


def _records(documents: Iterable[Document]) -> Iterator[Record]:
    for document in documents:
        record: dict[str, Any] = {"id": document.id}
        if "messages" not in document.metadata:
            record["text"] = document.text
        record.update(document.metadata)
        yield Record(**record)


class PipelineOfJob(NamedTuple):
    """Blocks, and the number of tasks that each run all of them."""

    name: str
    blocks: list[PipelineStep]
    tasks: int


def pipelines(job: ShardJob, out: Path, between: Iterable[PipelineStep] = ()) -> list[PipelineOfJob]:
    """Of a whole job, in the order in which they must run.

    between: filters of datatrove's for the kept records. The ledger counts what these were given; what they drop
    stands in datatrove's own statistics.
    """
    found: list[PipelineOfJob] = []
    for name, source in job.sources.items():
        num_shards, where = len(source.shards), (str(out), name)
        found.append(PipelineOfJob(f"{name}-1-treat", [Treat(*where)], num_shards))
        found.append(PipelineOfJob(f"{name}-2-compare", [Compare(*where)], 1))
        found.append(PipelineOfJob(f"{name}-3-write", [Kept(*where), *between, Shards(*where)], num_shards))
        found.append(PipelineOfJob(f"{name}-4-check", [Check(*where)], 1))
    return found


def errors_in(out: Path) -> list[str]:
    """What tasks have left in errors/, each message once."""
    found: dict[str, None] = {}
    for path in sorted((out / ERRORS).glob("*.txt")):
        found[path.read_text(encoding="utf-8").strip()] = None
    return list(found)
