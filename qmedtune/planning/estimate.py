"""How many tokens the sources hold, from a sample of their records: for `plan`, before data is sealed.

Every figure carries the share it may be off by. Where the base's tokenizer is on this machine, records are framed and
tokenised as packing does it. Deliberately not here: exact counts (the sealed ledgers have them), duplicates and
contamination (what hygiene removes is not foreseen).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qmedtune.data.reading.document import Record
from qmedtune.planning.sample import Sample, characters
from qmedtune.recipe import SourceSection

# Characters per token of English biomedical text, where no tokenizer is at hand: large vocabularies (Llama 3) about
# 4.4, 32k vocabularies about 3.6; a tiny base spells real words in bytes. Assumed, +-15 %.
CHARS_PER_TOKEN = {"large": 4.4, "small": 3.6, "tiny": 1.7}
ASSUMED_SPREAD = 0.15
SAMPLE_CHARACTERS = 400_000  # tokenised per source: a third of a second on one core

Lengths = Callable[[list[Record]], list[int]]  # records -> tokens of each, with bos and eos


@dataclass(frozen=True)
class Estimate:
    """What a source holds for training, after its hold-out: `tokens` +- `spread` (a share), 0 when exact.

    `sampled`: records looked at. `read_bytes` are the files' sizes. `missing` says why there is no estimate (then
    tokens are 0).
    """

    records: int
    tokens: int
    spread: float
    num_files: int = 0
    read_bytes: int = 0
    missing: str = ""
    sampled: int = 0


@dataclass(frozen=True)
class SampledEstimate:
    """An estimate, and the tokens of each record that was tokenised for it, int64."""

    estimate: Estimate
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Counting:
    """How records of one source are counted, +- `spread`: by the tokenizer in `tokenizer_dir`, if it is there."""

    lengths: Lengths
    spread: float


def count_with(
    tokenizer_dir: Path | None, vocab: int, source: SourceSection, *, builtin_base: bool, builtin_text: bool
) -> Counting:
    """By the base's own tokenizer where it is local, otherwise by an assumption."""
    if tokenizer_dir is not None and (tokenizer_dir / "tokenizer.json").is_file():
        return Counting(lambda records: framed_lengths(tokenizer_dir, source, records), 0.0)
    if builtin_base and builtin_text:  # every word and mark of the built-in world is one token
        return Counting(lambda records: _word_lengths(source, records), 0.05)
    if builtin_base:
        ratio = CHARS_PER_TOKEN["tiny"]
    elif vocab > 100_000:
        ratio = CHARS_PER_TOKEN["large"]
    else:
        ratio = CHARS_PER_TOKEN["small"]
    return Counting(lambda records: _assumed_lengths(source, ratio, records), ASSUMED_SPREAD)


def _word_lengths(source: SourceSection, records: list[Record]) -> list[int]:
    return [2 + len(re.findall(r"\w+|[^\w\s]", _text(record, source))) for record in records]


def _assumed_lengths(source: SourceSection, ratio: float, records: list[Record]) -> list[int]:
    return [2 + round(len(_text(record, source)) / ratio) for record in records]


def framed_lengths(tokenizer_dir: Path, source: SourceSection, records: list[Record]) -> list[int]:
    """Tokens of each record as packing makes them: framed by its template, nothing cut."""
    from qmedtune.data.packing import templates
    from qmedtune.data.packing.conversations import encode_conversations
    from qmedtune.data.packing.tokens import encode_texts, load_codec

    codec = load_codec(tokenizer_dir)
    if source.kind != "instructions":
        return [len(document.ids) for document in encode_texts(codec, records, None)]
    template = templates.default(source.template, tokenizer_dir)
    return [
        len(document.ids)
        for document in encode_conversations(codec, records, template=template, prompt_weight=0.0, limit=2**31)
    ]


def estimate_source(sample: Sample, source: SourceSection, counting: Counting) -> SampledEstimate:
    """Scale what was seen up to the source. A sample of n records is off by two standard errors of their mean."""
    records = tokenised_part(sample.records)
    found = Estimate(0, 0, 0.0, sample.num_files, sample.read_bytes)
    if not records:
        return SampledEstimate(replace(found, missing="no usable record among the first"))
    lengths = np.array(counting.lengths(records), np.int64)
    all_seen = sample.whole and len(records) == len(sample.records)
    error = 0.0 if all_seen else 2 * float(lengths.std()) / float(lengths.mean()) / math.sqrt(len(lengths))
    kept = min(sample.total, source.max_records or sample.total) * sample.trained_share
    spread = round(counting.spread + sample.spread + error, 2)
    tokens = round(kept * float(lengths.mean()))
    found = replace(found, records=round(kept), tokens=tokens, spread=spread, sampled=len(records))
    return SampledEstimate(found, lengths)


def tokenised_part(records: list[Record]) -> list[Record]:
    """Every so-manieth record, so that all together have at most SAMPLE_CHARACTERS."""
    every = max(1, math.ceil(sum(map(characters, records)) / SAMPLE_CHARACTERS))
    return records[::every]


def _text(record: Record, source: SourceSection) -> str:
    """What is trained on: the text, or the conversation in its template (`plain` where it is the tokenizer's own)."""
    if "messages" not in record:
        return record["text"]  # pyright: ignore[reportTypedDictNotRequiredAccess] - what has no messages has text
    from qmedtune.data.packing import templates

    template = templates.load(source.template if source.template not in (None, "chat") else "plain")
    return "".join(text for text, _ in template.render(record["messages"]))
