"""The parts of a table: cells as text, and the table itself. What is not known is a dash in every one of them.

Deliberately does not: know HTML, Markdown, or a run.
"""

from dataclasses import dataclass, field

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


def counted(value: Number | None) -> str:
    return UNKNOWN if value is None else count(value)


def exact(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def percent(value: Number | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def percent2(value: Number | None) -> str:
    return UNKNOWN if value is None else f"{value:.2%}"


def two_digits(value: Number | None) -> str:
    return UNKNOWN if value is None else f"{value:.2g}"


def size_cell(value: int | None) -> str:
    return size(value) if value else UNKNOWN


def time_cell(seconds: Number | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)


def three_decimals(value: Number | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"
