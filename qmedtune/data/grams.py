"""Text as windows of letters and digits, hashed in numpy: what near-duplicate and benchmark search share.

Case, punctuation and spacing are gone before anything is compared, so none of them hides a copy. Texts are handled in
batches, one buffer for all, about 40 MB/s per core; a window never crosses from one text into the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Odd 64-bit constants (the golden ratio, and the multiplier of Steele & Vigna 2021 for the second half).
MIX_1, MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
NOT_WORD = re.compile(r"[^\w\x00-\x7f]")
_KEEP = np.zeros(256, bool)
_KEEP[[*b"abcdefghijklmnopqrstuvwxyz0123456789"]] = True
_KEEP[128:] = True  # letters beyond ASCII, as UTF-8; punctuation beyond ASCII is blanked before


@dataclass(frozen=True)
class Letters:
    """The letters and digits of several texts, lower case, in one buffer.

    buffer: uint8; text i is buffer[bounds[i]:bounds[i + 1]].
    """

    buffer: np.ndarray
    bounds: np.ndarray

    def of(self, text: int) -> bytes:
        return self.buffer[self.bounds[text] : self.bounds[text + 1]].tobytes()


def letters(texts: Sequence[str]) -> Letters:
    """Normalise a batch of texts."""
    encoded = [lower_bytes(text) for text in texts]
    raw = np.frombuffer(b"\x00".join(encoded) + b"\x00", np.uint8)
    keep = _KEEP[raw]
    ends = np.cumsum([len(e) + 1 for e in encoded])
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    bounds = np.concatenate([[0], kept_before[ends]]).astype(np.int64)
    return Letters(raw[keep], bounds)


def lower_bytes(text: str) -> bytes:
    if text.isascii():
        return text.lower().encode()
    return NOT_WORD.sub(" ", text.casefold()).encode("utf-8", errors="replace")


def windows(buffer: np.ndarray, width: int) -> np.ndarray:
    """uint64 hash of the `width` bytes (16 or 24) from every position at which that many are left."""
    assert width in (16, 24)
    if len(buffer) < width:
        return np.zeros(0, np.uint64)
    eight = buffer.astype(np.uint64)
    for step in (1, 2, 4):  # doubles the bytes packed into each element: 1 -> 2 -> 4 -> 8
        eight = eight[:-step] | (eight[step:] << np.uint64(8 * step))
    count = len(buffer) - width + 1
    mixed = eight[:count] * MIX_1
    for offset in range(8, width, 8):
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ eight[offset : offset + count]) * MIX_2
    return mixed ^ (mixed >> np.uint64(32))


def whole(bounds: np.ndarray, width: int, count: int) -> np.ndarray:
    """True for the first `count` positions whose window of `width` lies within one text."""
    inside = np.ones(count, bool)
    for end in bounds[1:]:
        inside[max(end - width + 1, 0) : end] = False
    return inside


def shingles(batch: Letters, one_in: int = 1, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, bounds): windows of about five words each; text i owns bounds[i]:bounds[i + 1].

    With `one_in` 4, those whose hash is divisible by 4: a sample that is the same wherever the same text stands, so
    that similarity is estimated without bias, and that does not hang on where words are taken to begin.
    """
    hashes = windows(batch.buffer, width)
    chosen = whole(batch.bounds, width, len(hashes)) & (hashes % np.uint64(one_in) == 0)
    before = np.concatenate([[0], np.cumsum(chosen)])
    return hashes[chosen], before[np.minimum(batch.bounds, len(hashes))].astype(np.int64)
