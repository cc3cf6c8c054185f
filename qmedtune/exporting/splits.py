"""How byte-level tokenizers split text before they merge: the definition in tokenizer.json, and llama.cpp's name of it.

llama.cpp has its splitting built in and picks it by `tokenizer.ggml.pre`. A wrong name tokenises quietly otherwise (of
nine clinical sentences four). So the name is derived from the definition, never guessed; llama.cpp's converter hashes
the ids of one text instead, and knows no tokenizer that was trained anew. Deliberately few: those that LLaMAs have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, pre_tokenizers

# The expressions of the tokenizers that published models carry (LLaMA 3, Qwen 2). Not Mistral's: llama.cpp 0.5 splits
# `tekken` otherwise beside combining accents.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class TextSplit:
    """Pre-tokenisation: how text is split before byte-pair encoding.

    expression: None is GPT-2's own, which ByteLevel has built in. digits: each digit is taken by itself before all
    else. whole_words: a piece that is a token is taken before any merge (`ignore_merges`)."""

    expression: str | None = None
    digits: bool = False
    whole_words: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The same in tokenizers' terms."""
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.expression is None)
        if self.digits:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        if self.expression is not None:
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.expression), "isolated"), words])
        return words


NAMES = {
    "gpt-2": TextSplit(),
    "smollm": TextSplit(digits=True),
    "llama-bpe": TextSplit(LLAMA3, whole_words=True),
    "dbrx": TextSplit(LLAMA3),
    "qwen2": TextSplit(QWEN2),
}


def name_of(backend: Tokenizer) -> str | None:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text; None where it is none of these."""
    said = json.loads(backend.to_str())
    whole_words = bool(said["model"].get("ignore_merges"))
    for name, split in NAMES.items():
        same = _steps(said["pre_tokenizer"]) == _steps(json.loads(split.pre_tokenizer().__getstate__()))
        if same and split.whole_words == whole_words:
            return name
    return None


def _steps(pre_tokenizer: dict | None) -> list[tuple[str, ...]]:
    """What a definition does to text: its steps in order, without settings that change no piece."""
    if pre_tokenizer is None:
        return []
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps = []
    for part in parts:
        told = {key: value for key, value in part.items() if key != "trim_offsets"}
        told.setdefault("use_regex", True) if part["type"] == "ByteLevel" else None
        steps.append((part["type"], json.dumps(told, sort_keys=True)))
    return steps
