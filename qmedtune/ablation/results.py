"""From the run folders of an ablation to one result: scores with intervals, perplexities, and what is beyond noise.

Only sealed runs are read; an arm that is not through all seeds is shown with those it has. Items are compared by their
ids, so that arms and seeds are paired on the same questions.
Deliberately absent: drawing (figure.py, page.py), statistics (effects.py), reading models.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from qmedtune import record
from qmedtune.ablation import effects
from qmedtune.ablation.arms import Arm

Answers = dict[str, float]
"""Item id -> 1.0 right, 0.0 wrong; the mean over draws where a task was asked with several draws of examples."""


@dataclass(frozen=True)
class Measured:
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


def read_run(folder: Path, label: str) -> Measured | None:
    """What `label` (base or final) of a finished run did; None for a run that is not finished."""
    run = record.read(folder)
    if not run or run["status"] != "finished":
        return None
    evaluation = run["evaluation"] or {"tasks": {}, "perplexity": {}}
    answers: dict[str, Answers] = {}
    metrics = {}
    for task, found in evaluation["tasks"].items():
        if found[label]["metric"] != "accuracy":
            metrics[task] = found[label][found[label]["metric"]]
            continue
        file = folder / "evaluation" / f"{task}.items.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        answers[task] = _answers(rows, label)
        for facet in found.get("facets", {}):
            answers[f"{task}: {facet}"] = _answers([row for row in rows if row.get("facet") == facet], label)
    texts = {source: entry[label] for source, entry in evaluation["perplexity"].items()}
    tokens = {stage["name"]: stage["tokens"]["trained"] for stage in run["stages"]} if label == "final" else {}
    return Measured(answers, metrics, texts, tokens)


def _answers(rows: list[dict[str, Any]], label: str) -> Answers:
    asked: dict[str, list[bool]] = {}
    for row in rows:
        given = row[label]
        asked.setdefault(row["id"], []).append(
            given["correct"] if "correct" in given else given["generation"]["correct"]
        )
    return {item: sum(right) / len(right) for item, right in asked.items()}


def collect(out: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> list[ArmResult]:
    """The arms that have a finished run, in order. The base is what the first other arm compared itself with."""
    first = next(arm for arm in arms if arm.recipe)
    found = {}
    for arm in arms:
        source, label = (arm, "final") if arm.recipe else (first, "base")
        runs = {seed: read_run(run_folder(out, source, seed), label) for seed in seeds}
        found[arm.name] = {seed: run for seed, run in runs.items() if run}
    shared = _shared_items([run for runs in found.values() for run in runs.values()])
    return [_over_seeds(arm, found[arm.name], shared) for arm in arms if found[arm.name]]


def _shared_items(runs: list[Measured]) -> dict[str, list[str]]:
    """Ids that every run answered, per score: a `limit` may have drawn others for another seed."""
    names = dict.fromkeys(name for run in runs for name in run.answers)
    shared = {}
    for name in names:
        answered = [set(run.answers.get(name, {})) for run in runs]
        shared[name] = sorted(set.intersection(*answered))
    return shared


def _over_seeds(arm: Arm, runs: dict[int, Measured], shared: dict[str, list[str]]) -> ArmResult:
    measured = list(runs.values())
    scores = {name: _scores_of(name, items, measured) for name, items in shared.items() if items}
    metrics = _by_name([run.metrics for run in measured])
    texts = _by_name([run.perplexity for run in measured])
    return ArmResult(arm, list(runs), scores, metrics, texts, measured[0].trained_tokens)


def _scores_of(name: str, items: Sequence[str], runs: Sequence[Measured]) -> np.ndarray:
    """[seeds, items] of a task or facet."""
    rows = []
    for run in runs:
        answers = run.answers[name]
        rows.append([answers[item] for item in items])
    return np.array(rows)


def _by_name(figures: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The figures of several seeds, side by side under the names that the first has."""
    found = {}
    for name in figures[0]:
        found[name] = [each[name] for each in figures]
    return found


# ---- the result ------------------------------------------------------------------------------------------------------


def summarise(results: list[ArmResult]) -> dict[str, Any]:
    """{"reference", "arms", "differences"}: what ablation.json, the table, the figure and the CSV files are made of."""
    reference = next((result.arm.name for result in results if result.arm.is_reference), None)
    return {
        "reference": reference,
        "arms": [_arm(result) for result in results],
        "differences": list(_differences(results)),
        "perplexity_ratios": list(_ratios(results, reference)),
    }


def _arm(result: ArmResult) -> dict[str, Any]:
    scores: dict[str, Any] = {name: _score(array) for name, array in result.scores.items()}
    scores |= {name: _over(values) for name, values in result.metrics.items()}
    return {
        "arm": result.arm.name,
        "change": result.arm.change,
        "seeds": result.seeds,
        "scores": scores,
        "perplexity": {source: _over(values, ratio=True) for source, values in result.perplexity.items()},
        "trained_tokens": result.trained_tokens,
    }


def _score(array: np.ndarray) -> dict[str, Any]:
    low, high = effects.mean_interval(array)
    by_seed = [round(value, 5) for value in array.mean(axis=1).tolist()]
    return {"mean": float(array.mean()), "ci95": [low, high], "by_seed": by_seed, "items": array.shape[1]}


def _over(values: list[float], ratio: bool = False) -> dict[str, Any]:
    interval = effects.seeds_interval(values, ratio)
    return {"mean": effects.centre(values, ratio), "ci95": interval and list(interval), "by_seed": values}


def _differences(results: list[ArmResult]) -> Iterator[dict[str, Any]]:
    """Every pair of arms on every score, on the seeds that both have; p values adjusted within a score."""
    pairs = list(_pairs(results))
    for name in dict.fromkeys(name for result in results for name in result.scores):
        tables = [(_rows(first, name, seeds), _rows(second, name, seeds)) for first, second, seeds in pairs]
        p_values = [effects.paired_p(first, second) for first, second in tables]
        adjusted = effects.holm(p_values)
        for (first, second, _), (a, b), p, p_holm in zip(pairs, tables, p_values, adjusted, strict=True):
            yield {
                "score": name,
                "first": first.arm.name,
                "second": second.arm.name,
                "difference": float(b.mean() - a.mean()),
                "p": p,
                "p_holm": p_holm,
                "within_noise": p_holm >= effects.SIGNIFICANCE,
            }


def _pairs(results: list[ArmResult]) -> Iterator[tuple[ArmResult, ArmResult, list[int]]]:
    """Two arms and the seeds that both have."""
    for first, second in combinations(results, 2):
        if seeds := [seed for seed in first.seeds if seed in second.seeds]:
            yield first, second, seeds


def _rows(result: ArmResult, name: str, seeds: list[int]) -> np.ndarray:
    return result.scores[name][[result.seeds.index(seed) for seed in seeds]]


def _ratios(results: list[ArmResult], reference: str | None) -> Iterator[dict[str, Any]]:
    """Perplexity of each arm over the reference's, paired by seed; not adjusted for their number."""
    whole = next((result for result in results if result.arm.name == reference), None)
    for result in results if whole else []:
        seeds = [seed for seed in result.seeds if whole and seed in whole.seeds]
        if whole is None or result is whole or not seeds:
            continue
        for source, values in result.perplexity.items():
            ratios = [values[result.seeds.index(s)] / whole.perplexity[source][whole.seeds.index(s)] for s in seeds]
            found = _over(ratios, ratio=True)
            noise = found["ci95"] is None or found["ci95"][0] <= 1 <= found["ci95"][1]
            yield {"text": source, "arm": result.arm.name, "ratio": found["mean"], "ci95": found["ci95"],
                   "within_noise": noise}  # fmt: skip


# ---- files -----------------------------------------------------------------------------------------------------------


def table_csv(result: dict[str, Any]) -> str:
    """One line per arm and measure. `by_seed` holds the seeds' own values, in the order of `seeds`."""
    columns = ("arm", "change", "kind", "measure", "mean", "ci95_low", "ci95_high", "items", "seeds", "by_seed")
    rows = []
    for arm in result["arms"]:
        for kind, found in (("score", arm["scores"]), ("perplexity", arm["perplexity"])):
            for name, entry in found.items():
                low, high = entry["ci95"] or (None, None)
                seeds, values = " ".join(map(str, arm["seeds"])), " ".join(f"{v:.5g}" for v in entry["by_seed"])
                figures = [_figure(entry["mean"]), _figure(low), _figure(high), entry.get("items")]
                rows.append((arm["arm"], arm["change"], kind, name, *figures, seeds, values))
    return _csv(columns, rows)


def differences_csv(result: dict[str, Any]) -> str:
    columns = ("score", "first", "second", "difference", "p", "p_holm", "within_noise")
    rows = []
    for entry in result["differences"]:
        figures = [_figure(entry[name]) for name in ("difference", "p", "p_holm")]
        words = (entry["score"], entry["first"], entry["second"])
        rows.append((*words, *figures, str(entry["within_noise"]).lower()))
    return _csv(columns, rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
