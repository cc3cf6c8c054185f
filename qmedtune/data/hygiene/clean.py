"""Cleaning that keeps meaning: Unicode form, control characters and spaces.

Newlines, section headings, de-identification marks (`[** **]`, `___`), case and numbers of clinical notes stay as they
are, and so do brackets: whether `[8-15]` is a citation or an interval, only markup knows (reading/markup.py). Does not
judge quality, and does not remove a record unless nothing is left of it.
"""

from __future__ import annotations

import re
import unicodedata

# C0/C1 controls but tab and newline; zero-width and direction marks; private use stays (symbol fonts of publishers).
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u3000]+")
TRAILING = re.compile(r"(?<! ) ++(?=\n|$)")  # from a run's first blank only: else 40,000 blanks take minutes
BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str, kind: str) -> str:
    """`text` in NFC without control characters and, but in clinical notes, runs of blanks."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROLS.sub("", text)
    if kind != "clinical":
        text = SPACES.sub(" ", text)
    return BLANK_LINES.sub("\n\n", TRAILING.sub("", text)).strip()
