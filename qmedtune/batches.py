"""How many optimiser steps a stage takes: the batch that `auto` leaves when it is known how many rows there are.

A recipe is resolved before its data is packed, so `batch: auto` becomes the largest batch that the field uses; what of
it is taken follows from the packed rows, on every machine alike. Deliberately not here: micro-batches (fit.py).
"""

from __future__ import annotations

from qmedtune.resolved import ResolvedTraining

# Smallest number of optimiser steps that `batch: auto` leaves. LoRA's B begins at 0 and AdamW moves an element by about
# its learning rate per step (Kingma & Ba 2015, section 2.1): at 2e-4 with a cosine, 100 steps can carry it to 1e-2,
# the size that trained LoRA weights have; 10 steps cannot. The field's own runs take hundreds to thousands.
MIN_STEPS = 100
# Below so many, `warmup: {ratio: 0.03}` is less than one step: the plan and the run warn.
FEWEST_STEPS = 33


def batch_rows(section: ResolvedTraining, rows: int) -> int:
    """Rows per optimiser step of a stage that has `rows` in all: `batch`, less where that would leave fewer than
    `min_steps` steps, and at least one. A `batch` that was given is taken as it is."""
    return max(1, min(section.batch, rows // section.min_steps))


def steps_in(section: ResolvedTraining, rows: int) -> int:
    """Optimiser steps over `rows` rows; the last one may be a short one."""
    return -(-rows // batch_rows(section, rows))


def too_few_steps(stage: str, steps: int) -> str | None:
    """What to say where a stage has too few steps to learn from; None where it has enough."""
    if steps >= FEWEST_STEPS:
        return None
    return (
        f"{stage}: only {steps} optimiser steps (under {FEWEST_STEPS} a warm-up of 3 % is less than one); "
        "little is learnt: give more text, `epochs` or `tokens`, a smaller `batch`, or a smaller `seq_len`"
    )
