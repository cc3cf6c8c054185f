"""From rows to scores: accuracy or another metric with its interval, calibration, and base against final paired.

With examples before the questions (n-shot) a task is asked once per draw of examples: scores are means over draws, with
the spread of the draws beside them, and items are resampled whole, all their draws together.
Deliberately absent: measuring (measure.py), formulas (statistics.py and the tasks' own metrics), rounding for print.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from qmedtune import results, store, ui
from qmedtune.evaluation import statistics
from qmedtune.evaluation.measure import Row
from qmedtune.results import Change, Difference, Score, Scores
from qmedtune.tasks import Item, Task
from qmedtune.tasks.definitions import READINGS, definition

WILSON, TANGO = "Wilson score", "Tango score, paired"
NO_WIDTH = 1e-12

ModelRows = dict[str, list[Row]]
"""Rows per model: `base` and `final` in a run, `model` where one is evaluated; of all draws, one after the other."""
Draws = list[list[Row]]
"""Rows (or the judgements in them) per draw of examples; one draw where there are none."""
Facts = dict[str, object]
"""Some fields of a Score."""


def summarise(task: Task, items: Sequence[Item], draws: Draws, seed: int) -> Score:
    """The scores of one model. Items with options: by log-likelihood, and under `generation` what the model writes."""
    generated, groups = _generations(draws), _groups(items)
    facts = _how_asked(task, draws)
    if not items[0].options:
        return _generated_score(task, generated, groups, seed).model_copy(update=facts)
    facts |= _without_a_model(task, items) | _calibration(draws, whole=len(items) == len(task.items))
    if task.metric != "auroc":  # of log odds, which no length divides
        facts["per_character"] = _mean(task, _column(draws, "normalised"))
    if generated:
        written = _generated_score(task, generated, groups, seed)
        if "majority" in facts:
            written = written.model_copy(update={"majority": facts["majority"]})
        facts["generation"] = written
    return _score(task, draws, groups, seed).model_copy(update=facts)


def _how_asked(task: Task, draws: Draws) -> Facts:
    """truncated: prompts, of all draws, whose beginning was cut; examples and where they are from."""
    truncated = 0
    for draw in draws:
        for row in draw:
            truncated += row["truncated"]
    found: Facts = {"truncated": truncated}
    if task.prompts != "own":
        found["prompts"] = task.prompts
    if not task.draws:
        return found
    return found | {"shots": len(task.draws[0][0].shots), "shots_from": task.shots_from}


def _calibration(draws: Draws, *, whole: bool) -> Facts:
    """Of answers by log-likelihood, all draws together. ece: expected calibration error, 0 to 1; its bins, of a task
    as a `whole`."""
    confidences, correct, ties = [], [], 0
    for draw in draws:
        for row in draw:
            confidences.append(row["confidence"])
            correct.append(row["correct"])
            ties += row.get("tie", False)
    found: Facts = {"ece": statistics.expected_calibration_error(confidences, correct), "ties": ties}
    if whole:
        found["calibration"] = statistics.calibration_bins(confidences, correct)
    return found


def _without_a_model(task: Task, items: Sequence[Item]) -> Facts:
    """What guessing reaches, and what always the commonest right answer (a letter, yes, a sentence) would."""
    if task.metric != "accuracy":
        return {}
    chances = [1 / len(item.options) for item in items]
    return {"chance": float(np.mean(chances)), "majority": majority_of(items)}


def majority_of(items: Sequence[Item]) -> float:
    """The share of items whose right option is the commonest one (a letter, yes, a sentence)."""
    answers = Counter[str]()
    for item in items:
        answers[item.options[item.gold]] += 1
    [(_, commonest)] = answers.most_common(1)
    return commonest / len(items)


def _groups(items: Sequence[Item]) -> statistics.Groups | None:
    """What each item was taken from (itself, where it names nothing); None where no two or all share it."""
    groups = [item.group or f"item {index}" for index, item in enumerate(items)]
    if not 1 < len(set(groups)) < len(groups):
        return None
    return groups


def _generations(draws: Draws) -> Draws:
    """What was judged of the written answers; nothing where none were asked for."""
    if "generation" not in draws[0][0]:
        return []
    return _column(draws, "generation")


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
        found.append([draw[index] for index in indices])
    return found


def _generated_score(task: Task, draws: Draws, groups: statistics.Groups | None, seed: int) -> Score:
    """unparsed: answers that could not be read (judged as wrong); cut: answers that had not ended by themselves."""
    unparsed = cut = 0
    for draw in draws:
        for answer in draw:
            unparsed += not answer["parsed"]
            cut += answer["ended"] == "length"
    score = _score(task, draws, groups, seed).model_copy(update={"unparsed": unparsed, "cut": cut})
    if task.extraction == "stated":
        return score
    meant = f"{score.definition}; {READINGS[task.extraction]}"
    return score.model_copy(update={"extraction": task.extraction, "definition": meant})


def _metric(task: Task, judgements: list[Row]) -> float:
    return task.aggregate(judgements)[task.metric]


def _mean(task: Task, draws: Draws) -> float:
    """The main metric, averaged over draws."""
    return fmean(_metric(task, draw) for draw in draws)


def _score(task: Task, draws: Draws, groups: statistics.Groups | None, seed: int) -> Score:
    """The task's metrics, the main one with its 95 % interval. `groups`: how many there are, where items share them."""
    each = [task.aggregate(draw) for draw in draws]
    found: Facts = {"metric": task.metric, "definition": definition(task.metric, task.name.partition("-")[0])}
    for name in each[0]:
        found[name] = fmean(metrics[name] for metrics in each)
    if task.metric != "accuracy":
        found["mean"] = found[task.metric]
    if len(draws) > 1:
        values = [metrics[task.metric] for metrics in each]
        found |= {"draws": values, "sd_of_draws": stdev(values)}
    interval, method = _interval(task, draws, groups, seed)
    found |= {"ci95": interval, "ci95_method": method, "n": len(draws[0])}
    if groups:
        found["groups"] = len(set(groups))
    if task.prompts != "own":
        found["prompts"] = task.prompts
    return Score.model_validate(found)


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
    if groups is None:
        return len(draws[0])
    return len(set(groups))


def _bootstrap_name(groups: statistics.Groups | None) -> str:
    return f"percentile bootstrap over {_units(groups)}, {statistics.RESAMPLES:,} resamples"


def _units(groups: statistics.Groups | None) -> str:
    if groups is None:
        return "items"
    return "groups"


def statistic(task: Task, draws: Draws) -> statistics.Statistic:
    """The task's main metric, averaged over draws, as a function of item indices, for resampling."""
    mean_of = task.metrics[task.metric]
    if mean_of:
        values = np.array(_column(draws, mean_of), dtype=np.float64).mean(0)
        return lambda indices: float(values[indices].mean())
    return lambda indices: _mean(task, _at(draws, indices))


def compare(task: Task, base: Draws, final: Draws, seed: int, *, groups: statistics.Groups | None = None) -> Change:
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
    difference = Difference(value=value, ci95=interval, ci95_method=method)
    if paired is None:
        return Change(difference=difference)
    return Change(difference=difference, paired=paired)


def task_result(task: Task, measured: ModelRows, seed: int) -> results.TaskScores:
    """`base` and `final` (or the one model that was measured) for the task and each of its facets."""
    places: dict[str, list[int]] = {}
    for index, item in enumerate(task.items):
        if item.facet:
            places.setdefault(item.facet, []).append(index)
    whole = _scores_of(task, range(len(task.items)), measured, seed)
    found = results.TaskScores.model_validate(whole.as_json())
    if len(places) < 2:
        return found
    facets = {}
    for facet, indices in places.items():
        facets[facet] = _scores_of(task, indices, measured, seed)
    return found.model_copy(update={"facets": facets})


def overlap_result(task: Task, measured: ModelRows, seed: int, known: set[str]) -> dict[str, Scores]:
    """The task's scores on the items that no training text holds (`clean`) and on those that some does.

    A part in which the metric is undefined (AUROC of one outcome) is left out, and said.
    """
    clean: list[int] = []
    overlapping: list[int] = []
    for index, item in enumerate(task.items):
        if item.id in known:
            overlapping.append(index)
        else:
            clean.append(index)
    scored = {}
    for part, indices in (("clean", clean), ("overlapping", overlapping)):
        if indices and _defined(task, indices, next(iter(measured.values()))):
            scored[part] = _scores_of(task, indices, measured, seed)
        elif indices:
            ui.note(f"{task.name}: no {task.metric} of the {len(indices)} {part} items alone: they have one outcome")
    return scored


def _defined(task: Task, indices: Sequence[int], rows: list[Row]) -> bool:
    draws = _at([rows], indices)
    if not task.items[0].options:
        draws = _generations(draws)
    return isfinite(_mean(task, draws))


def _scores_of(task: Task, indices: Sequence[int], measured: ModelRows, seed: int) -> Scores:
    """Each model's scores on some of the items, and where there are two what changed."""
    items = [task.items[index] for index in indices]
    draws: dict[str, Draws] = {}
    written: dict[str, Draws] = {}
    found: Facts = {}
    for label, rows in measured.items():
        draws[label] = _at(_per_draw(task, rows), indices)
        written[label] = _generations(draws[label])
        found[label] = summarise(task, items, draws[label], seed)
    if draws.keys() >= {"base", "final"}:
        groups = _groups(items)
        judged = written
        if items[0].options:
            judged = draws
        change = compare(task, judged["base"], judged["final"], seed, groups=groups)
        for name in change.model_fields_set:
            found[name] = getattr(change, name)
        if items[0].options and written["base"]:
            found["generation"] = compare(task, written["base"], written["final"], seed, groups=groups)
    return Scores.model_validate(found)


def _per_draw(task: Task, rows: list[Row]) -> Draws:
    """The rows of all draws, one after the other, draw by draw."""
    size = len(task.items)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def write_items(path: Path, task: Task, measured: ModelRows) -> None:
    """One line per question: id, gold label, examples, and per model prediction and scores. Never text of a source."""
    lines = []
    groups: dict[str, int] = {}
    for index, item in enumerate(task.asked):
        line: Facts = {"id": item.id}
        if item.group:
            line["group"] = groups.setdefault(item.group, len(groups))  # its name may be a premise, or a patient
        if item.facet:
            line["facet"] = item.facet
        if task.draws:
            line |= {"draw": index // len(task.items), "shots": list(item.shots)}
        if item.options:
            line["gold"] = item.options[item.gold]
        for label, rows in measured.items():
            line[label] = rows[index]
        lines.append(json.dumps(line, ensure_ascii=False))
    store.write_atomic(path, "\n".join(lines) + "\n")
