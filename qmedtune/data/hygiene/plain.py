"""A copy of a text in plain ASCII letters, digits and marks, character for character, for patterns to be matched on.

Letters lose their accents (`García` -> `Garcia`), letters of other scripts become X and x by their case, digits of all
scripts become 0 to 9, dashes, quotes and spaces of all kinds become the plain ones. What has no width of its own (soft
hyphens, joiners, combining marks) is left out, and `origin` then says where each character stood. A character is a
letter or digit in the copy exactly if it is one in the text, so that a word boundary is one in both.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
QUOTES = dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\uff07", "'")
SPACES = dict.fromkeys(
    "\t\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
LINES = dict.fromkeys("\r\x0b\x0c\u0085\u2028\u2029", "\n")
MARKS = {
    **DASHES,
    **QUOTES,
    **SPACES,
    **LINES,
    "\uff0f": "/",
    "\uff1a": ":",
    "\uff0e": ".",
    "\uff03": "#",
    "\uff20": "@",
}
# Letters that Unicode does not take apart.
UNDIVIDED = {
    "ß": "s",
    "ø": "o",
    "Ø": "O",
    "ł": "l",
    "Ł": "L",
    "đ": "d",
    "Đ": "D",
    "æ": "a",
    "Æ": "A",
    "œ": "o",
    "Œ": "O",
}
UNDIVIDED |= {"ı": "i", "ð": "d", "Ð": "D", "þ": "t", "Þ": "T"}


@dataclass(frozen=True)
class PlainText:
    """`text[i]` stands for character `origin[i]` of the original; for all of them where `origin` is None."""

    text: str
    origin: list[int] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Where text[start:end] (not empty) lies in the original, marks on its last letter included."""
        if self.origin is None:
            return start, end
        return self.origin[start], self.origin[end] if end < len(self.text) else self.origin[-1]


def plain(text: str) -> PlainText:
    """The copy of a text."""
    if text.isascii():
        return PlainText(text.translate(_ASCII) if "\t" in text or "\r" in text else text)
    if not INVISIBLE.search(text) and not _COMBINING.search(text):
        return PlainText("".join(map(_plain_character, text)))
    return _without_invisible(text)


def _without_invisible(text: str) -> PlainText:
    kept, origin = [], []
    for index, character in enumerate(text):
        if not INVISIBLE.match(character) and not unicodedata.combining(character):
            kept.append(_plain_character(character))
            origin.append(index)
    return PlainText("".join(kept), [*origin, len(text)])


_ASCII = {ord(c): plain for c, plain in MARKS.items() if c.isascii()}
_COMBINING = re.compile("[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u1ab0-\u1aff\u20d0-\u20ff]")


@lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    if character.isascii():
        return MARKS.get(character, character)
    if character in MARKS:
        return MARKS[character]
    if not character.isalnum():
        return "\u2022"  # a bullet: no letter, no digit, nothing that a pattern looks for
    base = UNDIVIDED.get(character) or unicodedata.normalize("NFKD", character)[0]
    if base.isascii() and base.isalnum():
        return base
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return "x" if character.islower() else "X"  # of scripts without case, each word may be a name
