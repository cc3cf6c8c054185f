"""How many tokens the sources hold, from a look at a few records of a few files: for `plan`, before data is sealed.

Every figure carries the share it may be off by. Reading stops after `SECONDS` per source. Deliberately not here:
exact counts (the sealed ledgers have them), duplicates and contamination (what hygiene removes is not foreseen).
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qmedtune.recipe import SourceSection

SECONDS = 0.3
FILES = 8
RECORDS_PER_FILE = 2000
WINDOWS, WINDOW_BYTES = 8, 1 << 17
# Characters per token of English biomedical text, where no tokenizer is at hand: large vocabularies (Llama 3) about
# 4.4, 32k vocabularies about 3.6; a tiny base spells real words in bytes. Assumed, +-15 %.
CHARS_PER_TOKEN = {"large": 4.4, "small": 3.6, "tiny": 1.7}
ASSUMED_SPREAD = 0.15
# Characters of text per byte of file where a file cannot be read to its end in time: XML has mark-up, compressed
# containers hold about three times their size. Assumed, +-40 %.
TEXT_PER_BYTE = {"json": 0.9, "jats": 0.6, "pubmed": 0.35, "parquet": 2.0, "huggingface": 2.0}
GUESSED_SPREAD = 0.4
LINE_FORMATS = ("jsonl", "json", "csv", "tsv")

Counter = Callable[[list[str]], int]  # texts -> tokens, without bos and eos


@dataclass(frozen=True)
class Estimate:
    """What a source holds for training, after its hold-out: `tokens` +- `spread` (a share), 0 when exact.

    `read_bytes` are the files' sizes. `missing` says why there is no estimate (then tokens are 0).
    """

    records: int
    tokens: int
    spread: float
    num_files: int = 0
    read_bytes: int = 0
    missing: str = ""


def count_with(
    tokenizer_dir: Path | None, vocab: int, *, builtin_base: bool, builtin_text: bool
) -> tuple[Counter, float]:
    """A token counter and its spread: the base's own tokenizer where it is local, otherwise an assumption."""
    if tokenizer_dir is not None and (tokenizer_dir / "tokenizer.json").is_file():
        from qmedtune.data.tokens import load_codec

        codec = load_codec(tokenizer_dir)
        return lambda texts: sum(map(len, codec.encode(texts, markers=False))), 0.0
    if builtin_base and builtin_text:  # every word and mark of the built-in world is one token
        return lambda texts: sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts), 0.05
    ratio = CHARS_PER_TOKEN["tiny" if builtin_base else "large" if vocab > 100_000 else "small"]
    return lambda texts: round(sum(map(len, texts)) / ratio), ASSUMED_SPREAD


def estimate_source(source: SourceSection, count: Counter, spread: float) -> Estimate:
    """Sample a source. Raises what reading it raises (DataError for absent or unreadable files)."""
    from qmedtune.data.sources import source_files

    files = source_files(source)
    if not files:
        texts = list(_builtin_texts(source))
        return _total(texts, len(texts), count, spread)
    sizes = [file.stat().st_size for file in files]
    picked = sorted({round(i * (len(files) - 1) / max(FILES - 1, 1)) for i in range(FILES)})
    seen = [_look(files[i], source, time.monotonic() + SECONDS / len(picked)) for i in picked]
    texts = [text for look in seen for text in look.texts]
    sampled = sum(sizes[i] for i in picked)
    records = sum(look.records for look in seen) * sum(sizes) / sampled
    exact = len(picked) == len(files) and all(look.whole for look in seen)
    spread += 0.0 if exact else max(look.spread for look in seen) + (0.1 if len(picked) < len(files) else 0.0)
    kept = min(records, source.max_records or records) * (1 - source.holdout)
    result = _total(texts, kept, count, spread)
    return Estimate(result.records, result.tokens, result.spread, len(files), sum(sizes))


def _total(texts: list[str], records: float, count: Counter, spread: float) -> Estimate:
    """Scale the sample up to `records`. bos and eos count."""
    if not texts:
        return Estimate(0, 0, 0.0, missing="no usable record among the first")
    per_record = count(texts) / len(texts) + 2
    return Estimate(round(records), round(records * per_record), round(spread, 2))


def _builtin_texts(source: SourceSection) -> Iterator[str]:
    """The training texts of the built-in world, which says itself what is held out."""
    from qmedtune.data.rejects import Rejects
    from qmedtune.data.sources import read_records

    return (_text(record, source) for record in read_records("", source, Rejects("")) if not record.get("held_out"))


@dataclass(frozen=True)
class Look:
    """The first records of one file: their texts, and how many records the file has in all, +- `spread`."""

    texts: list[str]
    records: float
    whole: bool
    spread: float


def _look(file: Path, source: SourceSection, until_s: float) -> Look:
    from qmedtune.data.rejects import Unusable
    from qmedtune.data.sources import READERS, format_of

    format = format_of(file, source.format)
    texts, line, bad = [], 0, 0
    if format in READERS:
        for line, fields in islice(READERS[format](file), RECORDS_PER_FILE):  # noqa: B007 - the last one counts
            try:
                texts.append(_text(_shape(fields, source), source))
            except Unusable:
                bad += 1
            if time.monotonic() > until_s:
                break
        else:
            if len(texts) + bad < RECORDS_PER_FILE:
                return Look(texts, len(texts), True, 0.0)
    lines = _lines(file) if format in LINE_FORMATS and line > 20 else 0.0
    if lines:
        spread = 0.2 if file.suffix == ".gz" else 0.1
        return Look(texts, len(texts) * max(lines / line, 1.0), False, spread)
    mean = sum(map(len, texts)) / len(texts) if texts else 4000.0
    return Look(
        texts or ["x" * 4000], file.stat().st_size * TEXT_PER_BYTE.get(format, 1.0) / mean, False, GUESSED_SPREAD
    )


def _shape(fields: Any, source: SourceSection) -> dict[str, Any]:
    from qmedtune.data.instructions import instruction_record
    from qmedtune.data.records import text_record
    from qmedtune.data.rejects import Unusable

    shape = instruction_record if source.kind == "instructions" else text_record
    record = shape(fields, source.columns) if isinstance(fields, dict) else fields
    if not isinstance(record, dict):
        raise Unusable("damaged or refused")
    return record


def _text(record: dict[str, Any], source: SourceSection) -> str:
    """What is trained on: the text, or the conversation in its template (`plain` where it is the tokenizer's own)."""
    if "messages" not in record:
        return record["text"]
    from qmedtune.data import templates

    template = templates.load(source.template if source.template not in (None, "chat") else "plain")
    return "".join(text for text, _ in template.render(record["messages"]))


def _lines(file: Path) -> float:
    """Lines of a file, from the density of newlines in windows spread over it; of a compressed one, in its head."""
    size = file.stat().st_size
    if file.suffix == ".zst":
        return 0.0
    with file.open("rb") as stream:
        if file.suffix == ".gz":
            packed = stream.read(WINDOW_BYTES)
            sample = zlib.decompressobj(31).decompress(packed)
            size = round(size * len(sample) / len(packed))
        else:
            sample = b""
            for i in range(WINDOWS):
                stream.seek(max(size - WINDOW_BYTES, 0) * i // (WINDOWS - 1))
                sample += stream.read(WINDOW_BYTES)
    return sample.count(b"\n") / len(sample) * size
