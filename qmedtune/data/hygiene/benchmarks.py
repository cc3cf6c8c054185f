"""What training text is checked against: the recipe's own evaluation, files, folders, and public benchmarks by name.

An item carries its question and its passages apart from its options, because leaked text seldom holds the options in
order, and the very id that the evaluation gives it, so that a score can be split into clean and overlapping items.
Benchmarks are read by the tasks' own readers: what is scored is what is looked for.
Named benchmarks are read through the `datasets` library, from its cache when offline; nothing else here downloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune.data.hygiene.decontaminate import BenchmarkItem
from qmedtune.data.reading.document import Fields
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, TaskSection

# Of a file that is no known task (`decontaminate: [FILE]`): where questions and passages stand in its records.
QUESTIONS = ("QUESTION", "question", "query", "instruction", "prompt", "sentence2", "hypothesis", "stem", "body")
PASSAGES = (
    "CONTEXTS", "context", "contexts", "abstract", "passage", "sentence1", "premise", "sentence", "input", "text",
    "article", "findings", "dialogue",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A public benchmark on the Hub: dataset, configurations (None: its only one), and the split that is scored."""

    dataset: str
    configurations: tuple[str | None, ...]
    split: str


# As lm-evaluation-harness scores them (MedMCQA's test split has no answers, so its validation split is the test set).
PRESETS = {
    "medqa": Preset("GBaker/MedQA-USMLE-4-options", (None,), "test"),
    "medmcqa": Preset("openlifescienceai/medmcqa", (None,), "validation"),
    "pubmedqa": Preset("qiaojin/PubMedQA", ("pqa_labeled",), "train"),
    "mmlu_medical": Preset(
        "cais/mmlu",
        ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics")
        + ("professional_medicine",),
        "test",
    ),
}


def chosen_tasks(recipe: Recipe) -> list[TaskSection]:
    """The benchmarks that training text is checked against. A name is one of `evaluate.tasks`, a preset, or a path."""
    wanted = recipe.hygiene.decontaminate
    if wanted == "off":
        return []
    once = {}
    for task in recipe.evaluate.tasks:
        once[(task.task, task.path, task.split)] = task
    tasks = list(once.values())  # few-shot asks the same items
    if wanted == "evaluation":
        return tasks
    known = {name: TaskSection(task=name) for name in PRESETS} | {task.task: task for task in tasks}
    found: list[TaskSection] = []
    for name in wanted:
        found.append(known.get(name, TaskSection(task=Path(name).stem, path=name)))
    return found


def benchmark_items(recipe: Recipe) -> list[BenchmarkItem]:
    """Items of the recipe's own evaluation, or of the files and names that `hygiene.decontaminate` lists."""
    return [item for task in chosen_tasks(recipe) for item in _items(recipe, task)]


def benchmark_files(task: TaskSection) -> list[Path]:
    """The files of a benchmark that are scored: a file, or of a folder the split. Raises DataError for none."""
    from qmedtune.tasks.shots import split_files

    assert task.path is not None
    try:
        return split_files(task.path, task.split)
    except DataError as error:
        raise DataError(
            f"{task.path}: benchmark {task.task} is not there, so training text cannot be checked against it\n"
            f"({str(error).splitlines()[0].rpartition(': ')[2]})\n"
            "give its file or folder, or `hygiene: {decontaminate: off}`"
        ) from error


def _items(recipe: Recipe, task: TaskSection) -> Iterator[BenchmarkItem]:
    """The items as the evaluation asks them, by the task's own reader and under its ids; else by their columns."""
    from qmedtune import tasks
    from qmedtune.tasks.items import item_id, records

    if task.path is None:
        yield from _preset(task.task) if task.task in PRESETS else _facts(recipe)
        return
    files = benchmark_files(task)
    try:
        for asked in tasks.read_items(task.task, files) if task.task in tasks.FILE_TASKS else ():
            yield BenchmarkItem(task.task, asked.id, asked.leaks, asked.pmid)
        if task.task in tasks.FILE_TASKS:
            return
    except DataError:
        pass  # no answers (MedMCQA's and other test splits have none), which a search needs not; scoring refuses it
    for file in files:
        for where, fields in records(file):
            name = item_id(where, fields)
            yield _item(task.task, name if len(files) == 1 else f"{file.stem}/{name}", fields)


def _facts(recipe: Recipe) -> Iterator[BenchmarkItem]:
    from qmedtune.data.synthetic import world

    found = []
    for path in recipe.paths():
        if path.startswith("builtin:"):
            found.append(world.locate(path)[0])
    for where in {one.name: one for one in found}.values():
        for fact in world.facts_items(where):
            yield BenchmarkItem("facts", fact["id"], (fact["question"],))


def _preset(name: str) -> Iterator[BenchmarkItem]:
    from datasets import load_dataset

    preset = PRESETS[name]
    for configuration in preset.configurations:
        try:
            rows_of_split: Any = load_dataset(preset.dataset, configuration, split=preset.split)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"hygiene.decontaminate: {name} ({preset.dataset} of the Hub) is not in the local cache and cannot be "
                f"fetched ({type(error).__name__})\nload it once where there is a network, or give a file of it instead"
            ) from error
        for number, fields in enumerate(rows_of_split, start=1):
            where = str(fields.get("pubid") or fields.get("id") or number)
            yield _item(name, f"{configuration}/{where}" if len(preset.configurations) > 1 else where, fields)


def _flat(fields: Fields) -> Fields:
    """PubMedQA as the Hub has it: `pubid`, and the passages one level down."""
    if "pubid" not in fields or not isinstance(fields.get("context"), dict):
        return fields
    return {"question": fields["question"], "contexts": fields["context"]["contexts"], "pmid": fields["pubid"]}


def _item(task: str, name: str, fields: Fields) -> BenchmarkItem:
    """Questions and passages by the names that benchmarks use; a file without any of them counts as text."""
    fields = _flat(fields)
    texts = [text for key in (*QUESTIONS, *PASSAGES) for text in _strings(fields.get(key))]
    if not texts:
        texts = [text for value in fields.values() for text in _strings(value)][:1]
    pmid = fields.get("pmid") or (fields.get("_key") if "QUESTION" in fields else None)
    return BenchmarkItem(task, name, tuple(texts), str(pmid) if pmid else None)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        found: list[str] = []
        for text in value:
            if isinstance(text, str):
                found.append(text)
        return found
    return []
