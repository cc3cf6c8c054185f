"""`qmedtune merge`: the merge alone, of a run or of an adapter folder, with the same proof as in a run.

Written beside `out`, proven, sealed, and renamed in one step: `out` is complete or not there. Deliberately not here:
the merge itself (merge.py), several runs at once, weighting of adapters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmedtune import base as bases
from qmedtune import record, store
from qmedtune.data.packing.templates import FILE
from qmedtune.errors import MergeRefused, RecipeError
from qmedtune.evaluation.open_model import check_intact, locate
from qmedtune.lineage import BASE, final_model, parts_of
from qmedtune.model_stack import ModelStack
from qmedtune.planning.machine import this_machine
from qmedtune.recipe import MergeSection, ModelSection
from qmedtune.results import Merge

if TYPE_CHECKING:
    from qmedtune.merging.weighing import Share

SEED = 17  # of stochastic rounding, where no recipe states one
AGAIN = "the adapters are as they were: give the same command again, to another disk if it is refused again"


def merge_into(name: str, out: Path, section: MergeSection, *, base: str | None = None, offline: bool = False) -> Merge:
    """Merge a run folder or an adapter folder (`base`: what it was trained on, default: what its config names).

    Raises RecipeError where `out` exists or `name` has no adapter.
    """
    from qmedtune.merge import MergeJob, merge
    from qmedtune.mixed_merge import HALF, mixing_with

    if out.exists():
        raise RecipeError(f"--out: {out} is there already\nmove it away, or give another name")
    folder = Path(os.path.expanduser(name))
    is_run = (folder / "run.json").is_file()
    if is_run:
        section = _mixed_as_in_run(section, folder)
    if section.other is None and (section.method is not None or section.share is not None):
        raise RecipeError("--method, --lambda: say how another model is mixed in\ngive it: --with MODEL")
    if section.weights and not is_run:
        raise RecipeError(f"--weights: {name} is no run, and has no stages to weigh\ngive the run folder")
    found = (
        adapters_of_run(folder, offline, section.weights) if is_run else adapter_of_folder(name, folder, base, offline)
    )
    stack = found.stack
    mixing = None
    if section.other is not None:
        share = HALF if section.share is None else section.share
        mixing = mixing_with(section, found.origin or stack.base, share, offline=offline)
    job = MergeJob(stack, section, found.model, found.seed, shares=found.shares, mixing=mixing)
    staging = out.with_name(f".{out.name}.part")
    with store.lock(staging):  # a second merge to the same place leaves
        shutil.rmtree(staging / "merged", ignore_errors=True)  # of a killed attempt; never anything that was finished
        (staging / "merged").mkdir()
        try:
            merged = merge(job, staging / "merged")
        except MergeRefused as error:
            kept = store.keep_refused(staging / "merged", out, str(error))
            shutil.rmtree(staging)
            told = f"{error}\nnot published: what was written is kept as {kept}\n{AGAIN}"
            raise MergeRefused(told, error.facts) from error
        except BaseException:
            shutil.rmtree(staging)  # not whole: of no use
            raise
        key = store.sha256_json([str(stack.base), *map(str, stack.adapters), section.model_dump()])
        store.seal(staging / "merged", key, merged.as_json())
        store.rename(staging / "merged", out)
        shutil.rmtree(staging)
    return merged.model_copy(update={"path": str(out)})


def _mixed_as_in_run(section: MergeSection, run: Path) -> MergeSection:
    """With the model and the share that the run was merged at, where its recipe names one and `section` none.
    RecipeError where its sweep chose no share yet."""
    found = record.load(run)
    asked = record.recipe_of(found, run).merge
    if section.other is not None or asked.other is None:
        return section
    share = asked.share if section.share is None else section.share
    if share is None and asked.sweep is not None:
        share = found.merge.chosen if found.merge is not None else None
        if share is None:
            raise RecipeError(f"{run}: its sweep has not chosen a share\nname one: --lambda 0.5")
    kept = {"other": asked.other, "method": section.method or asked.method, "share": share}
    return section.model_copy(update=kept)


@dataclass(frozen=True)
class MergeInputs:
    """What is to be merged, and how it was trained. origin: the run's own base, where `stack` is on a later one; mixed:
    whether its own merge mixes another model in."""

    model: ModelSection
    stack: ModelStack
    seed: int
    shares: Sequence[Share] = ()
    origin: Path | None = None
    mixed: bool = False


def adapters_of_run(folder: Path, offline: bool, weights: Mapping[str, float] | None = None) -> MergeInputs:
    """What the run's own merge folds: the adapters since the last full model, and the template of the last sft.

    weights: of its stages, in place of the recipe's. RecipeError for a stage whose adapter is not merged.
    """
    from qmedtune.merge import shares_of

    recipe = record.recipe_of(record.load(folder), folder)
    final = final_model(recipe)
    parts = parts_of(recipe)
    weights = weights or recipe.merge.weights
    if unknown := sorted(weights.keys() - {part.stage for part in parts}):
        allowed = ", ".join(part.stage for part in parts)
        raise RecipeError(f"--weights: no adapter of stage {unknown[0]!r} is merged\nallowed: {allowed}")
    for name in [part.adapter for part in parts] if weights else final.adapters:
        stage = (folder / name).parent
        if not (folder / name).is_dir():
            raise RecipeError(f"{folder}: stage {stage.name} is not finished\ncontinue it with `qmedtune run`")
        check_intact(stage, full=True)

    def base() -> Path:
        return bases.locate_folder(recipe.model, offline=offline)

    stack = final.located(folder, base)
    shares = shares_of(recipe, weights, [folder / part.adapter for part in parts]) if weights else ()
    origin = None if final.base == BASE else base()
    return MergeInputs(recipe.model, stack, recipe.seed, shares, origin, recipe.merge.other is not None)


def adapter_of_folder(name: str, folder: Path, base: str | None, offline: bool) -> MergeInputs:
    location = locate(name, base=base, offline=offline)
    if not location.adapters:
        raise RecipeError(
            f"{name}: neither a run nor an adapter folder (adapter_config.json)\nthere is nothing to merge"
        )
    templates = [place for place in (folder, folder.parent) if (place / FILE).is_file()]
    quantization = bases.quantization_of(location.stack)
    model = ModelSection(base=str(location.base), compute_dtype=this_machine().compute_dtype, quantization=quantization)
    template = templates[0] if templates else None
    return MergeInputs(model, ModelStack(location.base, location.adapters, template), SEED)
