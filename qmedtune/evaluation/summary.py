"""From rows to scores: accuracy or another metric with its interval, calibration, and base against final paired.

With examples before the questions (n-shot) a task is asked once per draw of examples: scores are means over draws, with
the spread of the draws beside them, and items are resampled whole, all their draws together.
Deliberately absent: measuring (measure.py), formulas (statistics.py and the tasks' own metrics), rounding for print.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from qmedtune import store, ui
from qmedtune.evaluation import statistics
from qmedtune.evaluation.measure import Row
from qmedtune.tasks import Item, Task
from qmedtune.tasks.definitions import READINGS, definition

WILSON, TANGO = "Wilson score", "Tango score, paired"
NO_WIDTH = 1e-12

ModelRows = dict[str, list[Row]]
"""Rows per model: `base` and `final` in a run, `model` where one is evaluated; of all draws, one after the other."""
Draws = list[list[Row]]
"""Rows (or the judgements in them) per draw of examples; one draw where there are none."""


def summarise(task: Task, items: Sequence[Item], draws: Draws, seed: int) -> dict[str, Any]:
    """The scores of one model. Items with options: by log-likelihood, and under `generation` what the model writes."""
    rows = [row for draw in draws for row in draw]
    generated, groups = _generations(draws), _groups(items)
    facts = {"truncated": sum(row["truncated"] for row in rows)}
    if task.draws:
        facts |= {"shots": len(task.draws[0][0].shots), "shots_from": task.shots_from}
    if not items[0].options:
        return _generated_scores(task, generated, groups, seed) | facts
    result = _scores(task, draws, groups, seed) | facts | _without_a_model(task, items)
    if task.metric != "auroc":  # of log odds, which no length divides
        result["per_character"] = _mean(task, _column(draws, "normalised"))
    confidences, correct = [row["confidence"] for row in rows], [row["correct"] for row in rows]
    result["ece"] = statistics.expected_calibration_error(confidences, correct)
    result["ties"] = sum(row.get("tie", False) for row in rows)
    if not generated:
        return result
    written = _generated_scores(task, generated, groups, seed)
    common = {"majority": result["majority"]} if "majority" in result else {}
    return result | {"generation": written | common}


def _without_a_model(task: Task, items: Sequence[Item]) -> dict[str, float]:
    """What guessing reaches, and what always the commonest right answer (a letter, yes, a sentence) would."""
    if task.metric != "accuracy":
        return {}
    answers = Counter(item.options[item.gold] for item in items)
    chance = float(np.mean([1 / len(item.options) for item in items]))
    return {"chance": chance, "majority": answers.most_common(1)[0][1] / len(items)}


def _groups(items: Sequence[Item]) -> statistics.Groups | None:
    """What each item was taken from (itself, where it names nothing); None where no two or all share it."""
    groups = [item.group or f"item {index}" for index, item in enumerate(items)]
    return groups if 1 < len(set(groups)) < len(groups) else None


def _generations(draws: Draws) -> Draws:
    """What was judged of the written answers; nothing where none were asked for."""
    return _column(draws, "generation") if "generation" in draws[0][0] else []


def _column(draws: Draws, key: str) -> list[list[Any]]:
    """One entry of every row, draw by draw."""
    found = []
    for draw in draws:
        found.append([row[key] for row in draw])
    return found


def _at(draws: Draws, indices: Sequence[int] | np.ndarray) -> Draws:
    """The rows at these places, draw by draw."""
    found = []
    for draw in draws:
        found.append([draw[i] for i in indices])
    return found


def _generated_scores(task: Task, draws: Draws, groups: statistics.Groups | None, seed: int) -> dict[str, Any]:
    """unparsed: answers that could not be read (judged as wrong); cut: answers that had not ended by themselves."""
    answers = [answer for draw in draws for answer in draw]
    unparsed = sum(not answer["parsed"] for answer in answers)
    cut = sum(answer["ended"] == "length" for answer in answers)
    scores = _scores(task, draws, groups, seed) | {"unparsed": unparsed, "cut": cut}
    if task.extraction != "stated":
        scores |= {"extraction": task.extraction, "definition": f"{scores['definition']}; {READINGS[task.extraction]}"}
    return scores


def _metric(task: Task, judgements: list[Row]) -> float:
    return task.aggregate(judgements)[task.metric]


def _mean(task: Task, draws: Draws) -> float:
    """The main metric, averaged over draws."""
    return fmean(_metric(task, draw) for draw in draws)


def _scores(task: Task, draws: Draws, groups: statistics.Groups | None, seed: int) -> dict[str, Any]:
    """The task's metrics, the main one with its 95 % interval. `groups`: how many there are, where items share them."""
    each = [task.aggregate(draw) for draw in draws]
    scores: dict[str, Any] = {}
    for name in each[0]:
        scores[name] = fmean(found[name] for found in each)
    if task.metric != "accuracy":
        scores["mean"] = scores[task.metric]
    if len(draws) > 1:
        values = [found[task.metric] for found in each]
        scores |= {"draws": values, "sd_of_draws": stdev(values)}
    interval, method = _interval(task, draws, groups, seed)
    facts = {"ci95": list(interval), "ci95_method": method, "n": len(draws[0])}
    facts |= {"groups": len(set(groups))} if groups else {}
    facts |= {"prompts": task.prompts} if task.prompts != "own" else {}
    meant = definition(task.metric, task.name.partition("-")[0])
    return {"metric": task.metric, "definition": meant, **scores, **facts}


def _interval(task: Task, draws: Draws, groups: statistics.Groups | None, seed: int) -> tuple[statistics.Interval, str]:
    """(interval, name of the method). Wilson for accuracy, else bootstrap over items; over groups for any metric of
    items that share them.

    Of several draws Wilson takes the mean, as if each item had been asked once: wider than need be. A bootstrap of
    width 0 (every answer right, or wrong) is no certainty: Wilson's interval of so many items takes its place.
    """
    size = _size(draws, groups)
    value = _mean(task, draws)
    if task.metric == "accuracy" and groups is None:
        return statistics.wilson(value * size, size), WILSON
    low, high = statistics.bootstrap(statistic(task, draws), len(draws[0]), seed=seed, groups=groups)
    if high - low < NO_WIDTH and 0 <= value <= 1:
        return statistics.wilson(min(1.0, value) * size, size), f"{WILSON}, of {size} {_units(groups)}"
    return (low, high), _bootstrap_name(groups)


def _size(draws: Draws, groups: statistics.Groups | None) -> int:
    """How much independent evidence there is: items, or groups of them."""
    return len(draws[0]) if groups is None else len(set(groups))


def _bootstrap_name(groups: statistics.Groups | None) -> str:
    return f"percentile bootstrap over {_units(groups)}, {statistics.RESAMPLES:,} resamples"


def _units(groups: statistics.Groups | None) -> str:
    return "items" if groups is None else "groups"


def statistic(task: Task, draws: Draws) -> statistics.Statistic:
    """The task's main metric, averaged over draws, as a function of item indices, for resampling."""
    mean_of = task.metrics[task.metric]
    if mean_of:
        values = np.array(_column(draws, mean_of), dtype=np.float64).mean(0)
        return lambda indices: float(values[indices].mean())
    return lambda indices: _mean(task, _at(draws, indices))


def compare(
    task: Task, base: Draws, final: Draws, seed: int, groups: statistics.Groups | None = None
) -> dict[str, Any]:
    """Paired on the same items: the difference with its interval always, McNemar where independent answers are right
    or wrong; there Tango's score interval, else the bootstrap.

    A bootstrap of width 0 (no answer changed) is no certainty: Tango's interval for no change among so many items, or
    groups, takes its place.
    """
    n, paired = len(base[0]), None
    if "correct" in base[0][0] and len(base) == 1 and groups is None:
        [before], [after] = _column(base, "correct"), _column(final, "correct")
        paired = statistics.mcnemar(before, after)
    if paired is not None and task.metric == "accuracy":
        value, method = (paired.gained - paired.lost) / n, TANGO
        interval = statistics.tango(paired.gained, paired.lost, n)
    else:
        first, second = statistic(task, base), statistic(task, final)
        value, interval = statistics.paired_bootstrap(first, second, n, seed=seed, groups=groups)
        method = _bootstrap_name(groups)
        if interval[1] - interval[0] < NO_WIDTH:
            size = _size(base, groups)
            low, high = statistics.tango(0, 0, size)
            interval, method = (value + low, value + high), f"{TANGO}, no change in {size} {_units(groups)}"
    result: dict[str, Any] = {"difference": {"value": value, "ci95": list(interval), "ci95_method": method}}
    if paired is not None:
        result["paired"] = {"test": "McNemar exact", **asdict(paired)}
    return result


def task_result(task: Task, measured: ModelRows, seed: int) -> dict[str, Any]:
    """`base` and `final` (or the one model that was measured) for the task and each of its facets."""
    result = _entry(task, list(range(len(task.items))), measured, seed)
    places: dict[str, list[int]] = {}
    for index, item in enumerate(task.items):
        if item.facet:
            places.setdefault(item.facet, []).append(index)
    if len(places) > 1:
        result["facets"] = {facet: _entry(task, indices, measured, seed) for facet, indices in places.items()}
    return result


def overlap_result(task: Task, measured: ModelRows, seed: int, known: set[str]) -> dict[str, Any]:
    """The task's scores on the items that no training text holds (`clean`) and on those that some does.

    A part in which the metric is undefined (AUROC of one outcome) is left out, and said.
    """
    parts = {"clean": [i for i, item in enumerate(task.items) if item.id not in known]}
    parts["overlapping"] = [i for i, item in enumerate(task.items) if item.id in known]
    scored = {}
    for part, indices in parts.items():
        if indices and _defined(task, indices, next(iter(measured.values()))):
            scored[part] = _entry(task, indices, measured, seed)
        elif indices:
            ui.note(f"{task.name}: no {task.metric} of the {len(indices)} {part} items alone: they have one outcome")
    return scored


def _defined(task: Task, indices: list[int], rows: list[Row]) -> bool:
    draw = _at([rows], indices)
    return isfinite(_mean(task, draw if task.items[0].options else _generations(draw)))


def _entry(task: Task, indices: list[int], measured: ModelRows, seed: int) -> dict[str, Any]:
    items = [task.items[i] for i in indices]
    draws = {label: _at(_per_draw(task, rows), indices) for label, rows in measured.items()}
    result: dict[str, Any] = {label: summarise(task, items, part, seed) for label, part in draws.items()}
    if draws.keys() >= {"base", "final"}:
        said = {label: _generations(part) for label, part in draws.items()}
        main = draws if items[0].options else said
        groups = _groups(items)
        result |= compare(task, main["base"], main["final"], seed, groups)
        if items[0].options and said["base"]:
            result["generation"] = compare(task, said["base"], said["final"], seed, groups)
    return result


def _per_draw(task: Task, rows: list[Row]) -> Draws:
    """The rows of all draws, one after the other, draw by draw."""
    size = len(task.items)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def write_items(path: Path, task: Task, measured: ModelRows) -> None:
    """One line per question: id, gold label, examples, and per model prediction and scores. Never text of a source."""
    lines = []
    for index, item in enumerate(task.asked):
        line: dict[str, Any] = {"id": item.id, **({"facet": item.facet} if item.facet else {})}
        line |= {"draw": index // len(task.items), "shots": list(item.shots)} if task.draws else {}
        line |= {"gold": item.options[item.gold]} if item.options else {}
        lines.append(json.dumps(line | {label: rows[index] for label, rows in measured.items()}, ensure_ascii=False))
    store.write_atomic(path, "\n".join(lines) + "\n")
