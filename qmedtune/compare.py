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

from qmedtune import statistics, store
from qmedtune.measure import Row
from qmedtune.tasks import Item, Task


def summarise(task: Task, items: Sequence[Item], rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """The scores of one model: the main way of answering on top, `generation` beside it."""
    generated = [row["generation"] for row in rows if "generation" in row]
    by_options = bool(items[0].options)
    result = _scores(task, rows if by_options else generated, seed)
    result["truncated"] = sum(row["truncated"] for row in rows)
    if by_options:
        correct = [row["correct"] for row in rows]
        result["chance"] = float(np.mean([1 / len(item.options) for item in items]))
        result["per_character"] = _scores(task, [row["normalised"] for row in rows], seed)[task.metric]
        result["ece"] = statistics.expected_calibration_error([row["confidence"] for row in rows], correct)
    if generated:
        answers = _scores(task, generated, seed) if by_options else result
        answers["unparsed"] = sum(not answer["parsed"] for answer in generated)
        answers["cut"] = sum(answer["ended"] == "length" for answer in generated)
        if by_options:
            result["generation"] = answers
    return result


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


Rows = dict[str, list[Row]]
"""Rows per model: `base` and `final` in a run, `model` where one is evaluated."""


def task_result(task: Task, measured: Rows, seed: int) -> dict[str, Any]:
    """`base` and `final` (or the one model that was measured) for the task and each of its facets."""
    result = _entry(task, list(range(len(task.items))), measured, seed)
    facets = dict.fromkeys(item.facet for item in task.items if item.facet)
    if facets:
        places = {facet: [i for i, item in enumerate(task.items) if item.facet == facet] for facet in facets}
        result["facets"] = {str(facet): _entry(task, indices, measured, seed) for facet, indices in places.items()}
    return result


def _entry(task: Task, indices: list[int], measured: Rows, seed: int) -> dict[str, Any]:
    items = [task.items[i] for i in indices]
    rows = {label: [rows[i] for i in indices] for label, rows in measured.items()}
    result: dict[str, Any] = {label: summarise(task, items, part, seed) for label, part in rows.items()}
    if rows.keys() >= {"base", "final"}:
        main = {label: part if items[0].options else [r["generation"] for r in part] for label, part in rows.items()}
        result |= compare(task, main["base"], main["final"], seed)
        if items[0].options and "generation" in rows["base"][0]:
            said = {label: [row["generation"] for row in part] for label, part in rows.items()}
            result["generation"] = compare(task, said["base"], said["final"], seed)
    return result


def write_items(path: Path, task: Task, measured: Rows) -> None:
    """One line per item: id, gold label, and per model prediction and scores. Options are labels, never source text."""
    lines = []
    for index, item in enumerate(task.items):
        line = {"id": item.id, **({"facet": item.facet} if item.facet else {})}
        line |= {"gold": item.options[item.gold]} if item.options else {}
        lines.append(json.dumps(line | {label: rows[index] for label, rows in measured.items()}, ensure_ascii=False))
    store.write_atomic(path, "\n".join(lines) + "\n")
