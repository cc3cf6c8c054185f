"""What was recognised as what, and which columns and keys were read and which were not: two lines of the ledger.

Names are shown only where they cannot be data: those of the known lists and of names made of known words; in JSON and
Parquet any plain name of a record whose schema is known, in tables only under a header that has two known names.
All others are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qmedtune.data.reading.column_names import is_known

UNNAMED = "(no known name)"
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
FACTS = ("recognised", "columns_read", "columns_unread", "files_unread")
MOST_SHAPES = 4096  # distinct sets of keys that are held before they are added up


@dataclass
class ReadingTally:
    """Counts of what was recognised, read and left out while a source is read.

    recognised: what -> files. columns_read, columns_unread: column or key -> records that had it. files_unread:
    extension -> files of a folder and members of archives that were found and not read."""

    recognised: Counter[str] = field(default_factory=Counter)
    columns_read: Counter[str] = field(default_factory=Counter)
    columns_unread: Counter[str] = field(default_factory=Counter)
    files_unread: Counter[str] = field(default_factory=Counter)
    _shapes: Counter[tuple[tuple[str, ...], frozenset[str], bool]] = field(default_factory=Counter)

    def add(self, names: Iterable[str], read: frozenset[str], is_table: bool) -> None:
        """Count one record with keys `names`, of which `read` were used."""
        self._shapes[tuple(names), read, is_table] += 1
        if len(self._shapes) > MOST_SHAPES:
            self._sum_up()

    def merge(self, other: ReadingTally) -> None:
        self._sum_up()
        other._sum_up()
        self.recognised += other.recognised
        self.columns_read += other.columns_read
        self.columns_unread += other.columns_unread
        self.files_unread += other.files_unread

    def as_dict(self) -> dict[str, dict[str, int]]:
        """The facts of run.json and of a kept part, names in order: the same for any order of files."""
        self._sum_up()
        counters = {}
        for name in FACTS:
            counters[name] = getattr(self, name)
        found: dict[str, dict[str, int]] = {}
        for name, counter in counters.items():
            found[name] = dict(sorted(counter.items()))
        return found

    @classmethod
    def from_dict(cls, kept: dict[str, dict[str, int]]) -> ReadingTally:
        recognised, columns_read, columns_unread, files_unread = (Counter(kept[name]) for name in FACTS)
        return cls(recognised, columns_read, columns_unread, files_unread)

    def __getstate__(self) -> dict[str, dict[str, int]]:
        return self.as_dict()

    def __setstate__(self, kept: dict[str, dict[str, int]]) -> None:
        self.__dict__.update(ReadingTally.from_dict(kept).__dict__)

    def _sum_up(self) -> None:
        for (names, read, is_table), count in self._shapes.items():
            trusted = not is_table or len(read) >= 2
            for name in names:
                if name in read:
                    counter = self.columns_read
                else:
                    counter = self.columns_unread
                counter[_shown(name, trusted or name in read)] += count
        self._shapes.clear()


def _shown(name: str, trusted: bool) -> str:
    if is_known(name) or (trusted and PLAIN.fullmatch(name)):
        return name
    return UNNAMED


def shown_names(names: Iterable[str]) -> str:
    """Column names for a message: the known ones, and how many others there are."""
    every = []
    for name in names:
        if not name.startswith("_"):
            every.append(name)
    known = []
    for name in every:
        if is_known(name):
            known.append(name)
    others = len(every) - len(known)
    listed = [*known[:12], *([f"{others} of no known name"] if others else [])]
    return ", ".join(listed) or "no column"
