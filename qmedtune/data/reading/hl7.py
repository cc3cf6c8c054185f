"""HL7 v2 messages (ORU, MDM and others): the text of their OBX and NTE segments, a report per OBR or TXA.

Segments end with CR, as the standard says, or with LF, as files often have it. Read: OBX of type TX, FT and ST, and
their repetitions and escapes; values that are coded or numbers are left out and told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qmedtune.data.reading.document import Document
from qmedtune.data.reading.files import ARCHIVE_ERRORS, BROKEN_ARCHIVE, MAX_RECORD_BYTES, open_bytes
from qmedtune.data.reading.rejects import Damaged, RefusedRecord
from qmedtune.data.reading.xml_files import Numbered

STARTS = re.compile(rb"(\xef\xbb\xbf)?\x0b?(FHS\|[^\r\n]*[\r\n]+|BHS\|[^\r\n]*[\r\n]+)*MSH\|")
TEXT_TYPES = ("TX", "FT", "ST")
CHUNK_BYTES = 1 << 20
ENDS = re.compile(rb"[\r\n\x1c\x0b]+")
DELETED = ("D", "W")  # of OBX-11: deleted, wrong


@dataclass
class _Message:
    """A message as it is read: its delimiters, patient and reports (lines of text)."""

    number: int
    separator: str
    repetition: str
    escape: str
    control: str
    patient: str | None = None
    reports: list[list[str]] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


def read_hl7(path: Path) -> Iterator[Numbered]:
    """The reports of all messages of a file; `number` is the message."""
    message: _Message | None = None
    number = 0
    for segment in _segments(path):
        if isinstance(segment, Damaged):
            yield number + 1, segment
            continue
        if segment.startswith("MSH"):
            if message:
                yield from _reports(message)
            number += 1
            message = _begin(number, segment)
            if message is None:
                yield number, Damaged("HL7 message without delimiters in MSH")
        elif message:
            _take(message, segment)
        elif segment[:3] not in ("FHS", "BHS", "FTS", "BTS"):
            number += 1
            yield number, Damaged("HL7 segment before the first MSH")
            message = _Message(number, "|", "~", "\\", "")
    if message:
        yield from _reports(message)


def _segments(path: Path) -> Iterator[str | Damaged]:
    left = b""
    with open_bytes(path) as file:
        try:
            while data := file.read(CHUNK_BYTES):
                *whole, left = ENDS.split(left + data)
                yield from map(_decoded, filter(None, whole))
                if len(left) > MAX_RECORD_BYTES:
                    yield Damaged(f"HL7 segment longer than {MAX_RECORD_BYTES >> 20} MiB")
                    left = b""
        except ARCHIVE_ERRORS:
            yield BROKEN_ARCHIVE
            return
    if left.strip():
        yield _decoded(left)


def _decoded(segment: bytes) -> str | Damaged:
    try:
        return segment.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return Damaged("not UTF-8")


def _begin(number: int, segment: str) -> _Message | None:
    if len(segment) < 8:
        return None
    separator, marks = segment[3], segment[4:8]
    fields = segment.split(separator)
    if len(fields) > 9:
        control = fields[9]
    else:
        control = ""
    return _Message(number, separator, marks[1], marks[2], control.strip())


def _take(message: _Message, segment: str) -> None:
    fields = segment.split(message.separator)
    name = fields[0]
    if name == "PID" and len(fields) > 3:
        message.patient = fields[3].split(message.repetition)[0].split("^")[0].strip() or None
    elif name in ("OBR", "TXA"):
        message.reports.append([])
    elif name == "OBX" and len(fields) > 5:
        is_text = fields[2] in TEXT_TYPES and (len(fields) <= 11 or fields[11] not in DELETED)
        _add(message, fields[5]) if is_text else message.unread.add("OBX")
    elif name == "NTE" and len(fields) > 3:
        _add(message, fields[3])


def _add(message: _Message, value: str) -> None:
    if not message.reports:
        message.reports.append([])
    message.reports[-1] += [_unescaped(line, message) for line in value.split(message.repetition)]


def _unescaped(text: str, message: _Message) -> str:
    mark = message.escape
    if mark not in text:
        return text
    for code, meant in (
        ("F", message.separator), ("S", "^"), ("R", message.repetition), ("T", "&"), (".br", "\n"), ("H", ""),
        ("N", ""), ("X0D", "\n"), ("X0A", "\n"), ("X0D0A", "\n"),
    ):  # fmt: skip
        text = text.replace(f"{mark}{code}{mark}", meant)
    return text.replace(f"{mark}E{mark}", mark)


def _reports(message: _Message) -> Iterator[tuple[int, Document | RefusedRecord]]:
    texts = []
    for report in message.reports:
        if text := "\n".join(report).strip():
            texts.append(text)
    if not texts:
        yield message.number, RefusedRecord("HL7 message without text")
    for index, text in enumerate(texts, start=1):
        name = message.control or f"message-{message.number}"
        if len(texts) != 1:
            name = f"{name}-{index}"
        yield message.number, Document(name, text, patient=message.patient, unread=tuple(sorted(message.unread)))
