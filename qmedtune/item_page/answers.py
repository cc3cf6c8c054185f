"""What <task>.items.jsonl says of each item, as the page shows it: who was right, how sure, what was written.

Deliberately does not: read questions (question_texts.py), judge anything anew, or know HTML.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune.errors import RunError

LABELS = ("base", "final", "model")
OUTCOMES = ("gained", "lost", "both right", "both wrong")
ONE_MODEL = ("right", "wrong")
HALF = 0.5  # a score per item (F1, ROUGE) from here on counts as right where models are not compared


@dataclass(frozen=True)
class ModelAnswer:
    """One model on one item. value: 1 or 0, or the score of a text; chosen: what it preferred, shares: per mille of
    each option; written: what was read out of its own words, None where nothing was asked for, "" where nothing could
    be read."""

    value: float
    chosen: str | None = None
    shares: tuple[int, ...] = ()
    tie: bool = False
    written: str | None = None
    written_value: float | None = None

    @property
    def confidence(self) -> float | None:
        """Share of the preferred option, 0 to 1."""
        if not self.shares:
            return None
        return max(self.shares) / 1000


@dataclass(frozen=True)
class Answered:
    """An item with the answers of each model."""

    id: str
    facet: str | None
    draw: int
    gold: str | None
    answers: tuple[ModelAnswer, ...]

    @property
    def outcome(self) -> str:
        return outcome([answer.value for answer in self.answers])

    @property
    def tie(self) -> bool:
        return any(answer.tie for answer in self.answers)

    @property
    def unread(self) -> bool:
        return any(answer.written == "" for answer in self.answers)


def outcome(values: Sequence[float]) -> str:
    """Of base and final, or of one model."""
    if len(values) == 1:
        return ONE_MODEL[values[0] < HALF]
    before, after = values
    if after > before:
        return OUTCOMES[0]
    if before > after:
        return OUTCOMES[1]
    return OUTCOMES[2 if after >= HALF else 3]


@dataclass(frozen=True)
class AnsweredTask:
    """A task: its items, and which models answered them. measure: what an item's written answer scores, `right` where
    the task's metric is none of a single item."""

    name: str
    measure: str
    labels: tuple[str, ...]
    items: list[Answered]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(item.outcome for item in self.items)

    @property
    def has_options(self) -> bool:
        return any(answer.shares for item in self.items for answer in item.answers)


def read_task(path: Path, name: str, metric: str) -> AnsweredTask:
    """The items of one task. RunError where a line is damaged."""
    items: list[Answered] = []
    labels: tuple[str, ...] = ()
    measure = "right"
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            labels = tuple(label for label in LABELS if label in line)
            answers = [_answer(line[label], metric) for label in labels]
            if metric in line[labels[0]].get("generation", {}):
                measure = metric
            gold = line.get("gold")
            items.append(Answered(str(line["id"]), line.get("facet"), line.get("draw", 0), gold, tuple(answers)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
            raise RunError(
                f"{path}:{number}: no answer of an evaluation ({type(error).__name__})\n"
                "the same `qmedtune run` makes the evaluation again, once its folder is moved away"
            ) from None
    return AnsweredTask(name, measure, labels, items)


def _answer(row: Mapping[str, Any], metric: str) -> ModelAnswer:
    written, written_value = _written(row.get("generation"), metric)
    if "logprobs" not in row:
        if written_value is None:
            raise KeyError("generation")
        return ModelAnswer(written_value, written=written, written_value=written_value)
    return ModelAnswer(
        float(bool(row["correct"])),
        row["prediction"],
        _shares(row["logprobs"]),
        bool(row.get("tie")),
        written,
        written_value,
    )


def _written(found: Mapping[str, Any] | None, metric: str) -> tuple[str | None, float | None]:
    """What was read out of an answer, and what it scores: by the metric where that is one of an item, else whether it
    is right."""
    if found is None:
        return None, None
    value = round(float(found[metric] if metric in found else found["correct"]), 3)  # as the page tells it
    if not found["parsed"]:
        return "", value
    said = found.get("prediction")
    if isinstance(said, list):
        return ", ".join(str(part) for part in said) or "none", value
    if said is None:
        return "(text)", value
    return str(said), value


def _shares(logprobs: Sequence[float]) -> tuple[int, ...]:
    """Per mille that each option has of all options' probability."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return tuple(round(1000 * weight / total) for weight in weights)
