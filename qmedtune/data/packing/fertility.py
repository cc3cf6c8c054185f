"""How a tokenizer copes with the corpora: tokens per word and per character, unknown tokens, words it splits most.

Fertility is the first thing to look at before training on clinical text: a tokenizer that needs two tokens per word
reads half as much text per row. Words shown are those of published literature and instructions; for clinical
sources only figures are given, never words.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path

from qmedtune.data.packing.tokens import Codec
from qmedtune.results import Fertility

WORD = re.compile(r"[^\W\d_]+")
SAMPLE_BYTES = 1 << 19
SHOWN_WORDS = 10


def fertility(codec: Codec, folders: Mapping[str, Path], quiet: Collection[str] = ()) -> dict[str, Fertility]:
    """Per source, over the first half MB of its train.jsonl.

    quiet: sources whose words are not told (`most_split`): what is split most in notes are names.
    """
    found: dict[str, Fertility] = {}
    for name, folder in folders.items():
        found[name] = _of(codec, _sample(folder / "train.jsonl"), name not in quiet)
    return found


def _sample(path: Path) -> list[str]:
    texts, size = [], 0
    with path.open("rb") as file:
        for line in file:
            record = json.loads(line)
            texts.append(record["text"] if "text" in record else "\n".join(m["content"] for m in record["messages"]))
            size += len(line)
            if size >= SAMPLE_BYTES:
                break
    return texts


def _of(codec: Codec, texts: list[str], show_words: bool) -> Fertility:
    tokens = list(chain.from_iterable(codec.encode(texts, markers=False)))
    counts = Counter(chain.from_iterable(WORD.findall(text) for text in texts))
    words = list(counts)
    pieces = dict(zip(words, _tokens_within_text(codec, words), strict=True))
    total, of_words, whole = max(1, counts.total()), 0, 0
    for word, count in counts.items():
        of_words += count * pieces[word]
        if pieces[word] == 1:
            whole += count
    share_unknown, unknown = 0.0, _unknown_id(codec)
    if unknown is not None:
        share_unknown = round(tokens.count(unknown) / max(1, len(tokens)), 6)
    most_split: list[list[str | int]] = []
    if show_words:
        often = [word for word in words if counts[word] > 1]
        longest = sorted(often, key=lambda word: (-pieces[word], -counts[word], word))
        for word in longest[:SHOWN_WORDS]:
            most_split.append([word, pieces[word]])
    return Fertility(
        words=counts.total(),
        tokens=len(tokens),
        tokens_per_word=round(of_words / total, 3),
        characters_per_token=round(sum(map(len, texts)) / max(1, len(tokens)), 3),
        share_of_words_whole=round(whole / total, 4),
        share_unknown=share_unknown,
        most_split=most_split,
    )


def _tokens_within_text(codec: Codec, words: list[str]) -> list[int]:
    """How many tokens each word takes behind another word and a space, as in running text.

    A word by itself would be counted with the space that SentencePiece puts before every text.
    """
    [before] = codec.encode(["x"], markers=False)
    encoded = codec.encode([f"x {word}" for word in words], markers=False)
    found: list[int] = []
    for ids in encoded:
        found.append(len(ids) - len(before))
    return found


def _unknown_id(codec: Codec) -> int | None:
    """The id that stands for text without a token, if there is one: byte-level tokenizers have none."""
    token = getattr(codec.backend.model, "unk_token", None)
    if token:
        return codec.backend.token_to_id(token)
    return None
