"""Replacing identifiers: the same value of the same patient always becomes the same stand-in, and no other does.

Stand-ins keep the shape (digits for digits, a name for a name) so that a model still learns what notes look like. They
come from a secret (secret.py), the patient and the value; nothing is stored, and equal values of two patients differ.
Numbers and codes are enciphered within their shape, so two of one patient never become one. Names become made-up
words, word by word; of 1,000 words of one patient two become the same in one case of 10,000. Dates move by a
per-patient number of days where `hygiene.shift_dates` asks for it, else they become `[date]`.
"""

# ruff: noqa: SIM905 (a list of syllables reads better as words)

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

from qmedtune.data.hygiene.phi import Span

VERSION = 2  # of what stands in for what: part of the data's key
STEMS = """Al Ash Bar Bel Bir Bran Cal Cam Car Cob Col Cor Dal Dan Del Dor Dun El Er Fal Far Fen Fin Gal Gar Gil Har
    Haz Hel Hol Il Jar Jul Kal Kel Ker Lan Lar Len Lin Lor Mal Mar Mel Mor Nel Nor Ol Or Pel Per Quin Ral
    Ren Ros Sal Sel Sor Tal Ter Thor Ul Val Wil""".split()
ENDS = """by bury dale dell den ding don down er field ford gate ham hart hill holm hope hurst ing ington kin land
    lee ley lin lock low man mark mere mond more mott nan ner ness nett old over park pool port ris rock
    row sall sby set shaw side son stead stock stow ten thorpe ton vale wald way well wick win worth""".split()
CONSONANTS, VOWELS = "bcdfghklmnprstvwyz", "aeiouy"
MIDDLES = 3
NUMERIC = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6(\d{4}|\d{2})")
MAX_SHIFT_DAYS = 365
ROUNDS = 10  # of the Feistel network; NIST SP 800-38G takes 10 for FF1
BRACKETED = ("url", "email", "ip", "address", "mac")
Secret = bytes | int


@dataclass(frozen=True)
class StandIns:
    """What stand-ins are derived from: the patient and a seed, in a run the secret of secret.py. shift_dates: dates
    move by the patient's number of days instead of becoming `[date]`."""

    patient: str
    seed: Secret
    shift_dates: bool = False


def redact(text: str, spans: list[Span], made: StandIns) -> str:
    """`text` with every span replaced."""
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], _stand_in(text[span.start : span.end], span.kind, made)]
        at = span.end
    return "".join([*parts, text[at:]])


def _bytes(secret: Secret, *parts: object) -> bytes:
    """64 bytes of a keyed hash; the lengths of the parts are hashed too, so that no two lists of parts are one."""
    if isinstance(secret, bytes):
        key = secret
    else:
        key = str(secret).encode()
    encoded = []
    for part in parts:
        encoded.append(str(part).encode("utf-8", "surrogatepass"))
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return hashlib.blake2b(framed, key=key, digest_size=64).digest()


def _stand_in(value: str, kind: str, made: StandIns) -> str:
    patient, seed = made.patient, made.seed
    if kind == "name":
        return re.sub(r"[^\W_]+", partial(_name_word, patient, seed), value)
    if kind == "hospital":
        return f"{_word(_bytes(seed, patient, kind, ' '.join(value.lower().split())))} Hospital"
    if kind == "age_over_89":
        rest = re.sub(r"^[\d]+", "", value)  # `94F` says also that it is a woman
        if rest != value and rest:
            return f"over 89 {rest}"
        return "over 89"
    if kind == "date":
        return (_shifted(value, patient, seed) if made.shift_dates else None) or "[date]"
    if kind in BRACKETED:
        return f"[{kind}]"
    return _enciphered(value, (seed, patient, kind))


# ---- names -----------------------------------------------------------------------------------------------------------


def _name_word(patient: str, seed: Secret, match: re.Match[str]) -> str:
    """A made-up word for one of a name, in its case; initials become initials, particles (`van der`) stay."""
    word = match[0]
    if len(word) == 1:
        return _enciphered(word, (seed, patient, "initial"))
    if word.islower() and word in ("van", "von", "der", "den", "de", "la", "del", "di", "da", "bin", "al", "el"):
        return word
    made = _word(_bytes(seed, patient, "name", word.lower()))
    if word.isupper():
        return made.upper()
    if word.islower():
        return made.lower()
    return made


def _word(random: bytes) -> str:
    """One of 64 * 102**3 * 64 = 4e9 words."""
    number = int.from_bytes(random[:16], "big")
    number, stem = divmod(number, len(STEMS))
    number, end = divmod(number, len(ENDS))
    middles = []
    for _ in range(MIDDLES):
        number, consonant = divmod(number, len(CONSONANTS))
        number, vowel = divmod(number, len(VOWELS))
        middles.append(CONSONANTS[consonant] + VOWELS[vowel])
    return STEMS[stem] + "".join(middles) + ENDS[end]


# ---- numbers and codes -----------------------------------------------------------------------------------------------


def _enciphered(value: str, key: tuple[Secret, str, str]) -> str:
    """Another value of the same shape: a permutation of all of them, without a fixed point.

    Digits stand for digits, letters for letters of their case; the rest stays. p^-1(p(x) + 1) moves every x, and is
    injective because p, a Feistel network on the numbers below the count of values, is.
    """
    shape = "".join("0" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in value)
    radices = []
    for c in shape:
        if c in "0Aa":
            radices.append(10 if c == "0" else 26)
    size, number = 1, 0
    for digit, radix in zip(_digits(value), radices, strict=True):
        number, size = number * radix + digit, size * radix
    if size == 1:
        return value
    round_key = partial(_bytes, *key, shape)
    mixed = _permuted(number, size, round_key)
    moved = _permuted((mixed + 1) % size, size, round_key, backwards=True)
    return _written(moved, shape, radices)


def _digits(value: str) -> Iterator[int]:
    for character in value:
        if character.isdigit():
            yield int(character) if character.isdecimal() else 0
        elif character.isalpha():
            yield ord(character.lower()[0]) % 97 % 26


def _written(number: int, shape: str, radices: list[int]) -> str:
    digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        digits.append(digit)
    first = {"0": ord("0"), "A": ord("A"), "a": ord("a")}
    return "".join(chr(first[c] + digits.pop()) if c in first else c for c in shape)


def _permuted(number: int, size: int, hashed: partial[bytes], *, backwards: bool = False) -> int:
    """A keyed permutation of range(size): a balanced Feistel network on the next even number of bits, walked until the
    result is below `size` (at most 4 steps on average)."""
    half = max(1, (max(1, (size - 1).bit_length()) + 1) // 2)
    if backwards:
        rounds = range(ROUNDS - 1, -1, -1)
    else:
        rounds = range(ROUNDS)
    while True:
        left, right = divmod(number, 1 << half)
        for index in rounds:
            if backwards:
                left, right = right ^ (_round(hashed, index, left) % (1 << half)), left
            else:
                left, right = right, left ^ (_round(hashed, index, right) % (1 << half))
        number = (left << half) | right
        if number < size:
            return number


def _round(hashed: partial[bytes], index: int, value: int) -> int:
    return int.from_bytes(hashed(index, value), "big")


# ---- dates -----------------------------------------------------------------------------------------------------------


def _shifted(value: str, patient: str, seed: Secret) -> str | None:
    """A numeric date moved by this patient's offset, in its own form; None where it is no such date."""
    match = NUMERIC.fullmatch(value)
    if match is None:
        return None
    days = 1 + int.from_bytes(_bytes(seed, patient, "shift")[:8], "big") % MAX_SHIFT_DAYS
    year_first = match[1] is not None
    if year_first:
        year, month, day = (match[1], match[3], match[4])
    else:
        year, month, day = (match[8], match[5], match[7])
    if len(year) == 4:
        century = 0
    elif int(year) < 50:
        century = 2000
    else:
        century = 1900
    try:
        moved = date(century + int(year), int(month), int(day)) - timedelta(days=days)
    except (ValueError, OverflowError):
        return None
    if year_first:
        mark = match[2]
    else:
        mark = match[6]
    if len(year) == 4:
        shown = f"{moved.year:04d}"
    else:
        shown = f"{moved.year % 100:02d}"
    ours = (shown, f"{moved.month:02d}", f"{moved.day:02d}")
    if year_first:
        return mark.join(ours)
    return mark.join((*ours[1:], shown))
