"""Replacing identifiers: the same value of the same patient always becomes the same stand-in, and no other does.

Stand-ins keep the shape (digits for digits, a name for a name) so that a model still learns what notes look like.
They come from a keyed hash of seed, patient and value; nothing is stored, and equal values of two patients differ.
Dates move by a per-patient number of days where `hygiene.shift_dates` asks for it, else they become `[date]`.
"""

from __future__ import annotations

import hashlib
import re
from datetime import date, timedelta

from qmedtune.data.phi import Span

FIRST = ("Alex", "Blair", "Casey", "Dana", "Ellis", "Finley", "Harper", "Jules", "Morgan", "Noel", "Perry", "Quinn")
LAST = (
    "Ashdown",
    "Birchall",
    "Cobham",
    "Dunmore",
    "Elstow",
    "Farley",
    "Hexham",
    "Ludlow",
    "Norley",
    "Pelham",
    "Thirsk",
)
NUMERIC = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6(\d{4}|\d{2})")
MAX_SHIFT_DAYS = 365


def redact(text: str, spans: list[Span], patient: str, seed: int, shift_dates: bool) -> str:
    """`text` with every span replaced."""
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], _stand_in(text[span.start : span.end], span.kind, patient, seed, shift_dates)]
        at = span.end
    return "".join([*parts, text[at:]])


def _bytes(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=32).digest()


def _stand_in(value: str, kind: str, patient: str, seed: int, shift_dates: bool) -> str:
    key = _bytes(seed, patient, kind, " ".join(value.lower().split()))
    if kind == "name":
        return f"{FIRST[key[0] % len(FIRST)]} {LAST[key[1] % len(LAST)]}"
    if kind == "age_over_89":
        return "over 89"
    if kind == "date":
        return (_shifted(value, patient, seed) if shift_dates else None) or "[date]"
    if kind in ("url", "email", "ip", "address"):
        return f"[{kind}]"
    return "".join(_same_class(c, key[i % len(key)]) for i, c in enumerate(value))


def _same_class(c: str, random: int) -> str:
    if c.isdigit():
        return str((int(c) + 1 + random % 9) % 10)  # never the digit that was there
    if c.isalpha():
        return chr(ord("A" if c.isupper() else "a") + random % 26)
    return c


def _shifted(value: str, patient: str, seed: int) -> str | None:
    """A numeric date moved by this patient's offset, in its own form; None where it is no such date."""
    match = NUMERIC.fullmatch(value)
    if match is None:
        return None
    days = 1 + int.from_bytes(_bytes(seed, patient, "shift")[:4], "big") % MAX_SHIFT_DAYS
    year_first = match[1] is not None
    year, month, day = (match[1], match[3], match[4]) if year_first else (match[8], match[5], match[7])
    century = 0 if len(year) == 4 else 2000 if int(year) < 50 else 1900
    try:
        moved = date(century + int(year), int(month), int(day)) - timedelta(days=days)
    except (ValueError, OverflowError):
        return None
    mark = match[2] if year_first else match[6]
    shown = f"{moved.year:04d}" if len(year) == 4 else f"{moved.year % 100:02d}"
    ours = (shown, f"{moved.month:02d}", f"{moved.day:02d}")
    return mark.join(ours) if year_first else mark.join((*ours[1:], shown))
