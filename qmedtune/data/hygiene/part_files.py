"""What is remembered of a part of a source, in two files beside its records: .npy for the arrays, .json for the rest.

The .json is written last and holds the hashes of the others: a part without it, or with a file that changed, is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from qmedtune import store
from qmedtune.data.hygiene import phi
from qmedtune.data.hygiene.per_record import ARRAYS, SoundRecords
from qmedtune.data.reading.tally import ReadingTally

ROW = np.dtype([("content", "<u8"), ("group", "<u8"), ("size", "<u4"), ("pmid", "<u4"), ("held_out", "i1")])


class PartLists(BaseModel):
    """The .json of a part: what `SoundRecords` remembers beside its arrays, and the hashes of its other files."""

    model_config = ConfigDict(frozen=True)

    hits: list[tuple[int, int, int]]
    deleted: list[tuple[int, tuple[str, ...]]]
    rejects: list[tuple[str, int, str, str]]
    cleaned: Counter[str]
    identifiers: phi.IdentifierCounts
    reading: dict[str, dict[str, int]]
    sha256: list[str]


def write_part(part: Path, sound: SoundRecords, beside: Sequence[Path]) -> None:
    """Keep `sound` in part.npy and part.json; `beside`: the files of the part that are there already."""
    table = np.zeros(len(sound), ROW)
    for name in ARRAYS:
        table[name] = getattr(sound, name)
    np.save(part.with_suffix(".npy"), table)
    others = [*beside, part.with_suffix(".npy")]
    lists = PartLists(
        hits=sound.hits,
        deleted=sound.deleted,
        rejects=sound.rejects,
        cleaned=sound.cleaned,
        identifiers=sound.identifiers,
        reading=sound.reading.as_dict(),
        sha256=_hashes(others),
    )
    for path in others:
        store.fsync_path(path)
    store.write_checked(part.with_suffix(".json"), lists.model_dump(mode="json"))


def read_part(part: Path, beside: Sequence[Path]) -> SoundRecords | None:
    """What `write_part` kept; None where it, or a file beside it, is missing or damaged."""
    lists = _lists_of(part, [*beside, part.with_suffix(".npy")])
    if lists is None:
        return None
    sound, table = SoundRecords(), np.load(part.with_suffix(".npy"))
    for name in ARRAYS:
        getattr(sound, name).frombytes(table[name].tobytes())
    sound.hits, sound.deleted, sound.rejects = lists.hits, lists.deleted, lists.rejects
    sound.cleaned, sound.identifiers = lists.cleaned, lists.identifiers
    sound.reading = ReadingTally.from_dict(lists.reading)
    return sound


def _lists_of(part: Path, others: Sequence[Path]) -> PartLists | None:
    found = store.read_checked(part.with_suffix(".json"))
    if found is None:
        return None
    try:
        lists = PartLists.model_validate(found)
        if lists.sha256 == _hashes(others):
            return lists
        return None
    except (OSError, ValidationError):
        return None


def _hashes(paths: Sequence[Path]) -> list[str]:
    found: list[str] = []
    for path in paths:
        found.append(store.sha256_file(path))
    return found
