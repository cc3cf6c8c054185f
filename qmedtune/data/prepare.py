"""One source from raw files to clean, de-duplicated, split records with a ledger: the `data/<source>` step.

Order: read, clean, identifiers and benchmark text (first_pass.py), exact duplicates, near duplicates (fates.py), split.
Two passes over a work file, so that memory holds 30 bytes per record, never the text. The split hangs on a record's
content or patient alone: adding records moves no other record between training and held-out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qmedtune.data.fates import (
    CONTAMINATED,
    DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    RecordLines,
    SourceOverlap,
    SourceRecords,
    check_damage,
    check_left,
    fates,
    held_out_of,
)
from qmedtune.data.hygiene.benchmarks import benchmark_items
from qmedtune.data.hygiene.first_pass import read_source
from qmedtune.data.hygiene.per_record import SoundRecords, phi_mode
from qmedtune.data.reading.listing import by_extension, list_source
from qmedtune.data.reading.rejects import Rejects
from qmedtune.recipe import Recipe
from qmedtune.results import Cleaned, Identifiers, Records, Source
from qmedtune.store import sha256_file

HASHES = "hashes.npy"


def prepare_source(recipe: Recipe, name: str, inputs: Mapping[str, Path], out: Path) -> Source:
    """Write train.jsonl, heldout.jsonl and rejects.jsonl of source `name` below `out`; return the ledger.

    inputs: folders of earlier sources; their records are duplicates here, near ones too. Always: read = kept +
    rejected + duplicates + contaminated + refused. Raises DataError when more than `hygiene.max_bad_fraction` of the
    records is damaged or nothing is left.
    """
    source, work = recipe.data[name], out / "work.jsonl"
    items = benchmark_items(recipe)
    rejects = Rejects(name, out / "rejects.jsonl")
    sound, superseded = read_source(recipe, name, items, rejects=rejects, work=work)
    rejects.close()
    check_damage(recipe, name, rejects, len(sound))
    own = [RecordLines(work, line_starts(sound))]
    compared = SourceRecords(
        recipe, name, own=own, earlier=_earlier(recipe, inputs), hashes=_hashes(inputs), scratch=out
    )
    fate, found = fates(compared, sound, superseded, items)
    check_left(name, source, rejects, fate)
    held_out = held_out_of(source, sound, fate == KEPT)
    _distribute(work, fate, held_out)
    work.unlink()
    write_hashes(out / HASHES, sound, fate)
    listing = list_source(source)
    files = FilesFound(len(listing.files), by_extension(listing.unread))
    counted = ledger(recipe, name, DecidedSource(sound, rejects, fate, held_out, found), files)
    return counted.model_copy(update={"sha256": sha256_file(out / "train.jsonl")})


def line_starts(sound: SoundRecords) -> np.ndarray:
    """(N,) int64: the byte where each record's line begins, in the file that holds them all."""
    size = np.array(sound.size, dtype=np.int64)
    return np.cumsum(size) - size


def _earlier(recipe: Recipe, inputs: Mapping[str, Path]) -> list[RecordLines]:
    """What near duplicates are looked for in besides."""
    found: list[RecordLines] = []
    if not recipe.hygiene.dedup.near:
        return found
    for folder in inputs.values():
        for path in (folder / "train.jsonl", folder / "heldout.jsonl"):
            with path.open("rb") as file:
                sizes = np.fromiter(map(len, file), np.int64)
            found.append(RecordLines(path, np.cumsum(sizes) - sizes))
    return found


def _hashes(inputs: Mapping[str, Path]) -> list[Path]:
    found: list[Path] = []
    for folder in inputs.values():
        if (folder / HASHES).is_file():
            found.append(folder / HASHES)
    return found


def _distribute(work: Path, fate: np.ndarray, held_out: np.ndarray) -> None:
    train, heldout = work.with_name("train.jsonl"), work.with_name("heldout.jsonl")
    with work.open("rb") as lines, train.open("wb") as trained, heldout.open("wb") as kept_back:
        for line, end, held in zip(lines, fate, held_out, strict=True):
            if end == KEPT:
                (kept_back if held else trained).write(line)


def write_hashes(path: Path, sound: SoundRecords, fate: np.ndarray) -> None:
    """The digests of all kept texts: what later sources must not repeat."""
    np.save(path, np.unique(np.array(sound.content, dtype=np.uint64)[fate == KEPT]))


@dataclass(frozen=True)
class DecidedSource:
    """All that was found of a source's records. Of the sound ones: `fate` (KEPT ..., uint8), `held_out` (bool)."""

    sound: SoundRecords
    rejects: Rejects
    fate: np.ndarray
    held_out: np.ndarray
    found: SourceOverlap


@dataclass(frozen=True)
class FilesFound:
    """How many files of a source are read, and by extension how many were found and are not."""

    read: int
    unread: Counter[str]


def ledger(recipe: Recipe, name: str, outcome: DecidedSource, files: FilesFound) -> Source:
    """The figures of source `name`; `sha256`, of what is trained on, is for the caller to add."""
    source, sound, fate = recipe.data[name], outcome.sound, outcome.fate
    near = int((fate == NEAR_DUPLICATE).sum())
    counts = outcome.rejects.counts
    records = Records(
        read=len(fate) + sum(counts.values()),
        kept=int((fate == KEPT).sum()),
        rejected=counts["rejected"],
        duplicates=int((fate == DUPLICATE).sum()) + near + counts["duplicates"],
        contaminated=int((fate == CONTAMINATED).sum()),
        refused=counts["refused"],
    )
    parts = records.model_dump(exclude={"read"})
    assert records.read == sum(parts.values())
    mode = phi_mode(recipe, name)
    identifiers = Identifiers()
    if mode != "off":
        identifiers = sound.identifiers.facts(mode)
    reading = sound.reading.as_dict()
    files_unread = sound.reading.files_unread + files.unread
    counted = Source(
        records=records,
        near_duplicates=near,
        held_out=int((outcome.held_out & (fate == KEPT)).sum()),
        sha256=None,
        kind=source.kind,
        license=source.license,
        terms=source.terms,
        files=files.read,
        reasons=dict(outcome.rejects.reasons),
        recognised=reading["recognised"],
        columns_read=reading["columns_read"],
        columns_unread=reading["columns_unread"],
        files_unread=dict(sorted(files_unread.items())),
        cleaned=Cleaned(records=sound.cleaned["records"], characters=sound.cleaned["characters"]),
        phi=identifiers,
        warnings=[],
        contamination=outcome.found.contamination,
    )
    if outcome.found.near is None:
        return counted
    return counted.model_copy(update={"near": outcome.found.near})
