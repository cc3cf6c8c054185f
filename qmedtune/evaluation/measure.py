"""One model against one benchmark: every item scored, by log-likelihood of its options and by what the model writes.

A base model can know without answering in form, so both ways are measured and told apart; answers that cannot be read
are wrong and counted. What is kept of an item are labels and numbers: no prompt, no answer text, no source text.
Every 256 questions are written as soon as they are scored, so a kill costs minutes of a benchmark of thousands.
Deliberately absent: model loading, intervals and comparisons (summary.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch

from qmedtune import store, ui
from qmedtune.data.packing.framing import Prompt, codec_of
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import encode_texts
from qmedtune.data.reading.document import Record
from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import read_records
from qmedtune.errors import DataError
from qmedtune.evaluation.generation import generate
from qmedtune.evaluation.scoring import (
    ChoiceScores,
    Perplexity,
    Progress,
    choice_logprobs,
    perplexity,
    prompt_texts,
)
from qmedtune.modeling.collation import Rows
from qmedtune.modeling.forward import compute_dtype
from qmedtune.recipe import SourceSection
from qmedtune.tasks import Item, Task
from qmedtune.tasks.items import Judgement

PART = 256  # questions between two writes
# Options nearer than this are a tie in that dtype: fp32 may order them otherwise. Of 236 questions (SmolLM2) bfloat16
# moved the gap of the best two by .054 nats (standard deviation; 97.5 % by less than .124), and 8 choices, all of a gap
# below .09, were others than in fp32 (2026-11). float16 has 8 times its resolution.
TIE_NATS = {torch.float32: 1e-4, torch.float16: 0.016, torch.bfloat16: 0.125}
FEWEST_TOKENS = 256  # of a batch: where not even these fit, no smaller batch would help
T = TypeVar("T")
Row = Judgement
"""Everything that is kept of one item for one model: its judgement, and how it was found."""


@dataclass(frozen=True)
class Settings:
    """How to measure. batch_tokens: padded tokens per forward pass."""

    template: Template
    generate: bool
    batch_tokens: int


@dataclass(frozen=True)
class MeasuredModel:
    """What one model did: rows per task in the order of `asked`, perplexity per source of held-out text."""

    tasks: dict[str, list[Row]]
    perplexity: dict[str, Perplexity]


def measure_model(
    model: Any,
    tokenizer: Any,
    label: str,
    tasks: list[Task],
    held_out: Mapping[str, Rows],
    settings: Settings,
    folder: Path,
) -> MeasuredModel:
    """All tasks and texts. Each result is written below `folder` at once and read from there when it is there."""
    marks = codec_of(tokenizer).special_ids

    def text(source: str) -> dict[str, float]:
        rows = held_out[source]
        with ui.progress_bar(f"perplexity of {Path(source).name}, {label}") as bar:
            done = bar.completed

            def read(batch_tokens: int) -> Perplexity:
                bar.update(done)
                return perplexity(model, rows, batch_tokens=batch_tokens, progress=adding(bar), marks=marks)

            return asdict(within_memory(read, settings.batch_tokens))

    done = {}
    for task in tasks:
        parts_folder = folder / f"{label}-{task.name}"
        done[task.name] = measure(model, tokenizer, task, settings, f"{task.name}, {label}", parts_folder)
    texts = {}
    for source in held_out:
        # A source may be a path, which must not lead out of the folder.
        file = folder / f"{label}-perplexity-{store.sha256_json(source)[:16]}.json"
        texts[source] = Perplexity(**store.kept(file, partial(text, source)))
    return MeasuredModel(done, texts)


def measure(model: Any, tokenizer: Any, task: Task, settings: Settings, title: str, folder: Path) -> list[Row]:
    """One row per question of `asked`, in order; each part of them is written to `folder` when it is scored."""
    asked = task.asked
    prompts = prompt_texts(tokenizer, settings.template, [item.messages for item in asked])
    rows: list[Row] = [{}] * len(asked)
    ways = bool(asked[0].options) + (settings.generate or not asked[0].options)
    with ui.progress_bar(title, total=len(asked) * ways, unit="answers") as bar:
        for number, part in enumerate(parts(asked, prompts)):
            items = [asked[index] for index in part]
            texts = [prompts[index] for index in part]
            done = bar.completed
            score = partial(_score, model, tokenizer, task, items, texts, settings, adding(bar))
            work = partial(within_memory, score, settings.batch_tokens)
            for index, row in zip(part, store.kept(folder / f"{number:05d}.json", work), strict=True):
                rows[index] = row
            bar.update(done + len(part) * ways)
    return rows


def parts(asked: Sequence[Item], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of what is scored and written together: the same examples before it, similar lengths, at most PART."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in sorted(range(len(asked)), key=lambda i: -len(prompts[i].ids)):
        groups.setdefault(asked[index].shots, []).append(index)
    found = []
    for group in groups.values():
        for start in range(0, len(group), PART):
            found.append(group[start : start + PART])
    return found


def _score(
    model: Any, tokenizer: Any, task: Task, items: list[Item], prompts: list[Prompt], settings: Settings,
    done: Progress, batch_tokens: int,
) -> list[Row]:  # fmt: skip
    rows: list[Row] = []
    options = []
    for item in items:
        rows.append({"truncated": False})
        options.append(item.options)
    if items[0].options:
        scores = choice_logprobs(model, tokenizer, prompts, options, batch_tokens=batch_tokens, progress=done)
        resolution = TIE_NATS[compute_dtype(model)]
        for row, item, score in zip(rows, items, scores, strict=True):
            row |= {**_choice_row(task, item, score, resolution), "truncated": score.truncated}
    if settings.generate or not items[0].options:
        length = task.max_new_tokens
        answers = generate(model, tokenizer, prompts, length, batch_tokens=batch_tokens, progress=done)
        for row, item, answer in zip(rows, items, answers, strict=True):
            prediction = task.parse(answer.text, item)
            judged = {**task.judge(item, prediction), "parsed": prediction is not None, "ended": answer.ended}
            row |= {"generation": judged, "truncated": row["truncated"] or answer.truncated}
    return rows


def within_memory(work: Callable[[int], T], batch_tokens: int) -> T:
    """What `work` makes of batches of so many padded tokens; of smaller ones where memory runs out, as it does on a
    card that others use too. torch.OutOfMemoryError where the smallest do not fit."""
    while True:
        try:
            return work(batch_tokens)
        except torch.OutOfMemoryError:
            if batch_tokens <= FEWEST_TOKENS:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        batch_tokens = max(FEWEST_TOKENS, batch_tokens // 2)
        ui.warn(f"out of memory: scored in batches of {batch_tokens:,} tokens from here on")


def adding(bar: ui.ProgressBar) -> Progress:
    return lambda count: bar.update(bar.completed + count)


def _choice_row(task: Task, item: Item, score: ChoiceScores, resolution: float) -> Row:
    sums = score.sums
    best, normalised = best_option(sums, item.id), best_option(score.per_character, item.id)
    weights = np.exp(np.array(sums) - max(sums))
    return {
        **task.judge(item, best),
        "normalised": task.judge(item, normalised),
        "logprobs": [round(value, 5) for value in sums],
        "confidence": round(float(weights.max() / weights.sum()), 5),
        "tie": gap(sums) <= resolution,
    }


def best_option(values: Sequence[float], item_id: str) -> int:
    """Index of the largest value. Equal ones are drawn from by the item's id: no place in the list is favoured, and
    every model and every run draws alike."""
    best = max(values)
    equal = []
    for index, value in enumerate(values):
        if value == best:
            equal.append(index)
    if len(equal) == 1:
        return equal[0]
    return Random(f"tie {item_id}").choice(equal)


def gap(values: Sequence[float]) -> float:
    """How far the best is before the second, in nats."""
    first, second = sorted(values, reverse=True)[:2]
    return first - second


def text_rows(tokenizer: Any, path: Path, max_tokens: int) -> tuple[list[dict[str, np.ndarray]], int]:
    """The texts of a file as rows for `perplexity`, each between the marks of a document, and their bytes of UTF-8.

    Long ones in windows of `max_tokens` that begin with the last token of the one before, so that every token but
    the first is predicted once. Damaged records raise DataError.
    """
    rejects = Rejects(path.name)
    texts: list[Record] = []
    num_bytes = 0
    for record in read_records(path.name, SourceSection(path=str(path), kind="general"), rejects):
        texts.append({"id": "", "text": record["text"]})
        num_bytes += len(record["text"].encode())
    if rejects.counts["rejected"]:
        reason = rejects.reasons.most_common(1)[0][0]
        raise DataError(
            f"{path}: {rejects.counts['rejected']} damaged records ({reason})\nmend the file: all are counted"
        )
    rows = []
    for document in encode_texts(codec_of(tokenizer), texts, None):
        ids = np.array(document.ids, dtype=np.int64)
        for start in range(0, len(ids) - 1, max_tokens - 1):
            window = ids[start : start + max_tokens]
            labels = window.copy()
            labels[0] = -100
            rows.append({"input_ids": window, "labels": labels, "position_ids": np.arange(len(window))})
    return rows, num_bytes
