"""Text as windows of letters and digits, hashed in numpy: what near-duplicate and benchmark search share.

Case, punctuation and spacing are gone before anything is compared, so none of them hides a copy. Texts are handled in
batches, one buffer for all, about 40 MB/s per core; a window never crosses from one text into the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Odd constants for multiply-add hashing of 8-byte parts: fractional digits of the golden ratio, e and pi.
MULTIPLIERS = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xB7E151628AED2A6B, 0x243F6A8885A308D3)))
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
    encoded = []
    for text in texts:
        encoded.append(lower_bytes(text))
    raw = np.frombuffer(b"\x00".join(encoded) + b"\x00", np.uint8)
    places = np.flatnonzero(_KEEP[raw])
    ends = np.cumsum([len(e) + 1 for e in encoded])
    return Letters(raw[places], np.concatenate([[0], np.searchsorted(places, ends)]))


def lower_bytes(text: str) -> bytes:
    if text.isascii():
        return text.lower().encode()
    return NOT_WORD.sub(" ", text.casefold()).encode("utf-8", errors="replace")


def windows(buffer: np.ndarray, width: int) -> np.ndarray:
    """uint64 hash of the `width` bytes (16 or 24) from every position at which that many are left."""
    assert width in (16, 24)
    count = len(buffer) - width + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    # Eight bytes from every position as one number: an overlapping view, copied once because it is not aligned.
    eight = np.ndarray((len(buffer) - 7,), "<u8", np.ascontiguousarray(buffer).data, strides=(1,)).copy()
    mixed = eight[:count] * MULTIPLIERS[0]
    for part in range(1, width // 8):
        mixed += eight[8 * part : 8 * part + count] * MULTIPLIERS[part]
    mixed ^= mixed >> np.uint64(32)
    return mixed


def whole(bounds: np.ndarray, width: int, count: int) -> np.ndarray:
    """True for the first `count` positions whose window of `width` lies within one text."""
    inside = np.ones(count, bool)
    for end in bounds[1:]:
        inside[max(end - width + 1, 0) : end] = False
    return inside


def shingles(batch: Letters, one_in: int = 1, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, bounds): windows of about five words each; text i owns bounds[i]:bounds[i + 1].

    With `one_in` 4 (a power of two), those whose hash is divisible by it: a sample that is the same wherever the same
    text stands, so that similarity is estimated without bias and does not hang on where words are taken to begin.
    """
    hashes = windows(batch.buffer, width)
    chosen = whole(batch.bounds, width, len(hashes))
    if one_in > 1:
        chosen &= (hashes & np.uint64(one_in - 1)) == 0
    places = np.flatnonzero(chosen)
    return hashes[places], np.searchsorted(places, batch.bounds)
