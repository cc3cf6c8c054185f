"""Which model each stage of a recipe starts from and leaves behind: said once, for the steps of a run, its plan of disk
space, and a later merge of the run.

A stage trains an adapter on the model before it, or a whole model; earlier adapters are sometimes folded into a new
base first. Deliberately not here: the steps themselves (steps.py), and where a base lies (base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qmedtune.model_stack import ModelStack
from qmedtune.recipe import Recipe, StageSection

BASE = "base"  # stands for the recipe's own base among the folders of a run


@dataclass(frozen=True)
class StackInRun:
    """A model as folders of a run, `step/subfolder`; `template` is the step that holds template.json."""

    base: str = BASE
    adapters: tuple[str, ...] = ()
    template: str | None = None

    def located(self, run: Path, base: Callable[[], Path]) -> ModelStack:
        """The same as paths below the folder `run`; `base` gives the recipe's base, and is asked only where needed."""
        start = place_in(run, self.base, base)
        adapters = tuple(run / adapter for adapter in self.adapters)
        return ModelStack(start, adapters, None if self.template is None else run / self.template)


def place_in(run: Path, path: str, base: Callable[[], Path]) -> Path:
    """Where `step/subfolder` of the folder `run` lies; `base` stands for the recipe's base and is made only then."""
    if path == BASE:
        return base()
    return run / path


@dataclass(frozen=True)
class StageLineage:
    """One stage: what it is trained on and what is there after it. Where `folds_into` names a step, that step folds the
    adapters of `before` into a 16-bit base, and the stage starts from it."""

    name: str
    before: StackInRun
    start: StackInRun
    after: StackInRun
    folds_into: str | None


def lineage_of(recipe: Recipe) -> list[StageLineage]:
    """Every stage of a recipe, in order."""
    stages: list[StageLineage] = []
    model = StackInRun()
    for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True):
        before = model
        folds_into = f"{name}-base" if _folds(stage, before) else None
        start = before if folds_into is None else replace(before, base=folds_into, adapters=())
        model = _after(stage, name, start)
        stages.append(StageLineage(name, before, start, model, folds_into))
    return stages


@dataclass(frozen=True)
class StagePart:
    """What a stage brings to the merge: its adapter, and the one that it trained on from (None: it began anew)."""

    stage: str
    adapter: str
    earlier: str | None


def parts_of(recipe: Recipe) -> list[StagePart]:
    """The stages whose adapters the merge folds. What an earlier fold took in is part of the base by then."""
    parts: list[StagePart] = []
    for stage, line in zip(recipe.stages, lineage_of(recipe), strict=True):
        if stage.kind == "classify":
            continue
        if line.folds_into is not None or stage.full:
            parts = []
        if not stage.full:
            continued = stage.section.adapter == "continue" and bool(line.start.adapters)
            parts.append(StagePart(line.name, line.after.adapters[-1], line.start.adapters[-1] if continued else None))
    return parts


def final_model(recipe: Recipe) -> StackInRun:
    """What the whole recipe trains: the model that is merged and scored."""
    return lineage_of(recipe)[-1].after


def _folds(stage: StageSection, before: StackInRun) -> bool:
    return stage.section.adapter in ("merge_then_new", "none") and bool(before.adapters)


def _after(stage: StageSection, name: str, start: StackInRun) -> StackInRun:
    """A classify stage is a branch: what follows goes on from before it."""
    if stage.kind == "classify":
        return start
    template = name if stage.kind == "sft" else start.template
    if stage.full:
        return StackInRun(f"{name}/model", (), template)
    kept = start.adapters[:-1] if stage.section.adapter == "continue" else start.adapters
    return StackInRun(start.base, (*kept, f"{name}/adapter"), template)
