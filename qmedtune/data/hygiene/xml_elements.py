"""Identifiers in elements of XML, as CDA and FHIR name them. Matched is the plain copy (plain.py)."""

# ruff: noqa: E501 (a table reads better in few lines)

from __future__ import annotations

import re
from collections.abc import Iterator

from qmedtune.data.hygiene.words import any_never

_ELEMENT = re.compile(
    r"<(?:[A-Za-z0-9]{1,12}:)?(?P<tag>[A-Za-z]{2,30})(?P<attributes>[ ][^<>]{0,300})?/?>(?P<content>[^<>\n]{0,200})",
    re.A,
)
_ATTRIBUTE = re.compile(r"(?P<name>extension|value)=\"(?P<tel>tel:|fax:|mailto:)?(?P<value>[^\"]{1,200})", re.A)
_TAGS = {
    "given": "name", "family": "name", "name": "name", "suffix": "name", "streetaddressline": "address", "line": "address",
    "city": "address", "county": "address", "postalcode": "zip", "birthtime": "date", "birthdate": "date",
    "deceasedtime": "date", "deceaseddatetime": "date", "effectivetime": "date", "time": "date", "low": "date", "high": "date",
    "telecom": "phone", "id": "mrn",
}  # fmt: skip
_TIMED = re.compile(r"(?:1[89]|2[01])\d\d-?\d\d-?\d\d[0-9T:.+Z-]*$", re.A)
_OID = re.compile(r"\d+(?:\.\d+){3,}$", re.A)


def find_elements(text: str) -> Iterator[tuple[str, int, int]]:
    """(class, start, end) of elements of CDA and FHIR by their names: what they hold or say in attributes."""
    for match in _ELEMENT.finditer(text):
        kind = _TAGS.get(match["tag"].lower())
        if kind is None:
            continue
        content = match["content"].strip()
        if content and kind in ("name", "address", "zip") and (kind != "name" or content[:1].isupper()):
            start = match.start("content") + match["content"].index(content)
            if not (kind == "name" and any_never(content)):
                yield kind, start, start + len(content)
        if match["attributes"] and (said := _ATTRIBUTE.search(text, *match.span("attributes"))):
            value = said["value"]
            if kind == "date" and not _TIMED.match(value):
                continue
            if kind == "mrn" and (
                said["name"] != "extension" or _OID.match(value) or not any(c.isdigit() for c in value)
            ):
                continue
            yield "email" if "@" in value else kind, *said.span("value")
