"""From rows to scores: accuracy or another metric with its interval, calibration, and base against final paired.

With examples before the questions (n-shot) a task is asked once per draw of examples: scores are means over draws, with
the spread of the draws beside them, and items are resampled whole, all their draws together.
Deliberately absent: measuring (measure.py), formulas (statistics.py and the tasks' own metrics), rounding for print.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from qmedtune import store
from qmedtune.evaluation import statistics
from qmedtune.evaluation.measure import Row
from qmedtune.tasks import Item, Task

ModelRows = dict[str, list[Row]]
"""Rows per model: `base` and `final` in a run, `model` where one is evaluated; of all draws, one after the other."""
Draws = list[list[Row]]
"""Rows (or the judgements in them) per draw of examples; one draw where there are none."""


def summarise(task: Task, items: Sequence[Item], draws: Draws, seed: int) -> dict[str, Any]:
    """The scores of one model. Items with options: by log-likelihood, and under `generation` what the model writes."""
    rows = [row for draw in draws for row in draw]
    generated = _generations(draws)
    facts = {"truncated": sum(row["truncated"] for row in rows)}
    if task.draws:
        facts |= {"shots": len(task.draws[0][0].shots), "shots_from": task.shots_from}
    if not items[0].options:
        return _generated_scores(task, generated, seed) | facts
    result = _scores(task, draws, seed) | facts
    if task.metric == "accuracy":
        result["chance"] = float(np.mean([1 / len(item.options) for item in items]))
    result["per_character"] = fmean(_metric(task, [row["normalised"] for row in draw]) for draw in draws)
    confidences, correct = [row["confidence"] for row in rows], [row["correct"] for row in rows]
    result["ece"] = statistics.expected_calibration_error(confidences, correct)
    return result | ({"generation": _generated_scores(task, generated, seed)} if generated else {})


def _generations(draws: Draws) -> Draws:
    """What was judged of the written answers; nothing where none were asked for."""
    return [[row["generation"] for row in draw] for draw in draws] if "generation" in draws[0][0] else []


def _generated_scores(task: Task, draws: Draws, seed: int) -> dict[str, Any]:
    """unparsed: answers that could not be read (judged as wrong); cut: answers that had not ended by themselves."""
    answers = [answer for draw in draws for answer in draw]
    unparsed = sum(not answer["parsed"] for answer in answers)
    return _scores(task, draws, seed) | {"unparsed": unparsed, "cut": sum(a["ended"] == "length" for a in answers)}


def _metric(task: Task, judgements: list[Row]) -> float:
    return task.aggregate(judgements)[task.metric]


def _scores(task: Task, draws: Draws, seed: int) -> dict[str, Any]:
    """The task's metrics, the main one with its 95 % interval: Wilson for accuracy, else bootstrap over items.

    Of several draws Wilson takes the mean, as if each item had been asked once: wider than need be, and no interval of
    width 0 where every answer is wrong.
    """
    each = [task.aggregate(draw) for draw in draws]
    scores: dict[str, Any] = {name: fmean(found[name] for found in each) for name in each[0]}
    n = len(draws[0])
    if task.metric == "accuracy":
        interval = statistics.wilson(sum(j["correct"] for draw in draws for j in draw) / len(draws), n)
    else:
        interval = statistics.bootstrap(statistic(task, draws), n, seed=seed)
    if task.metric != "accuracy":
        scores["mean"] = scores[task.metric]
    if len(draws) > 1:
        values = [found[task.metric] for found in each]
        scores |= {"draws": values, "sd_of_draws": stdev(values)}
    return {"metric": task.metric, **scores, "ci95": list(interval), "n": n}


def statistic(task: Task, draws: Draws) -> statistics.Statistic:
    """The task's main metric, averaged over draws, as a function of item indices, for resampling."""
    mean_of = task.metrics[task.metric]
    if mean_of:
        values = np.array([[judgement[mean_of] for judgement in draw] for draw in draws], dtype=np.float64).mean(0)
        return lambda indices: float(values[indices].mean())
    return lambda indices: fmean(_metric(task, [draw[i] for i in indices]) for draw in draws)


def compare(task: Task, base: Draws, final: Draws, seed: int) -> dict[str, Any]:
    """Paired on the same items: McNemar where answers are right or wrong, the bootstrapped difference always."""
    difference, interval = statistics.paired_bootstrap(
        statistic(task, base), statistic(task, final), len(base[0]), seed=seed
    )
    result: dict[str, Any] = {"difference": {"value": difference, "ci95": list(interval)}}
    if "correct" in base[0][0] and len(base) == 1:
        paired = statistics.mcnemar([row["correct"] for row in base[0]], [row["correct"] for row in final[0]])
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


def overlap_result(task: Task, measured: ModelRows, seed: int, known: set[str]) -> dict[str, Any]:
    """The task's scores on the items that no training text holds (`clean`) and on those that some does."""
    parts = {"clean": [i for i, item in enumerate(task.items) if item.id not in known]}
    parts["overlapping"] = [i for i, item in enumerate(task.items) if item.id in known]
    return {part: _entry(task, indices, measured, seed) for part, indices in parts.items() if indices}


def _entry(task: Task, indices: list[int], measured: ModelRows, seed: int) -> dict[str, Any]:
    items = [task.items[i] for i in indices]
    starts = range(0, len(task.asked), len(task.items))
    draws = {label: [[rows[start + i] for i in indices] for start in starts] for label, rows in measured.items()}
    result: dict[str, Any] = {label: summarise(task, items, part, seed) for label, part in draws.items()}
    if draws.keys() >= {"base", "final"}:
        said = {label: _generations(part) for label, part in draws.items()}
        main = draws if items[0].options else said
        result |= compare(task, main["base"], main["final"], seed)
        if items[0].options and said["base"]:
            result["generation"] = compare(task, said["base"], said["final"], seed)
    return result


def write_items(path: Path, task: Task, measured: ModelRows) -> None:
    """One line per question: id, gold label, examples, and per model prediction and scores. Never text of a source."""
    lines = []
    for index, item in enumerate(task.asked):
        line: dict[str, Any] = {"id": item.id, **({"facet": item.facet} if item.facet else {})}
        line |= {"draw": index // len(task.items), "shots": list(item.shots)} if task.draws else {}
        line |= {"gold": item.options[item.gold]} if item.options else {}
        lines.append(json.dumps(line | {label: rows[index] for label, rows in measured.items()}, ensure_ascii=False))
    store.write_atomic(path, "\n".join(lines) + "\n")
