"""FHIR resources that hold notes: DocumentReference, DiagnosticReport, Binary and Composition, alone or in Bundles.

The text is that of the attachments, in Base64 (text/plain, HTML or none said); of reports also the conclusion where it
is not in an attachment. Resources that hold no note (Observation, Condition ...) are refused by their type: the text of
a generated narrative is no note.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from lxml import etree, html  # pyright: ignore[reportAttributeAccessIssue]

from qmedtune.data.reading import markup
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unusable

TYPE = re.compile(r"[A-Za-z]{1,40}")
TEXT_TYPES = ("text/plain", "text/html", "text/rtf", "application/xhtml+xml")
WRONG = ("entered-in-error", "entered in error")
CHARSET = re.compile(r"charset=\"?([\w-]+)", re.IGNORECASE)
BLOCKS = frozenset(("p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "section"))


def documents(resource: Fields) -> Iterator[Document | Damaged | RefusedRecord]:
    """The documents of one resource; of a Bundle, those of its entries."""
    if isinstance(resource.get("resource"), dict):
        resource = resource["resource"]
    if resource.get("resourceType") == "Bundle":
        for entry in resource.get("entry") or []:
            if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
                yield from documents(entry["resource"])
            else:
                yield Damaged("FHIR Bundle entry without a resource")
        return
    try:
        yield _document(resource)
    except Unusable as error:
        yield Damaged(str(error))


def _document(resource: Fields) -> Document | RefusedRecord:
    kind = str(resource.get("resourceType"))
    if kind not in HOLDERS:
        if TYPE.fullmatch(kind):
            shown = kind
        else:
            shown = "unknown"
        return RefusedRecord(f"FHIR {shown} holds no note")
    if WRONG[0] in (resource.get("status"), resource.get("docStatus")):
        return RefusedRecord("marked as an error in the source (entered-in-error)")
    parts = []
    for part in HOLDERS[kind](resource):
        if part:
            parts.append(part)
    if not parts:
        return RefusedRecord(f"FHIR {kind} without text")
    patient = resource.get("subject")
    if isinstance(patient, dict):
        reference = patient.get("reference")
    else:
        reference = None
    name = resource.get("id")
    return Document(
        str(name) if name else None,
        "\n\n".join(parts),
        patient=reference.rpartition("/")[2] if isinstance(reference, str) else None,
        schema=f"FHIR {kind}",
    )


def _of_reference(resource: Fields) -> list[str]:
    contents = _listed(resource, "content")
    found: list[str] = []
    for content in contents:
        found.append(_attachment(content.get("attachment")))
    return found


def _of_report(resource: Fields) -> list[str]:
    parts = []
    for form in _listed(resource, "presentedForm"):
        parts.append(_attachment(form))
    conclusion = resource.get("conclusion")
    if isinstance(conclusion, str) and conclusion.strip() and not any(conclusion.strip() in part for part in parts):
        parts.append(conclusion.strip())
    return parts


def _of_composition(resource: Fields) -> list[str]:
    title = resource.get("title")
    parts = [f"# {title.strip()}"] if isinstance(title, str) and title.strip() else []
    body = _sections(resource)
    if body:
        return [*parts, *body]
    return []


def _sections(holder: Fields) -> list[str]:
    return list(chain.from_iterable(_section(section) for section in _listed(holder, "section")))


def _section(section: Fields) -> list[str]:
    title, text = section.get("title"), section.get("text")
    if isinstance(text, dict):
        said = _of_html(str(text.get("div", "")))
    else:
        said = ""
    below = _sections(section)
    heading = [f"## {title.strip()}"] if isinstance(title, str) and title.strip() and (said or below) else []
    return [*heading, *([said] if said else []), *below]


def _of_binary(resource: Fields) -> list[str]:
    return [_attachment(resource)]


HOLDERS = {
    "DocumentReference": _of_reference, "DiagnosticReport": _of_report, "Composition": _of_composition,
    "Binary": _of_binary,
}  # fmt: skip


def _listed(resource: Fields, key: str) -> list[Fields]:
    value = resource.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Unusable(f"FHIR {key} is no list of objects")
    return value


def _attachment(attachment: Any) -> str:
    """The text of an attachment; "" where it is elsewhere (`url`) or no text (PDF, images)."""
    if not isinstance(attachment, dict) or not isinstance(attachment.get("data"), str):
        return ""
    kind = str(attachment.get("contentType") or "text/plain").lower()
    if not kind.startswith(TEXT_TYPES):
        return ""
    try:
        data = base64.b64decode("".join(attachment["data"].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("FHIR attachment is no Base64") from error
    charset = CHARSET.search(kind)
    try:
        text = data.decode(charset[1] if charset else "utf-8-sig")
    except (UnicodeDecodeError, LookupError) as error:
        raise Unusable("FHIR attachment is not in its encoding (none said: UTF-8)") from error
    if kind.startswith("text/rtf"):
        raise Unusable("FHIR attachment is RTF, which is not read")
    if kind.startswith("text/plain"):
        return text.strip()
    return _of_html(text)


def _of_html(text: str) -> str:
    """Text of HTML, block elements on lines of their own."""
    if not text.strip():
        return ""
    try:
        root = html.fromstring(text)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as error:
        raise Unusable("FHIR attachment is broken HTML") from error
    for element in root.iter():
        if isinstance(element.tag, str):
            name = element.tag
        else:
            name = ""
        if name in ("script", "style") or not name:
            element.text = ""
        elif name in BLOCKS:
            element.text, element.tail = f"\n{element.text or ''}", f"\n{element.tail or ''}"
        elif name in ("td", "th"):
            element.tail = f"\t{element.tail or ''}"
    return markup.lines_and_cells(root.text_content())
