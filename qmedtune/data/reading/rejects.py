"""What does not become training text, and why: the left-hand side of the ledger.

Every source ends up with read = kept + rejected + duplicates + contaminated + refused. Rejected is damage (it counts
against `hygiene.max_bad_fraction`), refused is a decision (retracted, entered in error, identifiers under
`phi: refuse`). Each such record leaves one line in rejects.jsonl, which never holds any of its text.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Damaged:
    """Stands in a reader's stream for a record that could not be read. `reason` is a fixed phrase, never data."""

    reason: str


@dataclass(frozen=True)
class Unread(Damaged):
    """Stands in a reader's stream for all that is left of a file (or of a member of an archive): how many records that
    is cannot be told, so it is fatal for the source, but under `hygiene: {max_bad_fraction: 1}`."""


@dataclass(frozen=True)
class RefusedRecord:
    """Stands in a reader's stream for a sound record that must not be used."""

    reason: str


# What a reject is in a list that crosses processes and is kept in files.
KINDS: dict[str, type[Damaged] | type[RefusedRecord]] = {
    "rejected": Damaged,
    "refused": RefusedRecord,
    "unread": Unread,
}


def kind_of(why: Damaged | RefusedRecord) -> str:
    """The key of `KINDS` that makes `why` again from its reason."""
    return next(kind for kind, made in KINDS.items() if type(why) is made)


class Unusable(Exception):
    """Raised while a record is given its shape; the reader's loop turns it into a `Damaged`."""


class Rejects:
    """Writes rejects.jsonl rows {"source", "file", "line", "reason"} and counts them; `path` None only counts."""

    def __init__(self, source: str, path: Path | None = None):
        self.source, self.path = source, path
        self.counts = Counter({"rejected": 0, "refused": 0, "duplicates": 0})
        self.reasons: Counter[str] = Counter()
        self.unread: list[tuple[str, int, str]] = []  # file, line, reason of what is left of a file
        self.at: tuple[str, int] = ("", 0)  # file, and line from 1 (or number) of the record in hand
        self._file: IO[str] | None = path.open("w", encoding="utf-8") if path else None

    def add(self, why: Damaged | RefusedRecord) -> None:
        """Count the record at `self.at` and write its row."""
        self.counts["rejected" if isinstance(why, Damaged) else "refused"] += 1
        self.reasons[why.reason] += 1
        if isinstance(why, Unread):
            self.unread.append((*self.at, why.reason))
        if self._file:
            row = {"source": self.source, "file": self.at[0], "line": self.at[1], "reason": why.reason}
            self._file.write(json.dumps(row, ensure_ascii=True) + "\n")

    def superseded(self) -> None:
        """A record that a later one of the same PMID replaces: counted among the duplicates."""
        self.counts["duplicates"] += 1

    def close(self) -> None:
        if self._file:
            self._file.close()
