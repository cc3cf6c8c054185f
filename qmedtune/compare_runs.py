"""Runs beside each other: the settings that differ, how training went, scores with paired tests on shared items.

Everything is read from the run folders; no model is loaded. The first run is what the others are held against, by the
tests of evaluation/verdict.py: exact McNemar on the items that all of them answered, Holm's correction over all tests.
Deliberately absent: prompts chosen per model (compare.py), runs over several seeds (`qmedtune ablate`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from qmedtune.errors import RecipeError
from qmedtune.evaluation import verdict
from qmedtune.reporting.facts import Metrics
from qmedtune.reporting.headline import headline
from qmedtune.reporting.live import read_metrics
from qmedtune.results import DuelEntry, Interval, Json, Number, Run, Score, Stage
from qmedtune.watching.runs import Seen, Shelf

# Differ between any two runs, or are told elsewhere.
NO_SETTING = ("name",)
Answers = dict[str, tuple[str, bool]]
"""By item: its gold answer, and whether the model gave it."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class Compared(_Facts):
    """One run of the comparison."""

    name: str
    folder: str
    status: str
    headline: str


class Setting(_Facts):
    """A key that differs, with its value in each run; None where a run has no such key."""

    key: str
    values: list[JsonValue]


class Scored(_Facts):
    """A task (or text, for perplexity) as each run's final model did. items: that all runs answered; None where no
    answers can be compared."""

    name: str
    metric: str
    values: list[Number | None]
    ci95: list[Interval | None] = []
    n: list[int | None] = []
    base: list[Number | None] = []
    items: int | None = None


class Training(_Facts):
    """One figure of a stage in each run."""

    stage: str
    what: str
    values: list[Number | None]


class Result(_Facts):
    """What `qmedtune compare RUN RUN --json` prints. duels: of evaluation/verdict.py."""

    reference: str
    runs: list[Compared]
    settings: list[Setting]
    made_with: list[Setting]
    training: list[Training]
    scores: list[Scored]
    perplexity: list[Scored]
    duels: list[DuelEntry]


@dataclass(frozen=True)
class Side:
    """One run with its curves; `name` is unique among those compared."""

    name: str
    seen: Seen
    metrics: Metrics

    @property
    def run(self) -> Run:
        return self.seen.run


def are_runs(names: Sequence[str]) -> bool:
    """Whether all of these are run folders."""
    return all((Path(name) / "run.json").is_file() for name in names)


def sides(folders: Sequence[Path]) -> list[Side]:
    """RecipeError where a folder is named twice or holds no run."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise RecipeError("compare: name two runs or more, each once")
    short = [folder.resolve().name for folder in folders]
    unique = len(set(short)) == len(short)
    found = []
    for folder in folders:
        seen = Shelf(folder).look(folder)
        if seen is None:
            raise RecipeError(
                f"{folder}: no run in this folder (it has no run.json)\n"
                "see what is there: qmedtune runs; models are compared with --tasks"
            )
        name = folder.resolve().name if unique else str(folder)
        found.append(Side(name, seen, read_metrics(folder, seen.run)))
    return found


def compare(runs: Sequence[Side]) -> Result:
    """All that can be told of these runs side by side."""
    answers = _answers(runs)
    reference = runs[0].name
    compared = []
    for side in runs:
        told = headline(side.run, side.seen.life)
        compared.append(Compared(name=side.name, folder=str(side.seen.folder), status=side.seen.status, headline=told))
    return Result(
        reference=reference,
        runs=compared,
        settings=_differing([_flat(side.run.recipe) for side in runs]),
        made_with=_differing([_made_with(side.run) for side in runs]),
        training=list(_training(runs)),
        scores=list(_scores(runs, answers)),
        perplexity=list(_perplexities(runs)),
        duels=[duel.entry() for duel in verdict.duels(answers, reference)] if answers else [],
    )


# ---- settings --------------------------------------------------------------------------------------------------------


def _flat(value: JsonValue, prefix: str = "") -> Json:
    """{"stages[0].cpt.lr": 0.0002, ...}, by the names that `--set` takes."""
    parts: list[tuple[str, JsonValue]] = []
    if isinstance(value, dict) and value:
        parts = [(f"{prefix}.{key}" if prefix else key, inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        parts = [(f"{prefix}[{place}]", inner) for place, inner in enumerate(value)]
    if not parts:
        return {prefix: value}
    found: Json = {}
    for key, inner in parts:
        found |= _flat(inner, key)
    return found


def _made_with(run: Run) -> Json:
    """Versions, machine, base and data, by their hashes."""
    found: Json = {"seed": run.seed}
    found |= _flat(run.provenance.as_json())
    for name, source in run.data.items():
        found[f"data.{name}.sha256"] = source.sha256
    return found


def _differing(each: Sequence[Json]) -> list[Setting]:
    """The keys whose values are not the same in all."""
    found, keys = [], dict[str, None]()
    for settings in each:
        keys |= dict.fromkeys(settings)
    for key in keys:
        values = [settings.get(key) for settings in each]
        if key not in NO_SETTING and any(value != values[0] for value in values):
            found.append(Setting(key=key, values=values))
    return found


# ---- training --------------------------------------------------------------------------------------------------------


def stage_names(runs: Sequence[Side]) -> list[str]:
    """Of all runs, each once."""
    found: dict[str, None] = {}
    for side in runs:
        found |= dict.fromkeys(stage.name for stage in side.run.stages)
    return list(found)


def _training(runs: Sequence[Side]) -> Iterator[Training]:
    for name in stage_names(runs):
        stages = [_stage(side.run, name) for side in runs]
        figures = {
            "tokens trained": [stage.tokens.trained if stage else None for stage in stages],
            "last loss": [stage.loss.last if stage and stage.loss else None for stage in stages],
            "tokens per second": [stage.tokens_per_s if stage else None for stage in stages],
            "seconds": [stage.seconds if stage else None for stage in stages],
            "peak memory": [stage.peak_memory_bytes if stage else None for stage in stages],
        }
        for source in held_out_sources(runs, name):
            figures[f"lowest held-out loss, {source}"] = [_lowest(side, name, source) for side in runs]
        for what, values in figures.items():
            if any(value is not None for value in values):
                yield Training(stage=name, what=what, values=values)


def _stage(run: Run, name: str) -> Stage | None:
    for stage in run.stages:
        if stage.name == name and stage.status == "sealed":
            return stage
    return None


def held_out_sources(runs: Sequence[Side], stage: str) -> list[str]:
    """Of all runs, each once."""
    found: dict[str, None] = {}
    for side in runs:
        curve = side.metrics.curves.get(stage)
        found |= dict.fromkeys(curve.validation if curve else ())
    return list(found)


def _lowest(side: Side, stage: str, source: str) -> float | None:
    curve = side.metrics.curves.get(stage)
    points = curve.validation.get(source, []) if curve else []
    return min((loss for _, loss in points), default=None)


# ---- scores ----------------------------------------------------------------------------------------------------------


def _tasks(runs: Sequence[Side]) -> list[str]:
    found: dict[str, None] = {}
    for side in runs:
        found |= dict.fromkeys(side.run.evaluation.tasks if side.run.evaluation else ())
    return list(found)


def _final(side: Side, task: str, model: str = "final") -> Score | None:
    scores = side.run.evaluation.tasks.get(task) if side.run.evaluation else None
    return scores.of(model) if scores else None


def _scores(runs: Sequence[Side], answers: dict[str, dict[str, list[bool]]]) -> Iterator[Scored]:
    for task in _tasks(runs):
        finals = [_final(side, task) for side in runs]
        bases = [_final(side, task, "base") for side in runs]
        known = next((score for score in (*finals, *bases) if score), None)
        shared = answers.get(task, {})
        yield Scored(
            name=task,
            metric=known.metric if known else "",
            values=[score.value if score else None for score in finals],
            ci95=[score.ci95 if score else None for score in finals],
            n=[score.n if score else None for score in finals],
            base=[score.value if score else None for score in bases],
            items=len(next(iter(shared.values()))) if shared else None,
        )


def _perplexities(runs: Sequence[Side]) -> Iterator[Scored]:
    names: dict[str, None] = {}
    for side in runs:
        names |= dict.fromkeys(side.run.evaluation.perplexity if side.run.evaluation else ())
    for name in names:
        texts = [side.run.evaluation.perplexity.get(name) if side.run.evaluation else None for side in runs]
        finals = [text.final if text else None for text in texts]
        bases = [text.base if text else None for text in texts]
        yield Scored(name=name, metric="perplexity", values=finals, base=bases)


def _answers(runs: Sequence[Side]) -> dict[str, dict[str, list[bool]]]:
    """{task: {run: right or wrong}} on the items that all runs answered, for tasks whose items are right or wrong.

    Shared are items of one id whose gold answer is the same: two files may number their items alike.
    """
    found: dict[str, dict[str, list[bool]]] = {}
    for task in _tasks(runs):
        each = [_items(side, task) for side in runs]
        shared = _shared(each)
        if shared:
            found[task] = {}
            for side, items in zip(runs, each, strict=True):
                found[task][side.name] = [items[key][1] for key in shared]
    return found


def _shared(each: Sequence[Answers]) -> list[str]:
    """In the order of the first."""
    first, *others = each
    found = []
    for key, (gold, _) in first.items():
        asked_of_all = all(key in items and items[key][0] == gold for items in others)
        if asked_of_all:
            found.append(key)
    return found


def _items(side: Side, task: str) -> Answers:
    """Empty where the run has no such items, or they are no right or wrong (a mean over draws, a summary)."""
    score = _final(side, task)
    path = side.seen.folder / "evaluation" / f"{task}.items.jsonl"
    if score is None or score.metric != "accuracy" or score.draws or not path.is_file():
        return {}
    found: Answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = row["final"]
        right = given["correct"] if "correct" in given else given["generation"]["correct"]
        found[row["id"]] = str(row.get("gold")), bool(right)
    return found
