"""The fair head-to-head: each model with the prompt and the examples that suit it, then the same items for all.

Medical models that beat their base under one fixed prompt often do not once prompts are chosen per model (Jeong et al.,
arXiv 2411.08870). So template and number of examples are chosen per model and task on development items, which are
never scored and are also where examples come from; verdicts are verdict.py's.
Deliberately absent: tasks that are no choice between options, training.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from qmedtune import store, ui
from qmedtune.data.packing import templates
from qmedtune.errors import RecipeError
from qmedtune.evaluation import statistics, verdict
from qmedtune.evaluation.measure import adding, best_option
from qmedtune.evaluation.open_model import OpenModel, Quantization, locate, open_model
from qmedtune.evaluation.scoring import choice_logprobs, prompt_texts
from qmedtune.recipe import TaskSection
from qmedtune.tasks import Item, Task, check_twice, load_task
from qmedtune.tasks.shots import with_examples

DEV_SHARE, MAX_DEV, MIN_DEV = 0.25, 100, 4


@dataclass(frozen=True)
class Setting:
    """How a model is asked: a template and the number of examples before each question."""

    template: templates.Template
    shots: int


@dataclass(frozen=True)
class Split:
    """A task's items: those that choose a setting and give examples, and those that are scored."""

    task: Task
    section: TaskSection
    dev: tuple[Item, ...]
    scored: tuple[Item, ...]


@dataclass(frozen=True)
class Entrant:
    """A model that takes part: its name, and what loads it."""

    name: str
    open: Callable[[], OpenModel]


@dataclass(frozen=True)
class Rules:
    """What every model may choose from: numbers of examples, and templates besides its own.

    kept: a folder in which answers are kept at once, so that what was killed goes on where it was
    """

    shots: tuple[int, ...] = (0,)
    templates: tuple[str, ...] = ()
    seed: int = 17
    kept: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What is compared. The first model is the one that all others are compared with."""

    models: tuple[str, ...]
    tasks: tuple[TaskSection, ...]
    shots: tuple[int, ...] = (0,)
    templates: tuple[str, ...] = ()
    seed: int = 17
    quantization: Quantization | None = "none"
    offline: bool = False


@dataclass(frozen=True)
class Outcome:
    """models: {name: {task: setting and score}}; answers: right or wrong per task, model and scored item."""

    models: dict[str, dict[str, Any]]
    answers: dict[str, dict[str, list[bool]]]
    splits: tuple[Split, ...]


def compare_models(asked: Asked, out: Path | None = None) -> dict[str, Any]:
    """{"reference", "models": {name: {task: setting and score}}, "duels", "claims": [one sentence per other model]}.

    out: a folder for compare.json and, per task, <task>.items.jsonl (id and right or wrong per model; no text).
    """
    if len(asked.models) < 2:
        raise RecipeError("compare: one model has nothing to be compared with\nname two or more")
    check_twice("compare", list(asked.models))
    splits = [split(load_task(section, asked.seed), section, asked.seed) for section in asked.tasks]
    entrants = []
    for name in asked.models:
        entrants.append(Entrant(name, partial(_opened, name, asked)))
    outcome = meet(entrants, splits, Rules(asked.shots, asked.templates, asked.seed))
    reference = asked.models[0]
    result = told(outcome, [(name, reference) for name in asked.models[1:]])
    if out is not None:
        write(out, outcome, {"reference": reference, **result})
    return {"reference": reference, **result}


def _opened(name: str, asked: Asked) -> OpenModel:
    return open_model(locate(name, offline=asked.offline), asked.quantization)


def meet(entrants: Sequence[Entrant], splits: Sequence[Split], rules: Rules) -> Outcome:
    """Every model answers every task's scored items, asked as suits it. One is loaded at a time."""
    answers: dict[str, dict[str, list[bool]]] = {part.section.label: {} for part in splits}
    models: dict[str, dict[str, Any]] = {}
    for entrant in entrants:
        opened = entrant.open()
        models[entrant.name] = {}
        for part in splits:
            setting, dev = _chosen(entrant, opened, part, rules)
            right = _right(entrant, opened, part.scored, Asking(part, setting, rules))
            answers[part.section.label][entrant.name] = right
            models[entrant.name][part.section.label] = _facts(setting, dev, right, part)
        del opened
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(models, answers, tuple(splits))


def told(outcome: Outcome, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """{"models", "duels", "claims"}: of each pair the first model against the second, and a sentence."""
    found = verdict.paired_duels(outcome.answers, pairs)
    claims = []
    for pair in pairs:
        claims.append(verdict.claim([duel for duel in found if (duel.model, duel.reference) == pair]))
    return {"models": outcome.models, "duels": [duel.facts() for duel in found], "claims": claims}


def comparable(task: Task) -> bool:
    """Whether its answers are right or wrong choices, and enough of them to choose prompts by and to score."""
    return task.metric == "accuracy" and bool(task.items[0].options) and _dev_count(task) >= MIN_DEV


def _dev_count(task: Task) -> int:
    return min(MAX_DEV, round(DEV_SHARE * len(task.items)))


def split(task: Task, section: TaskSection, seed: int) -> Split:
    """A task without examples of its own, as development and scored items. RecipeError where it cannot be compared."""
    if task.metric != "accuracy" or not task.items[0].options:
        raise RecipeError(
            f"compare: {section.task} is no choice between options\nallowed: tasks whose metric is accuracy"
        )
    count = _dev_count(task)
    if count < MIN_DEV:
        raise RecipeError(
            f"compare: {section.task} has {len(task.items)} items\n16 are needed: a quarter chooses prompts"
        )
    dev = set(Random(f"compare {seed}").sample(range(len(task.items)), count))
    chosen = tuple(item for index, item in enumerate(task.items) if index in dev)
    groups = {item.group for item in chosen if item.group is not None}
    scored = [item for index, item in enumerate(task.items) if index not in dev and item.group not in groups]
    return Split(task, section, chosen, tuple(scored))


@dataclass(frozen=True)
class Asking:
    """One task, asked in one way."""

    part: Split
    setting: Setting
    rules: Rules

    @property
    def words(self) -> str:
        return f"{self.part.section.label}, {self.setting.template.name}, {self.setting.shots} shots"


def _chosen(entrant: Entrant, opened: OpenModel, part: Split, rules: Rules) -> tuple[Setting, dict[str, float]]:
    """The setting that answers most development items rightly (the earlier one on a tie), and what each reached."""
    own = opened.template
    others = [templates.load(name, opened.location.base) for name in rules.templates]
    settings = []
    for template in [own, *(other for other in others if other.name != own.name)]:
        settings += [Setting(template, shots) for shots in rules.shots]
    reached = []
    for setting in settings:
        right = _right(entrant, opened, part.dev, Asking(part, setting, rules))
        reached.append(sum(right) / len(right))
    best = max(range(len(settings)), key=lambda index: (reached[index], -index))
    names = [f"{setting.template.name}, {setting.shots} shots" for setting in settings]
    return settings[best], dict(zip(names, reached, strict=True))


def _right(entrant: Entrant, opened: OpenModel, items: Sequence[Item], asking: Asking) -> list[bool]:
    """Per item whether the model's best option is the right one; kept where the rules name a folder."""
    work = partial(_answered, entrant, opened, items, asking)
    if asking.rules.kept is None:
        return work()
    name = store.sha256_json([entrant.name, asking.words, [item.id for item in items]])[:16]
    return store.kept(asking.rules.kept / f"{name}.json", work)


def _answered(entrant: Entrant, opened: OpenModel, items: Sequence[Item], asking: Asking) -> list[bool]:
    part, shots, seed = asking.part, asking.setting.shots, asking.rules.seed
    order = Random(f"{seed}").sample(list(part.dev), len(part.dev))
    section = part.section.model_copy(update={"shots": shots})
    asked = [with_examples(item, order, section, part.task.write, True) for item in items] if shots else items
    prompts = prompt_texts(opened.tokenizer, asking.setting.template, [item.messages for item in asked])
    with ui.stage(f"{entrant.name}: {asking.words}", total=len(items), unit="items") as bar:
        options = [item.options for item in items]
        found = choice_logprobs(opened.model, opened.tokenizer, prompts, options, progress=adding(bar))
    return [best_option(score.sums, item.id) == item.gold for score, item in zip(found, items, strict=True)]


def _facts(setting: Setting, dev: Mapping[str, float], right: list[bool], part: Split) -> dict[str, Any]:
    return {
        "template": setting.template.name,
        "shots": setting.shots,
        "dev": {"items": len(part.dev), "accuracy": dict(dev)},
        "accuracy": sum(right) / len(right),
        "ci95": list(statistics.wilson(sum(right), len(right))),
        "n": len(right),
    }


def write(out: Path, outcome: Outcome, result: dict[str, Any]) -> None:
    """compare.json and per task <task>.items.jsonl: ids, and right or wrong per model."""
    out.mkdir(parents=True, exist_ok=True)
    for part in outcome.splits:
        rows = outcome.answers[part.section.label]
        lines = []
        for index, item in enumerate(part.scored):
            lines.append({"id": item.id, **{name: right[index] for name, right in rows.items()}})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        store.write_atomic(out / f"{part.section.label}.items.jsonl", text)
    store.write_json(out / "compare.json", result)
