"""How much of a prompt's end may join the first letters of an answer in one token, for a given tokenizer.

"Assistant: " before "Yes" is the token " Yes" in every LLaMA tokenizer; "Response:" before "No" is ":No" in LLaMA 3's
and two tokens in LLaMA 2's; "\\n\\n" at a text's end is one token in GPT-2's splitting and two before a letter. So it
is tried: a prompt may end where the tokens up to its end are the same alone and before any letter or digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmedtune.data.packing.tokens import Codec

REACH = 8  # characters of a prompt's end that are looked at
# Beginnings of answers; what a vocabulary has behind the prompt's last characters is tried besides.
BEGINNINGS = ("A", "a", "The", "yes", "No", "B.", "I", "1", "12", "2 mg", "é", "β", "药")


def held_characters(codec: Codec, prompts: Iterable[str], gap: str = "") -> int:
    """The fewest characters to leave to the answer so that no token joins both; 0 where none up to `REACH` is enough.

    prompts: texts with the same end; gap: what stands between them and an answer
    """
    texts = list(prompts)
    ends = _Ends(codec, texts, gap)
    limit = min(REACH, *(len(text) for text in texts))
    held = ends.fewest(list(BEGINNINGS), range(limit))
    others = _from_vocabulary(codec, texts[0][-limit:], held)
    if others:
        return ends.fewest(others, range(held, limit))
    return held


@dataclass(frozen=True)
class _Ends:
    """Prompts, and what stands between each and its answer."""

    codec: Codec
    texts: list[str]
    gap: str

    def fewest(self, beginnings: list[str], choices: range) -> int:
        """The first of these numbers of characters that leaves every prompt's tokens as they are before each of these
        answers; 0 where none does."""
        whole = []
        for text in self.texts:
            answered = [text + self.gap + start for start in beginnings]
            whole.append(self.codec.encode(answered, markers=True))
        for held in choices:
            alone = self.codec.encode([text[: len(text) - held] for text in self.texts], markers=True)
            if all(_opens(ids, rows) for ids, rows in zip(alone, whole, strict=True)):
                return held
        return 0


def _opens(ids: list[int], rows: list[list[int]]) -> bool:
    return all(row[: len(ids)] == ids for row in rows)


def _from_vocabulary(codec: Codec, ending: str, held: int) -> list[str]:
    """What follows the last characters of `ending`, more of them than are held already, in tokens that begin with them
    and go on with a letter or digit."""
    suffixes = []
    for size in range(held + 1, len(ending) + 1):
        suffixes.append(ending[-size:])
    spelled = [*_byte_level(suffixes), *(suffix.replace(" ", "▁") for suffix in suffixes)]
    return list(dict.fromkeys(_beginning_with(codec, tuple(dict.fromkeys(spelled)))))


def _beginning_with(codec: Codec, suffixes: tuple[str, ...]) -> Iterator[str]:
    for token in codec.vocabulary:
        if token.startswith(suffixes):
            for suffix in suffixes:
                rest = token[len(suffix) :]
                if token.startswith(suffix) and rest[:1].isalnum() and rest.isascii():
                    yield rest


def _byte_level(texts: list[str]) -> list[str]:
    """How byte-level vocabularies spell these texts: blanks and line ends have letters of their own there."""
    found: list[str] = []
    for text in texts:
        found.append(text.replace(" ", "Ġ").replace("\n", "Ċ").replace("\t", "ĉ"))
    return found
