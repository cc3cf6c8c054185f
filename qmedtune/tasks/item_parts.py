"""Which items a choice is made on, and which are scored at the end: decided by what an item is, and by nothing else.

An item's hash lies below a fixed border or above it, so it is in the same part in every task, whatever the task's
`limit`, its examples and the words that it is asked in. A border by rank would move with the number of items: two tasks
that share a question could then choose by it and score it. Items about one thing (a note, a patient, an abstract) are
one. Deliberately not here: held-out texts (evaluation/halves.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe
from qmedtune.tasks.items import Item, Task

Part = Literal["development", "scored"]


def identified(items: Iterable[Item]) -> list[Item]:
    """The items with their `identity`. To be called before examples or other words are put in."""
    found: list[Item] = []
    for item in items:
        found.append(replace(item, identity=_identity(item)))
    return found


def _identity(item: Item) -> str:
    """What an item was taken from; its question and passages, without case and white space, where it does not say."""
    if unit := item.group or item.pmid:
        return unit
    words = "\n".join(item.leaks).casefold().split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def place_of(item: Item, drawn_by: str) -> float:
    """Where an item stands between 0 and 1: drawn evenly, for each `drawn_by` anew, and alike in every task."""
    digest = hashlib.sha256(f"{drawn_by} {item.identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def part_of(task: Task, recipe: Recipe, part: Part) -> Task:
    """The task on one part of its items; on all, without `evaluate.development`. RecipeError where a part is empty."""
    share = recipe.development
    if not share:
        return task
    wanted = part == "development"
    kept: list[int] = []
    for number, item in enumerate(task.items):
        chosen_by = place_of(item, f"development {recipe.items_seed}") < share
        if chosen_by == wanted:
            kept.append(number)
    if len(kept) in (0, len(task.items)):
        raise RecipeError(
            f"evaluate.development: the {len(task.items)} items of {task.name} all fall into one part\n"
            f"each item is drawn by itself, {share:g} of them for choices; raise the task's `limit`, or change\n"
            "`development` or `evaluate.items_seed`"
        )

    def those(items: Sequence[Item]) -> tuple[Item, ...]:
        return tuple(items[number] for number in kept)

    draws: list[tuple[Item, ...]] = []
    for draw in task.draws:  # the same items in the same order, behind examples
        draws.append(those(draw))
    return replace(task, items=those(task.items), draws=tuple(draws))
