"""JATS articles: one per file, in a bulk archive, or as a set (E-utilities, Europe PMC, OAI-PMH).

Policy: title, abstract and body paragraphs in document order, each once; headings as `#` lines; captions of figures,
tables, media and supplements kept; table cells, references, back matter and LaTeX sources left out (and named in the
ledger); raised numbers, formulas and citations as markup.py says.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading import markup, xml_files
from qmedtune.data.reading.document import Document
from qmedtune.data.reading.files import MAX_MEMBER_BYTES, head_of
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread, Unusable
from qmedtune.data.reading.xml_files import local, text_of

SKIPPED = frozenset(
    ("tex-math", "object-id", "label", "graphic", "alt-text", "long-desc", "fn-group", "table", "ref-list", "back")
)
TOLD = frozenset(("table", "ref-list", "fn-group", "tex-math"))  # of these, what the ledger names where it is there
# Containers whose own paragraphs follow the paragraph they are nested in.
NESTED = frozenset(
    ("fig", "fig-group", "table-wrap", "table-wrap-group", "list", "def-list", "disp-quote", "boxed-text", "media")
    + ("supplementary-material", "verse-group", "statement", "speech")
)
HEADINGS = ("", "# ", "## ", "### ", "#### ", "##### ", "###### ")  # by depth; at 0 it is a caption's, and a paragraph
TEXTS = frozenset(("disp-formula", "preformat", "code", "term"))
Block = tuple[str, str]  # what is written before a heading or paragraph, and its text as it stands
# A citation that is one number, as three of four are written: `<xref ref-type="bibr" rid="B1">1</xref>`, `[1]` too.
# Only what is the same in every encoding that has ASCII in it; repeats are bounded, so that no tag costs a square.
NUMBER_CITED = re.compile(rb'<xref [^<>\n]{0,99}?ref-type="bibr"[^<>\n]{0,99}>\[?\d{1,3}\]?</xref>')
RETRACTED = "retraction-forward"
HOLDS = "holds-blocks"  # set on paragraphs that have block containers in them
SETS = ("pmc-articleset", "articles", "OAI-PMH")
ARTICLES = ("article", "{*}article")
PARTS = ("front/article-meta", "body", "floats-group", "floats-wrap")


def read_jats(path: Path) -> Iterator[xml_files.Numbered]:
    """One article per file, the articles of a set, or those of a bulk `.tar`/`.tar.gz` without unpacking it to disk."""
    if is_tar(path):
        yield from _members(path)
    elif path.suffix != ".nxml" and _is_set(path):
        yield from xml_files.read_each(path, ARTICLES, article)
    else:
        yield 1, xml_files.read_file(path, article, _with_marks)


def _with_marks(data: bytes) -> bytes:
    """An article with the marks that `markup.resolve` would put into its simplest citations: before it is parsed,
    because an element costs five times its mark."""
    if b"<![CDATA[" in data:
        return data  # there it would be text
    return NUMBER_CITED.sub(markup.CITED.encode(), data)


def _is_set(path: Path) -> bool:
    """By the root; parsed for it only where its name is in the file's head: an article has one parse to pay for."""
    head = head_of(path, 4096)
    if not any(name.encode() in head for name in SETS) and b"\0" not in head:
        return False
    root = xml_files.root_of(path)
    return root is not None and root.name in SETS


def is_tar(path: Path) -> bool:
    """True for `.tar`, `.tar.gz` and `.tgz`."""
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _members(path: Path) -> Iterator[xml_files.Numbered]:
    # Not tarfile's own "r|gz": on damaged headers Python 3.11.2's raises AttributeError in place of its error.
    packed = path.suffix.lower() in (".gz", ".tgz")
    with gzip.open(path) if packed else path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for number, member in enumerate((m for m in archive if m.isfile()), start=1):
            if not member.name.lower().endswith((".nxml", ".xml")):
                continue
            data = archive.extractfile(member)
            assert data is not None
            if member.size > MAX_MEMBER_BYTES:
                yield number, Unread(f"member longer than {MAX_MEMBER_BYTES >> 20} MiB")
            else:
                yield number, xml_files.read_whole(_with_marks(data.read()), article)


def article(root: Any) -> Document | Damaged | RefusedRecord:
    """The document of an `article` element. Raises `Unusable`."""
    if local(root) != "article":
        return Damaged(f"XML is not a JATS article, nor of another known format: its root is `{local(root)[:40]}`")
    if root.tag[0] == "{":
        xml_files.without_namespace(root, root.tag[1:].partition("}")[0])
    meta = root.find("front/article-meta")
    if meta is None:
        if root.find("front") is None:
            raise Unusable("an `article` that is not JATS: it has no `front` (a publisher's own format?)")
        raise Unusable("JATS without article-meta")
    related = meta.findall("related-article")
    if root.get("article-type") == "retraction" or any(r.get("related-article-type") == RETRACTED for r in related):
        return RefusedRecord("retracted")
    unread = _prune(root)
    text = _written(_blocks(root, meta))
    if not text:
        raise Unusable("article without text")
    ids = {}
    for e in meta.findall("article-id"):
        ids[e.get("pub-id-type")] = (e.text or "").strip()
    pmcid = ids.get("pmc") or ids.get("pmcid") or ids.get("pmcaid")
    if pmcid:
        name = f"PMC{pmcid.removeprefix('PMC')}"
    else:
        name = ids.get("pmid") or ids.get("doi") or ""
    return Document(name, text, pmid=ids.get("pmid"), unread=unread)


def _blocks(root: Any, meta: Any) -> list[Block]:
    """Headings and paragraphs in document order, each once."""
    blocks: list[Block] = []
    title = meta.find("title-group/article-title")
    if title is not None:
        blocks.append(("# ", text_of(title)))
    for abstract in meta.findall("abstract"):
        if abstract.find("title") is None:
            blocks.append(("## ", "Abstract"))
        _collect(abstract, 2, blocks)
    for part in (root.find("body"), root.find("floats-group"), root.find("floats-wrap")):
        if part is not None:
            _collect(part, 1, blocks)
    return blocks


def _written(blocks: list[Block]) -> str:
    """All blocks that say something, with an empty line between them."""
    texts = xml_files.tidy_all([text for _, text in blocks])
    said = []
    for (before, _), text in zip(blocks, texts, strict=True):
        if text:
            said.append(before + text)
    return "\n\n".join(said)


def _prune(root: Any) -> tuple[str, ...]:
    """Empty what has no reading value, put in what markup means, mark paragraphs that hold blocks; the names of what
    is left out.

    Done once per document in libxml2, so that a paragraph's text is one call.
    """
    if root.find("back") is not None:
        unread = {"back"}
    else:
        unread = set()
    for part in PARTS:
        for element in root.iterfind(part):
            xml_files.name_entities(element)
            for waste in list(element.iter(*SKIPPED)):
                if waste.tag in TOLD:
                    unread.add(waste.tag)
                waste.clear(keep_tail=True)
            markup.resolve(element, ("ref-type", "bibr"))
            for line in element.iter("break"):
                line.text = " "
            for container in element.iter(*NESTED):
                for paragraph in container.iterancestors("p"):
                    paragraph.set(HOLDS, "yes")
    return tuple(sorted(unread))


def _collect(element: Any, depth: int, blocks: list[Block]) -> None:
    """Appends to one list: a generator for each level would pass every paragraph up through all of them."""
    for child in element:
        name = local(child)
        if name == "p":
            if child.get(HOLDS) is None:
                blocks.append(("", text_of(child)))
            else:
                _collect_holding(child, depth, blocks)
        elif name == "sec":
            _collect(child, depth + 1, blocks)
        elif name == "title":
            blocks.append((HEADINGS[min(depth, 6)], text_of(child)))
        elif name in TEXTS:
            blocks.append(("", text_of(child)))
        elif name and name not in SKIPPED:
            _collect(child, 0 if name in NESTED or name == "caption" else depth, blocks)


def _collect_holding(paragraph: Any, depth: int, blocks: list[Block]) -> None:
    """A paragraph with block containers in it: its own text first, then theirs."""
    parts: list[str] = []
    containers: list[Any] = []
    _walk(paragraph, parts, containers)
    blocks.append(("", "".join(parts)))
    for container in containers:
        _collect(container, depth, blocks)


def _walk(element: Any, parts: list[str], containers: list[Any]) -> None:
    parts.append(element.text or "")
    for child in element:
        if local(child) in NESTED:
            containers.append(child)
        else:
            _walk(child, parts, containers)
        parts.append(child.tail or "")
