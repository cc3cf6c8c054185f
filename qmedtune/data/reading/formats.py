"""What a file is, and its reader: by `format:`, else by extension and, where that says too little, by how it begins.

Readers give (number, row of fields | Document | Damaged | Refused); what a row means is decided in records.py and
instructions.py. What is guessed of a table (separator, encoding) is told as what was recognised.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading import (
    arrow,
    bioc,
    clinical_xml,
    csvs,
    fhir,
    hl7,
    jats,
    notes,
    office,
    pubmed,
    questions,
    row_formats,
    tei,
    xml_files,
)
from qmedtune.data.reading.document import Document, Fields, Recognised, Skipped
from qmedtune.data.reading.files import ARCHIVE_ERRORS, MAX_MEMBER_BYTES, head_of
from qmedtune.data.reading.listing import SUFFIXES, data_suffix, is_stray
from qmedtune.data.reading.rejects import Unread
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection

Reader = Callable[[Path], Iterator[tuple[int, Any]]]
READERS: dict[str, Reader] = {
    "jsonl": row_formats.read_jsonl, "json": row_formats.read_json, "csv": row_formats.read_csv,
    "tsv": row_formats.read_csv, "text": row_formats.read_text, "jats": jats.read_jats, "pubmed": pubmed.read_pubmed,
    "parquet": arrow.read_parquet,
    "mimic_cxr": notes.read_mimic_cxr, "medline": pubmed.read_medline, "bioc_xml": bioc.read_xml,
    "pubtator": bioc.read_pubtator, "tei": tei.read_tei, "ccda": clinical_xml.read_ccda, "n2c2": clinical_xml.read_n2c2,
    "hl7": hl7.read_hl7, "medquad": questions.read_medquad, "liveqa": questions.read_liveqa, "docx": office.read_docx,
    "xlsx": office.read_xlsx, "pdf": office.read_pdf,
}  # fmt: skip
UNKNOWN = "unknown XML"  # read as JATS, whose reader says what is wrong with it
READERS[UNKNOWN] = jats.read_jats
DESCRIPTIONS = {
    "pdf": "pdf (text only: its layout, tables and images are lost)",
    UNKNOWN: "XML of no known format (not read)",
}
# Schemas in JSON or JSON lines, told apart by their keys; naming them only skips the guess from the extension.
JSON_SCHEMAS = ("s2orc", "cord19", "bioc", "emrqa", "pubmedqa", "medqa", "medmcqa", "fhir", "bioasq")
TABLES = ("csv", "tsv", "xlsx")
CXR_REPORT = re.compile(r"p\d+/s\d+\.txt$")
HEAD_BYTES = 4096
# Damaged, of another method, encrypted; OSError and ValueError are zipfile's for offsets outside the file.
ZIP_ERRORS = (*ARCHIVE_ERRORS, NotImplementedError, RuntimeError, OSError, ValueError, struct.error)


def format_of(file: Path, format: str) -> str:
    """The reader's name for a file: `format:` unless that is `auto`, then its extension and how it begins."""
    suffix = data_suffix(file)
    if suffix == ".zip" and format not in ("docx", "xlsx"):
        return "zip"
    if format in JSON_SCHEMAS and suffix != ".xml":
        if suffix in (".jsonl", ".ndjson"):
            return "jsonl"
        return "json"
    if format == "bioc":
        return "bioc_xml"
    if format not in ("auto", *JSON_SCHEMAS):
        return format
    known = SUFFIXES.get(suffix)
    if known is None:
        if file.suffix in (".gz", ".zst"):
            below = f" below {file.suffix}"
        else:
            below = ""
        raise DataError(
            f"{file}: unknown extension {suffix or '(none)'}{below}\n"
            f"allowed: {', '.join(SUFFIXES)}, also .gz and .zst; or name the `format:`"
        )
    if known == "xml":
        return _xml(file)
    if known == "text":
        return _text(file)
    return known


def _xml(file: Path) -> str:
    """By the root; `unknown` for others than the known ones."""
    root = xml_files.root_of(file)
    if root is None:
        return UNKNOWN
    if root.name in ("article", *jats.SETS):
        return "jats"
    if root.name in pubmed.SETS:
        return "pubmed"
    known = {
        "collection": "bioc_xml", "TEI": "tei", "teiCorpus": "tei", "ClinicalDocument": "ccda", "Document": "medquad",
    }  # fmt: skip
    if root.name in known:
        return known[root.name]
    if root.name in questions.LIVEQA_ROOTS:
        return "liveqa"
    if clinical_xml.holds_text(file):
        return "n2c2"
    return UNKNOWN


def _text(file: Path) -> str:
    """Plain text, or one of the formats that go by `.txt`."""
    if CXR_REPORT.search(file.as_posix()):
        return "mimic_cxr"
    head = head_of(file, HEAD_BYTES)
    if hl7.STARTS.match(head):
        return "hl7"
    if head.startswith(b"PMID- "):
        return "medline"
    if bioc.STARTS.match(head):
        return "pubtator"
    is_table = head.startswith((b"\xff\xfe", b"\xfe\xff")) and csvs.is_header(head)  # Excel's "Unicode text"
    if is_table:
        return "tsv"
    return "text"


def read_rows(file: Path, source: SourceSection, format: str) -> Iterator[tuple[int, Any]]:
    """Rows and documents of a file in a known format, with what the recipe says of its kind."""
    if format in ("csv", "tsv"):
        yield from csvs.read_table(file, requested_of(source))
    elif format == "text":
        yield from _documents(row_formats.read_text(file, source.encoding))
    elif format == "mimic_cxr":
        yield from _documents(notes.read_mimic_cxr(file))
    elif format == "zip":
        yield from _members(file, source)
    else:
        yield from _expanded(READERS[format](file), source.kind == "instructions")


def _documents(stream: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Whole files as documents: their id and text are no columns."""
    for number, fields in stream:
        yield number, Document(**fields) if isinstance(fields, dict) else fields


def requested_of(source: SourceSection) -> csvs.Requested:
    return csvs.Requested(source.delimiter, source.encoding, frozenset(source.columns.values()))


def describe(file: Path, source: SourceSection, format: str) -> str:
    """What a file was recognised as, in words."""
    if format in ("csv", "tsv"):
        try:
            return f"{format} ({csvs.find_dialect(file, requested_of(source))})"
        except (*ARCHIVE_ERRORS, OSError, UnicodeError):
            return format
    if format == "text" and source.encoding:
        return f"text ({source.encoding})"
    return DESCRIPTIONS.get(format, format)


def _expanded(stream: Iterator[tuple[int, Any]], instructions: bool) -> Iterator[tuple[int, Any]]:
    """What the elements of JSON files stand for: notes of emrQA, documents of BioC and FHIR."""
    for number, fields in stream:
        if not isinstance(fields, dict):
            yield number, fields
        elif "resourceType" in fields or _is_entry(fields):
            for found in fhir.documents(fields):
                yield (number, found)
        else:
            yield from ((number, found) for found in notes.expand(fields, instructions))


def _is_entry(fields: Fields) -> bool:
    """Whether a row is an entry of a FHIR Bundle."""
    resource = fields.get("resource")
    return isinstance(resource, dict) and "resourceType" in resource


def _members(file: Path, source: SourceSection) -> Iterator[tuple[int, Any]]:
    """What is in a zip archive, by the names of its members, nothing unpacked to disk; `number` counts on."""
    number = 0
    try:
        with zipfile.ZipFile(file) as archive:
            inside = sorted(
                (m for m in archive.infolist() if m.filename and not m.is_dir()), key=lambda member: member.filename
            )
        for member in inside:
            path = file / member.filename
            if is_stray(path) or data_suffix(path) not in SUFFIXES or data_suffix(path) in (".zip", ".tar", ".tgz"):
                yield number, Skipped(member.filename)
            elif member.file_size > MAX_MEMBER_BYTES:
                yield number + 1, Unread(f"member of a zip archive longer than {MAX_MEMBER_BYTES >> 20} MiB unpacked")
            else:
                yield number, Recognised(f"in a zip: {describe(path, source, format_of(path, source.format))}")
                for found in _member(path, source):
                    number += 1
                    yield number, found
    except DataError:
        raise
    except ZIP_ERRORS:
        yield number + 1, Unread("zip archive is truncated, corrupt or encrypted from here on")


def _member(path: Path, source: SourceSection) -> Iterator[Any]:
    """The rows of a member; of PubMed with what replaces what left to the caller as for a file of its own."""
    format = format_of(path, source.format)
    for _, found in read_rows(path, source, format):
        if not (isinstance(found, dict) and "deleted" in found) and found is not None:
            yield found
