"""The order of training: which documents are drawn how often, and how they share rows of `seq_len` tokens.

Everything is laid out here, ahead of training and from the seed alone: a mixture by token weights with every source
spread evenly over the stage, documents drawn whole, one full pass of a source before its next. Rows are filled best-fit
from a small window; text is split where nothing fits, never dropped. Works on lengths only: no tokens are read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qmedtune.errors import DataError
from qmedtune.resolved import ResolvedCpt, ResolvedPretrain

# Up to four passes over the same text are worth nearly as much as new text (Muennighoff et al. 2023, 2305.16264).
AUTO_MAX_REPEATS = 4.0
LOOKAHEAD_DOCUMENTS = 512
BUCKET_BATCHES = 50


@dataclass(frozen=True)
class Target:
    """What one source shall contribute: `tokens` to draw, its normalised `share` of the mixture, whether capped."""

    share: float
    tokens: float
    capped: bool


def targets(section: ResolvedCpt | ResolvedPretrain, lengths: Mapping[str, np.ndarray]) -> dict[str, Target]:
    """Tokens to draw from each source (`lengths`: kept tokens per document). Raises DataError for an empty source."""
    kept = {}
    for name, per_document in lengths.items():
        kept[name] = int(per_document.sum())
    empty = [name for name, total in kept.items() if total == 0]
    if empty:
        raise DataError(f"mix: {', '.join(empty)} has no training text left\nlook at rejects.jsonl and `holdout`")
    by_document = section.unit == "documents"
    weights = {}
    for name in kept:
        weights[name] = section.mix[name] * (kept[name] / len(lengths[name]) if by_document else 1)
    share = {}
    for name, weight in weights.items():
        share[name] = weight / sum(weights.values())
    cap = section.max_repeats
    if section.epochs is not None:
        total = section.epochs * sum(kept.values())
    elif section.budget is None:
        main = max(share, key=lambda name: share[name])
        total, cap = kept[main] / share[main], cap or AUTO_MAX_REPEATS
    else:
        total = section.budget
    wanted = {}
    for name in share:
        wanted[name] = share[name] * total
    most = {}
    for name in kept:
        most[name] = kept[name] * cap if cap else float("inf")
    found: dict[str, Target] = {}
    for n in share:
        found[n] = Target(share[n], min(wanted[n], most[n]), wanted[n] > most[n])
    return found


def draw(lengths: np.ndarray, tokens: float, rng: np.random.Generator) -> np.ndarray:
    """Document numbers of one source, in order: whole shuffled passes, then a part of one, nearest to `tokens`."""
    total = int(lengths.sum())
    passes = int(tokens // total)
    picks = []
    for _ in range(passes):
        picks.append(rng.permutation(len(lengths)))
    last = rng.permutation(len(lengths))
    reached = np.cumsum(lengths[last]) - (tokens - passes * total)
    part = int(np.argmin(np.abs(np.concatenate([[passes * total - tokens], reached]))))
    picks.append(last[:part] if passes or part else last[:1])
    return np.concatenate(picks)


def interleave(counts: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A merged order of several sequences, each spread evenly: an index into their concatenation."""
    places = []
    for n in counts:
        if n:
            places.append((np.arange(n) + rng.random(n)) / n)
    return np.argsort(np.concatenate(places), kind="stable")


def chunk_counts(kept: np.ndarray, seq_len: int, shared: int) -> np.ndarray:
    """How many chunks of `seq_len` tokens a document takes, each beginning with the last `shared` of the one before."""
    return np.maximum(1, -(-(kept - shared) // (seq_len - shared)))


def chunks(counts: np.ndarray, kept: np.ndarray, seq_len: int, shared: np.ndarray) -> np.ndarray:
    """(C, 3) int64 of (draw, start, length): draw i in counts[i] chunks that share `shared[i]` tokens, or whole."""
    draw = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(draw)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * (seq_len - shared[draw])
    left = kept[draw] - start
    return np.stack([draw, start, np.where(counts[draw] > 1, np.minimum(left, seq_len), left)], axis=1)


def buckets(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """An order in which rows of like length share a batch: sorted within runs of 50 batches, the batches shuffled.

    What TRL's and Hugging Face's `group_by_length` do; the last batch stays last, because it may be a short one.
    """
    run = BUCKET_BATCHES * batch
    order = np.concatenate([
        first + np.argsort(-lengths[first : first + run], kind="stable") for first in range(0, len(lengths), run)
    ])  # fmt: skip
    whole = len(order) // batch
    places = rng.permutation(whole)
    return np.concatenate([order[: whole * batch].reshape(whole, batch)[places].ravel(), order[whole * batch :]])


@dataclass(frozen=True)
class RowLayout:
    """Rows of a packed stage.

    pieces: (P, 3) int64 of (index into the draws, start, length); row r holds pieces[ends[r-1]:ends[r]].
    """

    pieces: np.ndarray
    bounds: np.ndarray


def fill_rows(lengths: np.ndarray, seq_len: int, split: bool) -> RowLayout:
    """Lay documents of these lengths into rows of at most `seq_len` tokens.

    Each row starts with the oldest waiting document and takes, from the next few hundred, the longest that fits. A
    document longer than a row fills rows of its own. With `split`, a gap of an eighth of a row or more that nothing
    fits takes the head of the oldest document; without it, rows keep such gaps.
    """
    packer = _Packer(lengths, seq_len, max(seq_len // 8, 16) if split else seq_len + 1)
    while packer.refill():
        packer.row()
    return RowLayout(np.frombuffer(packer.pieces, np.int64).reshape(-1, 3), np.frombuffer(packer.bounds, np.int64))


def single_rows(order: np.ndarray, lengths: np.ndarray) -> RowLayout:
    """One document per row, in this order."""
    pieces = np.stack([order, np.zeros(len(order), np.int64), lengths[order]], axis=1)
    return RowLayout(pieces.astype(np.int64), np.arange(len(order) + 1))


class _Packer:
    """The window of waiting documents: `by_length` sorted for best fit, `queue` in order of arrival.

    Only the window is held as Python objects; what is laid out takes 24 bytes per piece.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, least_cut: int):
        self.lengths, self.seq_len, self.least_cut = lengths, seq_len, least_cut
        self.arrived = 0
        self.waiting: dict[int, tuple[int, int]] = {}  # document -> next token, tokens left
        self.by_length: list[tuple[int, int]] = []
        self.queue: deque[int] = deque()
        self.pieces, self.bounds = array("q"), array("q", [0])

    def refill(self) -> bool:
        room = LOOKAHEAD_DOCUMENTS - len(self.by_length)
        if room > 0:
            for length in self.lengths[self.arrived : self.arrived + room].tolist():
                self._wait(self.arrived, 0, length)
                self.queue.append(self.arrived)
                self.arrived += 1
        return bool(self.by_length)

    def _wait(self, document: int, start: int, left: int) -> None:
        self.waiting[document] = start, left
        insort(self.by_length, (left, document))

    def _oldest(self) -> int:
        while self.queue[0] not in self.waiting:
            self.queue.popleft()
        return self.queue[0]

    def _take(self, document: int, most: int) -> int:
        """Put up to `most` tokens of a waiting document into the row; the rest waits on. Returns what was taken."""
        start, left = self.waiting.pop(document)
        del self.by_length[bisect_right(self.by_length, (left, document)) - 1]
        length = min(left, most)
        self.pieces.extend((document, start, length))
        if left > length:
            self._wait(document, start + length, left - length)
        return length

    def row(self) -> None:
        gap = self.seq_len - self._take(self._oldest(), self.seq_len)
        while gap and self.by_length:
            fits = bisect_right(self.by_length, (gap, self.arrived)) - 1
            if fits >= 0:
                gap -= self._take(self.by_length[fits][1], gap)
                continue
            oldest = self._oldest()
            cut = min(gap, self.waiting[oldest][1] - self.least_cut)
            if cut < self.least_cut:
                break
            gap -= self._take(oldest, cut)
        self.bounds.append(len(self.pieces) // 3)
