"""What becomes of each sound record of a source: kept, or a duplicate, a near duplicate, a holder of benchmark text.

The one place where records are compared with each other, and with those of earlier sources. Where their lines lie
does not matter: a run has them in one work file, shards (data/shards/) in many.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qmedtune.data.hygiene import decontaminate, dedup
from qmedtune.data.hygiene.first_pass import in_batches
from qmedtune.data.hygiene.per_record import SoundRecords, phi_mode, text_of
from qmedtune.data.reading.document import Record
from qmedtune.data.reading.rejects import Rejects
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.results import NearDuplicates, Overlap

KEPT, DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = 0, 1, 2, 3
EXAMPLES = 3


@dataclass(frozen=True)
class StoredWindows:
    """`dedup.windows_of` some texts, kept in a file: text i owns elements starts[i]:ends[i] of it (uint64)."""

    path: Path
    starts: np.ndarray
    ends: np.ndarray

    def some(self, chosen: np.ndarray) -> StoredWindows:
        return StoredWindows(self.path, self.starts[chosen], self.ends[chosen])

    def batches(self) -> Iterator[dedup.Windows]:
        if not self.path.stat().st_size:
            yield np.zeros(0, np.uint64), np.zeros(len(self.starts) + 1, np.int64)
            return
        stored = np.memmap(self.path, np.uint64, mode="r")
        for texts in in_batches(range(len(self.starts)), dedup.SKETCH_TEXTS):
            pieces = [stored[self.starts[text] : self.ends[text]] for text in texts]
            sizes = self.ends[texts] - self.starts[texts]
            yield np.concatenate(pieces), np.concatenate([[0], np.cumsum(sizes)])


@dataclass(frozen=True)
class RecordLines:
    """Some records of a file, one a line. starts: (N,) int64, the byte where each begins; windows: what near duplicates
    are sought by, where that was made before."""

    path: Path
    starts: np.ndarray
    windows: StoredWindows | None = None

    def some(self, chosen: np.ndarray) -> RecordLines:
        """Those of a mask or of numbers."""
        return RecordLines(self.path, self.starts[chosen], self.windows.some(chosen) if self.windows else None)


@dataclass(frozen=True)
class SourceRecords:
    """The records of source `name` of a recipe, and what they are compared with.

    own: all its sound records, in their order; earlier: the kept records of earlier sources; hashes: files with the
    digests of the latter's texts; scratch: a folder on disk.
    """

    recipe: Recipe
    name: str
    own: Sequence[RecordLines]
    earlier: Sequence[RecordLines]
    hashes: Sequence[Path]
    scratch: Path


@dataclass(frozen=True)
class SourceOverlap:
    """Benchmark items by task, and near duplicates where these were looked for."""

    contamination: dict[str, Overlap]
    near: NearDuplicates | None


def fates(
    task: SourceRecords, sound: SoundRecords, superseded: np.ndarray, items: list[decontaminate.BenchmarkItem]
) -> tuple[np.ndarray, SourceOverlap]:
    """(N,) uint8, KEPT or why not, of every sound record; and what was found of benchmarks and near duplicates.

    superseded: (N,) bool, of PubMed records that a newer one replaces.
    """
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
        for path in task.hashes:
            fate[np.isin(content, np.load(path))] = DUPLICATE
    generic = decontaminate.given_back([(item, words) for _, item, words in sound.hits], len(content))
    hits = []
    for hit in sound.hits:
        if hit[1] not in generic and fate[hit[0]] == KEPT:
            hits.append(hit)
    if hygiene.contaminated == "drop":
        fate[[record for record, _, _ in hits]] = CONTAMINATED
    contamination, near = decontaminate.overlap(items, hits, generic), None
    if hygiene.dedup.near and (fate == KEPT).any():
        near = _mark_near_duplicates(task, hygiene.dedup.near, fate)
    return fate, SourceOverlap(contamination, near)


class _TextsOnDisk:
    """Texts of the lines of several files by one number, read where they lie: 8 bytes of memory each."""

    def __init__(self, several: Sequence[RecordLines]) -> None:
        self.several = several
        self.files: list[IO[bytes]] = [lines.path.open("rb") for lines in several]
        self.firsts = [0]
        for lines in several:
            self.firsts.append(self.firsts[-1] + len(lines.starts))

    def record(self, number: int) -> Record:
        which = bisect_right(self.firsts, number) - 1
        self.files[which].seek(int(self.several[which].starts[number - self.firsts[which]]))
        return json.loads(self.files[which].readline())

    def id(self, number: int) -> str:
        return self.record(number)["id"]

    def text(self, number: int) -> str:
        return text_of(self.record(number))

    def windows(self) -> Iterator[dedup.Windows]:
        for lines, first in zip(self.several, self.firsts, strict=False):
            if lines.windows is not None:
                yield from lines.windows.batches()
                continue
            for some in in_batches(range(first, first + len(lines.starts)), dedup.BATCH_TEXTS):
                yield dedup.windows_of([self.text(number) for number in some])

    def close(self) -> None:
        for file in self.files:
            file.close()


def _mark_near_duplicates(task: SourceRecords, threshold: float, fate: np.ndarray) -> NearDuplicates:
    """Mark records like an earlier one, of this source or of an earlier source. Returns how many were like one of the
    latter, and the ids of some pairs."""
    shown = EXAMPLES if phi_mode(task.recipe, task.name) == "off" else 0  # ids of notes are identifiers themselves
    several, first = list(task.earlier), 0
    num_earlier = sum(len(lines.starts) for lines in several)
    for lines in task.own:
        end = first + len(lines.starts)
        several.append(lines.some(fate[first:end] == KEPT))
        first = end
    texts = _TextsOnDisk(several)
    bands = task.scratch / "bands"
    shutil.rmtree(bands, ignore_errors=True)  # of an attempt that was killed here
    like = dedup.near_duplicates(texts.windows(), texts.text, threshold, bands, num_given=num_earlier)
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


# ---- what is asked of all records together ---------------------------------------------------------------------------


def check_damage(recipe: Recipe, name: str, rejects: Rejects, num_sound: int) -> None:
    """DataError where more than `hygiene.max_bad_fraction` of the records is damaged, or a file is not read to its
    end."""
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
    raise DataError(
        f"data.{name} ({recipe.data[name].path}): {bad:,} of {read:,} records are unusable "
        f"(allowed: {limit:.1%}, `hygiene.max_bad_fraction`)\nmost frequent: {_most_frequent(rejects)}\n"
        f"each is named in {rejects.path} (file, line, reason)\nrepair the files, set `columns:` or raise the limit"
    )


def _most_frequent(rejects: Rejects) -> str:
    return "; ".join(f"{reason} ({count:,})" for reason, count in rejects.reasons.most_common(3))


def check_left(name: str, source: SourceSection, rejects: Rejects, fate: np.ndarray) -> None:
    """DataError where no record is kept."""
    if not (fate == KEPT).any():
        raise DataError(
            f"data.{name} ({source.path}): no record is left of {len(fate) + sum(rejects.counts.values()):,} read\n"
            f"duplicates {int(((fate == DUPLICATE) | (fate == NEAR_DUPLICATE)).sum()):,}, "
            f"contaminated {int((fate == CONTAMINATED).sum()):,}, refused {rejects.counts['refused']:,}"
            + (f"\nmost frequent: {_most_frequent(rejects)}" if rejects.reasons else "")
        )


def held_out_of(source: SourceSection, sound: SoundRecords, kept: np.ndarray) -> np.ndarray:
    """(N,) bool, True for held-out records: whole groups whose hash falls below `holdout`; the built-in world marks its
    own."""
    marked = np.array(sound.held_out, dtype=np.int8)
    if (marked >= 0).any():
        return marked == 1
    group = np.array(sound.group, dtype=np.uint64)
    held_out = (group < np.uint64(source.holdout * 2**64)) & kept
    if source.holdout and not held_out.any() and len(np.unique(group[kept])) > 1:
        held_out = kept & (group == group[kept].min())  # a small source still needs something to be validated on
    return held_out
