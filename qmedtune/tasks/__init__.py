"""Benchmarks over local files, by name. Importing this brings no torch and no metric library.

A task is one reader (a file as published -> items) and one metric; evaluate.py does the rest. To add one, write both
in a small file here and name it below. Nothing is downloaded, and no text of a test set leaves its file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qmedtune import ui
from qmedtune.data.synthetic import outcomes
from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.tasks import choice, expert, findings, free_text, item_parts, labels, me_llama, safety, shots
from qmedtune.tasks.items import Item, Task, allowed, checked_items, with_metric

__all__ = [
    "BUILTIN_TASKS",
    "FILE_TASKS",
    "Item",
    "Task",
    "check_twice",
    "load_task",
    "published_examples",
    "read_items",
    "world_of",
]

Reader = Callable[[Path], list[Item]]
Maker = Callable[[str, tuple[Item, ...]], Task]

BUILTIN_TASKS = ("facts",)
FILE_TASKS: dict[str, tuple[Reader, Maker]] = {
    "pubmedqa": (choice.pubmedqa, labels.accuracy_task),
    "medqa": (choice.medqa, choice.choice_task),
    "medmcqa": (choice.medmcqa, choice.choice_task),
    "mmlu": (choice.mmlu, choice.choice_task),
    "mmlu_medical": (choice.mmlu_medical, choice.choice_task),
    "mmlu_meditron": (choice.mmlu_meditron, choice.choice_task),
    "mmlu_general": (choice.mmlu_general, choice.choice_task),
    "mmlu_pro_health": (expert.mmlu_pro_health, choice.choice_task),
    "medxpertqa": (expert.medxpertqa, choice.choice_task),
    "medbullets": (expert.medbullets, choice.choice_task),
    "careqa": (expert.careqa, choice.choice_task),
    "arc": (choice.arc, choice.choice_task),
    "choice": (choice.choice, choice.choice_task),
    "mednli": (labels.nli, labels.accuracy_task),
    "bionli": (labels.nli, labels.macro_f1_task),
    "ddi2013": (labels.ddi2013, labels.ddi_task),
    "mtsamples": (labels.mtsamples, labels.macro_f1_task),
    "outcome": (labels.outcome, labels.auroc_task),
    "hoc": (findings.hoc, findings.hoc_task),
    "i2b2_2012": (findings.i2b2_2012, findings.entity_task),
    "emrqa": (free_text.emrqa, free_text.question_task),
    "pubmed_summary": (free_text.pubmed_summaries, free_text.summary_task),
    "mimic_cxr_summary": (free_text.radiology_summaries, free_text.summary_task),
    "summarization": (free_text.summaries, free_text.summary_task),
    "meqsum": (free_text.answers, free_text.summary_task),
    "aci_bench": (free_text.answers, free_text.summary_task),
    "mts_dialog": (free_text.answers, free_text.summary_task),
    "medquad": (free_text.answers, free_text.summary_task),
    "liveqa": (free_text.answers, free_text.summary_task),
    "medicationqa": (free_text.answers, free_text.summary_task),
    "bioasq": (free_text.answers, free_text.summary_task),
    "bioasq_yesno": (free_text.bioasq_yesno, labels.accuracy_task),
    "safety": (safety.requests, safety.safety_task),
}


def load_task(section: TaskSection, seed: int, world: str = "tiny") -> Task:
    """Read and check a benchmark. `limit` items and the examples are drawn with `seed`. RecipeError, DataError."""
    if section.task in BUILTIN_TASKS:
        every, where, make = choice.facts(world), Path(f"builtin:{world}"), choice.choice_task
    else:
        _check_name(section)
        files = shots.split_files(str(section.path), section.split)
        every, where, make = read_items(section.task, files), files[0], FILE_TASKS[section.task][1]
    every = me_llama.ask(section, item_parts.identified(every))
    task = make(section.task, checked_items(section.task, where, every, limit=section.limit, seed=seed))
    task = replace(me_llama.read(section, task), name=section.label)
    if section.bertscore:
        task = free_text.with_bertscore(task, section.bertscore)
    if section.metric:
        task = with_metric(task, section.metric)
    if not section.shots:
        return task
    examples = shots.shot_files(section)
    if examples is None:
        return shots.with_shots(task, section, every, source=None, seed=seed)
    return shots.with_shots(task, section, published_examples(section, examples), source=examples[0].name, seed=seed)


def published_examples(section: TaskSection, files: list[Path]) -> list[Item]:
    """Items of other files than the task's (`shots.shot_files`), in its words, as examples before its own."""
    return me_llama.ask(section, read_items(section.task, files))


def world_of(recipe: Recipe) -> str:
    """The built-in world that a recipe's data come from; `tiny` for recipes on other data."""
    for path in recipe.paths():
        if path.startswith("builtin:"):
            world, _ = outcomes.locate(path)
            return world.name
    return "tiny"


def check_twice(option: str, names: Sequence[str]) -> None:
    """Refuse a task that is asked twice: scores, files and what a killed evaluation left carry its name."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RecipeError(f"{option}: {name} is there twice\ngive all its files as one folder, or ask in two calls")


def _check_name(section: TaskSection) -> None:
    if section.task not in FILE_TASKS:
        known = [*BUILTIN_TASKS, *FILE_TASKS]
        raise RecipeError(f"no task {section.task!r}\n{allowed(section.task, known)}")
    if section.path is None:
        raise RecipeError(
            f"task {section.task} is read from a file\n"
            f"in a recipe: {{task: {section.task}, path: FILE}}; on the command line: --tasks {section.task}=FILE"
        )


def read_items(task: str, files: list[Path]) -> list[Item]:
    """The items of a benchmark's files, under the ids that its scores have. DataError."""
    read, _ = FILE_TASKS[task]
    if len(files) == 1:
        return read(files[0])
    found, empty = [], 0
    for file in files:
        items = read(file)
        empty += not items
        for item in items:
            found.append(replace(item, id=f"{file.stem}/{item.id}"))  # subjects of MMLU number their items alike
    if empty:
        ui.note(f"{task}: {empty} of {len(files)} files hold no question of this task and are left out")
    return found
