"""Full text in TEI as GROBID writes it: title, abstract, sections and captions; citations that are numbers left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading import markup, xml_files
from qmedtune.data.reading.document import Document
from qmedtune.data.reading.rejects import Damaged, Unusable
from qmedtune.data.reading.xml_files import local, plain

NAMESPACE = "http://www.tei-c.org/ns/1.0"
LEFT_OUT = ("note", "table", "formula/label", "listBibl", "back")


def read_tei(path: Path) -> Iterator[xml_files.Numbered]:
    """The document of a file, or those of a `teiCorpus`."""
    root = xml_files.root_of(path)
    if root is not None and root.name == "teiCorpus":
        yield from xml_files.read_each(path, (f"{{{NAMESPACE}}}TEI",), document)
    else:
        yield 1, xml_files.read_file(path, document)


def document(root: Any) -> Document | Damaged:
    """The document of a `TEI` element. Raises `Unusable`."""
    if local(root) != "TEI":
        return Damaged(f"XML is not TEI: its root is `{local(root)[:40]}`")
    xml_files.without_namespace(root, NAMESPACE)
    xml_files.name_entities(root)
    unread = tuple(name for name in ("listBibl", "table", "note") if next(root.iter(name), None) is not None)
    for waste in list(root.iter("table", "note")):
        waste.clear(keep_tail=True)
    for raised in root.iter("hi"):
        raised.tag = {"superscript": "sup", "subscript": "sub"}.get(raised.get("rend", ""), "hi")
    markup.resolve(root, ("type", "bibr"))
    title = root.find("teiHeader/fileDesc/titleStmt/title")
    if title is not None:
        heading = plain(title)
    else:
        heading = ""
    parts = [f"# {heading}"] if heading else []
    abstract = root.find("teiHeader/profileDesc/abstract")
    if abstract is not None:
        said = _blocks(abstract)
    else:
        said = []
    parts += ["## Abstract", *said] if said else []
    body = root.find("text/body")
    parts += _blocks(body) if body is not None else []
    if not parts:
        raise Unusable("TEI without text")
    pmid = root.findtext(".//idno[@type='PMID']")
    name = pmid or root.findtext(".//idno[@type='DOI']") or root.findtext(".//idno[@type='MD5']")
    return Document(name, "\n\n".join(parts), pmid=pmid, unread=unread)


def _blocks(element: Any) -> list[str]:
    found = []
    for child in element:
        name = local(child)
        if name == "head":
            heading = plain(child)
            found.append(f"## {heading}" if heading and local(element) == "div" else heading)
        elif name in ("p", "ab", "figDesc", "formula", "item", "l"):
            found.append(plain(child))
        elif name and name != "label":
            found += _blocks(child)
    result: list[str] = []
    for part in found:
        if part:
            result.append(part)
    return result
