"""What a stage owes to the machine: how an attempt goes on on another one, and what to change when memory runs out.

Deliberately not here: the choice itself (planning/fit.py), and halving the micro-batch (trainer.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qmedtune import store, ui, units
from qmedtune.errors import RunError
from qmedtune.planning import fit
from qmedtune.planning.machine import this_machine
from qmedtune.planning.shapes import base_facts
from qmedtune.resolved import ResolvedRecipe, ResolvedTraining
from qmedtune.results import CheckpointSeal, MadeWith


def resume_settings(
    recipe: ResolvedRecipe, index: int, checkpoint: Path | None
) -> tuple[ResolvedTraining, MadeWith, list[str]]:
    """The stage's section, what this machine chose for it, and what of that differs from the checkpoint's making.

    `auto` may choose otherwise than where the attempt began (another card). An optimiser's states fit no other one, so
    the checkpoint's is kept; the rest only changes rounding, and is said.
    """
    section, model = recipe.stages[index].section, recipe.model
    now = MadeWith(
        optimizer=section.optimizer,
        compute_dtype=model.compute_dtype,
        attention=model.attention,
        micro_batch=section.micro_batch,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
    sealed = store.read_seal(checkpoint) if checkpoint else None
    if sealed is None:
        return section, now, []
    before = CheckpointSeal.model_validate(sealed.facts).made_with
    if before is None or before == now:
        return section, now, []
    section = section.model_copy(update={"optimizer": before.optimizer})
    differing: list[str] = []
    for name in MadeWith.model_fields:
        there, here = getattr(before, name), getattr(now, name)
        if there != here:
            differing.append(f"{name} {there} there, {here} here")
    kept = ""
    if before.optimizer != now.optimizer:
        kept = "; the checkpoint's optimizer is kept"
    warning = f"goes on from a checkpoint made elsewhere ({', '.join(differing)}){kept}: not bit-identical to one run"
    ui.warn(warning)
    return section, now.model_copy(update={"optimizer": before.optimizer}), [warning]


def out_of_memory(recipe: ResolvedRecipe, index: int, step: int) -> RunError:
    """With one row at a time there is no room: what to change, cheapest first, and what each frees."""
    facts, here = base_facts(recipe.model), this_machine()
    setup = replace(fit.setup_of(recipe, index), micro_batch=1)
    lines = [
        f"{recipe.stage_names()[index]}, step {step}: out of memory with one row at a time",
        "sealed checkpoints are kept; remedies, cheapest first:",
    ]
    for text, size in fit.remedies(facts, setup, gpu=here.is_gpu)[:3]:
        lines.append(f"  {text} frees {units.size(size)}")
    return RunError("\n".join(lines))
