"""Clinical notes in XML: n2c2 and i2b2 tasks, and sections of C-CDA documents. Lines and headings of notes are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from qmedtune.data.reading import markup, xml_files
from qmedtune.data.reading.document import Document
from qmedtune.data.reading.files import ARCHIVE_ERRORS, BROKEN_ARCHIVE, head_of, open_bytes
from qmedtune.data.reading.rejects import Damaged, RefusedRecord

TEXTS = ("TEXT", "text")
RECORDS = ("RECORD", "record", "doc")  # several notes in one file: de-identification 2006, obesity 2008
BARE_AMPERSAND = re.compile(rb"&(?!#?\w+;)")
CDATA, CDATA_END = b"<![CDATA[", b"]]>"
HEAD_BYTES = 1 << 16
MAX_NOTE_BYTES = 64 << 20
CDA = "{urn:hl7-org:v3}"
SPACES = re.compile(r"\s+")
ROWS = {
    "tr": "\n",
    "td": "\t",
    "th": "\t",
    "paragraph": "\n",
    "item": "\n",
    "br": "\n",
    "caption": "\n",
}


def holds_text(path: Path) -> bool:
    """Whether an XML file holds notes in a TEXT element, as n2c2's and i2b2's do, by its head."""
    head = head_of(path, HEAD_BYTES)
    return b"<TEXT" in head or (b"<doc " in head and b"<text" in head)


def read_n2c2(path: Path) -> Iterator[xml_files.Numbered]:
    """The note of a file, or all `RECORD`s of one. The patient is what stands before the last `-` or `_` of the name
    (`110-01.xml`: n2c2's longitudinal records), where that is a number.

    Unescaped `&`, which several of the published files have, is mended.
    """
    try:
        with open_bytes(path) as file:
            raw = file.read(MAX_NOTE_BYTES + 1)
    except ARCHIVE_ERRORS:
        yield 1, BROKEN_ARCHIVE
        return
    if len(raw) > MAX_NOTE_BYTES:
        yield 1, Damaged(f"XML file longer than {MAX_NOTE_BYTES >> 20} MiB")
        return
    try:
        root = etree.fromstring(_with_entities(raw), xml_files.PARSER)
    except etree.XMLSyntaxError as error:
        yield 1, Damaged(f"broken XML (line {error.lineno})")
        return
    if xml_files.declares_entities(root.getroottree()):
        yield 1, Damaged("XML declares entities")
        return
    records = []
    for element in root.iter(*RECORDS):
        if _text_of(element) is not None:
            records.append(element)
    for number, element in enumerate(records or [root], start=1):
        yield number, _note(element, path.stem, number if records else None)


def _text_of(element: Any) -> str | None:
    return next((text for name in TEXTS if (text := element.findtext(name)) is not None), None)


def _note(element: Any, stem: str, number: int | None) -> Document | Damaged:
    text = _text_of(element)
    if text is None:
        return Damaged("XML with no TEXT of a note")
    if number is None:
        name = stem
    else:
        name = f"{stem}-{element.get('ID') or element.get('id') or number}"
    if number is None:
        patient = re.match(r"(\d+)[-_]", stem)
    else:
        patient = None
    unread = tuple(sorted({xml_files.local(child) for child in element} & {"TAGS", "PHI", "ANNOTATIONS"}))
    return Document(name, text.strip("\r\n"), patient=patient[1] if patient else None, unread=unread)


# ---- C-CDA -----------------------------------------------------------------------------------------------------------


def read_ccda(path: Path) -> Iterator[xml_files.Numbered]:
    """The narrative of a C-CDA document: each section's title and text. Coded entries are not read."""
    yield 1, xml_files.read_file(path, _cda)


def _cda(root: Any) -> Document | Damaged | RefusedRecord:
    if root.tag != f"{CDA}ClinicalDocument":
        return Damaged(f"XML is not a C-CDA document: its root is `{xml_files.local(root)[:40]}`")
    xml_files.name_entities(root)
    title = root.findtext(f"{CDA}title")
    parts = [f"# {' '.join(title.split())}"] if title and title.strip() else []
    for section in root.iter(f"{CDA}section"):
        heading, text = section.findtext(f"{CDA}title"), section.find(f"{CDA}text")
        if text is not None:
            said = _narrative(text)
        else:
            said = ""
        if said:
            parts += [f"## {' '.join(heading.split())}"] if heading and heading.strip() else []
            parts.append(said)
    if len(parts) < 2:
        embedded = next(root.iter(f"{CDA}nonXMLBody"), None) is not None
        return RefusedRecord(f"C-CDA document without a narrative section{' (a file is embedded)' if embedded else ''}")
    patient = root.find(f"{CDA}recordTarget/{CDA}patientRole/{CDA}id")
    name = root.find(f"{CDA}id")
    if next(root.iter(f"{CDA}entry"), None) is not None:
        unread = ("entry",)
    else:
        unread = ()
    return Document(_id(name), "\n\n".join(parts), patient=_id(patient), unread=unread)


def _id(element: Any) -> str | None:
    if element is None:
        return None
    return element.get("extension") or element.get("root")


def _narrative(text: Any) -> str:
    """Lines of a narrative block: paragraphs, items and table rows each on their own, cells apart."""
    parts: list[str] = []
    _walk(text, parts)
    return markup.lines_and_cells("".join(parts))


def _walk(element: Any, parts: list[str]) -> None:
    parts.append(SPACES.sub(" ", element.text or ""))
    for child in element:
        mark = ROWS.get(xml_files.local(child), "")
        parts.append("\n" if mark == "\n" else "")
        _walk(child, parts)
        parts += [mark, SPACES.sub(" ", child.tail or "")]


def _with_entities(raw: bytes) -> bytes:
    """Ampersands that stand for themselves as `&amp;`, but in CDATA sections, where they may. In one pass."""
    parts: list[bytes] = []
    at = 0
    while (start := raw.find(CDATA, at)) >= 0:
        end = raw.find(CDATA_END, start)
        if end < 0:
            break
        parts += [BARE_AMPERSAND.sub(b"&amp;", raw[at:start]), raw[start:end]]
        at = end
    return b"".join([*parts, BARE_AMPERSAND.sub(b"&amp;", raw[at:])])
