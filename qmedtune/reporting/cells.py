"""The parts of a table: cells as text, and the table itself. What is not known is a dash in every one of them.

Deliberately does not: know HTML, Markdown, or a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qmedtune.results import Number
from qmedtune.units import count, duration, size

UNKNOWN = "–"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`note` explains the columns or, when there are no rows, says what is missing and why."""

    title: str
    columns: Row
    rows: list[Row] = field(default_factory=list[Row])
    note: str = ""

    def or_say(self, missing: str) -> Table:
        """With this note in place of its own where it has no rows."""
        if self.rows:
            return self
        return replace(self, note=missing)


def shown(value: Number | None, form: str, unit: str = "") -> str:
    """The value as a format specification writes it."""
    if value is None:
        return UNKNOWN
    return f"{format(value, form)}{unit}"


def exact(value: int | None) -> str:
    return shown(value, ",")


def three_decimals(value: Number | None) -> str:
    return shown(value, ".3f")


def counted(value: Number | None) -> str:
    """A count abbreviated with k, M or G.

    Short: `600k`.
    """
    if value is None:
        return UNKNOWN
    return count(value)


def size_cell(value: int | None) -> str:
    if not value:
        return UNKNOWN
    return size(value)


def time_cell(seconds: Number | None) -> str:
    if seconds is None:
        return UNKNOWN
    return duration(seconds)
