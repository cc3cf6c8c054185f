"""The language of a text, by its script and its function words: enough to leave out what a recipe does not want.

No model and no statistics beyond word lists: a text of 20 words or more in one of ten languages of the Latin script is
told apart, others by their script. Notes in telegraphic style hold few function words and come out as unknown (None):
what is unknown is kept.
"""

from __future__ import annotations

import re
from collections import Counter

# The words that the languages share least, among the thirty most frequent of each.
WORDS = {
    "en": "the of and to in that is was for with as are were this which from have had has been not their by",
    "de": "der die und das ist nicht mit ein eine den dem von zu bei wurde werden auch sich auf für oder nach sind des",
    "fr": "le les des et est une dans pour que qui avec sur pas par plus ont sont cette été aux du chez ces nous",
    "es": "el los las y en una con por para que se del es al como más este fue son pero su sin entre pacientes",
    "it": "il di che della sono una con per nel gli è dei alla più delle non anche come stato questo sia dal nella ha",
    "pt": "os as em uma com para não que dos das do da foi são mais ao pelo entre como à ou na no pacientes",
    "nl": "de het een van en is met voor niet zijn op aan dat werd bij ook door als worden naar te ze dit deze",
    "sv": "och att det som är för på med av en ett inte har till den från var vid eller efter kan hos ej under",
    "da": "og at det som er for på med af en et ikke har til den fra var ved eller efter kan hos blev ikke",
    "pl": "na się nie jest do że dla przez po oraz od jak był są lub przy ich tym może być",
}
SCRIPTS = {
    "zh": "\u4e00-\u9fff", "ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af", "ru": "\u0400-\u04ff", "ar": "\u0600-\u06ff",
    "el": "\u0370-\u03ff", "he": "\u0590-\u05ff", "th": "\u0e00-\u0e7f", "hi": "\u0900-\u097f",
}  # fmt: skip
HEAD_CHARACTERS = 4000
LEAST_WORDS = 20
LEAST_DISTINCT = 4  # function words: one that is repeated is a name or an abbreviation
LEAST_SHARE = 0.08  # of function words: English prose has about .35, a list of diagnoses next to none
LEAST_LEAD = 1.2  # over the second best: related languages share words

WORD = re.compile(r"[^\W\d_]{2,}")  # single letters are units and abbreviations in notes
LETTERS = {code: re.compile(f"[{block}]") for code, block in SCRIPTS.items()}
LANGUAGES_OF: dict[str, tuple[str, ...]] = {}
for _code, _words in WORDS.items():
    for _word in _words.split():
        LANGUAGES_OF[_word] = (*LANGUAGES_OF.get(_word, ()), _code)


def detect(text: str) -> str | None:
    """ISO 639-1 code of the language of `text` (its first 4,000 characters), None where it cannot be told."""
    head = text[:HEAD_CHARACTERS]
    if not head.isascii() and (script := _script(head)):
        return script
    words = WORD.findall(head.lower())
    if len(words) < LEAST_WORDS:
        return None
    known = [(word, code) for word in words for code in LANGUAGES_OF.get(word, ())]
    (best, count), (_, second) = (*Counter(code for _, code in known).most_common(2), ("", 0), ("", 0))[:2]
    if len({word for word, code in known if code == best}) < LEAST_DISTINCT:
        return None
    if count >= LEAST_SHARE * len(words) and count >= LEAST_LEAD * second:
        return best
    return None


def _script(head: str) -> str | None:
    """The language that a script stands for, where it makes up half of the letters; Japanese mixes two scripts."""
    letters = sum(map(str.isalpha, head))
    counts = {}
    for code, pattern in LETTERS.items():
        counts[code] = len(pattern.findall(head))
    if counts["ja"] > letters / 10:
        return "ja"
    best = max(counts, key=lambda code: counts[code])
    if letters and counts[best] > letters / 2:
        return best
    return None
