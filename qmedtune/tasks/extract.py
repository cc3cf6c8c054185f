"""Reading the choice out of a generated answer.

Anchored: an option counts where the answer begins with it or says "answer is ..."; the "A" of "Answer" or "A patient"
is not option A (the substring search of published harnesses scores it as one). What names no option, or several, is
unparsed; it is counted and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

STATED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be))?\s*:?\s*", re.IGNORECASE
)
OPENING = "*_\"'`([ \t\r\n"
AFTER_LETTER = re.compile(r"[)\].:,;*_\"'`]|\s*$|[ \t]*\n|\s+[-\u2013\u2014]\s")
# "A, B" and "(A) or (B)" name several; "B, A drug" does not
NEXT_LETTER = re.compile(
    r"[)\]]?\s*(?:(?:[,/&]|\b(?:and|or)\b)\s*)+[(\[]?([A-Z0-9])(?=[)\].:,;/]|\s*$|\s*\n|\s+(?:and|or|are|both)\b)"
)
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|no|nor|never|neither|without|rather than|instead of|rul\w+ out)|n['\u2019]t)"
    r"(?: (?:be|is|a|an|the))*[ \"'(]*$"
)
DENIED_AFTER = re.compile(
    r"[ \"')]*(?:is|was|can|could|would|does|do)(?: not\b|n['\u2019]t\b| (?:wrong|incorrect|false|unlikely)\b)"
)
# Shorter options ("no", "maybe", "yes") are everyday words: inside a sentence they are not the answer.
MENTION_CHARS = 6


def extract_choice(answer: str, options: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """Index of the chosen option, None when unparsed. `texts`: what options say where they are letters.

    In order: the beginning of the answer, the last "answer is ..." backwards, the only option mentioned anywhere.
    An option that the answer denies ("not a contradiction") is not chosen.
    """
    words = [_plain(text) for text in (texts or options)]
    letters = options if texts else ()
    stated = [answer[match.end() :] for match in STATED.finditer(answer)]
    for start in [answer, *reversed(stated)]:
        found = _anchored(start.lstrip(OPENING), letters, words)
        if found is not None:
            return found
    return _mentioned(_plain(answer), words)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:*\"'`")


def _anchored(start: str, letters: Sequence[str], words: list[str]) -> int | None:
    if letters and start[:1] in letters and start[:1]:
        index, rest = list(letters).index(start[0]), start[1:]
        following = NEXT_LETTER.match(rest)
        if following and following[1] in letters:
            return None
        if AFTER_LETTER.match(rest) or _begins(_plain(rest), words[index]):
            return index
    alone = start.strip(OPENING + ")].:,;")
    if len(alone) == 1 and alone.upper() in letters:
        return list(letters).index(alone.upper())
    plain = _plain(start)
    found = [i for i, word in enumerate(words) if _begins(plain, word) and not DENIED_AFTER.match(plain, len(word))]
    return max(found, key=lambda i: len(words[i]), default=None)


def _begins(text: str, word: str) -> bool:
    return bool(word) and text.startswith(word) and not text[len(word) : len(word) + 1].isalnum()


def _mentioned(text: str, words: list[str]) -> int | None:
    """The only option that occurs as whole words, not counting those inside a longer option that occurs."""
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    matches = list(re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text))
    found = {match.group() for match in matches}
    if len(found) != 1 or len(only := found.pop()) < MENTION_CHARS or words.count(only) != 1:
        return None
    denied = any(DENIED_BEFORE.search(text, 0, m.start()) or DENIED_AFTER.match(text, m.end()) for m in matches)
    return None if denied else words.index(only)
