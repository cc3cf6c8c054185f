"""BioC, as JSON (PMC, PubTator 3) and XML, and PubTator's text: titles as headings, passages in order.

References, table cells, footnotes and back matter are left out as for JATS; captions stay. Annotations are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune.data.reading import xml_files
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.files import text_lines
from qmedtune.data.reading.rejects import Damaged, Unusable

# Passages of BioC full texts that are no running text, by type and by section.
SKIPPED = frozenset({"ref", "table", "front_matter", "footnote", "table_footnote", "reference"})
SKIPPED_SECTIONS = frozenset({"REF", "ACK_FUND", "AUTH_CONT", "COMP_INT"})
TITLES = frozenset({"front", "title"})
HEADINGS = frozenset({"title_1", "title_2", "title_3", "title_4", "title_5", "abstract_title_1", "title_caption"})
STARTS = re.compile(rb"\d+\|[ta]\|")
PUBTATOR = re.compile(r"(\d+)\|([ta])\|(.*)")


@dataclass(frozen=True)
class Passage:
    """One passage: its type and section in the file's own words, its text, the PubMed id where it says one."""

    kind: str
    section: str
    text: str
    pmid: str | None = None


def document(name: Any, passages: Iterable[Passage]) -> Document:
    """The document of some passages."""
    parts, left_out, pmid = [], set(), None
    for passage in passages:
        pmid = pmid or passage.pmid
        if passage.kind in SKIPPED or passage.section in SKIPPED_SECTIONS:
            left_out.add(passage.kind if passage.kind in SKIPPED else passage.section)
        elif passage.text:
            parts.append(f"{_mark(passage)}{passage.text}")
    return Document(None if name is None else str(name), "\n\n".join(parts), pmid=pmid, unread=tuple(sorted(left_out)))


def _mark(passage: Passage) -> str:
    if passage.kind in TITLES:
        return "# " if passage.section in ("", "TITLE") else "## "
    return "## " if passage.kind in HEADINGS else ""


def of_json(entry: Fields) -> Document:
    """The document of a JSON object with `passages`. Raises `Unusable`."""
    found = document(entry.get("id"), [_passage(passage) for passage in entry["passages"]])
    pmid = found.pmid or entry.get("pmid")
    return found._replace(schema="BioC", pmid=str(pmid) if pmid else None)


def _passage(passage: Any) -> Passage:
    if not isinstance(passage, dict):
        raise Unusable("a BioC passage is not an object")
    infons = passage.get("infons")
    if not isinstance(infons, dict):
        infons = {}
    text = passage.get("text")
    if not isinstance(text, str):
        sentences = passage.get("sentences") or []
        text = " ".join(str(s.get("text", "")) for s in sentences if isinstance(s, dict))
    pmid = infons.get("article-id_pmid")
    kind, section = str(infons.get("type", "")).lower(), str(infons.get("section_type", "")).upper()
    return Passage(kind, section, text.strip(), str(pmid) if pmid else None)


def read_xml(path: Path) -> Iterator[xml_files.Numbered]:
    """The documents of a BioC collection."""
    return xml_files.read_each(path, ("document",), _of_xml)


def _of_xml(element: Any) -> Document | Damaged:
    passages = element.findall("passage")
    if not passages:
        return Damaged("BioC document without passages")
    return document(element.findtext("id"), [_xml_passage(passage) for passage in passages])


def _xml_passage(passage: Any) -> Passage:
    infons = {}
    for infon in passage.findall("infon"):
        infons[infon.get("key")] = infon.text or ""
    text = passage.findtext("text")
    if text is None:
        text = " ".join(sentence.findtext("text") or "" for sentence in passage.findall("sentence"))
    kind, section = infons.get("type", "").lower(), infons.get("section_type", "").upper()
    return Passage(kind, section, text.strip(), infons.get("article-id_pmid"))


def read_pubtator(path: Path) -> Iterator[xml_files.Numbered]:
    """PubTator's text: `PMID|t|title`, `PMID|a|abstract`, then annotations, a blank line between documents."""
    name, start, said = "", 1, {}
    for number, text in text_lines(path):
        if isinstance(text, Damaged):
            yield number, text
            continue
        found = PUBTATOR.match(text)
        if found is None:
            continue
        if found[1] != name and said:
            yield start, _titled(name, said)
        if found[1] != name:
            name, start, said = found[1], number, {}
        said[found[2]] = found[3].strip()
    yield start, _titled(name, said) if said else Damaged("no document in PubTator's format")


def _titled(name: str, said: dict[str, str]) -> Document:
    text = "\n".join(part for part in (said.get("t", ""), said.get("a", "")) if part)
    return Document(name, text, pmid=name, unread=("annotations",))
