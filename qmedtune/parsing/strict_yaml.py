"""A strict reader for recipes: plain YAML in, plain data and the line of every key out.

PyYAML's own loader reads `2e-4` as text, `no` as false, `12:30` as 750, `010` as 8 and keeps the last of two equal
keys. Here scalars follow the YAML 1.2 core schema, and tags, anchors, aliases, merge keys, duplicate keys, tabs and
second documents are problems with a line number. Deliberately not read: anything that a page of settings never needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml import events as ev

KeyPath = tuple[str | int, ...]
Tree = dict[str, Any]  # a mapping of YAML or JSON as it was read, before anything has judged it

MAX_BYTES = 256 * 1024  # the longest shipped recipe has 4 kB
MAX_DEPTH = 16  # a recipe nests at most 6 deep
MAX_KEY_CHARS = 200

_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_EXPONENT = re.compile(r"(\+?[0-9]{1,18})[eE]\+?([0-9]{1,2})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass(frozen=True)
class Problem:
    """One thing to mend: the key path it is about, the 1-based line (0: none) and what to say."""

    path: KeyPath
    line: int
    text: str


@dataclass
class YamlDocument:
    """`data` as plain dicts, lists and scalars; `lines` maps the path of every key and list item to its line."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def resolve_scalar(text: str) -> Any:
    """YAML 1.2 core schema, plus: `2e9` is a whole number, as people who write token counts mean it."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if match := _EXPONENT.fullmatch(text):
        return int(match[1]) * 10 ** int(match[2])
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(_SPECIAL[text.lower()]) if text.lower() in _SPECIAL else text


def parse(text: str) -> YamlDocument:
    """Read one YAML document. Never raises for bad input: `problems` says what is wrong with it."""
    document = YamlDocument()
    if problem := _tab_indent(text):
        document.problems.append(problem)
        return document
    try:
        document.data = _document(yaml.parse(text, Loader=yaml.SafeLoader), document)
    except yaml.YAMLError as error:
        document.problems.append(_syntax(error))
    except (ValueError, OverflowError):  # PyYAML passes "\UFFFFFFFF" to chr() unchecked
        document.problems.append(Problem((), 0, "an escape in double quotes names no Unicode character"))
    return document


class _Stop(yaml.YAMLError):
    """Reading on would be useless or unbounded."""

    def __init__(self, line: int, text: str) -> None:
        self.line, self.text = line, text


def _document(events: Iterator[ev.Event], document: YamlDocument) -> Any:
    next(events)  # stream start
    if isinstance(next(events), ev.StreamEndEvent):
        return None
    data = _node(next(events), events, (), document)
    next(events)  # document end
    if not isinstance(extra := next(events), ev.StreamEndEvent):
        raise _Stop(_line(extra), "a second document (`---`); a recipe is one document")
    return data


def _node(event: ev.Event, events: Iterator[ev.Event], path: KeyPath, document: YamlDocument) -> Any:
    if len(path) > MAX_DEPTH:
        raise _Stop(_line(event), f"nested more than {MAX_DEPTH} levels deep; a recipe needs 6")
    if isinstance(event, ev.AliasEvent):
        document.problems.append(Problem(path, _line(event), f"alias `*{event.anchor}`; write the value out"))
        return None
    _refuse_extras(event, path, document)
    if isinstance(event, ev.SequenceStartEvent):
        return _sequence(events, path, document)
    if isinstance(event, ev.MappingStartEvent):
        return _mapping(events, path, document)
    assert isinstance(event, ev.ScalarEvent)
    return _scalar(event, path, document)


def _refuse_extras(event: ev.Event, path: KeyPath, document: YamlDocument) -> None:
    if anchor := getattr(event, "anchor", None):
        document.problems.append(Problem(path, _line(event), f"anchor `&{anchor}`; write the value out each time"))
    if tag := getattr(event, "tag", None):
        document.problems.append(Problem(path, _line(event), f"tag `{tag}`; recipes hold plain values only"))


def _sequence(events: Iterator[ev.Event], path: KeyPath, document: YamlDocument) -> list[Any]:
    items: list[Any] = []
    while not isinstance(event := next(events), ev.SequenceEndEvent):
        here = (*path, len(items))
        document.lines[here] = _line(event)
        items.append(_node(event, events, here, document))
    return items


def _mapping(events: Iterator[ev.Event], path: KeyPath, document: YamlDocument) -> Tree:
    values: Tree = {}
    while not isinstance(event := next(events), ev.MappingEndEvent):
        key = _key(event, path, document)
        here = (*path, key)
        if key in values:
            text = f"duplicate key; it stands already on line {document.lines[here]}"
            document.problems.append(Problem(here, _line(event), text))
        document.lines.setdefault(here, _line(event))
        value = _node(next(events), events, here, document)
        values.setdefault(key, value)  # of two the first, which later keys refer to more often
    return values


def _key(event: ev.Event, path: KeyPath, document: YamlDocument) -> str:
    if not isinstance(event, ev.ScalarEvent):
        raise _Stop(_line(event), "a key is a list, a mapping or an alias; a key is a word")
    if event.value == "<<":
        raise _Stop(_line(event), "merge key `<<`; write the values out")
    if len(event.value) > MAX_KEY_CHARS:
        raise _Stop(_line(event), f"a key of {len(event.value)} characters; at most {MAX_KEY_CHARS}")
    _refuse_extras(event, (*path, event.value), document)
    if not isinstance(_scalar(event, path, document), str):
        text = f'the key {event.value or "(empty)"} is no word; put it in quotes: "{event.value}"'
        document.problems.append(Problem((*path, event.value), _line(event), text))
    return _encodable(event.value)


def _scalar(event: ev.ScalarEvent, path: KeyPath, document: YamlDocument) -> Any:
    if event.value != _encodable(event.value):
        document.problems.append(Problem(path, _line(event), "half of a surrogate pair; write the character itself"))
        return _encodable(event.value)
    return resolve_scalar(event.value) if event.style is None else event.value


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _line(event: ev.Event) -> int:
    return event.start_mark.line + 1


def _tab_indent(text: str) -> Problem | None:
    for number, line in enumerate(text.splitlines(), start=1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return Problem((), number, "a tab in the indentation; YAML wants spaces (`expand -t2` converts a file)")
    return None


def _syntax(error: yaml.YAMLError) -> Problem:
    """PyYAML's own words for what it found, with the line, and a hint for what people do most."""
    if isinstance(error, _Stop):
        return Problem((), error.line, error.text)
    if isinstance(error, yaml.reader.ReaderError):
        return Problem((), 0, "not plain text (a control character); save the recipe as UTF-8 text")
    mark = getattr(error, "problem_mark", None)
    found = str(getattr(error, "problem", None) or "unreadable")
    hint = "check the indentation, quotes, brackets and the space after `:`"
    if "escape" in found:
        hint = "in double quotes a backslash starts an escape: use 'single quotes' or forward slashes"
    begin = getattr(error, "context_mark", None)
    if mark and begin and begin.line < mark.line:
        found += f" (in what begins on line {begin.line + 1})"
    return Problem((), mark.line + 1 if mark else 0, f"not YAML: {found}; {hint}")


OVERRIDE = "# --set "  # how the loader writes down what the command line changed


def without_comments(text: str) -> str:
    """The same recipe as it may stand in a report: comments hold what somebody noted for themselves, names among it.

    A `#` is a comment where it is in no scalar and follows white space; what YAML makes of the text stays the same.
    """
    inside = bytearray(len(text) + 1)
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken):
            start, end = token.start_mark.index, token.end_mark.index
            inside[start:end] = b"\1" * (end - start)
    kept, at = [], 0
    for line in text.splitlines(keepends=True):
        end = at + len(line)
        cut = next((i for i in range(at, end) if text[i] == "#" and not inside[i] and _begins_comment(text, i)), None)
        before = line if cut is None else text[at:cut].rstrip() + "\n"
        if line.startswith(OVERRIDE):
            kept.append(line)
        elif cut is None or before.strip():
            kept.append(before)
        at = end
    return "".join(kept).lstrip("\n")


def _begins_comment(text: str, at: int) -> bool:
    return at == 0 or text[at - 1].isspace()
