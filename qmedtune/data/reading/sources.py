"""From a source of a recipe to a stream of records, in a fixed order, with what was recognised and what was not read.

Files are found in listing.py and read by the readers that formats.py picks. Damaged records are counted and named,
never raised. Nothing is downloaded: a Hub id is read by the `datasets` library only when `format: huggingface` asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from qmedtune.data.reading import arrow
from qmedtune.data.reading.document import Document, Recognised, Record, Skipped
from qmedtune.data.reading.files import ARCHIVE_ERRORS, BROKEN_ARCHIVE
from qmedtune.data.reading.formats import READERS, TABLES, describe, format_of, read_rows
from qmedtune.data.reading.instructions import instruction_shape
from qmedtune.data.reading.listing import BUILTIN, SUFFIXES, hub_dataset, source_files, with_variables
from qmedtune.data.reading.medmcqa import with_answer_base
from qmedtune.data.reading.pubmed import LatestFirst
from qmedtune.data.reading.records import KEPT, Shaped, text_shape
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Rejects, Unusable
from qmedtune.data.reading.tally import ReadingTally, shown_names
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection

__all__ = [
    "BUILTIN", "READERS", "SUFFIXES", "VERSIONED", "Deleted", "ReadItem", "PmidSet", "format_of", "hub_dataset",
    "read_items", "read_records", "reading_order", "source_files", "with_variables",
]  # fmt: skip

VERSIONED: Literal["_versioned"] = "_versioned"
CHECKED_ROWS = 100  # of a file, in which a column that `columns:` names must occur


@dataclass(frozen=True)
class Deleted:
    """Stands in a stream for the PubMed ids that a file withdraws."""

    pmids: tuple[str, ...]


ReadItem = tuple[str, int, Record | Damaged | RefusedRecord | Deleted]


def read_records(name: str, source: SourceSection, rejects: Rejects) -> Iterator[Record]:
    """Records of a source in a fixed order: text records, or for `kind: instructions` records with messages.

    `name` is the source's name in the recipe. What cannot be used goes to `rejects`, whose `at` tells file and line
    of the record just given; with `max_records` reading stops early. PubMed updates replace earlier versions.
    """
    seen, num = PmidSet(), 0
    for file, line, item in read_items(source):
        rejects.at = (file, line)
        if isinstance(item, (Damaged, RefusedRecord)):
            rejects.add(item)
        elif isinstance(item, Deleted):
            seen.update(item.pmids)
        elif item.pop(VERSIONED, False) and seen.add(item["pmid"]):
            rejects.superseded()
        else:
            yield item
            num += 1
            if num == source.max_records:
                return


class SourceReader(Iterator[ReadItem]):
    """The items of a source as they are read, and `tally`: what was recognised, read and not read up to here."""

    def __init__(self, source: SourceSection, files: list[Path] | None, spill: Path | None):
        self.tally = ReadingTally()
        self._items = _items(source, files, self.tally, spill)

    def __next__(self) -> ReadItem:
        return next(self._items)


def read_items(source: SourceSection, files: list[Path] | None = None, spill: Path | None = None) -> SourceReader:
    """(file, line, record | what stands for an unusable one) of a source, or of some of its `reading_order`.

    spill: a folder on disk for what a very large PubMed file does not hold in memory (None: the system's own). PubMed
    records carry `VERSIONED`: the first of a PMID that is met is the one to keep, unless a `Deleted` that names
    it came before. Both are for the caller to apply, because they reach across files.
    """
    return SourceReader(source, files, spill)


def _items(
    source: SourceSection, files: list[Path] | None, tally: ReadingTally, spill: Path | None
) -> Iterator[ReadItem]:
    if source.format == "huggingface":
        tally.recognised["huggingface"] += 1
        yield from _shaped(_dataset_rows(source), source, tally, is_table=False)
        return
    files = files or reading_order(source)
    if not files:
        yield from _shaped(_builtin_rows(source), source, tally, is_table=False)
    for file in files:
        format = format_of(file, source.format)
        kinds: set[str] = set()
        if format == "pubmed":
            stream = _latest_first(file, spill)
        else:
            stream = _file_rows(file, source, format)
        yield from _shaped(stream, source, tally, format in TABLES, kinds=kinds)
        said = describe(file, source, format)
        tally.recognised[f"{said}: {', '.join(sorted(kinds))}" if kinds else said] += 1


def reading_order(source: SourceSection) -> list[Path]:
    """The files of a source: PubMed's from the newest to the oldest, then all others by name."""
    files = source_files(source)
    formats = []
    for file in files:
        formats.append(format_of(file, source.format))
    pubmed = []
    for file, format in zip(files, formats, strict=True):
        if format == "pubmed":
            pubmed.append(file)
    return [*reversed(pubmed), *(file for file, format in zip(files, formats, strict=True) if format != "pubmed")]


RawRows = Iterator[tuple[str, int, Any]]


def _shaped(
    stream: RawRows, source: SourceSection, tally: ReadingTally, is_table: bool, *, kinds: set[str] | None = None
) -> Iterator[ReadItem]:
    """Rows as records, and the tally of what they were made of."""
    if source.kind == "instructions":
        shape = instruction_shape
    else:
        shape = text_shape
    for file, line, fields in _with_columns(stream, source, is_table):
        if isinstance(fields, Skipped):
            tally.files_unread[Path(fields.name).suffix.lower() or "no extension"] += 1
            continue
        if isinstance(fields, Recognised):
            tally.recognised[fields.format] += 1
            continue
        if isinstance(fields, (Damaged, RefusedRecord, Deleted)):
            yield file, line, fields
            continue
        try:
            shaped = shape(fields, source.columns)
        except Unusable as error:
            yield file, line, Damaged(str(error))
            continue
        if isinstance(shaped, RefusedRecord):
            yield file, line, shaped
            continue
        yield file, line, _finished(shaped, fields, tally, is_table)
        if kinds is not None and shaped.schema:
            kinds.add(shaped.schema)


def _finished(shaped: Shaped, fields: Any, tally: ReadingTally, is_table: bool) -> Record:
    record = shaped.record
    if isinstance(fields, Document):
        tally.add(fields.unread, frozenset(), False)
        if fields.versioned:
            record[VERSIONED] = True
        return record
    tally.add((name for name in fields if name not in KEPT and name[:1] != "_"), shaped.read, is_table)
    for key in KEPT:
        if key in fields:
            record[key] = fields[key]
    return record


def _with_columns(stream: RawRows, source: SourceSection, is_table: bool) -> RawRows:
    """The rows, once a column that the recipe names has been seen in the first of them. Raises DataError."""
    if not source.columns:
        return stream
    first = list(islice(stream, CHECKED_ROWS))
    rows = []
    for _, _, fields in first:
        if isinstance(fields, dict):
            rows.append(fields)
    there = set(chain.from_iterable(rows))
    for role, name in source.columns.items():
        if rows and name not in there:
            close = get_close_matches(name, there, n=3)
            if close:
                hint = f"did you mean {' or '.join(close)}? "
            else:
                hint = ""
            known = shown_names(rows[0])
            raise DataError(
                f"{first[0][0]}: no column {name!r} (columns: {{{role}: {name}}})\n{hint}columns there: {known}"
            )
    return chain(first, stream)


def _builtin_rows(source: SourceSection) -> RawRows:
    from qmedtune.data.synthetic import outcomes

    for path in source.paths:
        for number, fields in enumerate(outcomes.builtin_records(path), start=1):
            yield path, number, fields


def _dataset_rows(source: SourceSection) -> RawRows:
    for path in source.paths:
        if hub_dataset(source):
            stream = arrow.read_hub(path)
        else:
            stream = arrow.read_saved(Path(with_variables(path)))
        for number, fields in stream:
            yield path, number, fields


def _file_rows(file: Path, source: SourceSection, format: str) -> RawRows:
    number = 0
    try:
        for number, fields in with_answer_base(file, lambda: read_rows(file, source, format)):
            yield str(file), number, fields
    except ARCHIVE_ERRORS:
        yield str(file), number + 1, BROKEN_ARCHIVE


def _latest_first(file: Path, spill: Path | None) -> RawRows:
    """What a PubMed file deletes, then its records from the last to the first."""
    items = LatestFirst(file, spill)
    if items.deleted:
        yield str(file), 1, Deleted(tuple(items.deleted))
    for number, item in items:
        yield str(file), number, item


class PmidSet:
    """A bitmap over PubMed ids that grows as needed: 8 MB for the 40 million there are."""

    def __init__(self) -> None:
        self._bits = bytearray(1 << 20)

    def __contains__(self, pmid: str) -> bool:
        if pmid.isdecimal():
            at = int(pmid)
        else:
            at = -1
        return 0 <= at < 8 * len(self._bits) and bool(self._bits[at >> 3] >> (at & 7) & 1)

    def update(self, pmids: Iterable[str]) -> None:
        for pmid in pmids:
            self.add(pmid)

    def add(self, pmid: str) -> bool:
        """True if it was there already."""
        if pmid in self or not pmid.isdecimal() or len(pmid) > 9:
            return pmid in self
        at = int(pmid)
        if at >= 8 * len(self._bits):
            self._bits.extend(bytes((at >> 3) + 1 + (1 << 20) - len(self._bits)))
        self._bits[at >> 3] |= 1 << (at & 7)
        return False
