"""A look at a few records of a few files of a source, for `plan`: within `SECONDS`, whatever the source's size.

What is seen is given the shape that reading gives it, so that the plan judges records as the run will. Deliberately not
here: tokens (estimate.py), hygiene.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qmedtune.data.reading.document import Record
from qmedtune.recipe import SourceSection

SECONDS = 0.3  # of reading per source
SLOWEST = 4  # times as long by the clock
FILES = 8
RECORDS_PER_FILE = 2000
WINDOWS, WINDOW_BYTES = 8, 1 << 17
# Characters of text per byte of file where a file cannot be read to its end in time: XML has mark-up, compressed
# containers hold about three times their size. Assumed, +-40 %.
TEXT_PER_BYTE = {"json": 0.9, "jats": 0.6, "pubmed": 0.35, "parquet": 2.0, "huggingface": 2.0}
GUESSED_SPREAD = 0.4
GUESSED_CHARACTERS = 4000.0  # of a record, where none could be read
LINE_FORMATS = ("jsonl", "json", "csv", "tsv")


@dataclass(frozen=True)
class Sample:
    """Usable `records` in reading order, and how often others were `damaged` and why. `total` +- `spread` (a share, 0
    when all was read): records of all files, before hold-out and limits. `trained_share`: what of them is not held out.
    `read_bytes`: the files' sizes."""

    records: list[Record]
    damaged: Counter[str]
    total: float
    spread: float
    trained_share: float
    num_files: int = 0
    read_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Every record of the source is here."""
        return self.spread == 0.0


@dataclass
class _Look:
    """The first records of one file, and how many it has in all, +- `spread`."""

    records: list[Record] = field(default_factory=list[Record])
    damaged: Counter[str] = field(default_factory=Counter[str])
    total: float = 0.0
    spread: float = 0.0


def sample_source(source: SourceSection, most: int | None = None) -> Sample:
    """Raises what reading raises: DataError for absent or unreadable files. What has no files (built in, or a dataset
    of the Hub) is read whole, or its first `most` records."""
    from qmedtune.data.reading.sources import source_files

    files = source_files(source)
    if not files:
        return _sample_without_files(source, most)
    sizes = [file.stat().st_size for file in files]
    picked = sorted({round(i * (len(files) - 1) / max(FILES - 1, 1)) for i in range(FILES)})
    records: list[Record] = []
    damaged: Counter[str] = Counter()
    total, looked_at, spread = 0.0, 0, 0.0
    for i in picked:
        look = _look(files[i], source, SECONDS / len(picked))
        records += look.records
        damaged.update(look.damaged)
        total += look.total
        looked_at += sizes[i]
        spread = max(spread, look.spread)
    if len(picked) < len(files):
        spread += 0.1
    total = total * sum(sizes) / max(1, looked_at)
    return Sample(records, damaged, total, spread, 1 - source.holdout, len(files), sum(sizes))


def _sample_without_files(source: SourceSection, most: int | None) -> Sample:
    from qmedtune.data.reading.rejects import Rejects
    from qmedtune.data.reading.sources import read_records

    trained_share = 1 - source.holdout
    kept: list[Record] = []
    for record in islice(read_records("", source, Rejects("")), most):
        if "held_out" in record:  # the built-in world says itself what is held out
            trained_share = 1.0
        if not record.get("held_out"):
            kept.append(record)
    return Sample(kept, Counter(), len(kept), 0.0, trained_share)


def _look(file: Path, source: SourceSection, seconds: float) -> _Look:
    from qmedtune.data.reading.formats import READERS, format_of

    format, look, line = format_of(file, source.format), _Look(), 0
    if format in READERS or format == "zip":
        line, ended = _read(file, source, format, look, seconds=seconds)
        look.total = len(look.records)
        if ended:
            return look
    if format in LINE_FORMATS and line > 20 and (lines := _lines(file)):
        look.total = len(look.records) * max(lines / line, 1.0)
        look.spread = 0.2 if file.suffix == ".gz" else 0.1
        return look
    mean = GUESSED_CHARACTERS
    if look.records:
        mean = sum(characters(record) for record in look.records) / len(look.records)
    look.total, look.spread = file.stat().st_size * TEXT_PER_BYTE.get(format, 1.0) / mean, GUESSED_SPREAD
    return look


def _read(file: Path, source: SourceSection, format: str, look: _Look, *, seconds: float) -> tuple[int, bool]:
    """Fill `look` from the file's head; the last line read, and whether the file ended there."""
    from qmedtune.data.reading.document import Recognised, Skipped
    from qmedtune.data.reading.formats import read_rows
    from qmedtune.data.reading.rejects import RefusedRecord, Unusable

    line, seen, began, started = 0, 0, time.thread_time(), time.monotonic()
    for line, fields in islice(read_rows(file, source, format), RECORDS_PER_FILE):  # noqa: B007 - the last one counts
        seen += 1
        if isinstance(fields, (Skipped, Recognised)):
            continue
        try:
            record = _shaped(fields, source)
            if not isinstance(record, RefusedRecord):
                look.records.append(record)
        except Unusable as error:
            look.damaged[str(error)] += 1
        # Of this thread's own time, so that a busy machine sees as much; of the clock's where a disk is slow.
        if time.thread_time() - began > seconds or time.monotonic() - started > SLOWEST * seconds:
            return line, False
    return line, seen < RECORDS_PER_FILE


def _shaped(fields: Any, source: SourceSection) -> Any:
    from qmedtune.data.reading.instructions import instruction_record
    from qmedtune.data.reading.records import text_record
    from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unusable

    if isinstance(fields, RefusedRecord):
        return fields
    if isinstance(fields, Damaged):
        raise Unusable(fields.reason)
    shape = instruction_record if source.kind == "instructions" else text_record
    return shape(fields, source.columns)


def characters(record: Record) -> int:
    """Of a record's text, or of its messages."""
    if "messages" not in record:
        return len(record["text"])  # pyright: ignore[reportTypedDictNotRequiredAccess] - what has no messages has text
    length = 0
    for message in record["messages"]:
        length += len(message["content"]) + len(message.get("input", ""))
    return length


def _lines(file: Path) -> float:
    """Lines of a file, from the density of newlines in windows spread over it; of a compressed one, in its head."""
    size = file.stat().st_size
    if file.suffix == ".zst":
        return 0.0
    with file.open("rb") as stream:
        if file.suffix == ".gz":
            packed = stream.read(WINDOW_BYTES)
            sample = zlib.decompressobj(31).decompress(packed)
            size = round(size * len(sample) / len(packed))
        else:
            sample = b""
            for i in range(WINDOWS):
                stream.seek(max(size - WINDOW_BYTES, 0) * i // (WINDOWS - 1))
                sample += stream.read(WINDOW_BYTES)
    return sample.count(b"\n") / len(sample) * size
