"""The fair head-to-head: each model with the prompt and the examples that suit it, then the same items for all.

Medical models that beat their base under one fixed prompt often do not once prompts are chosen per model (Jeong et al.,
arXiv 2411.08870). So template and number of examples are chosen per model and task on development items, which are
never scored and are also where examples come from; verdicts are verdict.py's.
Deliberately absent: tasks that are no choice between options, training.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
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

DEV_SHARE, MAX_DEV = 0.25, 100


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
class Asked:
    """What is compared. The first model is the one that all others are compared with."""

    models: tuple[str, ...]
    tasks: tuple[TaskSection, ...]
    shots: tuple[int, ...] = (0,)
    templates: tuple[str, ...] = ()
    seed: int = 17
    quantization: Quantization | None = "none"
    offline: bool = False


def compare_models(asked: Asked, out: Path | None = None) -> dict[str, Any]:
    """{"models": {name: {task: setting and score}}, "duels": [...], "claims": [one sentence per other model]}.

    out: a folder for compare.json and, per task, <task>.items.jsonl (id and right or wrong per model; no text).
    """
    if len(asked.models) < 2:
        raise RecipeError("compare: one model has nothing to be compared with\nname two or more")
    check_twice("compare", list(asked.models))
    splits = [_split(section, asked.seed) for section in asked.tasks]
    answers: dict[str, dict[str, list[bool]]] = {split.section.label: {} for split in splits}
    models: dict[str, dict[str, Any]] = {}
    for name in asked.models:
        opened = open_model(locate(name, offline=asked.offline), asked.quantization)
        models[name] = {}
        for split in splits:
            setting, dev = _chosen(opened, split, asked)
            right = _right(opened, split, split.scored, setting, asked.seed)
            answers[split.section.label][name] = right
            models[name][split.section.label] = _facts(setting, dev, right, split)
        del opened
        gc.collect()
        torch.cuda.empty_cache()
    reference = asked.models[0]
    found = verdict.duels(answers, reference)
    claims = []
    for name in asked.models[1:]:
        claims.append(verdict.claim([duel for duel in found if duel.model == name]))
    result = {"reference": reference, "models": models, "duels": [duel.facts() for duel in found], "claims": claims}
    if out is not None:
        _write(out, splits, answers, result)
    return result


def _split(section: TaskSection, seed: int) -> Split:
    task = load_task(section, seed)
    if task.metric != "accuracy" or not task.items[0].options:
        raise RecipeError(
            f"compare: {section.task} is no choice between options\nallowed: tasks whose metric is accuracy"
        )
    count = min(MAX_DEV, round(DEV_SHARE * len(task.items)))
    if count < 4:
        raise RecipeError(
            f"compare: {section.task} has {len(task.items)} items\n16 are needed: a quarter chooses prompts"
        )
    dev = set(Random(f"compare {seed}").sample(range(len(task.items)), count))
    chosen = tuple(item for index, item in enumerate(task.items) if index in dev)
    groups = {item.group for item in chosen if item.group is not None}
    scored = [item for index, item in enumerate(task.items) if index not in dev and item.group not in groups]
    return Split(task, section, chosen, tuple(scored))


def _chosen(opened: OpenModel, split: Split, asked: Asked) -> tuple[Setting, dict[str, float]]:
    """The setting that answers most development items rightly (the earlier one on a tie), and what each reached."""
    names = [templates.load(name, opened.location.base) for name in asked.templates]
    settings = [Setting(t, k) for t in [opened.template, *names] for k in asked.shots]
    reached = []
    for setting in settings:
        right = _right(opened, split, split.dev, setting, asked.seed)
        reached.append(sum(right) / len(right))
    best = max(range(len(settings)), key=lambda index: (reached[index], -index))
    told = {f"{s.template.name}, {s.shots} shots": r for s, r in zip(settings, reached, strict=True)}
    return settings[best], told


def _right(opened: OpenModel, split: Split, items: Sequence[Item], setting: Setting, seed: int) -> list[bool]:
    order = Random(f"{seed}").sample(list(split.dev), len(split.dev))
    section = split.section.model_copy(update={"shots": setting.shots})
    asked = [with_examples(item, order, section, split.task.write, True) for item in items] if setting.shots else items
    prompts = prompt_texts(opened.tokenizer, setting.template, [item.messages for item in asked])
    title = f"{opened.location.name}: {split.section.label}, {setting.template.name}, {setting.shots} shots"
    with ui.stage(title, total=len(items), unit="items") as bar:
        options = [item.options for item in items]
        found = choice_logprobs(opened.model, opened.tokenizer, prompts, options, progress=adding(bar))
    return [best_option(score.sums, item.id) == item.gold for score, item in zip(found, items, strict=True)]


def _facts(setting: Setting, dev: dict[str, float], right: list[bool], split: Split) -> dict[str, Any]:
    return {
        "template": setting.template.name,
        "shots": setting.shots,
        "dev": {"items": len(split.dev), "accuracy": dev},
        "accuracy": sum(right) / len(right),
        "ci95": list(statistics.wilson(sum(right), len(right))),
        "n": len(right),
    }


def _write(out: Path, splits: list[Split], answers: dict[str, dict[str, list[bool]]], result: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = answers[split.section.label]
        lines = []
        for index, item in enumerate(split.scored):
            lines.append({"id": item.id, **{name: right[index] for name, right in rows.items()}})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        store.write_atomic(out / f"{split.section.label}.items.jsonl", text)
    store.write_json(out / "compare.json", result)
