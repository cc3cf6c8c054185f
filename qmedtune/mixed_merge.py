"""The merge of a run whose recipe names another model with `merge.with`: at the recipe's share, or at the one that its
sweep chose.

Deliberately not here: summing, rounding and the proof (merge.py), and the search for a share (sweep.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qmedtune.evaluation import halves
from qmedtune.merge import MergeJob, merge, shares_of, stack_of, validation_ids
from qmedtune.merging.sibling import Mixing, check_alike, find
from qmedtune.model_stack import ModelStack
from qmedtune.recipe import MergeSection, Recipe
from qmedtune.results import Merge, Sweep

SWEEP = "sweep.json"
HALF = 0.5  # where a recipe names no share


def mixed_merge_step(recipe: Recipe, trained: ModelStack, out: Path, folders: Mapping[str, Path]) -> Merge:
    """The step of a run. trained: with the adapters that the merge reads; folders: `validation`, `sweep` and `origin`
    where there are any, the last being the recipe's own base where earlier stages are folded into that of `trained`."""
    share = HALF if recipe.merge.share is None else recipe.merge.share
    found = None
    if "sweep" in folders:
        found = Sweep.model_validate(json.loads((folders["sweep"] / SWEEP).read_text(encoding="utf-8")))
        share = float(found.chosen)
    mixing = sibling_of(recipe, folders.get("origin", trained.base), share)
    merged = merge(job_of(recipe, trained, mixing, folders.get("validation")), out)
    if found is None:
        return merged
    told = {"sweep": found.sweep, "sweep_base": found.sweep_base, "chosen": found.chosen, "rule": found.rule}
    return merged.model_copy(update={**told, "development": found.development, "scored_in": found.scored_in})


def check(recipe: Recipe, other: str, base: Path, *, offline: bool) -> None:
    """Before anything is trained: the other model is there and fits (a Hub id is fetched now), and there are items and
    texts for both, a sweep and the scores. RecipeError."""
    check_alike(base, find(other, offline=offline))
    if recipe.merge.sweep is not None:
        halves.development_tasks(recipe)


def sibling_of(recipe: Recipe, base: Path, share: float) -> Mixing:
    """The model that the recipe names, if it and `base` are siblings. RecipeError."""
    return mixing_with(recipe.merge, base, share, offline=True)


def mixing_with(section: MergeSection, base: Path, share: float, *, offline: bool) -> Mixing:
    """As `sibling_of`, of a merge that belongs to no run. Fetches a Hub id that is not here, unless `offline`."""
    assert section.other is not None
    sibling = find(section.other, offline=offline)
    return Mixing(sibling, section.method or "linear", share, check_alike(base, sibling))


def job_of(recipe: Recipe, trained: ModelStack, mixing: Mixing, validation: Path | None) -> MergeJob:
    """What is merged at one share. validation: folder of packed rows, which the proof reports divergences on."""
    shares = []
    if recipe.merge.weighs:
        shares = shares_of(recipe, recipe.merge.weights, trained.adapters)
        trained = replace(trained, adapters=stack_of(shares))
    ids = validation_ids(validation)
    return MergeJob(trained, recipe.merge, recipe.model, recipe.seed, ids, shares=shares, mixing=mixing)
