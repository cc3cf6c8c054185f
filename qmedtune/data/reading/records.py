"""From the fields of a row, or from a document that a reader made, to a text record.

A record is {"id", "text"} and, where known, "patient", "pmid", "group", "label", "language". Column names are those
of the public corpora (MIMIC, MTSamples, CORD-19, guidelines, PubMed summaries); `columns:` in the recipe names others.
What was used of a row is told, so that the ledger can name the rest. Instruction records are in instructions.py.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

from qmedtune.data.reading import fulltext
from qmedtune.data.reading.document import Document, Fields, Record
from qmedtune.data.reading.rejects import RefusedRecord, Unusable
from qmedtune.data.reading.tally import shown_names

# First match wins; compared in lower case because MIMIC-III's header is upper case and MIMIC-IV's is not.
COLUMNS = {
    "text": (
        "text", "clean_text", "transcription", "contents", "content", "body", "note", "note_text", "notetext",
        "article", "full_text", "fulltext", "report", "report_text", "document",
    ),
    "abstract": ("abstract", "abstract_text", "abstracttext"),
    "title": ("title",),
    "id": (
        "id", "note_id", "row_id", "pmid", "corpusid", "cord_uid", "doc_id", "document_id", "accession_id", "paper_id",
        "_key",
    ),
    "patient": ("patient", "patient_id", "patientid", "subject_id", "subjectid", "mrn"),
    "pmid": ("pmid", "pubmed_id"),
    "group": ("group",),
}  # fmt: skip
NAMES: tuple[Literal["patient", "pmid", "group"], ...] = ("patient", "pmid", "group")
KEPT: tuple[Literal["held_out", "language"], ...] = (
    "held_out",
    "language",
)  # what a reader of ours says, and no column


@dataclass(frozen=True)
class Shaped:
    """A record, and the keys of the row that it was made of."""

    record: Record
    read: frozenset[str]
    schema: str = ""  # what the keys were recognised as, where they are no plain columns


def find_columns(fields: Fields, columns: dict[str, str]) -> dict[str, str]:
    """Which field of this row serves which role: the recipe's `columns:` first, then the known names."""
    key = tuple(fields), tuple(columns.items())
    found = _found.get(key)
    if found is None:
        if len(_found) > 1024:
            _found.clear()
        found = _found[key] = _find_columns(fields, columns)
    return found


_found: dict[Any, dict[str, str]] = {}  # rows of a file have the same keys: finding them is half the time of a row


def _find_columns(fields: Fields, columns: dict[str, str]) -> dict[str, str]:
    lower = {}
    for name in reversed(fields):
        lower[name.lower()] = name
    found = {}
    for role, name in columns.items():
        if name in fields:
            found[role] = name
    for role, names in COLUMNS.items():
        if role not in columns:
            match = next((lower[name] for name in names if name in lower), None)
            if match:
                found[role] = match
    return found


def content_id(*parts: str) -> str:
    """A short stable name for a record that carries none: 64 bits of its content's BLAKE2b."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def checked(value: Any, what: str = "text") -> str:
    """`value` as usable text, or `Unusable` with a reason that quotes nothing."""
    if value is None:
        raise Unusable(f"{what} is null")
    if not isinstance(value, str):
        raise Unusable(f"{what} is not a string")
    if not value or value.isspace():
        raise Unusable(f"{what} is empty")
    if "\0" in value:
        raise Unusable(f"{what} holds NUL bytes")
    if "\ufffd" in value and value.count("\ufffd") > len(value) // 100:
        raise Unusable(f"{what} was decoded wrongly (replacement characters)")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"{what} holds a lone surrogate") from error
    return value


def as_name(value: Any) -> str | None:
    """An identifier: strings and whole numbers (also as floats, which Parquet makes of nullable integers)."""
    if isinstance(value, float):
        if math.isfinite(value) and value == int(value):
            value = int(value)
        else:
            value = None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    name = str(value).strip()
    if name and name.isprintable():
        return name
    return None


def text_record(fields: Fields | Document, columns: dict[str, str]) -> Record | RefusedRecord:
    """The record of one row of a text source. Raises `Unusable`."""
    shaped = text_shape(fields, columns)
    if isinstance(shaped, RefusedRecord):
        return shaped
    return shaped.record


def text_shape(fields: Fields | Document, columns: dict[str, str]) -> Shaped | RefusedRecord:
    """The record of one row of a text source, and what it was made of. Raises `Unusable`."""
    if isinstance(fields, Document):
        return Shaped(_of_document(fields), frozenset(), fields.schema)
    if refused := _refused(fields):
        return refused
    if "text" not in columns and (paper := fulltext.paper(fields)):
        whole: Record = {"id": as_name(paper.id) or content_id(checked(paper.text)), "text": checked(paper.text)}
        if paper.pmid:
            whole["pmid"] = paper.pmid
        return Shaped(whole, paper.read, "full text")
    nested = fields.get("metadata")
    if isinstance(nested, dict):
        fields = {**nested, **fields}  # shards of datatrove, The Pile and others: what is known, one down
    found = find_columns(fields, columns)
    text, used = _text(fields, found, columns)
    if isinstance(text, RefusedRecord):
        return text
    record: Record = {"id": as_name(fields.get(found.get("id", ""))) or content_id(text), "text": text}
    for role in NAMES:
        if role in found and (name := as_name(fields[found[role]])):
            record[role] = name
    if "label" in columns:
        record["label"] = label_of(fields.get(columns["label"]))
    unused = {"text", "abstract", "title"} - used
    return Shaped(record, frozenset(name for role, name in found.items() if role not in unused))


def _text(fields: Fields, found: dict[str, str], columns: dict[str, str]) -> tuple[str | RefusedRecord, set[str]]:
    """The text of a row and the roles that it is made of: the text column; beside an abstract, title, abstract and text
    in this order, each once."""
    if "text" in columns or ("abstract" not in found and "title" not in columns):
        if "text" not in found:
            raise Unusable(f"no text column among {shown_names(fields)}")
        return checked(_joined(fields[found["text"]])), {"text"}
    said = {}
    for role in ("title", "abstract", "text"):
        said[role] = _optional(fields.get(found.get(role, "")))
    if said["abstract"] in said["text"]:
        said["abstract"] = ""
    if not said["abstract"] and not said["text"]:
        return RefusedRecord("no abstract"), set()
    if said["text"]:
        between = "\n\n"
    else:
        between = "\n"
    return checked(between.join(part for part in said.values() if part)), set(said)


def _optional(value: Any) -> str:
    """A part that a record may lack: empty where it is missing, null or NaN (an empty cell of a Parquet file)."""
    value = _joined(value)
    if value is None or value == "" or isinstance(value, float) or (isinstance(value, str) and value.isspace()):
        return ""
    return checked(value).strip()


def _refused(fields: Fields) -> RefusedRecord | None:
    if _flag(fields, "iserror"):
        return RefusedRecord("marked as an error in the source (ISERROR)")
    if _flag(fields, "retracted"):
        return RefusedRecord("retracted")
    return None


def _of_document(document: Document) -> Record:
    text = checked(document.text)
    record: Record = {"id": as_name(document.id) or content_id(text), "text": text}
    for role in (*NAMES, "language"):
        name = as_name(getattr(document, role))
        if name:
            record[role] = name
    return record


def label_of(value: Any) -> str | list[str]:
    """What `classify` predicts: one name, or a list of names. Raises `Unusable` where there is none."""
    if isinstance(value, list):
        names = []
        for item in value:
            names.append(as_name(item))
        if not all(names):
            raise Unusable("a label is empty or no name")
        return [name for name in names if name]
    if isinstance(value, bool):
        name = str(value).lower()
    else:
        name = as_name(value)
    if name is None:
        raise Unusable("the label is missing, empty or no name")
    return name


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name, fields.get(name.upper()))
    return value is not None and str(value).strip().lower() in ("1", "1.0", "true", "yes", "y")


def _joined(value: Any) -> Any:
    """emrQA stores a note as the list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(line.rstrip("\r\n") for line in value)
    return value
