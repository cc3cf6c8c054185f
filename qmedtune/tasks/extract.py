"""Reading the choice out of a generated answer: an answer counts when exactly one option is stated.

Stated is what the answer begins with, what it says behind "answer is" or before "is correct", what it boxes or writes
on a line of its own, and, where there is none of these, the one option that a sentence ends with. Menus ("A. ... B.
...", "yes, no or maybe") restate the question and state nothing; what is denied is not stated; an invented question
is cut off. Several options stated, or none: unparsed. It is counted and never guessed.

The patterns are English (wordings.py). `python tests/test_extract.py` gives precision and recall on labelled answers of
a real model.
Deliberately absent: similarity of words, a model that judges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qmedtune.tasks.wordings import (
    AFTER_LETTER,
    AFTER_WORD,
    BETWEEN,
    BULLET,
    CHOSEN,
    CUE,
    DENIED_BEFORE,
    DENIED_IN_SENTENCE,
    EVERYDAY_CHARS,
    INSTEAD,
    IS_RIGHT,
    IS_WRONG,
    LETTER_TEXT,
    LIST_LETTER,
    MARKED,
    MENTION_CHARS,
    MENU,
    NEXT_QUESTION,
    OPENED,
    REASON,
    REVISED,
    SENTENCE_END_LETTER,
    SHORT_ANSWER_WORDS,
    SPECIES,
    SUBJECT,
)


@dataclass(frozen=True)
class Stated:
    """An option and where the answer states it."""

    option: int
    start: int
    end: int


class Options:
    """The options of one question, as patterns."""

    def __init__(self, options: Sequence[str], texts: Sequence[str]):
        self.letters: list[str] = []
        if texts:
            self.letters = [option.upper() for option in options]
        self.words = [_plain(text) for text in (texts or options)]
        self.letter = "|".join(map(re.escape, self.letters))  # one of them, in a pattern; "" where there are none
        named = [word for word in self.words if word]
        self.longest_first = sorted(named, key=len, reverse=True)

    @cached_property
    def word_pattern(self) -> str:
        """One group per option's text; longer ones first, so that "insulin glargine" is not insulin."""
        by_length: list[tuple[int, str]] = []
        for number, word in enumerate(self.words):
            if word:
                by_length.append((len(word), f"(?P<w{number}>{_flexible(word)}{_after(word)})"))
        by_length.sort(key=lambda each: -each[0])
        return "(?:" + "|".join(part for _, part in by_length) + ")"

    def _where_lettered(self, pattern: str) -> str:
        """A part of a pattern that options without letters lack."""
        if not self.letters:
            return ""
        return pattern

    @cached_property
    def at(self) -> re.Pattern[str]:
        """An option where it is expected: a letter with a sign behind it, or the text."""
        by_letter = self._where_lettered(
            rf"(?:option\s+)?(?P<letter>{self.letter}){AFTER_LETTER}|(?P<bare>{self.letter})(?=\s+)|"
        )
        return re.compile(rf"{by_letter}(?:the\s+|an?\s+)?{self.word_pattern}", re.I)

    @cached_property
    def anywhere(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w)(?<!\w-)(?:{self.word_pattern})(?!\w|-\w)", re.I)

    @cached_property
    def several(self) -> re.Pattern[str]:
        """ "yes, no or maybe", "A, B", "(A) or (B)": two or more options with nothing but signs between them."""
        words, last_words = [], []
        for word in self.longest_first:
            words.append(_flexible(word))
            last_words.append(_flexible(word) + _after(word))
        lettered = r"(?:\s*\([A-Za-z]\))?"
        one = rf"(?<!\w)(?:{'|'.join(words)})(?!\w){lettered}"
        end = rf"(?<!\w)(?:{'|'.join(last_words)})(?!\w){lettered}"
        article = r"(?:the\s+|an?\s+)?"
        by_word = rf"{one}(?:{BETWEEN}{article}{one})*{BETWEEN}{article}{end}"
        if not self.letters:
            return re.compile(by_word, re.I)
        letter = rf"(?<!\w)[(\[]?(?-i:{self.letter})(?!\w)[)\].]?"
        last = rf"[(\[]?(?-i:{self.letter})(?=\s*[)\].:,;/|]|\s*$|\s*\n|\s+(?:and|or|are|both|is)\b)[)\]]?"
        by_letter = rf"{letter}(?:{BETWEEN}{last})+"
        return re.compile(rf"(?:{by_letter}|{by_word})", re.I)

    @cached_property
    def named(self) -> re.Pattern[str]:
        """Each option in a row of them."""
        words = "|".join(map(_flexible, self.longest_first))
        letters = self._where_lettered(rf"|(?<!\w)(?:{self.letter})(?!\w)")
        return re.compile(rf"(?<!\w)(?:{words})(?!\w){letters}", re.I)

    @cached_property
    def beginning(self) -> re.Pattern[str]:
        """An option's text at the beginning of a text."""
        return re.compile(rf"\W*(?:the\s+|an?\s+)?{self.word_pattern}", re.I)

    @cached_property
    def behind(self) -> re.Pattern[str]:
        """An option's text behind its letter."""
        return re.compile(rf"[)\].:,;]*\s*{self.word_pattern}", re.I)

    @cached_property
    def judged(self) -> re.Pattern[str]:
        """An option, or a menu, that something may be said of."""
        by_letter = ""
        if self.letters:
            by_letter = rf"(?<![\w'])(?-i:(?P<letter>{self.letter}))|"
        return re.compile(rf"{by_letter}{MENU}|(?<!\w){self.word_pattern}", re.I)

    def of(self, match: re.Match[str]) -> int:
        """The option that a match of `at` or `anywhere` found."""
        found = match.groupdict()
        letter = found.get("letter") or found.get("bare")
        if letter:
            return self.letters.index(letter.upper())
        for name, text in found.items():
            if text and name.startswith("w"):
                return int(name.removeprefix("w"))
        raise AssertionError("the pattern has a group for each option")

    def begins(self, text: str) -> int | None:
        """The longest option text that `text` begins with."""
        match = self.beginning.match(text)
        if match is None:
            return None
        return self.of(match)


@lru_cache(maxsize=64)
def _options(options: tuple[str, ...], texts: tuple[str, ...]) -> Options:
    return Options(options, texts)


def extract_choice(answer: str, options: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """Index of the one option that the answer states, None when unparsed.

    options: letters, with `texts` what they say, or the words themselves.
    """
    known = _options(tuple(options), tuple(texts))
    text = _without_menus(_first_answer(_without_marks(answer)), known)
    stated = [*_leading(text, known), *_cued(text, known), *_called_right(text, known), *_alone(text, known)]
    found = {each.option for each in _unrevised(text, stated, known)} or _mentioned(text, known)
    if len(found) != 1 or SEVERAL in found:
        return None
    return found.pop()


def _plain(text: str) -> str:
    return re.sub(r"^(?:the|an?)\s+", "", " ".join(_without_marks(text).casefold().split()).strip(" .,;:"))


def _flexible(word: str) -> str:
    """The option's text with any white space between its words."""
    return r"\s+".join(map(re.escape, word.split()))


def _after(word: str) -> str:
    if len(word) <= EVERYDAY_CHARS and word.isalpha():
        return AFTER_WORD
    return r"(?!\w)"


# ---- what is cut away -----------------------------------------------------------------------------------------------


def _without_marks(answer: str) -> str:
    for pattern, by in MARKED:
        answer = pattern.sub(by, answer)
    return answer.strip()


def _first_answer(text: str) -> str:
    """Up to an invented next question: a heading, or a line that asks and is followed by a list of options."""
    lines = text.split("\n")
    begun = False
    for number, line in enumerate(lines):
        asks = line.rstrip().endswith("?") and _listed(lines[number + 1 :])
        if begun and (asks or NEXT_QUESTION.match(line)):
            return "\n".join(lines[:number])
        begun = begun or bool(line.strip())
    return text


def _listed(lines: list[str]) -> bool:
    """Whether the first two lines that are not empty are options."""
    options = 0
    for line in lines:
        if line.strip():
            if not LIST_LETTER.match(line):
                return False
            options += 1
        if options == 2:
            return True
    return False


def _without_menus(text: str, known: Options) -> str:
    """The text with a mark in place of each list of options: lines, parts of one line, words in a row."""
    lines = text.split("\n")
    listed = [_line_option(line, known) for line in lines]
    is_list = len(set(listed) - {None}) > 1
    kept = []
    for number, line in enumerate(lines):
        in_list = is_list and _cut_line(lines, listed, number, known) is not None
        if in_list or _inline_menu(line, known):
            line = MENU
        kept.append(line)
    return _mark_series("\n".join(kept), known)


def _line_option(line: str, known: Options) -> int | None:
    """The option that a line begins with by letter, or that it is."""
    if known.letters and (match := LIST_LETTER.match(line)):
        return _place(known.letters, match["letter"].upper())
    return _place(known.words, _plain(re.sub(BULLET, "", line)))


def _place(known: list[str], word: str) -> int | None:
    if not word or word not in known:
        return None
    return known.index(word)


def _cut_line(lines: list[str], listed: list[int | None], number: int, known: Options) -> int | None:
    """The option of a line; also of a letter without its text right behind a list that lacks it: a list cut short."""
    letter = lines[number].strip().upper()
    if listed[number] is None and number and listed[number - 1] is not None and letter in known.letters:
        option = known.letters.index(letter)
        if option in listed:
            return None
        return option
    return listed[number]


def _inline_menu(line: str, known: Options) -> bool:
    """Two or more letters, each with its own text behind it, in one line."""
    found = re.finditer(r"(?<!\w)[(\[]?(?P<letter>[A-Za-z])\s*[)\].:=]\s*", line)
    expected = {match.end() for match in CUE.finditer(line)}
    own = set()
    for match in found:
        letter = match["letter"].upper()
        if match.start("letter") in expected or match.start() in expected:
            continue
        if letter in known.letters and known.begins(line[match.end() :]) == known.letters.index(letter):
            own.add(letter)
    return len(own) > 1 or _letters_alone(line, known)


def _letters_alone(line: str, known: Options) -> bool:
    """ "A) B) C)": two or more letters of options, and nothing else."""
    letters = re.findall(r"\w+", line)
    return len(set(letters)) > 1 and set(letters) <= set(known.letters)


def _mark_series(text: str, known: Options) -> str:
    """Several different options in a row are a menu, unless something is said of them: then they stay, as several."""

    def mark(match: re.Match[str]) -> str:
        named = set()
        for option in known.named.finditer(match.group()):
            named.add(option.group().casefold().strip("()[] "))
        if len(named) > 1:
            return MENU
        return match.group()

    return known.several.sub(mark, text)


# ---- what is stated -------------------------------------------------------------------------------------------------

SEVERAL = -1  # stands for a menu where one option was expected: no one option is stated


def _read(text: str, start: int, known: Options) -> list[Stated]:
    """The option at a place where one is expected. A letter beside another option's text states both; a menu there is
    several."""
    if text[start : start + 1] == MENU:
        return [Stated(SEVERAL, start, start + 1)]
    match = known.at.match(text, start)
    if match is None:
        return []
    option, end = known.of(match), match.end()
    groups = match.groupdict()
    if groups.get("letter") and SPECIES.match(text, end):
        named = known.begins(text[start:])  # an option may be a species
        return [] if named is None else [Stated(named, start, end)]
    if groups.get("bare") and known.begins(text[end:]) != option:
        return []  # "A patient", "B is wrong"
    if _called_wrong(text, end, known) or text[end:].lstrip(" )]").startswith("?"):
        return []
    stated = [Stated(option, start, end)]
    beside = None
    if groups.get("letter"):
        beside = known.begins(text[end : end + 400])
    if beside is not None and known.words[beside] != known.words[option]:
        stated.append(Stated(beside, start, end))
    return stated


def _called_wrong(text: str, end: int, known: Options) -> bool:
    """Whether what follows an option says that it is wrong. Not of "No, it does not", which says no twice."""
    if not known.letters and re.match(r"\s*[,;.:!\u2013\u2014-]", text[end:]):
        return False
    return IS_WRONG.match(text, _past_text(text, end, known)) is not None


def _past_text(text: str, end: int, known: Options) -> int:
    match = known.behind.match(text, end)
    if not match:
        return end
    return match.end()


def _leading(text: str, known: Options) -> list[Stated]:
    start = len(text) - len(text.lstrip(" \t\r\n([-:.,"))
    if re.match(r"[AQ]\s*:\s", text[start:]) and CUE.search(text, start, start + 60):
        return []  # "A: The correct answer is C": the A of question and answer
    begun = OPENED.match(text, start)
    found = []
    if begun:
        found = _read(text, begun.end(), known)
    if not found:
        found = _read(text, start, known)
    found = [each for each in found if each.option != SEVERAL and not _is_subject(text, each, known)]
    if found or text[start : start + 1] == MENU:
        return found
    alone = _place(known.letters, text.strip(" \t\r\n()[].:,;").upper())
    if alone is None:
        return []
    return [Stated(alone, 0, 1)]


def _is_subject(text: str, stated: Stated, known: Options) -> bool:
    """Whether an option's text opens a sentence that goes on to name another option, and gives no reason."""
    words = text[stated.start : stated.end]
    if not known.letters or len(words.strip(" .:)(")) < 2 or not SUBJECT.match(text, stated.end):
        return False
    rest = re.split(r"[.;\n]", text[stated.end :])[0]
    if IS_RIGHT.match(text, stated.end) or REASON.search(rest):
        return False
    return any(known.of(match) != stated.option for match in known.anywhere.finditer(rest))


def _cued(text: str, known: Options) -> Iterator[Stated]:
    for pattern in (CUE, CHOSEN):
        for match in pattern.finditer(text):
            found = _read(text, match.end(), known)
            denied = match.groupdict().get("denied")
            if denied and (instead := INSTEAD.match(text, match.end())):
                yield from _read(text, instead.end(), known)
            if not denied or any(each.option == SEVERAL for each in found):
                yield from found
    for match in SENTENCE_END_LETTER.finditer(text):
        if match["letter"] in known.letters and not SPECIES.match(text, match.end()):
            yield Stated(known.letters.index(match["letter"]), match.start("letter"), match.end())


def _called_right(text: str, known: Options) -> Iterator[Stated]:
    """ "Therefore, C is correct", "option B would be the best"; a menu called right states several."""
    for match in known.judged.finditer(text):
        called = IS_RIGHT.match(text, match.end())
        if match.groupdict().get("letter"):
            called = IS_RIGHT.match(text, _past_text(text, match.end(), known))
            invented = LETTER_TEXT.match(text, match.end())
            if not called and invented:
                called = IS_RIGHT.match(text, invented.end())
        if not called or DENIED_BEFORE.search(text, 0, match.start()):
            continue
        option = SEVERAL
        if match.group() != MENU:
            option = known.of(match)
        yield Stated(option, match.start(), match.end())


def _alone(text: str, known: Options) -> Iterator[Stated]:
    """Lines, and where options are words sentences, that are an option and nothing else."""
    start = 0
    ends = r"[\n;!]|\.(?!\s*of\b)"  # "No. of patients"
    if known.letters:
        ends = r"\n"
    for part in re.split(ends, text):
        words = part.strip(" \t()[].:;,!-")
        if words.upper() in known.letters:
            yield Stated(known.letters.index(words.upper()), start, start + len(part))
        elif words and _plain(words) in known.words:
            yield Stated(known.words.index(_plain(words)), start, start + len(part))
        start += len(part) + 1


def _unrevised(text: str, stated: list[Stated], known: Options) -> list[Stated]:
    """Without what the answer takes back in so many words before it states another ("No: the answer is B")."""
    ordered = sorted(stated, key=lambda each: each.start)
    kept: list[Stated] = []
    for each in ordered:
        others = [old for old in kept if old.option != each.option]
        if others and _takes_back(text[: each.start], others[-1], known):
            kept = [old for old in kept if old.option == each.option]
        kept.append(each)
    return kept


def _takes_back(text: str, stated: Stated, known: Options) -> bool:
    """Whether the text ends in words that take back what it stated before them."""
    said = REVISED.search(text)
    return bool(said) and said.start() >= stated.end and said.group(1).casefold() not in known.words


def _mentioned(text: str, known: Options) -> set[int]:
    """The only option that is named at all, where the answer is one short sentence or a sentence ends with it."""
    if NEXT_QUESTION.match(text):
        return set()  # the question once more, and perhaps the first of its options
    found = set()
    ends = False
    for match in known.anywhere.finditer(text):
        if len(match.group()) < MENTION_CHARS:
            continue
        denied = DENIED_BEFORE.search(text, 0, match.start()) or DENIED_IN_SENTENCE.search(text, 0, match.start())
        if denied or IS_WRONG.match(text, match.end()) or text[match.end() :].lstrip().startswith("?"):
            return set()
        found.add(known.of(match))
        ends = ends or bool(re.match(r"\s*(?:[.!]|$|\n)", text[match.end() :]))
    if len(found) != 1 or known.words.count(known.words[next(iter(found))]) != 1:
        return set()
    short = len(text.split()) <= SHORT_ANSWER_WORDS
    if not short and not ends:
        return set()
    return found
