"""CSV and its relatives as Excel and others write them: separator, encoding, line ends and quoting are found, and told.

A header that cannot be one (damaged, a name twice, no known name, another number of columns than the rows) makes the
whole file unread, with what was found about it: rows under wrong names would be worse than none. `delimiter:` and
`encoding:` of the recipe are taken as given.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qmedtune.data.reading.column_names import is_known
from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.files import ARCHIVE_ERRORS, BROKEN_ARCHIVE, MAX_RECORD_BYTES, open_bytes, text_lines_of
from qmedtune.data.reading.rejects import Damaged, Unread

Row = tuple[int, Fields | Damaged]

SAMPLE_BYTES = 1 << 20
SAMPLE_ROWS = 50
DELIMITERS = (",", ";", "\t", "|")
SHOWN = {"\t": "tab"}
SEPARATOR_LINE = re.compile(rb'"?sep=(.)"?\s*$', re.IGNORECASE)
QUOTED = re.compile(r'"(?:[^"]|"")*+"')
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
csv.field_size_limit(MAX_RECORD_BYTES)  # a quote left open ends here at the latest


@dataclass(frozen=True)
class Dialect:
    """Encoding, delimiter and header of a CSV file.

    How a file is written. line_end: "\\n" also stands for "\\r\\n"; first_line: where the header is, from 1.
    """

    delimiter: str
    encoding: str
    line_end: str = "\n"
    quoted: bool = True
    first_line: int = 1

    def __str__(self) -> str:
        ends = {"\n": "LF", "\r": "CR"}[self.line_end]
        if self.quoted:
            quoting = ""
        else:
            quoting = ", quotes as text"
        return f"separator {SHOWN.get(self.delimiter, self.delimiter)}, {self.encoding}, line ends {ends}{quoting}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of csv.reader."""
        if self.quoted:
            return {"delimiter": self.delimiter, "strict": True}
        return {"delimiter": self.delimiter, "quoting": csv.QUOTE_NONE}


@dataclass(frozen=True)
class Requested:
    """What the recipe says about a table. known: names of columns that it expects beside the known ones."""

    delimiter: str | None = None
    encoding: str | None = None
    known: frozenset[str] = frozenset()


# ---- finding out -----------------------------------------------------------------------------------------------------


def find_dialect(path: Path, requested: Requested) -> Dialect:
    """How the file is written, by its first MiB."""
    with open_bytes(path) as file:
        head = file.read(SAMPLE_BYTES)
    encoding = requested.encoding or find_encoding(head)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head).removeprefix("\ufeff")
    bare = QUOTED.sub("", text)
    if bare.count("\r") > 2 * bare.count("\n"):
        line_end = "\r"
    else:
        line_end = "\n"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = Dialect(requested.delimiter or ",", encoding, line_end)
    first, _, rest = text.partition("\n")
    if said := SEPARATOR_LINE.match(first.encode()):
        return _quoting(replace(found, delimiter=requested.delimiter or said[1].decode(), first_line=2), rest)
    if requested.delimiter:
        return _quoting(found, text)
    if path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        usual = "\t"
    else:
        usual = ","
    candidates = [usual, *(d for d in DELIMITERS if d != usual)]
    tried = []
    for d in candidates:
        tried.append(_quoting(replace(found, delimiter=d), text))
    return max(tried, key=lambda dialect: _fit(dialect, text, requested.known))


def find_encoding(head: bytes) -> str:
    """By the byte order mark, by NUL bytes at every other place, as UTF-8 where that fits; else Windows' cp1252."""
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding
    if head.count(0) > len(head) // 4:
        if head[1::2].count(0) > head[::2].count(0):
            return "utf-16-le"
        return "utf-16-be"
    if head.isascii():
        return "utf-8"
    if _is_utf8(head):
        return "utf-8"
    good = sum(not line.isascii() and _is_utf8(line) for line in head.splitlines())
    if good:
        return "utf-8"
    return "cp1252"


def _is_utf8(data: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def is_header(head: bytes) -> bool:
    """Whether a file begins with two known names, separated by a tab."""
    line = codecs.getincrementaldecoder(find_encoding(head))("replace").decode(head).partition("\n")[0]
    return sum(is_known(name) for name in line.removeprefix("\ufeff").strip().split("\t")) >= 2


def _quoting(dialect: Dialect, text: str) -> Dialect:
    """Quotes are text where a file that is split by tabs or bars is whole only so."""
    if dialect.delimiter not in "\t|":
        return dialect
    bare = replace(dialect, quoted=False)
    if _share(_sample(dialect, text)) < _share(_sample(bare, text)) == 1:
        return bare
    return dialect


def _sample(dialect: Dialect, text: str) -> list[list[str]]:
    """The first rows; an empty one stands for the place where they cannot be read on."""
    found: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), **dialect.arguments)
    try:
        for row in reader:
            found += [row] if row else []
            if len(found) > SAMPLE_ROWS:
                break
    except csv.Error:
        found.append([])
    return found


def _share(rows: list[list[str]]) -> float:
    """Of the first rows, how many have as many cells as the first; 0 for a single column."""
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows)


def _fit(dialect: Dialect, text: str, known: frozenset[str]) -> tuple[int, float, int]:
    rows = _sample(dialect, text)
    if not rows:
        return 0, 0.0, 0
    names = sum(name.strip() in known or is_known(name) for name in rows[0])
    return (names if len(rows[0]) > 1 else 0), _share(rows), len(rows[0])


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Recoded(io.RawIOBase):
    """A file's bytes as UTF-8 with "\\n" at the ends of lines, whatever they are in it."""

    def __init__(self, file: IO[bytes], dialect: Dialect):
        self._file, self._left = file, b""
        wide = dialect.encoding.lower().startswith(("utf-16", "utf-32"))  # have no bytes to keep: marks instead
        self._decode = codecs.getincrementaldecoder(dialect.encoding)("replace" if wide else "surrogateescape").decode
        self._old_end = dialect.line_end == "\r"
        self._was_return = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._file.read(1 << 16)
            text = self._decode(data, not data)
            if self._old_end and text:
                if self._was_return and text[0] == "\n":
                    again = text[1:]
                else:
                    again = text
                self._was_return = text[-1] == "\r"
                text = again.replace("\r\n", "\n").replace("\r", "\n")
            self._left = text.encode("utf-8", "surrogateescape")
            if not data:
                break
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


class _Lines:
    """Feeds csv.reader and remembers the lines of the row in progress, so that a bad quote costs one line."""

    def __init__(self, source: Iterator[tuple[int, str | Damaged]]):
        self._source = source
        self.again: deque[tuple[int, str]] = deque()
        self.row: list[tuple[int, str]] = []
        self.damaged: list[tuple[int, Damaged]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.again:
            self.row.append(self.again.popleft())
            return self.row[-1][1]
        for number, text in self._source:
            if isinstance(text, Damaged):
                self.damaged.append((number, text))
                continue
            self.row.append((number, text + "\n"))
            return text + "\n"
        raise StopIteration


def read_table(path: Path, requested: Requested) -> Iterator[Row]:
    """Rows of a file with a header; quoted fields may hold newlines. `line` is the row's first line."""
    try:
        dialect = find_dialect(path, requested)
    except UnicodeError:
        yield 1, Unread(f"not {requested.encoding}, which `encoding:` says")
        return
    except ARCHIVE_ERRORS:
        yield 1, BROKEN_ARCHIVE
        return
    with open_bytes(path) as file:
        plain = dialect.encoding == "utf-8" and dialect.line_end == "\n"
        if plain:
            stream = file
        else:
            stream = io.BufferedReader(_Recoded(file, dialect))
        yield from _rows(_Lines(text_lines_of(stream)), dialect, requested)


def _rows(source: _Lines, dialect: Dialect, requested: Requested) -> Iterator[Row]:
    """The first rows are held back until they show whether the header is one."""
    stream = _split(source, dialect)
    header = next(stream, None)
    if header is None:
        yield 1, Unread(f"no header ({dialect})")
        return
    line, names = header
    if isinstance(names, Damaged):
        yield line, Unread(f"the header cannot be read: {names.reason} ({dialect})")
        return
    names = [name.strip() for name in names]
    first = list(islice(stream, SAMPLE_ROWS))
    fault = _fault(names, [row for _, row in first if isinstance(row, list)], requested)
    if fault:
        yield line, Unread(f"{fault} ({dialect})")
        return
    for number, row in first:
        yield number, _named(names, row)
    for number, row in stream:
        yield number, _named(names, row)


def _split(source: _Lines, dialect: Dialect) -> Iterator[tuple[int, list[str] | Damaged]]:
    """(line, cells) of every row, the header first."""
    reader = csv.reader(source, **dialect.arguments)
    while True:
        source.row.clear()
        row: list[str] | Damaged
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error:
            row = Damaged("quote left open or misplaced")
            source.again.extendleft(reversed(source.row[1:]))
            reader = csv.reader(source, **dialect.arguments)
        yield from source.damaged
        source.damaged.clear()
        if row != [] and not (source.row[0][0] < dialect.first_line):
            yield source.row[0][0], row
    yield from source.damaged


def header_fault(names: list[str], known: frozenset[str] = frozenset()) -> str:
    """Why a first row cannot be a header, "" where it can. Only known names are told."""
    lower = []
    for name in names:
        if name:
            lower.append(name.lower())
    twice = next((name for name in lower if lower.count(name) > 1), None)
    if twice is not None:
        return f"the header names a column twice ({twice if is_known(twice) else 'of no known name'})"
    if not any(name in known or is_known(name) for name in names):
        return f"the header has no known name among its {len(names)} columns: is the first line a header?"
    return ""


def _fault(names: list[str], rows: list[list[str]], requested: Requested) -> str:
    """Why a header cannot be one, by itself and by the rows below it."""
    if fault := header_fault(names, requested.known):
        return fault
    if any(_recurs(names, row) for row in rows):
        return f"the first line is no header: a cell of it stands in its own column again ({len(names)} columns)"
    counts = set()
    for row in rows:
        counts.add(len(row))
    if counts and len(names) not in counts:
        return f"the header has {len(names)} columns and the rows have {', '.join(map(str, sorted(counts)[:3]))}"
    return ""


def _recurs(names: list[str], row: list[str]) -> bool:
    cells = []
    for cell in row:
        cells.append(cell.strip())
    return cells != names and any(a and a == b for a, b in zip(names, cells, strict=False))


def _named(header: list[str], row: list[str] | Damaged) -> Fields | Damaged:
    if isinstance(row, Damaged):
        return row
    if len(row) != len(header):
        return Damaged("wrong number of columns")
    fields = {}
    for i, (name, value) in enumerate(zip(header, row, strict=True)):
        fields[name or f"column{i}"] = value
    if all(name == value.strip() for name, value in zip(header, row, strict=True)):
        return Damaged("the header stands here again")
    return fields
