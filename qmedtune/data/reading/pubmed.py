"""PubMed and MEDLINE records: XML sets (articles, books, citations) and the MEDLINE text that PubMed saves.

Title and abstract; labelled parts each start a paragraph with their label, and lines set in bold keep their line. There
are no citations in PubMed's abstracts: `[8-15]` is an interval and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import zstandard

from qmedtune.data.reading import markup, xml_files
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.files import text_lines
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread
from qmedtune.data.reading.xml_files import BREAK, Numbered, plain

RECORDS = ("PubmedArticle", "PubmedBookArticle", "DeleteCitation")
CITATIONS = ("MedlineCitation", "DeleteCitation")
SETS = ("PubmedArticleSet", "PubmedBookArticleSet", "MedlineCitationSet", *RECORDS, *CITATIONS)
RETRACTED = frozenset(("Retracted Publication", "Retraction of Publication"))
NO_TITLE = re.compile(r"\[?not available\]?\.?", re.IGNORECASE)
# Told in the ledger where they are there: what a record holds beside title and abstract.
UNREAD = frozenset(("OtherAbstract", "KeywordList", "MeshHeadingList", "Sections"))
TITLES = ("ArticleTitle", "VernacularTitle")
FLAT = frozenset(("i", "u", "b", "AbstractText", *TITLES))  # what means nothing for the words in it


def read_pubmed(path: Path) -> Iterator[Numbered]:
    """Documents of a baseline or update file, then `{"deleted": [pmid, ...]}` where it carries DeleteCitation."""
    root = xml_files.root_of(path)
    if root is not None and root.name in ("MedlineCitationSet", "MedlineCitation"):
        return xml_files.read_each(path, CITATIONS, record)
    return xml_files.read_each(path, RECORDS, record)


def record(element: Any) -> Document | dict[str, list[str]] | Damaged | RefusedRecord:
    """The document of a record."""
    if element.tag == "DeleteCitation":
        return {"deleted": [e.text for e in element.findall("PMID")]}
    if element.tag == "MedlineCitation":
        citation = element
    else:
        citation = element.find("MedlineCitation")
    if citation is None:
        holder = element.find("BookDocument")
    else:
        holder = citation
    if holder is None:
        return Damaged("PubMed record without PMID or article")
    held = {child.tag: child for child in holder}  # one pass: a search for each would take twice as long
    if citation is None:
        article = holder
    else:
        article = held.get("Article")
    if "PMID" in held:
        pmid = held["PMID"].text
    else:
        pmid = None
    if not pmid or article is None:
        return Damaged("PubMed record without PMID or article")
    inside = {}
    for child in article:
        inside[child.tag] = child
    kinds = set()
    for kind in inside.get("PublicationTypeList", ()):
        kinds.add(kind.text)
    if not kinds.isdisjoint(RETRACTED):
        return RefusedRecord("retracted")
    if "Abstract" in inside:
        body = _abstract(inside["Abstract"])
    else:
        body = []
    if not body:
        return RefusedRecord("no abstract")
    text = "\n".join([*_title(article, inside), *body])
    if "Language" in inside:
        language = article.findtext("Language")
    else:
        language = None
    if UNREAD.isdisjoint(held):
        unread = ()
    else:
        unread = tuple(sorted(UNREAD & held.keys()))
    return Document(pmid, text, pmid=pmid, language=language or None, versioned=True, unread=unread)


def _title(article: Any, inside: Fields) -> list[str]:
    """ArticleTitle; where there is none, or only the note that it is missing, the original's or the book's."""
    for place in TITLES:
        if place in inside:
            said = _said(inside[place])
            if said and not NO_TITLE.fullmatch(said):
                return [said]
    if "Book" in inside:
        book = article.find("Book/BookTitle")
    else:
        book = None
    if book is None:
        said = ""
    else:
        said = _said(book)
    if said:
        return [said]
    return []


def _abstract(abstract: Any) -> list[str]:
    parts = []
    for section in abstract:
        if section.tag != "AbstractText":
            continue
        text, label = _said(section), section.get("Label")
        if text:
            parts.append(f"{label}: {text}" if label and label != "UNLABELLED" else text)
    return parts


def _said(element: Any) -> str:
    if not len(element):
        return xml_files.tidy(element.text or "")
    tags = set()
    for below in element.iter():
        tags.add(below.tag)
    if not tags <= FLAT:
        xml_files.name_entities(element)
        markup.resolve(element)
    if "b" in tags:
        _mark_lines(element)
    return plain(element)


def _mark_lines(element: Any) -> None:
    """Lines of a summary, each set in bold (case reports)."""
    for bold in element.iter("b"):
        after = bold.getnext()
        if not bold.tail and after is not None and after.tag == "b":
            bold.tail = BREAK


class LatestFirst:
    """The documents of one file from its last to its first, as a later version replaces an earlier one.

    Held compressed, a sixth to a third of the XML: in memory up to `HELD_BYTES`, which the files that PubMed publishes
    stay below, beyond that in a file without a name in `spill` (None: the system's folder for temporary files).
    """

    BLOCK = 512
    HELD_BYTES = 32 << 20

    def __init__(self, path: Path, spill: Path | None = None):
        self.deleted: list[str] = []
        self._sizes: list[int] = []  # compressed bytes of each block of rows
        self._blocks = SpooledTemporaryFile(self.HELD_BYTES, dir=spill and str(spill))  # noqa: SIM115 - closed with this object
        self._pack = zstandard.ZstdCompressor(level=1)
        rows: list[list[Any]] = []
        for number, item in read_pubmed(path):
            if isinstance(item, dict):
                for pmid in item["deleted"]:
                    if pmid:
                        self.deleted.append(pmid)
            else:
                rows.append(_row(number, item))
            if len(rows) == self.BLOCK:
                self._add(rows)
                rows = []
        self._add(rows)

    def _add(self, rows: list[list[Any]]) -> None:
        packed = self._pack.compress(json.dumps(rows).encode())
        self._blocks.write(packed)
        self._sizes.append(len(packed))

    def __iter__(self) -> Iterator[Numbered]:
        unpack = zstandard.ZstdDecompressor()
        start = self._blocks.tell()
        for size in reversed(self._sizes):
            start -= size
            self._blocks.seek(start)
            for number, kind, said in reversed(json.loads(unpack.decompress(self._blocks.read(size)))):
                yield number, KINDS[kind](*said)
        self._blocks.close()


KINDS = {made.__name__: made for made in (Document, Damaged, RefusedRecord, Unread)}


def _row(number: int, item: Document | Damaged | RefusedRecord) -> list[Any]:
    if isinstance(item, Document):
        said = item
    else:
        said = vars(item).values()
    return [number, type(item).__name__, list(said)]


# ---- MEDLINE text ----------------------------------------------------------------------------------------------------

TAG = re.compile(r"([A-Z]{2,4}) *- (.*)")


def read_medline(path: Path) -> Iterator[Numbered]:
    """Records of `PMID- `, `TI  - `, `AB  - ` lines; a blank line between them, six blanks before what goes on."""
    said: dict[str, list[str]] = {}
    start, last = 1, ""
    for number, text in text_lines(path):
        if isinstance(text, Damaged):
            yield number, text
            continue
        tag = TAG.match(text)
        if tag and tag[1] == "PMID" and said:
            yield start, _medline(said)
            said = {}
        if tag:
            if not said:
                start, last = (number, tag[1])
            else:
                start, last = (start, tag[1])
            said.setdefault(last, []).append(tag[2].strip())
        elif text.startswith("      ") and last in said:
            said[last][-1] += f" {text.strip()}"
    if said:
        yield start, _medline(said)


def _medline(said: dict[str, list[str]]) -> Document | Damaged | RefusedRecord:
    pmid = (said.get("PMID") or [""])[0]
    if not pmid:
        return Damaged("PubMed record without PMID or article")
    if RETRACTED & set(said.get("PT", ())):
        return RefusedRecord("retracted")
    if not said.get("AB"):
        return RefusedRecord("no abstract")
    title = " ".join(said.get("TI", ()))
    text = "\n".join(part for part in ("" if NO_TITLE.fullmatch(title) else title, *said["AB"]) if part)
    language = (said.get("LA") or [None])[0]
    return Document(pmid, text, pmid=pmid, language=language, unread=tuple(sorted({"MH", "OT"} & said.keys())))
