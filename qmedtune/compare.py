"""The fair head-to-head: each model with the prompt and the examples that suit it, then the same items for all.

Medical models that beat their base under one fixed prompt often do not once prompts are chosen per model (Jeong et al.,
arXiv 2411.08870). So template and number of examples are chosen per model and task on development items, which are
never scored and are also where examples come from; verdicts are verdict.py's.
Deliberately absent: tasks that are no choice between options, training.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from qmedtune import store, ui
from qmedtune.data.packing import templates
from qmedtune.errors import RecipeError
from qmedtune.evaluation import statistics, verdict
from qmedtune.evaluation.measure import adding, best_option
from qmedtune.evaluation.open_model import OpenModel, Quantization, locate, open_model
from qmedtune.evaluation.scoring import choice_logprobs, prompt_texts
from qmedtune.recipe import TaskSection
from qmedtune.results import Chosen, Development, HeadToHead
from qmedtune.tasks import Item, Task, check_twice, load_task
from qmedtune.tasks.shots import with_examples

DEV_SHARE, MAX_DEV = 0.25, 100

Answers = dict[str, dict[str, list[bool]]]
"""By task and model, whether each item was answered rightly."""


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


def compare_models(asked: Asked, out: Path | None = None) -> HeadToHead:
    """How each model was asked and what it reached, the duels, and one sentence per other model.

    out: a folder for compare.json and, per task, <task>.items.jsonl (id and right or wrong per model; no text).
    """
    if len(asked.models) < 2:
        raise RecipeError("compare: one model has nothing to be compared with\nname two or more")
    check_twice("compare", list(asked.models))
    splits = [_split(section, asked.seed) for section in asked.tasks]
    answers: Answers = {split.section.label: {} for split in splits}
    models: dict[str, dict[str, Chosen]] = {}
    for name in asked.models:
        opened = open_model(locate(name, offline=asked.offline), asked.quantization)
        models[name] = {}
        for split in splits:
            setting, dev = _chosen(opened, split, asked)
            right = _right(opened, split, split.scored, setting, asked.seed)
            answers[split.section.label][name] = right
            models[name][split.section.label] = _reached(setting, dev, right)
        del opened
        gc.collect()
        torch.cuda.empty_cache()
    result = _judged(asked, answers, models)
    if out is not None:
        _write(out, splits, answers, result)
    return result


def _judged(asked: Asked, answers: Answers, models: dict[str, dict[str, Chosen]]) -> HeadToHead:
    reference, *others = asked.models
    found = verdict.duels(answers, reference)
    claims: list[str] = []
    for name in others:
        claims.append(verdict.claim([duel for duel in found if duel.model == name]))
    return HeadToHead(reference=reference, models=models, duels=[duel.entry() for duel in found], claims=claims)


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
    chosen: list[Item] = []
    others: list[Item] = []
    for index, item in enumerate(task.items):
        (chosen if index in dev else others).append(item)
    groups = {item.group for item in chosen if item.group is not None}
    scored = [item for item in others if item.group not in groups]
    return Split(task, section, tuple(chosen), tuple(scored))


def _chosen(opened: OpenModel, split: Split, asked: Asked) -> tuple[Setting, Development]:
    """The setting that answers most development items rightly (the earlier one on a tie), and what each reached."""
    reached: dict[str, float] = {}
    best, highest = None, -1.0
    for setting in _settings(opened, asked):
        right = _right(opened, split, split.dev, setting, asked.seed)
        share = sum(right) / len(right)
        reached[f"{setting.template.name}, {setting.shots} shots"] = share
        if share > highest:
            best, highest = setting, share
    assert best is not None
    return best, Development(items=len(split.dev), accuracy=reached)


def _settings(opened: OpenModel, asked: Asked) -> Iterator[Setting]:
    """The template of its training first."""
    named = [templates.load(name, opened.location.base) for name in asked.templates]
    for template in (opened.template, *named):
        for shots in asked.shots:
            yield Setting(template, shots)


def _right(opened: OpenModel, split: Split, items: Sequence[Item], setting: Setting, seed: int) -> list[bool]:
    """Per item whether the most likely option is the right one."""
    asked = _with_shots(split, items, setting, seed)
    prompts = prompt_texts(opened.tokenizer, setting.template, [item.messages for item in asked])
    options = [item.options for item in items]
    title = f"{opened.location.name}: {split.section.label}, {setting.template.name}, {setting.shots} shots"
    with ui.stage(title, total=len(items), unit="items") as bar:
        found = choice_logprobs(opened.model, opened.tokenizer, prompts, options, progress=adding(bar))
    right: list[bool] = []
    for score, item in zip(found, items, strict=True):
        right.append(best_option(score.sums, item.id) == item.gold)
    return right


def _with_shots(split: Split, items: Sequence[Item], setting: Setting, seed: int) -> Sequence[Item]:
    """The items, each behind examples from the development items where the setting asks for some."""
    if not setting.shots:
        return items
    order = Random(f"{seed}").sample(list(split.dev), len(split.dev))
    section = split.section.model_copy(update={"shots": setting.shots})
    return [with_examples(item, order, section, split.task.write, True) for item in items]


def _reached(setting: Setting, dev: Development, right: list[bool]) -> Chosen:
    return Chosen(
        template=setting.template.name,
        shots=setting.shots,
        dev=dev,
        accuracy=sum(right) / len(right),
        ci95=statistics.wilson(sum(right), len(right)),
        n=len(right),
    )


def _write(out: Path, splits: list[Split], answers: Answers, result: HeadToHead) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        text = ""
        for index, item in enumerate(split.scored):
            line: dict[str, str | bool] = {"id": item.id}
            for name, right in answers[split.section.label].items():
                line[name] = right[index]
            text += json.dumps(line, ensure_ascii=False) + "\n"
        store.write_atomic(out / f"{split.section.label}.items.jsonl", text)
    store.write_json(out / "compare.json", result.as_json())
