"""From the run folders of an ablation to one result: scores with intervals, perplexities, and what is beyond noise.

Only sealed runs are read; an arm that is not through all seeds is shown with those it has. Items are compared by their
ids, so that arms and seeds are paired on the same questions.
Deliberately absent: drawing (figure.py, ablation_page.py), statistics (effects.py), reading models.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from qmedtune import record
from qmedtune.ablation import effects
from qmedtune.ablation.arms import Arm
from qmedtune.results import AnsweredItem, ArmDifference, ArmEntry, Comparisons, Measure, Ratio, Run

Answers = dict[str, float]
"""Id of an item -> 1.0 right, 0.0 wrong; the mean over draws where a task was asked with several draws of examples."""


@dataclass(frozen=True)
class ArmScores:
    """One arm on one seed. metrics: tasks whose score is no mean over items."""

    answers: dict[str, Answers]
    metrics: dict[str, float]
    perplexity: dict[str, float]
    trained_tokens: dict[str, int]


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds. scores: [seeds, items] per task and facet, items in the order of their ids."""

    arm: Arm
    seeds: list[int]
    scores: dict[str, np.ndarray]
    metrics: dict[str, list[float]]
    perplexity: dict[str, list[float]]
    trained_tokens: dict[str, int]


def run_folder(out: Path, arm: Arm, seed: int) -> Path:
    return out / "arms" / arm.name / f"seed-{seed}"


def read_run(folder: Path, label: str) -> ArmScores | None:
    """What `label` (base or final) of a finished run did; None for a run that is not finished."""
    run = record.read(folder)
    if run is None or not run.finished:
        return None
    answers: dict[str, Answers] = {}
    metrics: dict[str, float] = {}
    for name, task in run.scored.tasks.items():
        score = task.of(label)
        assert score is not None
        if score.metric != "accuracy":
            metrics[name] = score.value
            continue
        items = read_items(folder / "evaluation" / f"{name}.items.jsonl")
        answers[name] = _answers(items, label)
        for facet in task.facets:
            of_facet = [item for item in items if item.facet == facet]
            answers[f"{name}: {facet}"] = _answers(of_facet, label)
    return ArmScores(answers, metrics, _perplexities(run, label), _trained(run, label))


def read_items(path: Path) -> list[AnsweredItem]:
    items: list[AnsweredItem] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        items.append(AnsweredItem.model_validate_json(line))
    return items


def _perplexities(run: Run, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for source, text in run.scored.perplexity.items():
        value = text.final
        if label == "base":
            value = text.base
        assert value is not None
        found[source] = value
    return found


def _trained(run: Run, label: str) -> dict[str, int]:
    """Tokens by stage; the base was trained on none."""
    found: dict[str, int] = {}
    if label == "final":
        for stage in run.stages:
            found[stage.name] = stage.tokens.trained or 0
    return found


def _answers(items: Sequence[AnsweredItem], label: str) -> Answers:
    asked: dict[str, list[bool]] = {}
    for item in items:
        asked.setdefault(item.id, []).append(item.of(label).is_right)
    answers: Answers = {}
    for name, right in asked.items():
        answers[name] = sum(right) / len(right)
    return answers


def collect(out: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> list[ArmResult]:
    """The arms that have a finished run, in order. The base is what the first other arm compared itself with."""
    first = next(arm for arm in arms if arm.recipe)
    found: dict[str, dict[int, ArmScores]] = {}
    measured: list[ArmScores] = []
    for arm in arms:
        source, label = arm, "final"
        if not arm.recipe:
            source, label = first, "base"
        runs: dict[int, ArmScores] = {}
        for seed in seeds:
            run = read_run(run_folder(out, source, seed), label)
            if run is not None:
                runs[seed] = run
        found[arm.name] = runs
        measured += runs.values()
    shared = _shared_items(measured)
    results: list[ArmResult] = []
    for arm in arms:
        if found[arm.name]:
            results.append(_over_seeds(arm, found[arm.name], shared))
    return results


def _shared_items(runs: Sequence[ArmScores]) -> dict[str, list[str]]:
    """Ids that every run answered, per score: a `limit` may have drawn others for another seed."""
    answered: dict[str, set[str]] = {}
    for run in runs:
        for name, answers in run.answers.items():
            answered.setdefault(name, set(answers))
    shared: dict[str, list[str]] = {}
    for name, items in answered.items():
        for run in runs:
            items &= run.answers.get(name, {}).keys()
        shared[name] = sorted(items)
    return shared


def _over_seeds(arm: Arm, runs: dict[int, ArmScores], shared: dict[str, list[str]]) -> ArmResult:
    measured = list(runs.values())
    scores: dict[str, np.ndarray] = {}
    for name, items in shared.items():
        if items:
            scores[name] = _scores_of(name, items, measured)
    metrics: dict[str, list[float]] = {}
    texts: dict[str, list[float]] = {}
    for run in measured:
        _beside(metrics, run.metrics, measured[0].metrics)
        _beside(texts, run.perplexity, measured[0].perplexity)
    return ArmResult(arm, list(runs), scores, metrics, texts, measured[0].trained_tokens)


def _scores_of(name: str, items: Sequence[str], runs: Sequence[ArmScores]) -> np.ndarray:
    """[seeds, items] of a task or facet."""
    rows: list[list[float]] = []
    for run in runs:
        answers = run.answers[name]
        rows.append([answers[item] for item in items])
    return np.array(rows)


def _beside(found: dict[str, list[float]], of_seed: dict[str, float], names: Iterable[str]) -> None:
    """Put the figures of one more seed behind those of the others, under these names."""
    for name in names:
        found.setdefault(name, []).append(of_seed[name])


# ---- the result ------------------------------------------------------------------------------------------------------


def summarise(results: Sequence[ArmResult]) -> Comparisons:
    """What the table, the figure and the CSV files are made of."""
    arms = [_arm(result) for result in results]
    differences = list(_differences(results))
    whole = reference_of(results)
    if not whole:
        return Comparisons(reference=None, arms=arms, differences=differences, perplexity_ratios=[])
    ratios = list(_ratios(results, whole))
    return Comparisons(reference=whole.arm.name, arms=arms, differences=differences, perplexity_ratios=ratios)


def reference_of(results: Sequence[ArmResult]) -> ArmResult | None:
    """The whole recipe, which single changes are compared with."""
    for result in results:
        if result.arm.is_reference:
            return result
    return None


def _arm(result: ArmResult) -> ArmEntry:
    scores: dict[str, Measure] = {}
    for name, array in result.scores.items():
        scores[name] = _score(array)
    for name, values in result.metrics.items():
        scores[name] = _over(values)
    perplexity: dict[str, Measure] = {}
    for source, values in result.perplexity.items():
        perplexity[source] = _over(values, ratio=True)
    return ArmEntry(
        arm=result.arm.name,
        change=result.arm.change,
        seeds=result.seeds,
        scores=scores,
        perplexity=perplexity,
        trained_tokens=result.trained_tokens,
    )


def _score(array: np.ndarray) -> Measure:
    by_seed = [round(value, 5) for value in array.mean(axis=1).tolist()]
    return Measure(
        mean=float(array.mean()), ci95=effects.mean_interval(array), by_seed=by_seed, items=int(array.shape[1])
    )


def _over(values: list[float], ratio: bool = False) -> Measure:
    return Measure(mean=effects.centre(values, ratio), ci95=effects.seeds_interval(values, ratio), by_seed=list(values))


@dataclass(frozen=True)
class _Pair:
    """Two arms and the seeds that both have."""

    first: ArmResult
    second: ArmResult
    seeds: list[int]

    def rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The scores of both, [seeds, items]."""
        return _rows(self.first, name, self.seeds), _rows(self.second, name, self.seeds)


def _differences(results: Sequence[ArmResult]) -> Iterator[ArmDifference]:
    """Every pair of arms on every score, on the seeds that both have; p values adjusted within a score."""
    pairs = list(_pairs(results))
    for name in _score_names(results):
        p_values: list[float] = []
        changes: list[float] = []
        for pair in pairs:
            first, second = pair.rows(name)
            p_values.append(effects.paired_p(first, second))
            changes.append(float(second.mean() - first.mean()))
        adjusted = effects.holm(p_values)
        for pair, change, p, p_holm in zip(pairs, changes, p_values, adjusted, strict=True):
            yield ArmDifference(
                score=name,
                first=pair.first.arm.name,
                second=pair.second.arm.name,
                difference=change,
                p=p,
                p_holm=p_holm,
                within_noise=p_holm >= effects.SIGNIFICANCE,
            )


def _score_names(results: Sequence[ArmResult]) -> list[str]:
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result.scores)
    return list(names)


def _pairs(results: Sequence[ArmResult]) -> Iterator[_Pair]:
    for first, second in combinations(results, 2):
        seeds = [seed for seed in first.seeds if seed in second.seeds]
        if seeds:
            yield _Pair(first, second, seeds)


def _rows(result: ArmResult, name: str, seeds: Sequence[int]) -> np.ndarray:
    return result.scores[name][[result.seeds.index(seed) for seed in seeds]]


def _ratios(results: Sequence[ArmResult], whole: ArmResult) -> Iterator[Ratio]:
    """Perplexity of each arm over that of the whole recipe, paired by seed; not adjusted for their number."""
    for result in results:
        seeds = [seed for seed in result.seeds if seed in whole.seeds]
        if result is whole or not seeds:
            continue
        for source, values in result.perplexity.items():
            ratios: list[float] = []
            for seed in seeds:
                reference = whole.perplexity[source][whole.seeds.index(seed)]
                ratios.append(values[result.seeds.index(seed)] / reference)
            found = _over(ratios, ratio=True)
            is_noise = found.ci95 is None or found.ci95[0] <= 1 <= found.ci95[1]
            yield Ratio(text=source, arm=result.arm.name, ratio=found.mean, ci95=found.ci95, within_noise=is_noise)


# ---- files -----------------------------------------------------------------------------------------------------------


def table_csv(result: Comparisons) -> str:
    """One line per arm and measure. `by_seed` holds the seeds' own values, in the order of `seeds`."""
    columns = ("arm", "change", "kind", "measure", "mean", "ci95_low", "ci95_high", "items", "seeds", "by_seed")
    rows: list[Sequence[object]] = []
    for arm in result.arms:
        for name, measure in arm.scores.items():
            rows.append(_csv_row(arm, "score", name, measure))
        for name, measure in arm.perplexity.items():
            rows.append(_csv_row(arm, "perplexity", name, measure))
    return _csv(columns, rows)


def _csv_row(arm: ArmEntry, kind: str, name: str, measure: Measure) -> Sequence[object]:
    low, high = measure.ci95 or (None, None)
    figures = (_figure(measure.mean), _figure(low), _figure(high), measure.items)
    seeds = " ".join(str(seed) for seed in arm.seeds)
    by_seed = " ".join(f"{value:.5g}" for value in measure.by_seed)
    return (arm.arm, arm.change, kind, name, *figures, seeds, by_seed)


def differences_csv(result: Comparisons) -> str:
    columns = ("score", "first", "second", "difference", "p", "p_holm", "within_noise")
    rows: list[Sequence[object]] = []
    for each in result.differences:
        figures = (_figure(each.difference), _figure(each.p), _figure(each.p_holm))
        rows.append((each.score, each.first, each.second, *figures, str(each.within_noise).lower()))
    return _csv(columns, rows)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5g}"


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
