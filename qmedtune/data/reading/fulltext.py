"""Full text of papers in JSON: S2ORC as it is now, S2ORC of 2019 and 2020, doc2json, and CORD-19.

Title, abstract, sections with their headings and captions, in this order; citations of the bibliography that are
numbers are left out where the file marks them as such, and nowhere else. Author lists, bibliographies and back matter
stay out, as for JATS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from qmedtune.data.reading import markup
from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.rejects import Unusable

PARSES = ("pdf_parse", "latex_parse", "grobid_parse")
LEFT_OUT = ("author", "authoraffiliation", "bibentry", "venue")
UNREADABLE = "the sections of a full text are not as S2ORC and CORD-19 have them"


@dataclass(frozen=True)
class Paper:
    """A paper, and the keys of the row that it was made of."""

    id: Any
    text: str
    pmid: str | None
    read: frozenset[str]


def paper(fields: Fields) -> Paper | None:
    """The paper in a row, None where the row is none. Raises `Unusable`."""
    if isinstance(fields.get("content"), dict):
        return _annotated(fields)
    name = next((name for name in PARSES if _has_body(fields.get(name))), None)
    if name:
        parse = fields[name]
    else:
        parse = fields
    if not _has_body(parse):
        return None
    nested = fields.get("metadata")
    about: Fields = nested if isinstance(nested, dict) else {}
    title = fields.get("title") or about.get("title")
    blocks = [f"# {title.strip()}"] if isinstance(title, str) and title.strip() else []
    abstract = list(_paragraphs(parse.get("abstract") or fields.get("abstract") or about.get("abstract")))
    blocks += ["## Abstract", *abstract] if abstract else []
    blocks += _sections(parse["body_text"])
    blocks += _captions(parse.get("ref_entries"))
    pmid = fields.get("pubmed_id") or about.get("pubmed_id")
    used = {"paper_id", "title", "abstract", "metadata", "body_text", "ref_entries", "pubmed_id", name}
    return Paper(
        fields.get("paper_id"), "\n\n".join(blocks), str(pmid) if pmid else None, frozenset(used & fields.keys())
    )


def _has_body(parse: Any) -> bool:
    return isinstance(parse, dict) and isinstance(parse.get("body_text"), list)


def _paragraphs(found: Any) -> Iterator[str]:
    """Paragraphs of a text, or of a list of {text, cite_spans}."""
    if isinstance(found, str) and found.strip():
        yield found.strip()
    for entry in found if isinstance(found, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise Unusable(UNREADABLE)
        text = markup.without_citations(entry["text"], _places(entry.get("cite_spans") or ())).strip()
        if text:
            yield text


def _sections(body: list[Any]) -> Iterator[str]:
    """Paragraphs, each new section's heading before its first."""
    heading = None
    for entry in body:
        if isinstance(entry, dict):
            section = entry.get("section")
        else:
            section = None
        if isinstance(section, str) and section.strip() and section != heading:
            heading = section
            yield f"## {section.strip()}"
        yield from _paragraphs([entry])


def _captions(entries: Any) -> Iterator[str]:
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry["text"].strip():
            yield entry["text"].strip()


def _annotated(fields: Fields) -> Paper:
    """S2ORC: `content.text` with stand-off annotations, each a JSON string of [{start, end, attributes}].

    Author, affiliation, venue and bibliography spans are left out; section headers become `## ` lines.
    """
    content = fields["content"]
    text = content.get("text")
    if not isinstance(text, str):
        raise Unusable("text is null" if text is None else "text is not a string")
    spans = content.get("annotations") or {}
    known = fields.get("externalids")
    if isinstance(known, dict):
        pmid = {k.lower(): v for k, v in known.items()}.get("pubmed")
    else:
        pmid = None
    left_out = chain.from_iterable(_spans(spans, key) for key in LEFT_OUT)
    cuts = []
    for start, end in left_out:
        cuts.append((start, end, ""))
    headers = []
    for start, end in _spans(spans, "sectionheader"):
        if end > start:
            headers.append((start, end))
    cuts += [(start, end, f"\n\n## {text[start:end].strip()}\n\n") for start, end in headers]
    cited = []
    for span in _spans(spans, "bibref"):
        if markup.is_number(text[span[0] : span[1]]):
            cited.append(span)
    for start, end in cited:
        cuts.append((start, end, markup.CITED))
    parts, at = [], 0
    for start, end, instead in sorted(cuts):
        if start >= at:
            parts += [text[at:start], instead]
            at = end
    parts.append(text[at:])
    read = frozenset({"content", "corpusid", "externalids"} & fields.keys())
    return Paper(fields.get("corpusid"), markup.without_marks("".join(parts)), str(pmid) if pmid else None, read)


def _spans(annotations: Fields, key: str) -> list[tuple[int, int]]:
    raw = annotations.get(key)
    try:
        return _places(json.loads(raw) if isinstance(raw, str) else raw or [])
    except (ValueError, Unusable) as error:
        raise Unusable("S2ORC annotations are unreadable") from error


def _places(spans: Iterable[Any]) -> list[tuple[int, int]]:
    try:
        found: list[tuple[int, int]] = []
        for span in spans:
            found.append((int(span["start"]), int(span["end"])))
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(UNREADABLE) from error
