"""Near duplicates: MinHash bands over shingles, on disk, verified by the true Jaccard similarity.

Boilerplate (windows that recur across the corpus: headings, templates, disclaimers) neither makes candidates nor
counts as similarity, so two notes from one template are not taken for one note: both the whole texts and what is
their own must be similar. Band keys are sorted on disk in partitions: memory holds a fixed table and one partition.
The sketches are rensa's (R-MinHash, Rust).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rensa import RMinHash  # type: ignore[attr-defined]

from qmedtune.data.hygiene import ngrams

ROWS_PER_BAND = 4
RECALL = 0.995  # of pairs exactly at the threshold; the bands are as many as that takes (11 of 4 rows at 0.8)
COUNTER_BITS = 24
BOILERPLATE_SHARE, BOILERPLATE_LEAST = 0.01, 50
ONE_IN = 4  # windows sampled for candidates; a found pair is compared by all its windows
OWN_TOLERANCE = 0.1  # what is a text's own is sampled: two standard errors at 60 windows
MIN_SHINGLES = 8  # shorter texts are compared whole, by the exact stage
SKETCH_TEXTS = 512
BATCH_TEXTS = 64  # of 1.5 kB: what numpy works on stays in the cache (a third less time than with 512)
PARTITION_BYTES, MOST_PARTITIONS = 16 << 20, 500  # sorting takes four times a partition; each is an open file
SEED = 20_240_917


class Boilerplate:
    """How often each window occurs, in 2^24 counters (64 MB), whatever the size of the corpus."""

    def __init__(self) -> None:
        self.counts = np.zeros(1 << COUNTER_BITS, np.uint32)
        self.num_texts = 0

    def add(self, hashes: np.ndarray, num_texts: int) -> None:
        np.add.at(self.counts, (hashes >> np.uint64(64 - COUNTER_BITS)).astype(np.intp), np.uint32(1))
        self.num_texts += num_texts

    def own(self, hashes: np.ndarray) -> np.ndarray:
        """False for windows in more than 1 % of the texts (and more than 50 of them)."""
        most = max(BOILERPLATE_LEAST, BOILERPLATE_SHARE * self.num_texts)
        return self.counts[hashes >> np.uint64(64 - COUNTER_BITS)] <= most


def num_bands(threshold: float) -> int:
    """Bands of 4 rows so that a pair at `threshold` shares one with probability `RECALL`."""
    if threshold >= 1:
        return 1
    return math.ceil(math.log(1 - RECALL) / math.log(1 - threshold**ROWS_PER_BAND))


class Bands:
    """Band keys of all texts in partition files of (key, text number), 16 bytes each."""

    def __init__(self, folder: Path, threshold: float, num_texts: int):
        self.folder, self.num = folder, num_bands(threshold)
        wanted = math.ceil(16 * self.num * num_texts / PARTITION_BYTES)
        self.num_partitions = min(max(1, wanted), MOST_PARTITIONS)
        folder.mkdir()
        self.files = []
        for number in range(self.num_partitions):
            self.files.append((folder / f"{number:05d}").open("wb"))

    def add(self, hashes: np.ndarray, bounds: np.ndarray, first: int) -> None:
        """Sketch a batch of texts numbered from `first`; texts with too few windows of their own stay out."""
        enough = np.flatnonzero(np.diff(bounds) >= MIN_SHINGLES)
        if not len(enough):
            return
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds, self.num * ROWS_PER_BAND, SEED)
        sketch = np.array(matrix.to_rows(), dtype=np.uint64)[enough].reshape(len(enough), self.num, ROWS_PER_BAND)
        key = np.broadcast_to(np.arange(self.num, dtype=np.uint64) * ngrams.MULTIPLIERS[0], sketch.shape[:2]).copy()
        for row in range(ROWS_PER_BAND):
            key = (key ^ sketch[:, :, row]) * ngrams.MULTIPLIERS[1]
            key ^= key >> np.uint64(31)
        number = np.repeat(np.uint64(first) + enough.astype(np.uint64), self.num)
        table = np.stack([key.ravel(), number], axis=1)
        partition = (table[:, 0] >> np.uint64(32)) % np.uint64(self.num_partitions)
        for wanted in np.unique(partition):
            self.files[int(wanted)].write(table[partition == wanted].tobytes())

    def pairs(self) -> Iterator[np.ndarray]:
        """Candidate pairs (earlier, later), (P, 2) int64, one partition at a time; each text with the first and the
        previous one of its band."""
        for file in self.files:
            file.close()
        for path in sorted(self.folder.iterdir()):
            table = np.fromfile(path, np.uint64).reshape(-1, 2)
            table = table[np.lexsort((table[:, 1], table[:, 0]))]
            same = np.flatnonzero(table[1:, 0] == table[:-1, 0])
            starts = np.flatnonzero(np.concatenate([[True], table[1:, 0] != table[:-1, 0]]))
            if len(same):
                first = starts[np.searchsorted(starts, same, side="right") - 1]
            else:
                first = same
            number = table[:, 1].astype(np.int64)
            earlier, later = np.concatenate([number[same], number[first]]), np.tile(number[same + 1], 2)
            path.unlink()
            yield np.unique(np.stack([earlier, later], axis=1), axis=0)
        self.folder.rmdir()


Windows = tuple[np.ndarray, np.ndarray]
"""(hashes, bounds): (W,) uint64, the sampled windows of some texts; text i owns hashes[bounds[i]:bounds[i + 1]]."""


def windows_of(texts: Sequence[str]) -> Windows:
    """What near duplicates are sought by; the same for a text whatever stands beside it."""
    return ngrams.shingles(ngrams.letters(texts), ONE_IN)


def near_duplicates(
    batches: Iterable[Windows], text_of: Callable[[int], str], threshold: float, folder: Path, *, num_given: int = 0
) -> np.ndarray:
    """(N,) int64: of every text that is a near duplicate of an earlier one, that one's number; -1 for all others.

    batches: `windows_of` the texts in order, best `BATCH_TEXTS` at a time; text_of: one text by number; folder: a
    working folder that does not exist yet, for about twice the texts' bytes; num_given: so many first texts (of earlier
    sources) are only compared with. Similarity is Jaccard's over windows of about five words.
    """
    folder.mkdir()
    windows, boilerplate, sizes = folder / "windows", Boilerplate(), array("I")
    with windows.open("wb") as file:
        for hashes, bounds in batches:
            boilerplate.add(hashes, len(bounds) - 1)
            file.write(hashes.tobytes())
            sizes.extend(np.diff(bounds).tolist())
    bands = Bands(folder / "bands", threshold, len(sizes))
    for first, hashes, bounds in _own_windows(windows, sizes, boilerplate):
        bands.add(hashes, bounds, first)
    windows.unlink()
    like = np.full(len(sizes), -1, np.int64)
    for pairs in bands.pairs():
        for earlier, later in pairs[pairs[:, 1] >= num_given].tolist():
            if like[later] < 0 and similar(text_of(earlier), text_of(later), threshold, boilerplate):
                like[later] = earlier
    folder.rmdir()
    return like


def _own_windows(path: Path, sizes: array, boilerplate: Boilerplate) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first text, hashes, bounds) of some texts at a time, without boilerplate."""
    with path.open("rb") as file:
        for first in range(0, len(sizes), SKETCH_TEXTS):
            bounds = np.concatenate([[0], np.cumsum(sizes[first : first + SKETCH_TEXTS], dtype=np.int64)])
            hashes = np.fromfile(file, np.uint64, int(bounds[-1]))
            own = np.flatnonzero(boilerplate.own(hashes))
            yield first, hashes[own], np.searchsorted(own, bounds)


def similar(a: str, b: str, threshold: float, boilerplate: Boilerplate) -> bool:
    """Jaccard similarity of at least `threshold`, over all windows and over those that are no boilerplate."""
    hashes, bounds = ngrams.shingles(ngrams.letters([a, b]))
    sides = hashes[: bounds[1]], hashes[bounds[1] :]
    if jaccard(*sides) < threshold:
        return False
    sampled = (side[side & np.uint64(ONE_IN - 1) == 0] for side in sides)  # what boilerplate was counted of
    return jaccard(*(side[boilerplate.own(side)] for side in sampled)) >= threshold - OWN_TOLERANCE


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays taken as sets, by sorting: 31 us at 1,500 elements, where Python's sets take 930."""
    both = np.sort(np.concatenate([_set(a), _set(b)]))
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / max(1, len(both) - common)


def _set(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    if len(values):
        return values[np.concatenate([[True], values[1:] != values[:-1]])]
    return values
