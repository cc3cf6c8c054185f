"""Identifiers in clinical text: found, counted, and where asked for replaced.

Structured identifiers are found by shape and label (recognisers.py); names only where a title or a label announces
them, so that eponyms (Parkinson, Graves) and drugs are not names. This helps a researcher to look and to reduce; it
is NOT de-identification to the Safe Harbor standard. Found text never leaves this module but in the redacted record:
what is reported are counts and shapes (`ddd-dd-dddd`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qmedtune.data.presidio import Finder
from qmedtune.data.recognisers import DIGITS, EPONYM, LABELLED_CODES, MARKED, NOT_NAMES, PATTERNS

EXAMPLES = 3
STANDS_FOR = "help for a reviewer, not de-identification to the Safe Harbor standard"


@dataclass(frozen=True)
class Span:
    """One identifier: text[start:end] of class `kind`."""

    start: int
    end: int
    kind: str


def find(text: str, persons: Finder | None = None) -> list[Span]:
    """Identifiers in order, without overlaps. Marks of earlier de-identification (`[** **]`, `___`) are none.

    persons: finds names that nothing announces (presidio.py); what else is found goes before.
    """
    taken = bytearray(len(text))
    if "[**" in text or "___" in text:
        for match in MARKED.finditer(text):
            taken[match.start() : match.end()] = b"\1" * len(match[0])
    spans = []
    plain = text.lower().translate(DIGITS)
    for kind, needs, pattern in PATTERNS:
        if not any(need in plain for need in needs):
            continue
        group = "value" if "value" in pattern.groupindex else 0
        for match in pattern.finditer(text):
            start, end = match.span(group)
            if not any(taken[start:end]) and _plausible(kind, text[start:end], text[end : end + 16]):
                taken[start:end] = b"\1" * (end - start)
                spans.append(Span(start, end, kind))
    for start, end in persons(text) if persons else ():
        if not any(taken[start:end]) and _plausible("name", text[start:end], text[end : end + 16]):
            taken[start:end] = b"\1" * (end - start)
            spans.append(Span(start, end, "name"))
    return sorted(spans, key=lambda span: span.start)


def _plausible(kind: str, value: str, after: str) -> bool:
    if kind == "name":
        first = re.split(r"[\s,.'’]", value.lower())[0]
        return first not in NOT_NAMES and not EPONYM.match(after) and not EPONYM.search(value)
    if kind in LABELLED_CODES:
        digits = sum(c.isdigit() for c in value)
        return digits >= 4 or (digits >= 2 and len(value) >= 6 and not re.fullmatch(r"[a-z.-]+\d\d", value))
    return True


def shape(value: str) -> str:
    """`555-1234` -> `ddd-dddd`, `Smith` -> `Aaaaa`: what may be shown of an identifier."""
    return "".join("d" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in value)


@dataclass
class Tally:
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

    def merge(self, other: Tally) -> None:
        """Add what was counted in text that came after."""
        self.classes += other.classes
        self.records += other.records
        for kind, forms in other.examples.items():
            shown = self.examples.setdefault(kind, [])
            shown += [form for form in forms if form not in shown][: EXAMPLES - len(shown)]

    def as_dict(self) -> dict[str, Any]:
        return {"classes": dict(self.classes), "records": self.records, "examples": self.examples}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Tally:
        return cls(Counter(value["classes"]), value["records"], value["examples"])

    def facts(self, mode: str) -> dict[str, Any]:
        return {
            "mode": mode, "records": self.records, "identifiers": self.classes.total(),
            "classes": dict(self.classes), "shapes": self.examples, "note": STANDS_FOR,
        }  # fmt: skip
