"""From the fields of a row to a text record: {"id", "text", and where known "patient", "pmid", "group"}.

Column names are those of the public corpora (MIMIC, MTSamples, S2ORC, HoC, guidelines);
`columns:` in the recipe names others. Instruction records are in instructions.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from qmedtune.data.rejects import Refused, Unusable

# First match wins; compared in lower case because MIMIC-III's header is upper case and MIMIC-IV's is not.
COLUMNS = {
    "text": ("text", "clean_text", "transcription", "contents", "content", "body", "abstract", "note", "note_text"),
    "id": ("id", "note_id", "row_id", "pmid", "corpusid", "doc_id", "document_id", "accession_id", "_key"),
    "patient": ("patient", "patient_id", "subject_id", "mrn"),
    "pmid": ("pmid", "pubmed_id"),
    "group": ("group",),
}


def find_columns(fields: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Which field of this row serves which role: the recipe's `columns:` first, then the known names."""
    lower = {name.lower(): name for name in reversed(fields)}
    found = {role: name for role, name in columns.items() if name in fields}
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
        value = int(value) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    name = str(value).strip()
    return name if name and name.isprintable() else None


def text_record(fields: dict[str, Any], columns: dict[str, str]) -> dict[str, Any] | Refused:
    """The record of one row of a text source. Raises `Unusable`."""
    if _flag(fields, "iserror"):
        return Refused("marked as an error in the source (ISERROR)")
    if _flag(fields, "retracted"):
        return Refused("retracted")
    if isinstance(fields.get("content"), dict):
        fields = _s2orc(fields)
    if isinstance(fields.get("metadata"), dict):
        fields = {**fields["metadata"], **fields}  # shards of datatrove, The Pile and others: what is known, one down
    found = find_columns(fields, columns)
    if "text" not in found:
        raise Unusable(f"no text column among {_names(fields)}")
    text = checked(_joined(fields[found["text"]]))
    record: dict[str, Any] = {"id": as_name(fields.get(found.get("id", ""))) or content_id(text), "text": text}
    for role in ("patient", "pmid", "group"):
        name = as_name(fields[found[role]]) if role in found else None
        if name:
            record[role] = name
    if "label" in columns:
        record["label"] = label_of(fields.get(columns["label"]))
    return record


def label_of(value: Any) -> str | list[str]:
    """What `classify` predicts: one name, or a list of names. Raises `Unusable` where there is none."""
    if isinstance(value, list):
        names = [as_name(item) for item in value]
        if not all(names):
            raise Unusable("a label is empty or no name")
        return [name for name in names if name]
    name = str(value).lower() if isinstance(value, bool) else as_name(value)
    if name is None:
        raise Unusable("the label is missing, empty or no name")
    return name


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = next((v for k, v in fields.items() if k.lower() == name), None)
    return str(value).strip().lower() in ("1", "1.0", "true", "yes", "y")


def _names(fields: dict[str, Any]) -> str:
    """Column names for a message: names of a header, so short and printable, not data."""
    names = [name for name in fields if len(name) <= 40 and name.isidentifier()]
    return ", ".join(names[:12]) or "unnamed columns"


def _joined(value: Any) -> Any:
    """emrQA stores a note as the list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(line.rstrip("\r\n") for line in value)
    return value


def _s2orc(fields: dict[str, Any]) -> dict[str, Any]:
    """S2ORC: `content.text` with stand-off annotations, each a JSON string of [{start, end, attributes}].

    Author, affiliation, venue and bibliography spans are left out; section headers become `## ` lines.
    """
    content = fields["content"]
    text = checked(content.get("text"))
    spans = content.get("annotations") or {}
    pmid = {k.lower(): v for k, v in (fields.get("externalids") or {}).items()}.get("pubmed")
    headers = {start: end for start, end in _spans(spans, "sectionheader") if end > start}
    dropped = sorted(s for key in ("author", "authoraffiliation", "bibentry", "venue") for s in _spans(spans, key))
    parts, at = [], 0
    cuts = sorted([(s, e, "") for s, e in dropped] + [(s, e, text[s:e].strip()) for s, e in headers.items()])
    for start, end, header in cuts:
        if start >= at:
            parts += [text[at:start], f"\n\n## {header}\n\n" if header else ""]
            at = end
    parts.append(text[at:])
    return {"id": fields.get("corpusid"), "pmid": pmid, "text": "".join(parts)}


def _spans(annotations: dict[str, Any], key: str) -> list[tuple[int, int]]:
    raw = annotations.get(key)
    try:
        spans = json.loads(raw) if isinstance(raw, str) else raw or []
        return [(int(span["start"]), int(span["end"])) for span in spans]
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable("S2ORC annotations are unreadable") from error
