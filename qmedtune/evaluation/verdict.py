"""What may be claimed of models that answered the same items: win, tie or lose, and one sentence that survives review.

Exact McNemar tests on paired items, Holm's correction over all tasks and models, Tango's interval of the difference,
and the difference that so many items could have shown: a tie is no proof of equality. Items of one note or premise are
no independent evidence: their groups are tested (exact sign flips) and resampled.
Deliberately absent: measuring (qmedtune/compare.py), scores that are no right or wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, lgamma, log, sqrt
from statistics import NormalDist
from typing import Literal

from qmedtune.ablation.effects import holm
from qmedtune.evaluation import statistics
from qmedtune.results import DuelEntry, Paired

SIGNIFICANCE, POWER = 0.05, 0.8

Verdict = Literal["win", "tie", "lose"]

Right = Sequence[bool]
"""Per item whether a model answered it rightly, items in one order for all models."""


@dataclass(frozen=True)
class Duel:
    """`model` against `reference` on one task. difference: share of items, above 0 where the model is better.

    detectable: the difference that a test as strict as this one finds in 80 % of draws of so many items.
    groups: how many there are, where items share them.
    """

    task: str
    model: str
    reference: str
    n: int
    gained: int
    lost: int
    difference: float
    ci95: tuple[float, float]
    p_value: float
    p_holm: float
    verdict: Verdict
    detectable: float
    groups: int | None = None

    def entry(self) -> DuelEntry:
        """As compare.json holds it."""
        if self.groups is None:
            return DuelEntry(**asdict(self), test="McNemar exact, Holm", ci95_method="Tango score")
        method = f"percentile bootstrap over groups, {statistics.RESAMPLES:,} resamples"
        return DuelEntry(**asdict(self), test="exact sign flips of groups, Holm", ci95_method=method)


Answers = Mapping[str, Mapping[str, Right]]
"""By task and model, whether each item was answered rightly."""


Grouped = Mapping[str, statistics.Groups]
"""By task, what each item was taken from; tasks whose items stand alone are not in it."""


def duels(answers: Answers, reference: str, grouped: Grouped | None = None) -> list[Duel]:
    """Every other model against `reference`."""
    models: dict[str, None] = {}
    for found in answers.values():
        models |= dict.fromkeys(found)
    return paired_duels(answers, [(model, reference) for model in models if model != reference], grouped)


def paired_duels(answers: Answers, pairs: Sequence[tuple[str, str]], grouped: Grouped | None = None) -> list[Duel]:
    """On every task the first model of each pair against the second; Holm's correction is over all of it."""
    met: list[tuple[str, str, str]] = []
    tested: list[_Tested] = []
    for task, found in answers.items():
        groups = grouped.get(task) if grouped else None
        for model, reference in pairs:
            met.append((task, model, reference))
            tested.append(_tested(found[reference], found[model], groups))
    adjusted = holm([each.paired.p_value for each in tested])
    made: list[Duel] = []
    for (task, model, reference), each, p_holm in zip(met, tested, adjusted, strict=True):
        n, paired = len(answers[task][model]), each.paired
        difference = (paired.gained - paired.lost) / n
        made.append(
            Duel(
                task=task,
                model=model,
                reference=reference,
                n=n,
                gained=paired.gained,
                lost=paired.lost,
                difference=difference,
                ci95=each.ci95,
                p_value=paired.p_value,
                p_holm=p_holm,
                verdict=_verdict(difference, p_holm),
                detectable=detectable(each.variance / n, n, len(met)),
                groups=each.groups,
            )
        )
    return made


@dataclass(frozen=True)
class _Tested:
    """variance: of the net gain, in items, where there is no difference; that many items changed, if they stand
    alone."""

    paired: Paired
    ci95: tuple[float, float]
    variance: int
    groups: int | None


def _tested(before: Right, after: Right, groups: statistics.Groups | None) -> _Tested:
    paired = statistics.mcnemar(before, after)
    n = len(before)
    if groups is None or len(set(groups)) == n:
        ci95 = statistics.tango(paired.gained, paired.lost, n)
        return _Tested(paired, ci95, paired.gained + paired.lost, None)
    changes = [int(is_right) - int(was_right) for was_right, is_right in zip(before, after, strict=True)]
    nets: dict[Hashable, int] = {}
    for group, change in zip(groups, changes, strict=True):
        nets[group] = nets.get(group, 0) + change
    p_value = statistics.sign_flip(list(nets.values()))
    paired = paired.model_copy(update={"p_value": p_value, "test": "exact sign flips of groups"})
    if any(nets.values()):
        ci95 = statistics.bootstrap_mean(changes, groups=groups)
    else:  # a bootstrap of width 0 is no certainty
        ci95 = statistics.tango(0, 0, len(nets))
    return _Tested(paired, ci95, sum(net * net for net in nets.values()), len(nets))


def _verdict(difference: float, p_value: float) -> Verdict:
    if p_value >= SIGNIFICANCE:
        return "tie"
    return "win" if difference > 0 else "lose"


def detectable(changed: float, n: int, tests: int) -> float:
    """The smallest difference found with 80 % power where a share `changed` of n items changes, at the strictest level
    of Holm's procedure over `tests` tests (normal approximation). Of groups: the variance of their net gains over n."""
    return (_z(1 - SIGNIFICANCE / (2 * tests)) + _z(POWER)) * sqrt(max(changed, 1 / n) / n)


def power(gained: float, lost: float, n: int, tests: int) -> float:
    """Chance that a true gain and loss (probabilities of an item) is claimed, in the right direction, of n items at the
    strictest level of Holm's procedure. Exact: over how many items change, and how many of them for the worse."""
    fewer = min(gained, lost)
    changed = gained + lost
    if not changed:
        return 0.0
    found = 0.0
    for count in range(n + 1):
        most = _most_against(count, SIGNIFICANCE / tests)
        right = sum(_binomial(against, count, fewer / changed) for against in range(most + 1))
        found += _binomial(count, n, changed) * right
    return min(1.0, found)


def _most_against(changed: int, level: float) -> int:
    """Of so many changed items the most that may go the other way in a significant result; -1 where none may."""
    tail, against = 0.0, -1
    while 2 * against < changed:
        tail += _binomial(against + 1, changed, 0.5)
        if 2 * tail >= level:
            break
        against += 1
    return against


def _binomial(hits: int, n: int, probability: float) -> float:
    """Of exactly so many hits in n."""
    if probability in (0.0, 1.0):
        return float(hits == n * probability)
    ways = lgamma(n + 1) - lgamma(hits + 1) - lgamma(n - hits + 1)
    return exp(ways + hits * log(probability) + (n - hits) * log(1 - probability))


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def claim(found: Sequence[Duel], precision: str) -> str:
    """One sentence about one model against the reference. precision: what both were scored in, in words."""
    model, reference = found[0].model, found[0].reference
    tasks = "1 task" if len(found) == 1 else f"{len(found)} tasks"
    how = f"in {precision}, prompts chosen per model, on the same items of {tasks}"
    parts = [f"{model} against {reference}, {how}:"]
    for verdict, words in (("win", "better on"), ("lose", "worse on"), ("tie", "no difference shown on")):
        told = [_told(duel) for duel in found if duel.verdict == verdict]
        if told:
            parts.append(f"{words} {', '.join(told)};")
    tests = ["exact McNemar"]
    if any(duel.groups for duel in found):
        tests.append("exact sign flips where items share a note or premise")
    return " ".join(parts).rstrip(";") + f" ({'; '.join(tests)}; Holm-corrected, p < .05)."


def _told(duel: Duel) -> str:
    low, high = duel.ci95
    change = f"{duel.difference:+.3f}, 95 % {low:+.3f} to {high:+.3f}, n {duel.n:,}"
    if duel.verdict == "tie":
        change += f", could show {duel.detectable:.3f}"
    return f"{duel.task} ({change})"
