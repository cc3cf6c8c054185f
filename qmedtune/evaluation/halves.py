"""Two parts of every task and every held-out text: one that choices are made on, one that is scored at the end.

`evaluate.development` is the share of the first; without it everything is scored. Items are parted by what they are
(tasks/item_parts.py), texts by whole documents, so that nothing is in both. The parts are drawn by seed: every model,
and every arm of an ablation, has the same. Deliberately not here: choosing.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from qmedtune.data.packing.pack import PackedRows, WholeDocuments
from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe
from qmedtune.tasks import Task, load_task, world_of
from qmedtune.tasks.item_parts import Part, part_of


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
