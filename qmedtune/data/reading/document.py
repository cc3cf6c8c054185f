"""What readers give (a row's fields, or a document), and the record that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Required, TypedDict

# A row as its file has it: columns or keys of anyone's naming, values as they were parsed. Whoever takes a value out
# of it checks it first (records.py, instructions.py, choices.py): nothing is known of what a file holds.
Fields = dict[str, Any]


class Record(TypedDict, total=False):
    """One record of a source, a line of its train.jsonl: `id` always, and either `text` or `messages`."""

    id: Required[str]
    text: str
    messages: list[dict[str, str]]  # role, content, and of a user's perhaps input
    patient: str
    pmid: str
    group: str  # what may not be parted by the split into training and held-out
    language: str
    label: str | list[str]
    held_out: bool  # where the source itself says so
    _versioned: bool  # of PubMed, until versions are sorted out: a newer one of the same id replaces it


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


@dataclass(frozen=True)
class Recognised:
    """Stands in a stream before what a member of an archive holds: what it was taken for, in words for the ledger."""

    format: str
