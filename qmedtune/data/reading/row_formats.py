"""Row formats: JSON lines, JSON, CSV, TSV, Parquet and plain text, as (line, fields) in bounded memory.

A damaged row is reported with its line and a fixed reason, and reading resumes at the next row. What the fields mean
is decided in records.py and instructions.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qmedtune.data.reading import csvs, json_stream
from qmedtune.data.reading.csvs import Requested
from qmedtune.data.reading.files import (
    ARCHIVE_ERRORS,
    BROKEN_ARCHIVE,
    MAX_RECORD_BYTES,
    lines,
    open_bytes,
    text_lines,
    text_of,
)
from qmedtune.data.reading.json_stream import Row, as_fields, parse_json
from qmedtune.data.reading.rejects import Damaged


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped."""
    for number, text in text_lines(path):
        if isinstance(text, Damaged):
            yield number, text
        elif text.strip():
            yield number, as_fields(parse_json(text))


def read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, an object with a list of records, or an object of objects (see json_stream.py).

    The key of an object of objects arrives as field `_key`. A file that holds one object per line in spite of its name
    is read as JSON lines.
    """
    line = 0
    try:
        if _is_jsonl(path):
            yield from read_jsonl(path)
            return
        with open_bytes(path) as file:
            for line, fields in json_stream.rows(file):
                yield line, fields
    except ARCHIVE_ERRORS:
        yield line + 1, BROKEN_ARCHIVE


def _is_jsonl(path: Path) -> bool:
    """Whether the first line is a whole object and the next begins one."""
    with open_bytes(path) as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            return False
    found = (number_and_line[1] for number_and_line in lines(path))
    written = [line for line in islice(found, 64) if isinstance(line, bytes) and line.strip()][:2]
    if len(written) < 2 or not all(line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") for line in written):
        return False
    text = text_of(written[0])
    return isinstance(text, str) and isinstance(parse_json(text), dict)


def read_csv(path: Path, requested: Requested = Requested()) -> Iterator[Row]:  # noqa: B008 - frozen
    """Rows of a table with a header, in whatever way it is separated, encoded and quoted (see csvs.py)."""
    return csvs.read_table(path, requested)


def read_text(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """A whole plain-text file as one document, called by its stem: UTF-8, UTF-16 with its mark, or `encoding`."""
    with open_bytes(path) as file:
        try:
            data = file.read(MAX_RECORD_BYTES + 1)
        except ARCHIVE_ERRORS:
            yield 1, BROKEN_ARCHIVE
            return
    if len(data) > MAX_RECORD_BYTES:
        yield 1, Damaged(f"text file longer than {MAX_RECORD_BYTES >> 20} MiB")
        return
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode(encoding or ("utf-16" if marked else "utf-8-sig"))
    except UnicodeError:
        yield 1, Damaged(f"not {encoding}" if encoding else "not UTF-8 (name it with `encoding:`, such as cp1252)")
        return
    yield 1, {"id": path.stem, "text": text.removeprefix("\ufeff")}
