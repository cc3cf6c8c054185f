"""Row formats: JSON lines, JSON, CSV, TSV, Parquet and plain text, as (line, fields) in bounded memory.

A damaged row is reported with its line and a fixed reason, and reading resumes at the next row. What the fields mean
is decided in records.py and instructions.py.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.files import MAX_RECORD_BYTES, lines, open_bytes, text_of
from qmedtune.data.rejects import Damaged, Unusable

Row = tuple[int, dict[str, Any] | Damaged]

CHUNK_CHARS = 1 << 20
csv.field_size_limit(MAX_RECORD_BYTES)  # a quote left open ends here at the latest


def _no_constant(name: str) -> None:
    raise Unusable("NaN or Infinity in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Unusable("duplicate key in JSON")
    return fields


# One decoder for all: the C scanner stays in use, 95 MB/s on abstracts (2 cores, Python 3.11).
DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def parse_json(text: str) -> Any | Damaged:
    """A JSON value, strictly: no NaN, no duplicate keys, no bottomless nesting."""
    try:
        return DECODER.decode(text)
    except Unusable as error:
        return Damaged(str(error))
    except RecursionError:
        return Damaged("JSON nested too deeply")
    except ValueError:
        return Damaged("broken JSON")


def _fields(value: Any) -> dict[str, Any] | Damaged:
    if isinstance(value, (dict, Damaged)):
        return value
    return Damaged("not a JSON object")


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped."""
    for number, line in lines(path):
        text = line if isinstance(line, Damaged) else text_of(line)
        if isinstance(text, Damaged):
            yield number, text
        elif text.strip():
            yield number, _fields(parse_json(text))


class _Window:
    """Decoded text of a file seen through a sliding window, with the line number of its start."""

    def __init__(self, path: Path):
        self._lines = lines(path)
        self.text = ""
        self.line = 1
        self.ended = False

    def more(self) -> bool:
        """Append at least `CHUNK_CHARS`; False at the end. Undecodable lines are replaced by U+FFFD."""
        parts, size = [], 0
        for _, line in self._lines:
            if isinstance(line, Damaged):
                self.ended = True
                break
            parts.append(line.decode("utf-8-sig", errors="replace") + "\n")
            size += len(parts[-1])
            if size >= CHUNK_CHARS:
                break
        else:
            self.ended = True
        self.text += "".join(parts)
        return bool(parts)

    def drop(self, upto: int) -> None:
        self.line += self.text.count("\n", 0, upto)
        self.text = self.text[upto:]


SEPARATORS = re.compile(r"[\s,]*")
NEXT_OBJECT = re.compile(r"\n\s*,?\s*\{")


def read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, an object with a `data` or `documents` array, or an object of objects.

    Arrays are streamed one element at a time; the key of an object of objects arrives as field `_key`. A file that
    holds one object per line in spite of its name is read as JSON lines.
    """
    window = _Window(path)
    window.more()
    start = window.text.lstrip()
    if start.startswith("["):
        window.drop(window.text.index("[") + 1)
        yield from _elements(window)
    elif _is_jsonl(start):
        yield from read_jsonl(path)
    else:
        yield from _whole(path)


def _is_jsonl(start: str) -> bool:
    first, _, rest = start.partition("\n")
    return rest.lstrip().startswith("{") and isinstance(parse_json(first), dict)


def _elements(window: _Window) -> Iterator[Row]:
    """The elements of an array whose opening bracket has been read."""
    while True:
        separators = SEPARATORS.match(window.text)
        window.drop(separators.end() if separators else 0)
        if not window.text and not window.more():
            yield window.line, Damaged("JSON array is not closed")
            return
        if not window.text.strip(" \t\r\n,"):
            continue
        if window.text.startswith("]"):
            return
        line, value, end = window.line, *_element(window)
        window.drop(end)
        yield line, _fields(value)
        if end == 0:
            return


def _element(window: _Window) -> tuple[Any, int]:
    """The value at the window's start and where it ends; 0 where nothing can be read any more."""
    while True:
        try:
            value, end = DECODER.raw_decode(window.text)
            return (value, end) if "\ufffd" not in window.text[:end] else (Damaged("not UTF-8"), end)
        except Unusable as error:
            reason = str(error)
        except RecursionError:
            reason = "JSON nested too deeply"
        except ValueError:
            if len(window.text) < MAX_RECORD_BYTES and not window.ended and window.more():
                continue
            reason = "broken JSON"
        following = NEXT_OBJECT.search(window.text, 1)
        return Damaged(reason), following.start() + 1 if following else 0


def _whole(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        text = text_of(file.read())
    value = text if isinstance(text, Damaged) else parse_json(text)
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "documents") if isinstance(value.get(key), list)]
        if lists:
            yield from ((n, _fields(item)) for n, item in enumerate(lists[0], start=1))
        elif value and all(isinstance(item, dict) for item in value.values()):
            yield from ((n, {"_key": key, **item}) for n, (key, item) in enumerate(value.items(), start=1))
        else:
            yield 1, value
    else:
        yield 1, _fields(value)


class _Lines:
    """Feeds csv.reader and remembers the lines of the row in progress, so that a bad quote costs one line."""

    def __init__(self, path: Path):
        self._source = lines(path)
        self.again: deque[tuple[int, str]] = deque()
        self.row: list[tuple[int, str]] = []
        self.damaged: list[tuple[int, Damaged]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.again:
            self.row.append(self.again.popleft())
            return self.row[-1][1]
        for number, line in self._source:
            text = line if isinstance(line, Damaged) else text_of(line)
            if isinstance(text, Damaged):
                self.damaged.append((number, text))
                continue
            self.row.append((number, text + "\n"))
            return text + "\n"
        raise StopIteration


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """Rows of a file with a header; quoted fields may hold newlines. `line` is the row's first line."""
    source = _Lines(path)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        source.row.clear()
        try:
            values = next(reader)
            row: list[str] | Damaged = values
        except StopIteration:
            break
        except csv.Error:
            row = Damaged("quote left open or misplaced")
            source.again.extendleft(reversed(source.row[1:]))
            reader = csv.reader(source, delimiter=delimiter, strict=True)
        yield from source.damaged
        source.damaged.clear()
        if isinstance(row, list) and not row:
            continue
        if header is None:
            header = row if isinstance(row, list) else []
            continue
        yield source.row[0][0], _named(header, row)
    yield from source.damaged


def _named(header: list[str], row: list[str] | Damaged) -> dict[str, Any] | Damaged:
    if isinstance(row, Damaged):
        return row
    if len(row) != len(header):
        return Damaged("wrong number of columns")
    return {name.strip() or f"column{i}": value for i, (name, value) in enumerate(zip(header, row, strict=True))}


def read_tsv(path: Path) -> Iterator[Row]:
    """As `read_csv`, separated by tabs."""
    return read_csv(path, delimiter="\t")


def read_text(path: Path) -> Iterator[Row]:
    """A whole plain-text file as one document, called by its stem."""
    with open_bytes(path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield 1, Damaged(f"text file longer than {MAX_RECORD_BYTES >> 20} MiB")
        return
    text = text_of(data)
    yield 1, text if isinstance(text, Damaged) else {"id": path.stem, "text": text}
