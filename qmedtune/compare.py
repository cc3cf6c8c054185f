"""The fair head-to-head: each model with the prompt and the examples that suit it, then the same items for all.

Medical models that beat their base under one fixed prompt often do not once prompts are chosen per model (Jeong et al.,
arXiv 2411.08870). So template and number of examples are chosen per model and task on development items, which are
never scored; examples come from the benchmark's own split for them, else from these. Verdicts are verdict.py's.
Deliberately absent: tasks that are no choice between options, training.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch

from qmedtune import store, ui
from qmedtune.allowed import Quantization
from qmedtune.data.packing import templates
from qmedtune.errors import RecipeError
from qmedtune.evaluation import statistics, verdict
from qmedtune.evaluation.measure import adding, best_option, within_memory
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.scoring import BATCH_TOKENS, ChoiceScores, choice_logprobs, prompt_texts
from qmedtune.evaluation.summary import majority_of
from qmedtune.recipe import TaskSection
from qmedtune.results import ChosenPrompting, Development, HeadToHead, scored_in
from qmedtune.tasks import Item, Task, check_twice, load_task, published_examples
from qmedtune.tasks.item_parts import place_of
from qmedtune.tasks.shots import shot_files, with_examples

DEV_SHARE, MAX_DEV, MIN_DEV = 0.25, 100, 4

Answers = dict[str, dict[str, list[bool]]]
"""By task and model, whether each item was answered rightly."""


@dataclass(frozen=True)
class PromptSetting:
    """How a model is asked: a template and the number of examples before each question."""

    template: templates.Template
    shots: int

    @property
    def words(self) -> str:
        return f"{self.template.name}, {self.shots} shots"


@dataclass(frozen=True)
class Picked:
    """The setting that suits a model in a task, and what each setting reached on the development items."""

    setting: PromptSetting
    dev: Development


@dataclass(frozen=True)
class Questions:
    """A task without examples of its own, and the section that asked for it."""

    task: Task
    section: TaskSection


@dataclass(frozen=True)
class TaskSplit:
    """A task's items: those that choose a setting, and those that are scored. published: where examples come from, if
    the benchmark has a split for them; without it from the items that choose."""

    task: Task
    section: TaskSection
    dev: tuple[Item, ...]
    scored: tuple[Item, ...]
    published: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Entrant:
    """A model that takes part: its name, and what loads it."""

    name: str
    open: Callable[[], OpenModel]


@dataclass(frozen=True)
class SettingSearch:
    """What every model may choose from: numbers of examples, and templates besides its own.

    kept: a folder in which answers are kept at once, so that what was killed goes on where it was
    """

    shots: tuple[int, ...] = (0,)
    templates: tuple[str, ...] = ()
    seed: int = 17
    kept: Path | None = None


@dataclass(frozen=True)
class ComparisonJob:
    """A head-to-head comparison of models on benchmark tasks.

    The first model is the one that all others are compared with.
    """

    models: tuple[str, ...]
    tasks: tuple[TaskSection, ...]
    shots: tuple[int, ...] = (0,)
    templates: tuple[str, ...] = ()
    seed: int = 17
    quantization: Quantization | None = "none"
    offline: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the models answered. models: how each was asked and what it reached, by name and task."""

    splits: tuple[TaskSplit, ...]
    models: dict[str, dict[str, ChosenPrompting]]
    answers: Answers


@dataclass(frozen=True)
class Player:
    """A model that is loaded, and the rules that it plays by."""

    name: str
    opened: OpenModel
    rules: SettingSearch


def compare_models(asked: ComparisonJob, out: Path | None = None) -> HeadToHead:
    """How each model was asked and what it reached, the duels, and one sentence per other model.

    out: a folder for compare.json and, per task, <task>.items.jsonl (id and right or wrong per model; no text).
    """
    if len(asked.models) < 2:
        raise RecipeError("compare: one model has nothing to be compared with\nname two or more")
    check_twice("compare", list(asked.models))
    questions: list[Questions] = []
    for section in asked.tasks:
        questions.append(Questions(load_task(section, asked.seed), section))
    splits = splits_of(questions, asked.seed)
    entrants: list[Entrant] = []
    for name in asked.models:
        entrants.append(Entrant(name, partial(_opened, name, asked)))
    outcome = meet(entrants, splits, SettingSearch(asked.shots, asked.templates, asked.seed))
    reference, *others = asked.models
    result = judged(outcome, [(name, reference) for name in others])
    result = result.model_copy(update={"reference": reference})
    if out is not None:
        write(out, outcome, result)
    return result


def _opened(name: str, asked: ComparisonJob) -> OpenModel:
    return open_model(locate(name, offline=asked.offline), asked.quantization)


def meet(entrants: Sequence[Entrant], splits: Sequence[TaskSplit], rules: SettingSearch) -> Outcome:
    """Every model answers every task's scored items, asked as suits it. One is loaded at a time."""
    answers: Answers = {part.section.label: {} for part in splits}
    models: dict[str, dict[str, ChosenPrompting]] = {}
    for entrant in entrants:
        player = Player(entrant.name, entrant.open(), rules)
        models[entrant.name] = {}
        for part in splits:
            picked = _chosen(player, part)
            right = _right(player, part, part.scored, picked.setting)
            answers[part.section.label][entrant.name] = right
            models[entrant.name][part.section.label] = _reached(player, part, picked, right)
        del player
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(tuple(splits), models, answers)


def judged(outcome: Outcome, pairs: Sequence[tuple[str, str]]) -> HeadToHead:
    """Of each pair the first model against the second."""
    grouped: dict[str, statistics.Groups] = {}
    for part in outcome.splits:
        grouped[part.section.label] = [item.group or f"item {item.id}" for item in part.scored]
    found = verdict.paired_duels(outcome.answers, pairs, grouped)
    claims: list[str] = []
    for pair in pairs:
        own = [duel for duel in found if (duel.model, duel.reference) == pair]
        claims.append(verdict.claim(own, precision_of(outcome.models, pair)) + _no_knowledge(outcome, pair[0]))
    duels = [duel.entry() for duel in found]
    return HeadToHead(models=outcome.models, duels=duels, claims=claims)


def _no_knowledge(outcome: Outcome, model: str) -> str:
    """A sentence on the tasks in which a model is not beyond always the commonest answer; nothing where there are
    none: to win against a base is no knowledge yet."""
    told: list[str] = []
    for task, chosen in outcome.models[model].items():
        if chosen.majority is not None and chosen.ci95[0] <= chosen.majority:
            told.append(f"{task} ({chosen.accuracy:.3f}; {chosen.majority:.3f})")
    if not told:
        return ""
    return f" {model} is not beyond always the commonest answer on {', '.join(told)}."


def precision_of(models: Mapping[str, Mapping[str, ChosenPrompting]], names: Sequence[str]) -> str:
    """`bfloat16`, or `bfloat16 and NF4` where these models were not scored in one precision."""
    found: dict[str, None] = {}
    for name in names:
        for chosen in models[name].values():
            found[scored_in(None, chosen.weights)] = None
    return " and ".join(found)


def comparable(task: Task) -> bool:
    """Whether its answers are right or wrong choices, and enough of them to choose prompts by and to score."""
    return _is_choice(task) and _dev_count(task) >= MIN_DEV


def _is_choice(task: Task) -> bool:
    return task.metric == "accuracy" and bool(task.items[0].options)


def _dev_count(task: Task) -> int:
    return min(MAX_DEV, round(DEV_SHARE * len(task.items)))


def splits_of(tasks: Sequence[Questions], seed: int) -> list[TaskSplit]:
    """Every task's development and scored items. What is a development item of one task is scored in none: tasks may
    share questions (MMLU and its medical part). RecipeError where a task cannot be compared."""
    development: list[tuple[Item, ...]] = []
    chosen_by = set[str]()
    for asked in tasks:
        items = _development(asked, seed)
        development.append(items)
        chosen_by |= {item.identity for item in items}
    splits: list[TaskSplit] = []
    for asked, items in zip(tasks, development, strict=True):
        scored = tuple(item for item in asked.task.items if item.identity not in chosen_by)
        if not scored:
            raise RecipeError(
                f"compare: prompts are chosen by all items of {asked.section.task}: it shares them with another task\n"
                "leave one of the two out"
            )
        published: list[Item] = []
        if files := shot_files(asked.section):
            published = published_examples(asked.section, files)
        splits.append(TaskSplit(asked.task, asked.section, items, scored, tuple(published)))
    return splits


def _development(asked: Questions, seed: int) -> tuple[Item, ...]:
    """The items that prompts are chosen by: those that a draw by what they are puts first."""
    task = asked.task
    if not _is_choice(task):
        raise RecipeError(
            f"compare: {asked.section.task} is no choice between options\nallowed: tasks whose metric is accuracy"
        )
    count = _dev_count(task)
    if count < MIN_DEV:
        raise RecipeError(
            f"compare: {asked.section.task} has {len(task.items)} items\n16 are needed: a quarter chooses prompts"
        )
    drawn = sorted(task.items, key=lambda item: place_of(item, f"compare {seed}"))
    return tuple(drawn[:count])


def _chosen(player: Player, part: TaskSplit) -> Picked:
    """The setting that answers most development items rightly (the earlier one on a tie), and what each reached."""
    reached: dict[str, float] = {}
    settings = list(_settings(player))
    best, highest = settings[0], -1.0
    for setting in settings:
        right = _right(player, part, part.dev, setting)
        share = sum(right) / len(right)
        reached[setting.words] = share
        if share > highest:
            best, highest = setting, share
    return Picked(best, Development(items=len(part.dev), accuracy=reached))


def _settings(player: Player) -> Iterator[PromptSetting]:
    """The template of its training first, each template once."""
    found = {player.opened.template.name: player.opened.template}
    for name in player.rules.templates:
        template = templates.load(name, player.opened.location.base)
        found.setdefault(template.name, template)
    for template in found.values():
        for shots in player.rules.shots:
            yield PromptSetting(template, shots)


def _right(player: Player, part: TaskSplit, items: Sequence[Item], setting: PromptSetting) -> list[bool]:
    """Per item whether the most likely option is the right one; kept where the rules name a folder."""
    work = partial(_answered, player, part, items, setting)
    if player.rules.kept is None:
        return work()
    asked = [player.name, part.section.label, setting.words, [item.id for item in items]]
    return store.kept(player.rules.kept / f"{store.sha256_json(asked)[:16]}.json", work)


def _answered(player: Player, part: TaskSplit, items: Sequence[Item], setting: PromptSetting) -> list[bool]:
    asked = with_shots(part, items, setting, player.rules.seed)
    tokenizer = player.opened.tokenizer
    prompts = prompt_texts(tokenizer, setting.template, [item.messages for item in asked])
    options = [item.options for item in items]
    title = f"{player.name}: {part.section.label}, {setting.words}"
    with ui.progress_bar(title, total=len(items), unit="items") as bar:

        def compare_options(batch_tokens: int) -> list[ChoiceScores]:
            bar.update(0)
            model = player.opened.model
            return choice_logprobs(model, tokenizer, prompts, options, batch_tokens=batch_tokens, progress=adding(bar))

        found = within_memory(compare_options, BATCH_TOKENS)
    right: list[bool] = []
    for score, item in zip(found, items, strict=True):
        right.append(best_option(score.sums, item.id) == item.gold)
    return right


def with_shots(part: TaskSplit, items: Sequence[Item], setting: PromptSetting, seed: int) -> Sequence[Item]:
    """The items, each behind examples where the setting asks for some."""
    if not setting.shots:
        return items
    pool = part.published or part.dev
    order = Random(f"{seed}").sample(list(pool), len(pool))
    section = part.section.model_copy(update={"shots": setting.shots})
    same_file = not part.published
    return [with_examples(item, order, section, part.task.write, same_ids=same_file) for item in items]


def _reached(player: Player, part: TaskSplit, picked: Picked, right: list[bool]) -> ChosenPrompting:
    weights = player.opened.computed_in
    if player.opened.quantization == "nf4":
        weights = "nf4"
    return ChosenPrompting(
        template=picked.setting.template.name,
        shots=picked.setting.shots,
        dev=picked.dev,
        accuracy=sum(right) / len(right),
        ci95=statistics.wilson(sum(right), len(right)),
        n=len(right),
        majority=majority_of(part.scored),
        weights=weights,
    )


def write(out: Path, outcome: Outcome, result: HeadToHead) -> None:
    """compare.json and per task <task>.items.jsonl: ids, and right or wrong per model."""
    out.mkdir(parents=True, exist_ok=True)
    for part in outcome.splits:
        text = ""
        for index, item in enumerate(part.scored):
            line: dict[str, str | bool] = {"id": item.id}
            for name, right in outcome.answers[part.section.label].items():
                line[name] = right[index]
            text += json.dumps(line, ensure_ascii=False) + "\n"
        store.write_atomic(out / f"{part.section.label}.items.jsonl", text)
    store.write_json(out / "compare.json", result.as_json())
