"""Identifiers in clinical text: found, counted, and where asked for replaced.

Structured identifiers are found by shape and label (recognisers.py); names only where a title or a label announces
them, so that eponyms (Parkinson, Graves) and drugs are not names. This helps a researcher to look and to reduce; it
is NOT de-identification to the Safe Harbor standard. Found text never leaves this module but in the redacted record:
what is reported are counts and shapes (`ddd-dd-dddd`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from qmedtune.data.hygiene import headers, messages
from qmedtune.data.hygiene.abroad import labelled
from qmedtune.data.hygiene.hospitals import find_hospitals
from qmedtune.data.hygiene.persons import find_names
from qmedtune.data.hygiene.plain import plain
from qmedtune.data.hygiene.presidio import Finder
from qmedtune.data.hygiene.recognisers import DIGITS, MARKED, RECOGNISERS, Recogniser, plausible
from qmedtune.data.hygiene.words import EPONYMS, NEVER
from qmedtune.results import Identifiers

EXAMPLES = 3
VERSION = 4  # of what is found: part of the key of data that is redacted or refused by it
STANDS_FOR = "help for a reviewer, not de-identification to the Safe Harbor standard"


@dataclass(frozen=True)
class Span:
    """One identifier: text[start:end] of class `kind`."""

    start: int
    end: int
    kind: str


def find(text: str, persons: Finder | None = None) -> list[Span]:
    """Identifiers in order, without overlaps. Marks of earlier de-identification (`[** **]`, `___`) are none.

    No span begins or ends between two letters or digits: an identifier is found whole, or not.
    persons: finds names that nothing announces (presidio.py); what else is found goes before.
    """
    copy = plain(text)
    claimed = _Claimed(copy.text)
    found = []
    for place in _found(copy.text):
        found += claimed.spans(*place)
    spans = []
    for span in found:
        spans.append(Span(*copy.span(span.start, span.end), span.kind))
    places = list(labelled(text))
    for start, end in persons(text) if persons else ():
        if _may_be_name(text[start:end]):
            places.append((start, end))
    if places:
        named = _Claimed(text, [(span.start, span.end) for span in spans])
        for start, end in places:
            spans += named.spans("name", start, end)
    return sorted(spans, key=lambda span: span.start)


def _found(text: str) -> Iterator[tuple[str, int, int]]:
    """(class, start, end) in a plain copy, in order of precedence; they may overlap."""
    lowered = text.lower().translate(DIGITS)
    yield from _recognised(text, lowered, FIRST)
    yield from messages.find(text)
    yield from headers.find(text, lowered)
    yield from _recognised(text, lowered, REST)
    for start, end in find_hospitals(text):
        yield ("hospital", start, end)
    for start, end in find_names(text, lowered):
        yield ("name", start, end)


def _recognised(text: str, lowered: str, recognisers: Iterable[Recogniser]) -> Iterator[tuple[str, int, int]]:
    for recogniser in recognisers:
        for match in recogniser.matches(text, lowered):
            start, end = match.span("value" if "value" in recogniser.pattern.groupindex else 0)
            if plausible(recogniser.kind, match, text[start:end], text[end : end + 16]):
                yield recogniser.kind, start, end


# An address of the web holds what looks like labels: `?id=88231`.
FIRST = [recogniser for recogniser in RECOGNISERS if recogniser.kind in ("email", "url")]
REST = [recogniser for recogniser in RECOGNISERS if recogniser.kind not in ("email", "url")]
# Of these a part that nothing else has found is still to be taken out; a number is whole or none.
IN_WORDS = frozenset(("name", "address", "hospital", "zip"))


class _Claimed:
    """Which characters of a text belong to an identifier already, or were masked before."""

    def __init__(self, text: str, spans: Iterable[tuple[int, int]] = ()):
        self.text, self.taken = text, bytearray(len(text))
        if "[**" in text or "___" in text:
            marked = MARKED.finditer(text)
        else:
            marked = ()
        for start, end in (*spans, *(match.span() for match in marked)):
            self.taken[start:end] = b"\1" * (end - start)

    def spans(self, kind: str, start: int, end: int) -> list[Span]:
        """Claim text[start:end] for a class, widened to whole words; of what is claimed in part the rest."""
        text = self.text
        while 0 < start < len(text) and text[start - 1].isalnum() and text[start].isalnum():
            start -= 1
        while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
            end += 1
        if kind not in IN_WORDS and self.taken.find(1, start, end) >= 0:
            return []
        found, asked = [], end - start
        while start < end:
            claimed = self.taken.find(1, start, end)
            stop = end if claimed < 0 else claimed
            left = _WORD if kind in ("name", "hospital") else _LETTER_OR_DIGIT
            if piece := _bare(text, start, stop, left=None if stop - start == asked else left):
                found.append(Span(*piece, kind))
                self.taken[piece[0] : piece[1]] = b"\1" * (piece[1] - piece[0])
            if claimed < 0:
                break
            start = self.taken.find(0, stop, end)
            if start < 0:
                break
        return found


_WORD, _LETTER_OR_DIGIT = re.compile(r"[^\W\d_]{2}"), re.compile(r"[^\W_]")


def _bare(text: str, start: int, end: int, *, left: re.Pattern[str] | None) -> tuple[int, int] | None:
    """A piece; if it is not the whole, without the marks at its ends, and None where nothing is left as `left` asks."""
    if left is None:
        return start, end
    while start < end and not text[start].isalnum() and text[start] not in "([+#/<":
        start += 1
    while start < end and not text[end - 1].isalnum() and text[end - 1] not in ")].>":
        end -= 1
    if left.search(text, start, end):
        return start, end
    return None


def _may_be_name(value: str) -> bool:
    """Of what a language model takes for a person: no eponym, no drug, no word of a note."""
    return bool(value.strip()) and value.lower().split()[0].strip("'.,") not in EPONYMS | NEVER


def shape(value: str) -> str:
    """`555-1234` -> `ddd-dddd`, `Smith` -> `Aaaaa`: what may be shown of an identifier."""
    return "".join("d" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in value)


@dataclass
class IdentifierCounts:
    """Counts for the report: identifiers by class, records that held any (counted by the caller), and a few shapes."""

    classes: Counter[str] = field(default_factory=Counter)
    records: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, spans: list[Span]) -> None:
        for span in spans:
            self.classes[span.kind] += 1
            shown = self.examples.setdefault(span.kind, [])
            form = shape(text[span.start : span.end])
            if len(shown) < EXAMPLES and form not in shown:
                shown.append(form)

    def merge(self, other: IdentifierCounts) -> None:
        """Add what was counted in text that came after."""
        self.classes += other.classes
        self.records += other.records
        for kind, forms in other.examples.items():
            shown = self.examples.setdefault(kind, [])
            shown += [form for form in forms if form not in shown][: EXAMPLES - len(shown)]

    def facts(self, mode: str) -> Identifiers:
        return Identifiers(
            mode=mode,
            records=self.records,
            identifiers=self.classes.total(),
            classes=dict(self.classes),
            shapes=self.examples,
            note=STANDS_FOR,
        )
