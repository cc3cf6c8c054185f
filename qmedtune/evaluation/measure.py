"""One model against one benchmark: every item scored, by log-likelihood of its options and by what the model writes.

A base model can know without answering in form, so both ways are measured and told apart; answers that cannot be read
are wrong and counted. What is kept of an item are labels and numbers: no prompt, no answer text, no source text.
Every 256 questions are written as soon as they are scored, so a kill costs minutes of a benchmark of thousands.
Deliberately absent: model loading, intervals and comparisons (summary.py).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from qmedtune.evaluation.turns import Turns
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
    """What one model did: rows per task in the order of `asked`, perplexity per source of held-out text. Of a process
    that does not lead several: its own part of it."""

    tasks: dict[str, list[Row]]
    perplexity: dict[str, Perplexity]


@dataclass(frozen=True)
class ModelToMeasure:
    """A loaded model, what it is called in progress bars and file names, and how it is measured. What is found is
    written below `folder` at once, and read from there where it is there. turns: with which other processes that is
    shared."""

    model: Any
    tokenizer: Any
    label: str
    settings: Settings
    folder: Path
    turns: Turns = field(default_factory=Turns)

    def part(self, task: Task, number: int) -> Path:
        """The file of part `number` of a task's answers."""
        return self.folder / f"{self.label}-{task.name}" / f"{number:05d}.json"

    def within(self, batch_tokens: int) -> ModelToMeasure:
        """The same with batches of another size."""
        return replace(self, settings=replace(self.settings, batch_tokens=batch_tokens))

    def text(self, source: str) -> Path:
        """The file of a source's perplexity; a source may be a path, which must not lead out of the folder."""
        return self.folder / f"{self.label}-perplexity-{store.sha256_json(source)[:16]}.json"


def measure_model(asked: ModelToMeasure, tasks: list[Task], held_out: Mapping[str, Rows]) -> MeasuredModel:
    """All tasks and texts; `held_out` has rows per source."""
    turns, marks = asked.turns, codec_of(asked.tokenizer).special_ids

    def text(source: str) -> dict[str, float]:
        with ui.progress_bar(f"perplexity of {Path(source).name}, {asked.label}") as bar:
            rows, done = held_out[source], bar.completed

            def read(batch_tokens: int) -> Perplexity:
                bar.update(done)
                return perplexity(asked.model, rows, batch_tokens=batch_tokens, progress=adding(bar), marks=marks)

            return asdict(within_memory(read, asked.settings.batch_tokens))

    done = {}
    for task in tasks:
        done[task.name] = measure(asked, task)
    texts, of_others = {}, []
    for source in held_out:
        if turns.mine():
            texts[source] = Perplexity(**store.kept(asked.text(source), partial(text, source)))
        else:
            of_others.append(source)
    for source in of_others:
        if turns.leads:
            turns.wait(asked.text(source))
            texts[source] = Perplexity(**store.kept(asked.text(source), partial(text, source)))
    return MeasuredModel(done, texts)


def measure(model: ModelToMeasure, task: Task) -> list[Row]:
    """One row per question of `asked`, in order; each part of them is written when it is scored. Where the parts are
    shared, the process that leads has all rows, another its own."""
    asked, settings, turns = task.asked, model.settings, model.turns
    prompts = prompt_texts(model.tokenizer, settings.template, [item.messages for item in asked])
    rows: list[Row] = [{}] * len(asked)
    ways = bool(asked[0].options) + (settings.generate or not asked[0].options)
    with ui.progress_bar(f"{task.name}, {model.label}", total=len(asked) * ways, unit="answers") as bar:

        def take(number: int, part: list[int]) -> None:
            questions = [(asked[index], prompts[index]) for index in part]
            done = bar.completed

            def score(batch_tokens: int) -> list[Row]:
                bar.update(done)
                return _score(model.within(batch_tokens), task, questions, adding(bar))

            work = partial(within_memory, score, settings.batch_tokens)
            for index, row in zip(part, store.kept(model.part(task, number), work), strict=True):
                rows[index] = row
            bar.update(done + len(part) * ways)

        of_others: dict[int, list[int]] = {}
        for number, part in enumerate(parts(asked, prompts)):
            if turns.mine():
                take(number, part)
            else:
                of_others[number] = part
        for number, part in of_others.items():
            if turns.leads:
                turns.wait(model.part(task, number))
                take(number, part)
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


def num_parts(task: Task) -> int:
    """How many parts a benchmark has."""
    sizes = Counter(item.shots for item in task.asked)
    return sum(-(-size // PART) for size in sizes.values())


def _score(asked: ModelToMeasure, task: Task, questions: list[tuple[Item, Prompt]], done: Progress) -> list[Row]:
    model, tokenizer, settings = asked.model, asked.tokenizer, asked.settings
    rows: list[Row] = []
    items, prompts, options = [], [], []
    for item, prompt in questions:
        rows.append({"truncated": False})
        items.append(item)
        prompts.append(prompt)
        options.append(item.options)
    if items[0].options:
        scores = choice_logprobs(model, tokenizer, prompts, options, batch_tokens=settings.batch_tokens, progress=done)
        resolution = TIE_NATS[compute_dtype(model)]
        for row, item, score in zip(rows, items, scores, strict=True):
            row |= {**_choice_row(task, item, score, resolution), "truncated": score.truncated}
    if settings.generate or not items[0].options:
        length, budget = task.max_new_tokens, settings.batch_tokens
        answers = generate(model, tokenizer, prompts, length, batch_tokens=budget, progress=done)
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
        release_memory()
        batch_tokens = max(FEWEST_TOKENS, batch_tokens // 2)
        ui.warn(f"out of memory: scored in batches of {batch_tokens:,} tokens from here on")


def release_memory() -> None:
    """Give back what a pass held that ran out of memory. Call it when its exception is gone: that holds the tensors."""
    gc.collect()
    torch.cuda.empty_cache()


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
