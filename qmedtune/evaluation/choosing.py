"""The rule that chooses a point of `merge.sweep`: gain over the base on development items, within a limit of what may
be lost on general text.

Deliberately not here: merging and measuring the points (sweep.py), and which items these are (halves.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qmedtune.evaluation import statistics
from qmedtune.evaluation.measure import MeasuredModel, Row
from qmedtune.evaluation.summary import summarise
from qmedtune.recipe import Recipe, SweepSection
from qmedtune.results import Score, SweepPoint
from qmedtune.tasks import Task

WORDS = {
    "tasks": "the highest mean score of the tasks by log-likelihood",
    "answers": "the highest mean score of the tasks by the answers that are written",
    "perplexity": "the lowest mean log perplexity of the texts that are not general",
}


@dataclass(frozen=True)
class Rule:
    """A recipe's rule, and what it is applied to."""

    section: SweepSection
    tasks: Sequence[Task]
    domain: Sequence[str]
    general: Sequence[str]
    seed: int

    @property
    def words(self) -> str:
        told = f"{WORDS[self.section.choose]}; of equal ones the least general loss"
        if self.section.max_general_loss is None:
            return told
        return f"{told}; general perplexity at most {self.section.max_general_loss:.1%} above the base's"


def rule_of(recipe: Recipe, sweep: SweepSection, tasks: Sequence[Task]) -> Rule:
    domain: list[str] = []
    general: list[str] = []
    for source in recipe.evaluate.perplexity:
        if recipe.data[source].kind == "general":
            general.append(source)
        else:
            domain.append(source)
    return Rule(sweep, tasks, domain, general, recipe.seed)


def point_of(rule: Rule, measured: MeasuredModel, base: MeasuredModel | None, share: float | None) -> SweepPoint:
    """What was measured at one share. base: of the untouched base, None for itself."""
    scores: dict[str, Score] = {}
    for task in rule.tasks:
        scores[task.name] = summarise(task, task.items, [measured.tasks[task.name]], rule.seed)
    texts: dict[str, float] = {}
    for source, found in measured.perplexity.items():
        texts[source] = found.perplexity
    point = SweepPoint(tasks=scores, perplexity=texts)
    if share is not None:
        point = point.model_copy(update={"share": share})
    if base is None:
        return point
    loss = _general_loss(rule, measured, base)
    limit = rule.section.max_general_loss
    found = {
        "gain": _worth(rule, measured) - _worth(rule, base),
        "general_loss": loss,
        "allowed": limit is None or loss is None or loss <= limit,
    }
    return point.model_copy(update=found)


def _worth(rule: Rule, measured: MeasuredModel) -> float:
    """What the rule goes by, higher is better: a mean score, or less the mean log perplexity."""
    if rule.section.choose == "perplexity":
        return -fmean(math.log(measured.perplexity[source].perplexity) for source in rule.domain)
    values: list[float] = []
    for task in rule.tasks:
        values.append(_value(rule, task, measured.tasks[task.name]))
    return fmean(values)


def _value(rule: Rule, task: Task, rows: Sequence[Row]) -> float:
    return task.aggregate([_judged(rule, row) for row in rows])[task.metric]


def _judged(rule: Rule, row: Row) -> Row:
    """The judgement that counts. Tasks without options are judged by their answers alone."""
    if "generation" in row and (rule.section.choose == "answers" or "logprobs" not in row):
        return row["generation"]
    return row


def _general_loss(rule: Rule, measured: MeasuredModel, base: MeasuredModel) -> float | None:
    """Rise of the mean perplexity (geometric) of general texts over the base's; None where there are none."""
    if not rule.general:
        return None
    rises: list[float] = []
    for source in rule.general:
        rises.append(math.log(measured.perplexity[source].perplexity / base.perplexity[source].perplexity))
    return math.exp(fmean(rises)) - 1


def choose(points: Sequence[SweepPoint]) -> tuple[SweepPoint, list[str]]:
    """The chosen point, and what to warn of. Where no point keeps the limit, the one that loses least."""
    allowed = [point for point in points if point.allowed]
    if not allowed:
        least = min(points, key=lambda point: (point.general_loss or 0.0, -_gain(point)))
        told = f"no share keeps general perplexity within the limit: the least loss was taken, {least.general_loss:.1%}"
        return least, [told]
    return max(allowed, key=lambda point: (_gain(point), -(point.general_loss or 0.0), -(point.share or 0.0))), []


def _gain(point: SweepPoint) -> float:
    assert point.gain is not None, "only the base has none"
    return float(point.gain)


def within_noise(rule: Rule, measured: MeasuredModel, chosen: MeasuredModel) -> bool | None:
    """Whether the bootstrap interval (95 %) of a point's difference from the chosen one holds 0; None for perplexities,
    and for metrics that are no mean over items."""
    differences: list[float] = []
    if rule.section.choose == "perplexity":
        return None
    for task in rule.tasks:
        number = task.metrics[task.metric]
        if number is None:
            return None
        pairs = zip(measured.tasks[task.name], chosen.tasks[task.name], strict=True)
        own: list[float] = []
        for row, other in pairs:
            own.append(float(_judged(rule, row)[number]) - float(_judged(rule, other)[number]))
        weight = 1 / (len(rule.tasks) * len(own))
        differences += [difference * weight for difference in own]
    if not any(differences):
        return True
    low, high = statistics.bootstrap_mean(differences, seed=rule.seed)
    return low <= 0 <= high
