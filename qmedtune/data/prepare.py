"""One source from raw files to clean, de-duplicated, split records with a ledger: the `data/<source>` step.

Order: read, clean, identifiers and benchmark text (first_pass.py), exact duplicates, near duplicates, split. Two passes
over a work file, so that memory holds 30 bytes per record, never the text. The split hangs on a record's content or
patient alone: adding records moves no other record between training and held-out.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qmedtune.data.hygiene import decontaminate, dedup
from qmedtune.data.hygiene.benchmarks import benchmark_items
from qmedtune.data.hygiene.first_pass import in_batches, read_source
from qmedtune.data.hygiene.per_record import SoundRecords, phi_mode, text_of
from qmedtune.data.reading.document import Record
from qmedtune.data.reading.listing import by_extension, list_source
from qmedtune.data.reading.rejects import Rejects
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.results import Cleaned, Identifiers, NearDuplicates, Overlap, Records, Source
from qmedtune.store import sha256_file

HASHES = "hashes.npy"
KEPT, DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = 0, 1, 2, 3
EXAMPLES = 3


def prepare_source(recipe: Recipe, name: str, inputs: Mapping[str, Path], out: Path) -> Source:
    """Write train.jsonl, heldout.jsonl and rejects.jsonl of source `name` below `out`; return the ledger.

    inputs: folders of earlier sources; their records are duplicates here, near ones too. Always: read = kept +
    rejected + duplicates + contaminated + refused. Raises DataError when more than `hygiene.max_bad_fraction` of the
    records is damaged or nothing is left.
    """
    task = Preparation(recipe, name, inputs, out)
    items = benchmark_items(recipe)
    rejects = Rejects(name, out / "rejects.jsonl")
    sound, superseded = read_source(recipe, name, items, rejects=rejects, work=task.work)
    rejects.close()
    _check_damage(recipe, name, rejects, len(sound))
    fate, found = _fates(task, sound, superseded, items)
    _check_left(name, task.source, rejects, fate)
    held_out = _split(task.source, sound, fate == KEPT)
    _distribute(task, fate, held_out)
    task.work.unlink()
    np.save(out / HASHES, np.unique(np.array(sound.content, dtype=np.uint64)[fate == KEPT]))
    ledger = _ledger(task, rejects, sound, Ends(fate, held_out))
    ledger = ledger.model_copy(update={"contamination": found.contamination})
    if found.near is not None:
        ledger = ledger.model_copy(update={"near": found.near})
    return ledger


@dataclass(frozen=True)
class Preparation:
    """Source `name` of a recipe: `inputs` are the folders of earlier sources, `out` is its own."""

    recipe: Recipe
    name: str
    inputs: Mapping[str, Path]
    out: Path

    @property
    def source(self) -> SourceSection:
        return self.recipe.data[self.name]

    @property
    def work(self) -> Path:
        """The sound records, one JSON line each, until they are distributed."""
        return self.out / "work.jsonl"


@dataclass(frozen=True)
class Ends:
    """Of every sound record: its `fate` (KEPT ..., uint8) and whether it is held out (bool)."""

    fate: np.ndarray
    held_out: np.ndarray


# ---- between the passes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceOverlap:
    """Benchmark items by task, and near duplicates where these were looked for."""

    contamination: dict[str, Overlap]
    near: NearDuplicates | None


def _fates(
    task: Preparation, sound: SoundRecords, superseded: np.ndarray, items: list[decontaminate.BenchmarkItem]
) -> tuple[np.ndarray, SourceOverlap]:
    """What becomes of every sound record, and what was found of benchmarks and near duplicates."""
    hygiene = task.recipe.hygiene
    if len(sound):
        content = np.frombuffer(sound.content, np.uint64)
    else:
        content = np.zeros(0, np.uint64)
    fate = np.where(superseded, DUPLICATE, KEPT).astype(np.uint8)
    if hygiene.dedup.exact:
        left = np.flatnonzero(fate == KEPT)
        again = np.ones(len(left), bool)
        again[np.unique(content[left], return_index=True)[1]] = False
        fate[left[again]] = DUPLICATE
        for folder in task.inputs.values():
            if (folder / HASHES).is_file():
                fate[np.isin(content, np.load(folder / HASHES))] = DUPLICATE
    generic = decontaminate.given_back([(item, words) for _, item, words in sound.hits], len(content))
    hits = []
    for hit in sound.hits:
        if hit[1] not in generic and fate[hit[0]] == KEPT:
            hits.append(hit)
    if hygiene.contaminated == "drop":
        fate[[record for record, _, _ in hits]] = CONTAMINATED
    contamination, near = decontaminate.overlap(items, hits, generic), None
    if hygiene.dedup.near and (fate == KEPT).any():
        near = _mark_near_duplicates(task, hygiene.dedup.near, sound, fate)
    return fate, SourceOverlap(contamination, near)


class _TextsOnDisk:
    """Texts of the lines of several files by one number, read where they lie: 8 bytes of memory each."""

    def __init__(self) -> None:
        self.files: list[IO[bytes]] = []
        self.starts: list[np.ndarray] = []
        self.firsts = [0]

    def append(self, path: Path, starts: np.ndarray) -> None:
        self.files.append(path.open("rb"))
        self.starts.append(starts)
        self.firsts.append(self.firsts[-1] + len(starts))

    def __len__(self) -> int:
        return self.firsts[-1]

    def record(self, number: int) -> Record:
        which = bisect_right(self.firsts, number) - 1
        self.files[which].seek(int(self.starts[which][number - self.firsts[which]]))
        return json.loads(self.files[which].readline())

    def id(self, number: int) -> str:
        return self.record(number)["id"]

    def text(self, number: int) -> str:
        return text_of(self.record(number))

    def batches(self) -> Iterator[list[str]]:
        for some in in_batches(range(len(self)), dedup.BATCH_TEXTS):
            yield [self.text(number) for number in some]

    def close(self) -> None:
        for file in self.files:
            file.close()


def _mark_near_duplicates(task: Preparation, threshold: float, sound: SoundRecords, fate: np.ndarray) -> NearDuplicates:
    """Mark records like an earlier one, of this source or of an earlier source. Returns how many were like one of the
    latter, and the ids of some pairs."""
    shown = EXAMPLES if phi_mode(task.recipe, task.name) == "off" else 0  # ids of notes are identifiers themselves
    texts = _TextsOnDisk()
    for folder in task.inputs.values():
        for path in (folder / "train.jsonl", folder / "heldout.jsonl"):
            texts.append(path, _line_starts(path))
    num_earlier = len(texts)
    size = np.array(sound.size, dtype=np.int64)
    texts.append(task.work, (np.cumsum(size) - size)[fate == KEPT])
    bands = task.work.with_name("bands")
    shutil.rmtree(bands, ignore_errors=True)  # of an attempt that was killed here
    like = dedup.near_duplicates(texts.batches(), texts.text, threshold, bands, num_given=num_earlier)
    for number in np.flatnonzero(like >= 0).tolist():
        if not _asked_alike(texts.record(number), texts.record(int(like[number])), threshold):
            like[number] = -1
    later = np.flatnonzero(like >= 0)
    pairs = []
    for n in later[:shown]:
        pairs.append([texts.id(int(n)), texts.id(int(like[n]))])
    texts.close()
    fate[np.flatnonzero(fate == KEPT)[later - num_earlier]] = NEAR_DUPLICATE
    return NearDuplicates(of_earlier_sources=int((like[later] < num_earlier).sum()), examples=pairs)


def _asked_alike(one: Record, other: Record, threshold: float) -> bool:
    """Whether two instruction records that are alike as a whole also ask and answer alike: of several questions about
    one long note nine words in ten are the note. Always true of texts."""
    if not (_has_input(one) or _has_input(other)):
        return True
    said, said_there = _words(one), _words(other)
    return len(said & said_there) >= threshold * len(said | said_there)


def _has_input(record: Record) -> bool:
    return any("input" in message for message in record.get("messages", ()))


def _words(record: Record) -> set[str]:
    """Of all messages, without what they are about (`input`)."""
    return set(" ".join(message["content"] for message in record["messages"]).lower().split())


def _line_starts(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        sizes = np.fromiter(map(len, file), np.int64)
    return np.cumsum(sizes) - sizes


def _check_damage(recipe: Recipe, name: str, rejects: Rejects, num_sound: int) -> None:
    bad, read = rejects.counts["rejected"], num_sound + sum(rejects.counts.values())
    limit = recipe.hygiene.max_bad_fraction
    if rejects.unread and limit < 1:
        file, line, reason = rejects.unread[0]
        if len(rejects.unread) > 1:
            others = f" (and {len(rejects.unread) - 1:,} more like it)"
        else:
            others = ""
        raise DataError(
            f"{file}:{line}: {reason}{others}\nwhat follows there is not read, and how many records that is cannot be "
            "told: mend the file\nto go on without: hygiene: {max_bad_fraction: 1}"
        )
    if not read or bad / read <= limit:
        return
    reasons = _most_frequent(rejects)
    raise DataError(
        f"data.{name} ({recipe.data[name].path}): {bad:,} of {read:,} records are unusable "
        f"(allowed: {limit:.1%}, `hygiene.max_bad_fraction`)\nmost frequent: {reasons}\n"
        f"each is named in {rejects.path} (file, line, reason)\nrepair the files, set `columns:` or raise the limit"
    )


def _most_frequent(rejects: Rejects) -> str:
    return "; ".join(f"{reason} ({count:,})" for reason, count in rejects.reasons.most_common(3))


def _check_left(name: str, source: SourceSection, rejects: Rejects, fate: np.ndarray) -> None:
    if not (fate == KEPT).any():
        raise DataError(
            f"data.{name} ({source.path}): no record is left of {len(fate) + sum(rejects.counts.values()):,} read\n"
            f"duplicates {int(((fate == DUPLICATE) | (fate == NEAR_DUPLICATE)).sum()):,}, "
            f"contaminated {int((fate == CONTAMINATED).sum()):,}, refused {rejects.counts['refused']:,}"
            + (f"\nmost frequent: {_most_frequent(rejects)}" if rejects.reasons else "")
        )


def _split(source: SourceSection, sound: SoundRecords, kept: np.ndarray) -> np.ndarray:
    """True for held-out records: whole groups whose hash falls below `holdout`; the built-in world marks its own."""
    marked = np.array(sound.held_out, dtype=np.int8)
    if (marked >= 0).any():
        return marked == 1
    group = np.array(sound.group, dtype=np.uint64)
    held_out = (group < np.uint64(source.holdout * 2**64)) & kept
    if source.holdout and not held_out.any() and len(np.unique(group[kept])) > 1:
        held_out = kept & (group == group[kept].min())  # a small source still needs something to be validated on
    return held_out


# ---- second pass -----------------------------------------------------------------------------------------------------


def _distribute(task: Preparation, fate: np.ndarray, held_out: np.ndarray) -> None:
    train, heldout = task.out / "train.jsonl", task.out / "heldout.jsonl"
    with task.work.open("rb") as work, train.open("wb") as trained, heldout.open("wb") as kept_back:
        for line, end, held in zip(work, fate, held_out, strict=True):
            if end == KEPT:
                (kept_back if held else trained).write(line)


def _ledger(task: Preparation, rejects: Rejects, sound: SoundRecords, ends: Ends) -> Source:
    source, fate = task.source, ends.fate
    near = int((fate == NEAR_DUPLICATE).sum())
    records = Records(
        read=len(fate) + sum(rejects.counts.values()),
        kept=int((fate == KEPT).sum()),
        rejected=rejects.counts["rejected"],
        duplicates=int((fate == DUPLICATE).sum()) + near + rejects.counts["duplicates"],
        contaminated=int((fate == CONTAMINATED).sum()),
        refused=rejects.counts["refused"],
    )
    parts = records.model_dump(exclude={"read"})
    assert records.read == sum(parts.values())
    mode, listing = phi_mode(task.recipe, task.name), list_source(source)
    identifiers = Identifiers()
    if mode != "off":
        identifiers = sound.identifiers.facts(mode)
    reading = sound.reading.as_dict()
    files_unread = sound.reading.files_unread + by_extension(listing.unread)
    return Source(
        records=records,
        near_duplicates=near,
        held_out=int((ends.held_out & (fate == KEPT)).sum()),
        sha256=sha256_file(task.out / "train.jsonl"),
        kind=source.kind,
        license=source.license,
        terms=source.terms,
        files=len(listing.files),
        reasons=dict(rejects.reasons),
        recognised=reading["recognised"],
        columns_read=reading["columns_read"],
        columns_unread=reading["columns_unread"],
        files_unread=dict(sorted(files_unread.items())),
        cleaned=Cleaned(records=sound.cleaned["records"], characters=sound.cleaned["characters"]),
        phi=identifiers,
        warnings=[],
    )
