"""Two parts of every task and every held-out text: one that choices are made on, one that is scored at the end.

`evaluate.development` is the share of the first; without it everything is scored. Items about one thing (a note, a
patient, an abstract) stay together, and texts are parted by whole documents, so that nothing is in both. The parts are
drawn by name and seed: every model, and every arm of an ablation, has the same. Deliberately not here: choosing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

from qmedtune.data.packing.pack import PackedRows, WholeDocuments
from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe
from qmedtune.tasks import Item, Task, load_task, world_of

Part = Literal["development", "scored"]


def development_tasks(recipe: Recipe) -> list[Task]:
    """The recipe's tasks on their development items, each asked once and without examples: these could be items that
    are scored at the end. RecipeError where one is too small to be parted."""
    found: dict[str, Task] = {}
    for section in recipe.evaluate.tasks:
        bare = section.model_copy(update={"shots": 0})
        if bare.label not in found:
            task = load_task(bare, recipe.items_seed, world_of(recipe))
            found[bare.label] = part_of(task, recipe, "development")
    return list(found.values())


def scored_tasks(recipe: Recipe) -> list[Task]:
    """The recipe's tasks on the items that nothing was chosen by: all of them, without `evaluate.development`."""
    found: list[Task] = []
    for section in recipe.evaluate.tasks:
        found.append(part_of(load_task(section, recipe.items_seed, world_of(recipe)), recipe, "scored"))
    return found


def part_of(task: Task, recipe: Recipe, part: Part) -> Task:
    """The task on one part of its items. RecipeError where there is nothing for the other one."""
    share = recipe.development
    if not share:
        return task
    units = sorted({_unit(item) for item in task.items}, key=lambda unit: _rank(recipe.items_seed, unit))
    count = max(1, round(share * len(units)))
    if count >= len(units):
        raise RecipeError(
            f"evaluate.development: {task.name} has {len(units)} items apart, and {share:g} of them are all\n"
            "lower `development`, or raise the task's `limit`"
        )
    development = set(units[:count])
    wanted = part == "development"

    def kept(items: Sequence[Item]) -> tuple[Item, ...]:
        return tuple(item for item in items if (_unit(item) in development) == wanted)

    draws: list[tuple[Item, ...]] = []
    for draw in task.draws:
        draws.append(kept(draw))
    return replace(task, items=kept(task.items), draws=tuple(draws))


def _unit(item: Item) -> str:
    """What an item was taken from; itself, where it does not say."""
    return item.group or item.pmid or item.id


def _rank(seed: int, unit: str) -> str:
    """An order that depends on nothing else in the task: with examples, or in other words, it is parted alike."""
    return hashlib.sha256(f"development {seed} {unit}".encode()).hexdigest()


def texts_of(recipe: Recipe, validation: Path, window: int, part: Part) -> dict[str, WholeDocuments]:
    """One part of the held-out documents of each source of `evaluate.perplexity`.

    validation: the folder of packed rows per source; window: tokens that are read at once.
    """
    found: dict[str, WholeDocuments] = {}
    for source in recipe.evaluate.perplexity:
        rows = PackedRows(validation / source)
        found[source] = WholeDocuments(rows, window, _documents(recipe, source, rows, part))
    return found


def _documents(recipe: Recipe, source: str, rows: PackedRows, part: Part) -> list[int]:
    drawn = [int(document) for document in rows.drawn_documents()]
    if not recipe.development:
        return drawn
    count = max(1, round(recipe.development * len(drawn)))
    if count >= len(drawn):
        raise RecipeError(
            f"evaluate.development: {len(drawn)} documents of {source} are held out, none is left to score\n"
            f"raise data.{source}.holdout, or lower `development`"
        )
    development = set(Random(f"development {recipe.items_seed} {source}").sample(drawn, count))
    wanted = part == "development"
    return [document for document in drawn if (document in development) == wanted]
