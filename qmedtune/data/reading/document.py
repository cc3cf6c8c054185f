"""The one thing that readers of formats that are no table give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Document(NamedTuple):
    """What a reader of a format that is no table gives: a text that is whole, and what is known about it.

    A tuple: made six times as fast as a frozen dataclass of nine fields, and there is one per PubMed record.
    """

    id: str | None
    text: str
    patient: str | None = None
    pmid: str | None = None
    group: str | None = None
    language: str | None = None
    versioned: bool = False  # of PubMed: a newer one of the same id replaces it
    schema: str = ""  # what a JSON object was recognised as
    unread: tuple[str, ...] = ()  # names of elements that are there and are left out


@dataclass(frozen=True)
class Skipped:
    """Stands in a stream for a member of an archive that is not read: its name counts by extension in the ledger."""

    name: str
