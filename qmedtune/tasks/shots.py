"""Which files are which split, and which examples stand before a question (n-shot).

A folder is read by its authors' own names: a file belongs to the split that its name, else its folder, says. Examples
come from `shots_from`, else from the folder's training (MMLU: development) split, else from the same file; an item is
never among its own examples, nor is one with the same question or of the same note. Examples move scores of base
models by tens of points, so at least three draws are asked and their spread is told (recipe.py).
Deliberately absent: balancing by label, choosing examples by similarity.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from qmedtune.data.reading.sources import source_files
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection, TaskSection
from qmedtune.tasks.choice import GROUND_TRUTH
from qmedtune.tasks.items import Item, Message, Task

WORDS = {"test": ("test",), "dev": ("dev", "val", "valid", "validation"), "train": ("train", "training")}


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name says: `mli_dev_v1.jsonl` -> dev."""
    words = re.split(r"[^a-z]+", name.lower())
    for split, names in WORDS.items():
        if not set(names).isdisjoint(words):
            return split
    return None


def split_files(path: str, split: str | None) -> list[Path]:
    """The files of a benchmark: `path` itself, or of a folder those of one split (default: test, else all files).

    Of several levels the upper one counts: MedQA's US folder holds the 4-option questions one level below. DataError.
    """
    every, folder = source_files(SourceSection(path=path, kind="instructions")), _folder(path)
    files = [file for file in every if file.name != GROUND_TRUTH] or every
    if not folder.is_dir():
        return files
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_below(folder, file), []).append(file)
    found = splits.get(split or "test", [])
    named = sorted(name for name in splits if name)
    if not found and (split or named):
        there = ", ".join(named) or "none that is named after a split"
        raise DataError(f"{folder}: no file of the split `{split or 'test'}`\nsplits there: {there}")
    level = min((len(file.parts) for file in found), default=0)
    return [file for file in found if len(file.parts) == level] or files


def _folder(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _split_below(folder: Path, file: Path) -> str | None:
    for name in reversed(file.relative_to(folder).parts):
        if split := split_of(name):
            return split
    return None


def shot_files(section: TaskSection) -> list[Path] | None:
    """Files that examples are drawn from; None: the task's own."""
    if section.shots_from:
        named = _has_split(section.shots_from, "train")
        return split_files(section.shots_from, "train" if named else None)
    # MMLU's five development questions a subject are its published examples; its training file is another benchmark's.
    preferred = ("dev", "train") if section.task.startswith("mmlu") else ("train", "dev")
    for split in preferred:
        if section.path and split != (section.split or "test") and _has_split(section.path, split):
            return split_files(section.path, split)
    return None


def _has_split(path: str, split: str) -> bool:
    folder = _folder(path)
    if not folder.is_dir():
        return False
    return any(path.is_file() and _split_below(folder, path) == split for path in folder.rglob("*"))


def with_shots(task: Task, section: TaskSection, pool: Sequence[Item], *, source: str | None, seed: int) -> Task:
    """The task with `shot_seeds` draws of `shots` examples before every item. `source`: the file of `pool`, for facts.

    The same examples stand before all items of a draw (a model reads them once), but for items that are among them:
    these get the next example of the draw's order. Where items have facets (MMLU's subjects), examples share them.
    """
    draws = []
    for draw in range(section.shot_seeds):
        order = Random(f"{seed}-{draw}").sample(list(pool), len(pool))
        asked = []
        for item in task.items:
            asked.append(with_examples(item, order, section, task.write, same_ids=source is None))
        draws.append(tuple(asked))
    name = source or "the task's own items, never the item itself"
    return replace(task, name=section.label, draws=tuple(draws), shots_from=name)


def with_examples(
    item: Item, order: list[Item], section: TaskSection, write: Callable[[Item], str], *, same_ids: bool
) -> Item:
    """The item behind the first examples of `order` that may stand before it. same_ids: an id names the same question
    in both."""
    examples, count = [], section.shots
    for other in order:
        if len(examples) == count:
            break
        itself = other.messages == item.messages or (same_ids and other.id == item.id)
        akin = item.group is not None and other.group == item.group
        if other.facet == item.facet and not itself and not akin:
            examples.append(other)
    if len(examples) < count:
        raise DataError(f"evaluate.tasks: {section.task}: {count} examples asked, {len(examples)} there\nlower `shots`")
    turns: list[Message] = []
    for example in examples:
        turns += [*example.messages, {"role": "assistant", "content": write(example)}]
    return replace(item, messages=(*turns, *item.messages), shots=tuple(example.id for example in examples))
