"""What all XML readers share: safe parsing, the root, text of an element in reading order, records freed as they pass.

Nothing is fetched and no entity expanded: a document that declares entities of its own is damaged; no public corpus
needs them, entity bombs do. Memory of a file of many records is that of one record.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from qmedtune.data.reading import markup
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.files import ARCHIVE_ERRORS, BROKEN_ARCHIVE, open_bytes
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread, Unusable

# Nothing fetched, nothing expanded, lxml's own limits on depth and size kept.
SAFE = {
    "resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False, "remove_comments": True,
    "remove_pis": True,
}  # fmt: skip
PARSER = etree.XMLParser(**SAFE)
OF_ENCODING = (etree.ErrorTypes.ERR_INVALID_ENCODING, etree.ErrorTypes.ERR_UNSUPPORTED_ENCODING)
HEAD_BYTES = 1 << 14
BREAK = "\ufdd1"  # a noncharacter of Unicode: a line that ends here, through the collapsing of spaces
APART = "\x01"  # between texts that are tidied as one: no XML may hold it
ODD_SPACES = "\n\t\r\f\v\x1c\x1d\x1e\x1f"  # what str.split() splits at in ASCII, beside the space
SPACES = re.compile("   *")  # written so that `re` searches for its two first, not for every single one
EVERY_SPACE = ODD_SPACES + "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
EVERY_SPACE += "\u2028\u2029\u202f\u205f\u3000"
Numbered = tuple[int, Any]


@dataclass(frozen=True)
class Root:
    """Local name, and the namespace where there is one, of a file's outermost element."""

    name: str
    namespace: str = ""


def root_of(path: Path) -> Root | None:
    """The root of an XML file; None where no element begins in it."""
    parser = etree.XMLPullParser(("start",), **SAFE)
    with open_bytes(path) as file:
        try:
            for _ in range(64):
                data = file.read(HEAD_BYTES)
                parser.feed(data)
                for _, element in parser.read_events():
                    if element.tag[0] == "{":
                        space, _, _ = element.tag[1:].partition("}")
                    else:
                        space, _, _ = ("", "", "")
                    return Root(local(element), space)
                if not data:
                    return None
        except (etree.XMLSyntaxError, *ARCHIVE_ERRORS):
            return None
    return None


def local(element: Any) -> str:
    """Local name; entities are not elements and have none."""
    tag = element.tag
    if not isinstance(tag, str):
        return ""
    if tag[0] == "{":
        return tag.rpartition("}")[2]
    return tag


def declares_entities(tree: Any) -> bool:
    dtd = tree.docinfo.internalDTD
    return dtd is not None and next(iter(dtd.iterentities()), None) is not None


def without_namespace(root: Any, namespace: str) -> None:
    """Elements of one namespace as if they had none; MathML keeps its own."""
    prefix = f"{{{namespace}}}"
    for element in root.iter(f"{prefix}*"):
        element.tag = element.tag.removeprefix(prefix)


def name_entities(root: Any) -> None:
    """Put the characters of named entities (&alpha;) in."""
    for entity in list(root.iter(etree.Entity)):
        _replace_by_text(entity, html.unescape(entity.text))


def _replace_by_text(entity: Any, text: str) -> None:
    parent, before = entity.getparent(), entity.getprevious()
    text += entity.tail or ""
    entity.tail = None
    parent.remove(entity)
    if before is None:
        parent.text = (parent.text or "") + text
    else:
        before.tail = (before.tail or "") + text


def plain(element: Any) -> str:
    """Text of an element in reading order, spaces collapsed, without marks of citations."""
    return tidy(text_of(element))


def text_of(element: Any) -> str:
    """Text of an element in reading order, as it stands."""
    if not len(element):
        return element.text or ""  # most headings: a fourth of the time
    return etree.tostring(element, method="text", encoding="unicode", with_tail=False)


def tidy_all(texts: list[str]) -> list[str]:
    """`tidy` of each, all as one text: an article has a hundred short ones, and a call costs more than it does."""
    tidied = tidy(APART.join(texts))
    return [text.strip(" ") for text in tidied.split(APART)]


def tidy(text: str) -> str:
    text = markup.without_marks(single_spaced(text))
    if text.isascii() or BREAK not in text:
        return text
    return "\n".join(line.strip() for line in text.split(BREAK)).strip()


def single_spaced(text: str) -> str:
    """Every run of white space as one space: up to ten times as fast as splitting and joining."""
    for space in ODD_SPACES if text.isascii() else EVERY_SPACE:
        if space in text:
            text = text.replace(space, " ")
    return SPACES.sub(" ", text).strip(" ")


def read_whole(data: bytes, shape: Callable[[Any], Any]) -> Any:
    """What `shape` makes of the root of a document that is one record; `Damaged` and `RefusedRecord` are no errors."""
    try:
        root = etree.fromstring(data, PARSER)
        if declares_entities(root.getroottree()):
            return Damaged("XML declares entities")
        return shape(root)
    except etree.XMLSyntaxError as error:
        if error.code in OF_ENCODING:
            return Damaged(f"XML is not in the encoding that it declares (line {error.lineno})")
        return Damaged(f"broken XML (line {error.lineno})")
    except Unusable as error:
        return Damaged(str(error))


def _unchanged(data: bytes) -> bytes:
    return data


def read_file(path: Path, shape: Callable[[Any], Any], prepare: Callable[[bytes], bytes] = _unchanged) -> Any:
    """`read_whole` of a file, read at once: libxml2 takes three times as long for a Python file. `prepare` makes what
    is parsed."""
    try:
        with open_bytes(path) as file:
            data = file.read()
    except ARCHIVE_ERRORS:
        return Damaged(BROKEN_ARCHIVE.reason)
    return read_whole(prepare(data), shape)


def read_each(path: Path, tags: tuple[str, ...], shape: Callable[[Any], Any]) -> Iterator[Numbered]:
    """(number, what `shape` makes of it) of every element with one of `tags`, each freed when it is read."""
    number = 0
    with open_bytes(path) as file:
        try:
            for number, (_, element) in enumerate(etree.iterparse(file, ("end",), tag=tags, **SAFE), start=1):
                if number == 1 and declares_entities(element.getroottree()):
                    yield 1, Unread("XML declares entities")
                    return
                yield number, _shaped(element, shape)
                _free(element)
        except etree.XMLSyntaxError as error:
            yield number + 1, Unread(f"broken XML (line {error.lineno}); not read from here on")
        except ARCHIVE_ERRORS:
            yield number + 1, BROKEN_ARCHIVE


def _shaped(element: Any, shape: Callable[[Any], Any]) -> Document | Fields | Damaged | RefusedRecord:
    try:
        return shape(element)
    except Unusable as error:
        return Damaged(str(error))


def _free(element: Any) -> None:
    """Let go an element and all that comes before it, at every level."""
    element.clear()
    parent = element.getparent()
    while parent is not None:
        while element.getprevious() is not None:
            del parent[0]
        element, parent = parent, parent.getparent()
