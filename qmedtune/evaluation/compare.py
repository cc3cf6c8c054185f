"""From rows to scores: accuracy or another metric with its interval, calibration, and base against final paired.

Deliberately absent: measuring (measure.py), formulas (statistics.py and the tasks' own metrics), rounding for print.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qmedtune import store
from qmedtune.evaluation import statistics
from qmedtune.evaluation.measure import Row
from qmedtune.tasks import Item, Task

ModelRows = dict[str, list[Row]]
"""Rows per model: `base` and `final` in a run, `model` where one is evaluated."""


def summarise(task: Task, items: Sequence[Item], rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """The scores of one model. Items with options: by log-likelihood, and under `generation` what the model writes."""
    generated = [row["generation"] for row in rows if "generation" in row]
    cut = {"truncated": sum(row["truncated"] for row in rows)}
    if not items[0].options:
        return _generated_scores(task, generated, seed) | cut
    result = _scores(task, rows, seed) | cut
    if task.metric == "accuracy":
        result["chance"] = float(np.mean([1 / len(item.options) for item in items]))
    result["per_character"] = task.aggregate([row["normalised"] for row in rows])[task.metric]
    confidences, correct = [row["confidence"] for row in rows], [row["correct"] for row in rows]
    result["ece"] = statistics.expected_calibration_error(confidences, correct)
    return result | ({"generation": _generated_scores(task, generated, seed)} if generated else {})


def _generated_scores(task: Task, answers: Sequence[Row], seed: int) -> dict[str, Any]:
    """unparsed: answers that could not be read (judged as wrong); cut: answers that had not ended by themselves."""
    unparsed = sum(not answer["parsed"] for answer in answers)
    return _scores(task, answers, seed) | {"unparsed": unparsed, "cut": sum(a["ended"] == "length" for a in answers)}


def _scores(task: Task, judgements: Sequence[Row], seed: int) -> dict[str, Any]:
    """The task's metrics, the main one with its 95 % interval: Wilson for accuracy, else bootstrap over items."""
    scores = task.aggregate(list(judgements))
    n = len(judgements)
    if task.metric == "accuracy":
        interval = statistics.wilson(sum(j["correct"] for j in judgements), n)
    else:
        interval = statistics.bootstrap(statistic(task, judgements), n, seed=seed)
        scores["mean"] = scores[task.metric]
    return {"metric": task.metric, **scores, "ci95": list(interval), "n": n}


def statistic(task: Task, judgements: Sequence[Row]) -> statistics.Statistic:
    """The task's main metric as a function of item indices, for resampling."""
    if task.mean_of:
        values = np.array([judgement[task.mean_of] for judgement in judgements], dtype=np.float64)
        return lambda indices: float(values[indices].mean())
    return lambda indices: task.aggregate([judgements[i] for i in indices])[task.metric]


def compare(task: Task, base: Sequence[Row], final: Sequence[Row], seed: int) -> dict[str, Any]:
    """Paired on the same items: McNemar where answers are right or wrong, the bootstrapped difference always."""
    difference, interval = statistics.paired_bootstrap(
        statistic(task, base), statistic(task, final), len(base), seed=seed
    )
    result: dict[str, Any] = {"difference": {"value": difference, "ci95": list(interval)}}
    if "correct" in base[0]:
        paired = statistics.mcnemar([row["correct"] for row in base], [row["correct"] for row in final])
        result["paired"] = {"test": "McNemar exact", **asdict(paired)}
    return result


def task_result(task: Task, measured: ModelRows, seed: int) -> dict[str, Any]:
    """`base` and `final` (or the one model that was measured) for the task and each of its facets."""
    result = _entry(task, list(range(len(task.items))), measured, seed)
    facets = dict.fromkeys(item.facet for item in task.items if item.facet)
    if len(facets) > 1:
        places = {facet: [i for i, item in enumerate(task.items) if item.facet == facet] for facet in facets}
        result["facets"] = {str(facet): _entry(task, indices, measured, seed) for facet, indices in places.items()}
    return result


def _entry(task: Task, indices: list[int], measured: ModelRows, seed: int) -> dict[str, Any]:
    items = [task.items[i] for i in indices]
    rows = {label: [rows[i] for i in indices] for label, rows in measured.items()}
    result: dict[str, Any] = {label: summarise(task, items, part, seed) for label, part in rows.items()}
    if rows.keys() >= {"base", "final"}:
        said = {label: [row["generation"] for row in part if "generation" in row] for label, part in rows.items()}
        main = rows if items[0].options else said
        result |= compare(task, main["base"], main["final"], seed)
        if items[0].options and said["base"]:
            result["generation"] = compare(task, said["base"], said["final"], seed)
    return result


def write_items(path: Path, task: Task, measured: ModelRows) -> None:
    """One line per item: id, gold label, and per model prediction and scores. Options are labels, never source text."""
    lines = []
    for index, item in enumerate(task.items):
        line = {"id": item.id, **({"facet": item.facet} if item.facet else {})}
        line |= {"gold": item.options[item.gold]} if item.options else {}
        lines.append(json.dumps(line | {label: rows[index] for label, rows in measured.items()}, ensure_ascii=False))
    store.write_atomic(path, "\n".join(lines) + "\n")
