"""PMC JATS articles and PubMed record sets, by lxml, with nothing fetched and no entity expanded.

Policy: title, abstract and body paragraphs in document order, each once; headings as `#` lines; figure and table
captions kept, table cells, references, acknowledgements and LaTeX sources left out; citation numbers set in
superscript left out (they would stick to words), bracketed ones are left to clean.py. A document that declares
entities of its own is damaged: no public corpus needs them, entity bombs do.
"""

from __future__ import annotations

import gzip
import html
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lxml import etree  # type: ignore[attr-defined]

from qmedtune.data.files import ARCHIVE_ERRORS, open_bytes
from qmedtune.data.rejects import Damaged, Refused, Unusable

# Nothing fetched, nothing expanded, lxml's own limits on depth and size kept.
SAFE = {
    "resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False, "remove_comments": True,
    "remove_pis": True,
}  # fmt: skip
SKIPPED = frozenset(
    ("tex-math", "object-id", "label", "graphic", "media", "alt-text", "long-desc", "fn-group", "table")
    + ("ref-list", "back")
)
# Containers whose own paragraphs follow the paragraph they are nested in.
NESTED = frozenset(
    ("fig", "fig-group", "table-wrap", "table-wrap-group", "list", "def-list", "disp-quote", "boxed-text")
    + ("supplementary-material", "verse-group", "statement", "speech")
)
ODD_SPACES = "\n\t\r\f\v\x1c\x1d\x1e\x1f"  # what str.split() splits at in ASCII, beside the space
RETRACTED = "retraction-forward"
HOLDS = "holds-blocks"  # set on paragraphs that have block containers in them
PUBMED_RECORDS = ("PubmedArticle", "PubmedBookArticle", "DeleteCitation")
Item = tuple[int, dict[str, Any] | Damaged | Refused]

PARSER = etree.XMLParser(**SAFE)


def _name(element: Any) -> str:
    """Local name; entities are not elements and have none."""
    tag = element.tag
    if not isinstance(tag, str):
        return ""
    return tag.rpartition("}")[2] if tag[0] == "{" else tag


def _declares_entities(tree: Any) -> bool:
    dtd = tree.docinfo.internalDTD
    return dtd is not None and next(iter(dtd.iterentities()), None) is not None


def _prune(root: Any) -> None:
    """Empty what has no reading value, citation numbers in superscript among it; put named entities' characters in;
    mark paragraphs that hold blocks.

    Done once per document in libxml2, so that a paragraph's text is one call.
    """
    for part in ("front/article-meta", "body", "floats-group", "floats-wrap"):
        for element in root.iterfind(part):
            for entity in list(element.iter(etree.Entity)):
                _replace_by_text(entity, html.unescape(entity.text))
            for waste in list(element.iter(*SKIPPED)):
                waste.clear(keep_tail=True)
            for raised in list(element.iter("sup")):
                if len(raised) and all(c.tag == "xref" and c.get("ref-type") == "bibr" for c in raised):
                    raised.clear(keep_tail=True)
            for container in element.iter(*NESTED):
                for paragraph in container.iterancestors("p"):
                    paragraph.set(HOLDS, "yes")


def _replace_by_text(entity: Any, text: str) -> None:
    parent, before = entity.getparent(), entity.getprevious()
    text += entity.tail or ""
    entity.tail = None
    parent.remove(entity)
    if before is None:
        parent.text = (parent.text or "") + text
    else:
        before.tail = (before.tail or "") + text


def _text(element: Any, nested: list[Any] | None = None) -> str:
    """Text of a paragraph in reading order, spaces collapsed; block containers in it are collected for later."""
    if element.get(HOLDS) is None:
        return _single_spaced(etree.tostring(element, method="text", encoding="unicode", with_tail=False))
    parts: list[str] = []
    _walk(element, parts, [] if nested is None else nested)
    return _single_spaced("".join(parts))


def _single_spaced(text: str) -> str:
    """Spaces collapsed, in ASCII by plain replacement: that is ten times as fast as splitting and joining."""
    if not text.isascii():
        return " ".join(text.split())
    for space in ODD_SPACES:
        if space in text:
            text = text.replace(space, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def _walk(element: Any, parts: list[str], nested: list[Any]) -> None:
    parts.append(element.text or "")
    for child in element:
        if _name(child) in NESTED:
            nested.append(child)
        else:
            _walk(child, parts, nested)
        parts.append(child.tail or "")


def _blocks(element: Any, depth: int) -> list[str]:
    """Headings and paragraphs below `element`, in order, each once."""
    found: list[str] = []
    _collect(element, depth, found)
    return found


def _collect(element: Any, depth: int, found: list[str]) -> None:
    """Appends to one list: a generator for each level would pass every paragraph up through all of them."""
    for child in element:
        name = _name(child)
        if name == "p":
            nested: list[Any] = []
            found.append(_text(child, nested))
            for container in nested:
                _collect(container, depth, found)
        elif name == "sec":
            _collect(child, depth + 1, found)
        elif name == "title":
            heading = _text(child)
            found.append(f"{'#' * min(depth, 6)} {heading}" if heading and depth else heading)
        elif name in ("disp-formula", "preformat", "code"):
            found.append(_text(child))
        elif name and name not in SKIPPED:
            _collect(child, 0 if name in NESTED or name == "caption" else depth, found)


def jats_record(root: Any) -> dict[str, Any] | Refused:
    """{"id", "pmid", "text"} of an `article` element. Raises `Unusable`."""
    meta = root.find("front/article-meta")
    if meta is None:
        raise Unusable("JATS without article-meta")
    related = meta.findall("related-article")
    if root.get("article-type") == "retraction" or any(r.get("related-article-type") == RETRACTED for r in related):
        return Refused("retracted")
    ids = {e.get("pub-id-type"): (e.text or "").strip() for e in meta.findall("article-id")}
    title = meta.find("title-group/article-title")
    blocks = [f"# {_text(title)}"] if title is not None else []
    for abstract in meta.findall("abstract"):
        blocks += ["## Abstract", *_blocks(abstract, 2)] if abstract.find("title") is None else _blocks(abstract, 2)
    for part in (root.find("body"), root.find("floats-group"), root.find("floats-wrap")):
        if part is not None:
            blocks += _blocks(part, 1)
    text = "\n\n".join(block for block in blocks if block)
    if not text:
        raise Unusable("article without text")
    pmcid = ids.get("pmc") or ids.get("pmcid") or ids.get("pmcaid")
    name = f"PMC{pmcid.removeprefix('PMC')}" if pmcid else ids.get("pmid") or ids.get("doi") or ""
    record = {"id": name, "text": text}
    return {**record, "pmid": ids["pmid"]} if ids.get("pmid") else record


def _jats(data: IO[bytes] | str) -> dict[str, Any] | Damaged | Refused:
    try:
        tree = etree.parse(data, PARSER)
        if _declares_entities(tree):
            return Damaged("XML declares entities")
        if _name(tree.getroot()) != "article":
            return Damaged("XML is not a JATS article")
        _prune(tree.getroot())
        return jats_record(tree.getroot())
    except etree.XMLSyntaxError as error:
        return Damaged(f"broken XML (line {error.lineno})")
    except OSError:  # what libxml2 says of bytes that its encoding does not have
        return Damaged("XML is not in the encoding that it declares")
    except Unusable as error:
        return Damaged(str(error))


def read_jats(path: Path) -> Iterator[Item]:
    """One article per file, or all articles of a bulk `.tar`/`.tar.gz` without unpacking it to disk."""
    if not tarfile_name(path):
        if path.suffix in (".gz", ".zst"):
            with open_bytes(path) as file:
                yield 1, _jats(file)
        else:
            yield 1, _jats(str(path))  # libxml2 reads a path three times as fast as a Python file
        return
    number = 0
    # Not tarfile's own "r|gz": on damaged headers Python 3.11.2's raises AttributeError in place of its error.
    packed = path.suffix.lower() in (".gz", ".tgz")
    with gzip.open(path) if packed else path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for number, member in enumerate((m for m in archive if m.isfile()), start=1):
            if not member.name.endswith((".nxml", ".xml")):
                continue
            data = archive.extractfile(member)
            assert data is not None
            yield number, _jats(io.BytesIO(data.read()))


def tarfile_name(path: Path) -> bool:
    """True for `.tar`, `.tar.gz` and `.tgz`."""
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def read_pubmed(path: Path) -> Iterator[Item]:
    """Records of a baseline or update file, then `{"deleted": [pmid, ...]}` where it carries DeleteCitation.

    Streams: each article is freed as soon as it is read.
    """
    number = 0
    with open_bytes(path) as file:
        try:
            events = etree.iterparse(file, ("end",), tag=PUBMED_RECORDS, **SAFE)
            for number, (_, element) in enumerate(events, start=1):
                if number == 1 and _declares_entities(element.getroottree()):
                    yield 1, Damaged("XML declares entities")
                    return
                yield number, pubmed_record(element)
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]
        except etree.XMLSyntaxError as error:
            yield number + 1, Damaged(f"broken XML (line {error.lineno})")
        except ARCHIVE_ERRORS:
            yield number + 1, Damaged("archive is truncated or corrupt from here on")


def pubmed_record(element: Any) -> dict[str, Any] | Damaged | Refused:
    """{"id", "pmid", "text"}: title and abstract; labelled parts each start a paragraph with their label."""
    if element.tag == "DeleteCitation":
        return {"deleted": [e.text for e in element.findall("PMID")]}
    pmid = element.findtext("MedlineCitation/PMID") or element.findtext("BookDocument/PMID")
    article = element.find("MedlineCitation/Article")
    if article is None:
        article = element.find("BookDocument")
    if not pmid or article is None:
        return Damaged("PubMed record without PMID or article")
    kinds = {e.text for e in article.iterfind("PublicationTypeList/PublicationType")}
    if "Retracted Publication" in kinds or "Retraction of Publication" in kinds:
        return Refused("retracted")
    title = article.find("ArticleTitle")
    parts = [_text(title)] if title is not None else []
    for section in article.iterfind("Abstract/AbstractText"):
        text, label = _text(section), section.get("Label")
        parts.append(f"{label}: {text}" if label and text and label != "UNLABELLED" else text)
    languages = [e.text for e in article.iterfind("Language")]
    if len(parts) < 2:
        return Refused("no abstract")
    record = {"id": pmid, "pmid": pmid, "text": "\n".join(part for part in parts if part)}
    return {**record, "language": languages[0]} if languages and languages[0] else record


ROOTS = {"PubmedArticleSet": "pubmed", "PubmedArticle": "pubmed", "article": "jats"}


def root_format(path: Path) -> str:
    """`pubmed` or `jats` by the root element of an .xml file; other roots are read (and rejected) as JATS."""
    with open_bytes(path) as file:
        try:
            head = file.read(1 << 16).decode("utf-8", errors="replace")
        except ARCHIVE_ERRORS:
            return "jats"
    root = re.search(r"<([A-Za-z_][\w:.-]*)[\s>/]", re.sub(r"<!DOCTYPE[^>\[]*(\[.*?\])?\s*>", "", head, flags=re.S))
    return ROOTS.get(root.group(1), "jats") if root else "jats"
