"""JSON files of any size as rows: arrays, `{"data": [...]}` and objects of objects, element by element.

The C scanner of `json` reads each element where it lies in a window of text. One that it cannot read is skipped by
structure (strings and brackets), so it costs itself alone and nothing inside it becomes a record. Where structure is
lost, what is left of the file is `Unread`, never one reject. Memory: an element, at most `MAX_ELEMENT_CHARS`.
ijson was tried: it stops at the first element that is not sound, and cannot go on behind it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.rejects import Damaged, Unread, Unusable

Row = tuple[int, Fields | Damaged]

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_CHARS = 16 << 20
SHAPED_BY = 1000  # elements whose common keys are known
FOLLOWS_CHARS = 256  # looked at behind a damaged element
# Keys of objects whose list holds the records: emrQA and SQuAD (data, paragraphs), BioC, BioASQ, FHIR, PubTator 3.
CONTAINERS = ("data", "documents", "questions", "articles", "entry", "PubTator3", "paragraphs")
BETWEEN = re.compile(r"[ \t\r\n,]*")
SPACE = re.compile(r"[ \t\r\n]*")
SCALAR = re.compile(r'[^,\[\]{}"]+')
# Strings (also one that the text ends in) and brackets. The second form ends a string at its line, where JSON allows
# no string to go on: it finds the end of an element that lacks a closing quote.
TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.S)
TOKENS_OF_LINES = re.compile(r'"(?:[^"\\\n]++|\\[^\n])*+(?:"|\\?(?=\n)|\\?\Z)|[\[\]{}]')
NOT_UTF8 = re.compile("[\udc80-\udcff]")
TOO_LONG = Unread(f"no end of a JSON value within {MAX_ELEMENT_CHARS >> 20} MiB; not read from here on")
LOST = Unread("broken JSON whose end cannot be told; not read from here on")
CLOSES = {"}": "{", "]": "["}


def _no_constant(name: str) -> None:
    raise Unusable("NaN or Infinity in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Unusable("duplicate key in JSON")
    return fields


# One decoder for all: the C scanner stays in use, 95 MB/s on abstracts (2 cores, Python 3.11).
DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def parse_json(text: str) -> Any | Damaged:
    """A JSON value, strictly: no NaN, no duplicate keys, no bottomless nesting."""
    try:
        return DECODER.decode(text)
    except Unusable as error:
        return Damaged(str(error))
    except RecursionError:
        return Damaged("JSON nested too deeply")
    except ValueError:
        return Damaged("broken JSON")


def as_fields(value: Any) -> Fields | Damaged:
    """A row must be an object."""
    if isinstance(value, (dict, Damaged)):
        return value
    return Damaged("not a JSON object")


class Window:
    """Text of a file from a position on. Bytes that are no UTF-8 stand in it as lone surrogates."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._line, self._counted = 1, 0
        self.text, self.at = "", 0
        self.odd = False  # whether there are such surrogates in `text`
        self.ended = False

    def more(self) -> bool:
        """Let go what is passed and add a chunk, as much again where one element fills the window; False at the end."""
        if self.ended:
            return False
        self.line  # noqa: B018 - counts the lines that are let go
        rest = self.text[self.at :]
        data = self._file.read(max(CHUNK_BYTES, len(rest)))
        self.ended = not data
        new = self._decoder.decode(data, self.ended)
        self.odd = not new.isascii() and NOT_UTF8.search(new) is not None or (self.odd and bool(rest))
        self.text, self.at, self._counted = rest + new, 0, 0
        return not self.ended

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Pass what matches; the text that was passed."""
        while True:
            end = pattern.match(self.text, self.at).end()  # type: ignore[union-attr] - matches the empty text too
            if end < len(self.text) or not self.more():
                passed, self.at = self.text[self.at : end], min(end, len(self.text))
                return passed

    def peek(self) -> str:
        """The next character that is no space, which is passed; "" at the end."""
        self.skip(SPACE)
        return self.text[self.at : self.at + 1]

    def value(self) -> Any | Damaged | Unread:
        """The value at the position, which is passed; `Damaged` for one that is skipped, `Unread` where nothing can be
        passed."""
        while True:
            start = self.at
            try:
                found, self.at = DECODER.raw_decode(self.text, start)
                if self.at == len(self.text) and not self.ended and not isinstance(found, (dict, list, str)):
                    self.at = start  # a number may go on
                    self.more()
                    continue
                return Damaged("not UTF-8") if self.odd and NOT_UTF8.search(self.text, start, self.at) else found
            except Unusable as error:
                reason = str(error)
            except RecursionError:
                reason = "JSON nested too deeply"
            except ValueError:
                reason = "broken JSON"
            self.at = start
            skipped = self._skip_damaged(reason)
            if skipped is not None:
                return skipped

    def _skip_damaged(self, reason: str) -> Damaged | Unread | None:
        """Pass the damaged value at the position. None: more of it has been read, it may be sound."""
        end = end_of_value(self.text, self.at, TOKENS)
        short = end is None and len(self.text) - self.at < MAX_ELEMENT_CHARS
        if not self.ended and (short or (end is not None and len(self.text) - end < FOLLOWS_CHARS)):
            self.more()
            return None
        if end is None or not self._goes_on(end):
            end = end_of_value(self.text, self.at, TOKENS_OF_LINES)
        if end is None or not self._goes_on(end):
            if not self.ended:
                return TOO_LONG
            return LOST
        self.at = end
        return Damaged(reason)

    def _goes_on(self, end: int) -> bool:
        """Whether what follows a value that ends here is JSON: `,` and another value or key, or a closing bracket."""
        follows = self.text[end : end + FOLLOWS_CHARS].lstrip()
        return (
            not follows or follows[0] in "]}" or (follows[0] == "," and follows[1:].lstrip()[:1] in ("", '"', "{", "["))
        )


def end_of_value(text: str, start: int, tokens: re.Pattern[str]) -> int | None:
    """Where the value at `start` ends by its strings and brackets; None where that is not in `text`."""
    if text[start : start + 1] not in ("{", "[", '"'):
        scalar = SCALAR.match(text, start)
        return scalar.end() if scalar else None
    opened: list[str] = []
    for token in tokens.finditer(text, start):
        mark = token[0]
        if mark in CLOSES:
            if not opened or opened.pop() != CLOSES[mark]:
                return None
        elif mark in "{[":
            opened.append(mark)
        elif token.end() == len(text) and (len(mark) == 1 or mark[-1] != '"'):
            return None
        if not opened:
            return token.end()
    return None


class _Shape:
    """What the elements of an array have in common: where a bracket of a damaged element was lost, what follows it may
    be an object from inside it, and that lacks keys which all elements before had."""

    def __init__(self) -> None:
        self._common: set[str] | None = None
        self._seen, self._doubt = 0, False

    def checked(self, value: Any) -> Any:
        """The element; `LOST` for one that cannot be an element of this array."""
        if isinstance(value, Damaged):
            self._doubt = True
        elif isinstance(value, dict):
            if self._doubt and self._common and not self._common <= value.keys():
                return LOST
            self._doubt = False
            if self._seen < SHAPED_BY:
                self._common = set(value) if self._common is None else self._common & value.keys()
                self._seen += 1
        return value


def elements(window: Window) -> Iterator[Row]:
    """The elements of an array whose `[` has been passed, and its `]`. After an `Unread` nothing follows."""
    first, shape = True, _Shape()
    while True:
        commas = window.skip(BETWEEN).count(",")
        line, next_one = window.line, window.text[window.at : window.at + 1]
        if not next_one:
            yield line, Unread("JSON array is not closed")
            return
        if commas != (0 if first or next_one == "]" else 1):
            yield line, Damaged("a comma of a JSON array is missing or doubled")
        if next_one == "]":
            window.at += 1
            return
        first = False
        value = shape.checked(window.value())
        if value is not TOO_LONG or next_one != "{":
            yield line, as_fields(value)
        else:
            window.at += 1
            for line, value in _parts(window):
                yield line, value
        if isinstance(value, Unread):
            return


def rows(file: IO[bytes]) -> Iterator[Row]:
    """Rows of a JSON file that is one array or one object."""
    window = Window(file)
    window.more()
    if window.peek() == "[":
        window.at += 1
        yield from _whole(window, elements(window))
        return
    while not window.ended and len(window.text) < MAX_ELEMENT_CHARS:
        window.more()
    value = parse_json(window.text[window.at :]) if window.ended and not window.odd else Damaged("not UTF-8")
    if isinstance(value, dict):
        yield from _of_object(value)
    elif window.peek() == "{":
        members = _holds_objects(window)
        window.at += 1
        yield from _whole(window, _members(window) if members else _parts(window, top=True))
    else:
        yield 1, as_fields(value)


def _whole(window: Window, found: Iterator[Row]) -> Iterator[Row]:
    """The rows, and what stands after the closing bracket."""
    lost = False
    for line, fields in found:
        lost = isinstance(fields, Unread)
        yield line, fields
    if not lost and window.peek():
        yield window.line, Unread("text after the end of the JSON array or object; not read from here on")


def _of_object(value: Fields) -> Iterator[Row]:
    """The rows of an object that has been read: those of its list, its members where all are objects, or itself."""
    lists = [value[key] for key in CONTAINERS if isinstance(value.get(key), list)]
    if lists and not isinstance(value.get("passages"), list):
        yield from ((number, as_fields(item)) for number, item in enumerate(lists[0], start=1))
    elif value and all(isinstance(item, dict) for item in value.values()):
        yield from ((number, {"_key": key, **item}) for number, (key, item) in enumerate(value.items(), start=1))
    else:
        yield 1, value


def _key(window: Window) -> str | Unread:
    """The key at the position, and its colon, which are passed."""
    key = window.value() if window.peek() == '"' else None
    if not isinstance(key, str) or window.peek() != ":":
        return LOST
    window.at += 1
    window.skip(SPACE)
    return key


def _parts(window: Window, top: bool = False) -> Iterator[Row]:
    """An object that is too long or damaged, whose `{` has been passed, as objects of one element of its list each;
    with `top` the elements themselves. One without a list of records cannot be taken apart: one `Damaged`."""
    said: Fields = {}
    taken, reason = False, f"a JSON document longer than {MAX_ELEMENT_CHARS >> 20} MiB"
    start = window.line
    while (mark := window.peek()) not in ("}", ""):
        key, line = _key(window), window.line
        if isinstance(key, Unread):
            yield line, key
            return
        if window.peek() == "[" and key in CONTAINERS:
            taken = True
            window.at += 1
            for number, fields in elements(window):
                yield number, fields if top or isinstance(fields, Damaged) else {**said, key: [fields]}
                if isinstance(fields, Unread):
                    return
        else:
            said[key] = value = window.value()
            if isinstance(value, Unread):
                yield line, value
                return
            reason = value.reason if isinstance(value, Damaged) else reason
        if window.peek() == ",":
            window.at += 1
    window.at += 1
    if not mark:
        yield window.line, Unread("JSON object is not closed")
    elif not taken:
        yield start, Damaged(reason)


def _members(window: Window) -> Iterator[Row]:
    """The members of an object of objects, whose `{` has been passed; what is no object cannot be one of them."""
    while (mark := window.peek()) not in ("}", ""):
        key, line = _key(window), window.line
        value = window.value() if isinstance(key, str) else key
        if not isinstance(value, (dict, Damaged)):
            value = LOST
        yield line, value if isinstance(value, Damaged) else {"_key": key, **value}
        if isinstance(value, Unread):
            return
        if window.peek() == ",":
            window.at += 1
    window.at += 1
    if not mark:
        yield window.line, Unread("JSON object is not closed")


def _holds_objects(window: Window) -> bool:
    """Whether the object at the position is one of objects, by its first member."""
    return re.match(r'\{\s*"(?:[^"\\]++|\\.)*+"\s*:\s*\{', window.text[window.at :]) is not None
