"""Runs beside each other: the settings that differ, how training went, scores with paired tests on shared items.

Everything is read from the run folders; no model is loaded. The first run is what the others are held against, by the
tests of evaluation/verdict.py: exact McNemar on the items that all of them answered, Holm's correction over all tests.
Deliberately absent: prompts chosen per model (compare.py), runs over several seeds (`qmedtune ablate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from qmedtune import record
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation import verdict
from qmedtune.reporting.facts import Curve, Metrics, precision_of
from qmedtune.reporting.headline import headline
from qmedtune.reporting.unfinished import read_metrics
from qmedtune.results import AnsweredItem, DuelEntry, Evaluation, Interval, Json, Number, Run, Score, Stage, Text
from qmedtune.watching.runs import Seen, Shelf

# Differ between any two runs, or are told elsewhere.
NO_SETTING = ("name",)
# Of a stage, in the order of the table.
FIGURES = ("tokens trained", "last loss", "tokens per second", "seconds", "peak memory")


@dataclass(frozen=True)
class Answer:
    """Of one item: its gold answer, whether the model gave it, and the number of what it was taken from."""

    gold: str
    right: bool
    group: int | None


Answers = dict[str, Answer]
"""By item."""


@dataclass(frozen=True)
class SharedItems:
    """The items of a task that all runs answered: right or wrong by run, and what each was taken from."""

    right: dict[str, list[bool]]
    groups: list[str]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class ComparedRun(_Facts):
    """One run of the comparison. scored_in: the precision of its scores, in words."""

    name: str
    folder: str
    status: str
    headline: str
    scored_in: str = ""


class DifferingKey(_Facts):
    """A key that differs, with its value in each run; None where a run has no such key."""

    key: str
    values: list[JsonValue]


class ComparedScore(_Facts):
    """A task (or text, for perplexity) as each run's final model did. items: that all runs answered; None where no
    answers can be compared; majority: what always the commonest answer scores."""

    name: str
    metric: str
    values: list[Number | None]
    ci95: list[Interval | None] = []
    n: list[int | None] = []
    base: list[Number | None] = []
    items: int | None = None
    majority: Number | None = None


class Training(_Facts):
    """One figure of a stage in each run."""

    stage: str
    what: str
    values: list[Number | None]


class RunComparison(_Facts):
    """What `qmedtune compare RUN RUN --json` prints. duels: of evaluation/verdict.py."""

    reference: str
    runs: list[ComparedRun]
    settings: list[DifferingKey]
    made_with: list[DifferingKey]
    training: list[Training]
    scores: list[ComparedScore]
    perplexity: list[ComparedScore]
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

    @property
    def evaluation(self) -> Evaluation:
        """Empty where nothing was evaluated."""
        return self.run.evaluation or Evaluation()

    def curve(self, stage: str) -> Curve:
        """Without points where the run has no such stage."""
        return self.metrics.curves.get(stage, Curve())

    def score(self, task: str, model: str) -> Score | None:
        if task not in self.evaluation.tasks:
            return None
        return self.evaluation.tasks[task].of(model)


def are_runs(names: Sequence[str]) -> bool:
    """Whether all of these are run folders."""
    return all((Path(name) / "run.json").is_file() for name in names)


def sides(folders: Sequence[Path]) -> list[Side]:
    """RecipeError where a folder is named twice or holds no run."""
    places = set[Path]()
    short = set[str]()
    for folder in folders:
        places.add(folder.resolve())
        short.add(folder.resolve().name)
    if len(places) < max(2, len(folders)):
        raise RecipeError("compare: name two runs or more, each once\nsee what is there: qmedtune runs")
    found = []
    for folder in folders:
        seen = Shelf(folder).look(folder)
        if seen is None:
            raise RecipeError(
                f"{folder}: no run in this folder (it has no run.json)\n"
                "see what is there: qmedtune runs; models are compared with --tasks"
            )
        record.load(folder)  # one that cannot be read is listed by `runs`, and not compared with
        name = str(folder)
        if len(short) == len(folders):
            name = folder.resolve().name
        found.append(Side(name, seen, read_metrics(folder, seen.run)))
    return found


def compare(runs: Sequence[Side]) -> RunComparison:
    """All that can be told of these runs side by side."""
    answers = _answers(runs)
    reference = runs[0].name
    compared, recipes, made_with = [], [], []
    for side in runs:
        told = headline(side.run, side.seen.life)
        compared.append(
            ComparedRun(
                name=side.name,
                folder=str(side.seen.folder),
                status=side.seen.status,
                headline=told,
                scored_in=precision_of(side.evaluation),
            )
        )
        recipes.append(_flat(side.run.recipe))
        made_with.append(_made_with(side.run))
    duels = []
    right = {task: shared.right for task, shared in answers.items()}
    groups = {task: shared.groups for task, shared in answers.items()}
    if answers:
        for duel in verdict.duels(right, reference, groups):
            duels.append(duel.entry())
    return RunComparison(
        reference=reference,
        runs=compared,
        settings=_differing(recipes),
        made_with=_differing(made_with),
        training=list(_training(runs)),
        scores=list(_scores(runs, answers)),
        perplexity=list(_perplexities(runs)),
        duels=duels,
    )


# ---- settings --------------------------------------------------------------------------------------------------------


def _flat(value: JsonValue, prefix: str = "") -> Json:
    """{"stages[0].cpt.lr": 0.0002, ...}, by the names that `--set` takes."""
    found: Json = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}".lstrip("."))
    elif isinstance(value, list) and _holds_sections(value):
        for place, inner in enumerate(value):
            found |= _flat(inner, f"{prefix}[{place}]")
    return found or {prefix: value}


def _holds_sections(values: list[JsonValue]) -> bool:
    return any(isinstance(value, dict) for value in values)


def _made_with(run: Run) -> Json:
    """Versions, machine, base and data, by their hashes."""
    found: Json = {"seed": run.seed}
    found |= _flat(run.provenance.as_json())
    for name, source in run.data.items():
        found[f"data.{name}.sha256"] = source.sha256
    return found


def _differing(each: Sequence[Json]) -> list[DifferingKey]:
    """The keys whose values are not the same in all."""
    found, keys = [], dict[str, None]()
    for settings in each:
        keys |= dict.fromkeys(settings)
    for key in keys:
        values = [settings.get(key) for settings in each]
        same = values.count(values[0]) == len(values)
        if key not in NO_SETTING and not same:
            found.append(DifferingKey(key=key, values=values))
    return found


# ---- training --------------------------------------------------------------------------------------------------------


def stage_names(runs: Sequence[Side]) -> list[str]:
    """Of all runs, each once."""
    found: list[str] = []
    for side in runs:
        for stage in side.run.stages:
            if stage.name not in found:
                found.append(stage.name)
    return found


def _training(runs: Sequence[Side]) -> Iterator[Training]:
    for name in stage_names(runs):
        each = [_figures(side, name) for side in runs]
        held_out = [_lowest_of(source) for source in held_out_sources(runs, name)]
        for what in (*FIGURES, *held_out):
            values = [figures.get(what) for figures in each]
            if values.count(None) < len(values):
                yield Training(stage=name, what=what, values=values)


def _figures(side: Side, name: str) -> dict[str, Number | None]:
    """Those that the run has of this stage."""
    found: dict[str, Number | None] = {}
    stage = _stage(side.run, name)
    if stage is not None:
        told = (stage.tokens.trained, None, stage.tokens_per_s, stage.seconds, stage.peak_memory_bytes)
        found |= zip(FIGURES, told, strict=True)
        if stage.loss is not None:
            found["last loss"] = stage.loss.last
    for source, points in side.curve(name).validation.items():
        losses = [loss for _, loss in points]
        found[_lowest_of(source)] = min(losses, default=None)
    return found


def _lowest_of(source: str) -> str:
    return f"lowest held-out loss, {source}"


def _stage(run: Run, name: str) -> Stage | None:
    for stage in run.stages:
        if stage.name == name and stage.status == "sealed":
            return stage
    return None


def held_out_sources(runs: Sequence[Side], stage: str) -> list[str]:
    """Of all runs, each once."""
    found: dict[str, None] = {}
    for side in runs:
        found |= dict.fromkeys(side.curve(stage).validation)
    return list(found)


# ---- scores ----------------------------------------------------------------------------------------------------------


def _tasks(runs: Sequence[Side]) -> list[str]:
    found: dict[str, None] = {}
    for side in runs:
        found |= dict.fromkeys(side.evaluation.tasks)
    return list(found)


def _scores(runs: Sequence[Side], answers: dict[str, SharedItems]) -> Iterator[ComparedScore]:
    for task in _tasks(runs):
        finals = _Column.of(runs, task, "final")
        bases = _Column.of(runs, task, "base")
        items = None
        if task in answers:
            items = len(answers[task].groups)
        yield ComparedScore(
            name=task,
            metric=finals.metric or bases.metric,
            values=finals.values,
            ci95=finals.ci95,
            n=finals.n,
            base=bases.values,
            items=items,
            majority=finals.majority,
        )


@dataclass
class _Column:
    """A task of one model of every run; None where a run has no such score."""

    metric: str = ""
    majority: Number | None = None
    values: list[Number | None] = field(default_factory=list[Number | None])
    ci95: list[Interval | None] = field(default_factory=list[Interval | None])
    n: list[int | None] = field(default_factory=list[int | None])

    @classmethod
    def of(cls, runs: Sequence[Side], task: str, model: str) -> _Column:
        found = cls()
        for side in runs:
            found.add(side.score(task, model))
        return found

    def add(self, score: Score | None) -> None:
        if score is None:
            self.values.append(None)
            self.ci95.append(None)
            self.n.append(None)
            return
        self.metric = self.metric or score.metric
        if self.majority is None:
            self.majority = score.majority
        self.values.append(score.value)
        self.ci95.append(score.ci95)
        self.n.append(score.n)


def _perplexities(runs: Sequence[Side]) -> Iterator[ComparedScore]:
    names: dict[str, None] = {}
    for side in runs:
        names |= dict.fromkeys(side.evaluation.perplexity)
    for name in names:
        finals: list[Number | None] = []
        bases: list[Number | None] = []
        for side in runs:
            text = side.evaluation.perplexity.get(name, Text())
            finals.append(text.final)
            bases.append(text.base)
        yield ComparedScore(name=name, metric="perplexity", values=finals, base=bases)


def _answers(runs: Sequence[Side]) -> dict[str, SharedItems]:
    """By task the items that all runs answered, for tasks whose items are right or wrong.

    Shared are items of one id whose gold answer is the same: two files may number their items alike.
    """
    found: dict[str, SharedItems] = {}
    for task in _tasks(runs):
        each = [_items(side, task) for side in runs]
        shared = _shared(each)
        if shared:
            right: dict[str, list[bool]] = {}
            for side, items in zip(runs, each, strict=True):
                right[side.name] = [items[key].right for key in shared]
            found[task] = SharedItems(right, _groups(each, shared))
    return found


def _groups(each: Sequence[Answers], shared: Sequence[str]) -> list[str]:
    """What each shared item was taken from, itself where nothing says. By the first run that tells: each numbers by
    itself, and runs of earlier versions do not."""
    for items in each:
        if any(items[key].group is not None for key in shared):
            return [_group(key, items[key]) for key in shared]
    return list(shared)


def _group(key: str, answer: Answer) -> str:
    if answer.group is None:
        return f"item {key}"
    return f"group {answer.group}"


def _shared(each: Sequence[Answers]) -> list[str]:
    """In the order of the first."""
    first, *others = each
    found = []
    for key, answer in first.items():
        asked_of_all = all(key in items and items[key].gold == answer.gold for items in others)
        if asked_of_all:
            found.append(key)
    return found


def _items(side: Side, task: str) -> Answers:
    """Empty where the run has no such items, or they are no right or wrong (a mean over draws, a summary)."""
    score = side.score(task, "final")
    folder = side.seen.folder / "evaluation"
    path = folder / f"{task}.items.jsonl"
    inside = path.parent == folder and not path.is_symlink()  # run.json may be anybody's
    if score is None or score.metric != "accuracy" or score.draws or not inside or not path.is_file():
        return {}
    found: Answers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            item = AnsweredItem.model_validate_json(line)
            if item.final is None:
                raise ValueError("no final answer")
            found[item.id] = Answer(str(item.gold), item.final.is_right, item.group)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{path}:{number}: no answer of an evaluation ({type(error).__name__})\n"
                "the same `qmedtune run` makes the evaluation again, once its folder is moved away"
            ) from None
    return found
