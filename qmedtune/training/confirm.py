"""One measured micro-step before a run on a GPU: the prediction is meant to be right within 10 %, a run must not find
out after an hour that it is not.

The longest rows go forward and backward once; what that takes is compared with the budget. Where it is too much, the
layers are treated more sparingly and measured again; nothing of it changes results. Random states and gradients are
put back. Deliberately not here: the CPU (memory there is the system's), and halving the micro-batch (trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from qmedtune import units
from qmedtune.errors import DoesNotFit
from qmedtune.llama_shape import BaseFacts
from qmedtune.modeling import activations
from qmedtune.modeling.collation import Rows
from qmedtune.planning import fit, memory
from qmedtune.planning.layers import choose_activation_plan
from qmedtune.planning.machine import Machine, this_machine
from qmedtune.planning.memory import Setup
from qmedtune.planning.shapes import base_facts
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Memory
from qmedtune.training import checkpoints
from qmedtune.training.trainer import QTrainer

TRIES = 4
OVER = 0.1  # of the budget: how much less is tried after running out, when nothing could be measured


def confirm(recipe: ResolvedRecipe, index: int, trainer: QTrainer, rows: Rows) -> Memory:
    """Measure the GPU memory of stage `index` before it starts; nothing on a CPU. What was changed is in `said`."""
    machine = this_machine()
    if not torch.cuda.is_available() or recipe.stages[index].full or trainer.group.sharded:
        return Memory()  # of a sharded base no process can try a step by itself
    budget = fit.budget_bytes(machine, recipe)
    if recipe.memory_gib is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / machine.memory_bytes))
    setup, facts = fit.setup_of(recipe, index), base_facts(recipe.model)
    states = memory.OPTIMIZER_BYTES[setup.optimizer] * memory.trained_parameters(facts, setup)  # not there yet

    def measure() -> int | None:
        used = peak_of_a_micro_step(trainer, rows)
        return None if used is None else used + int(states) + memory.CUDA_CONTEXT_BYTES

    apply = partial(activations.set_ways, trainer.trained_model)
    return settle(facts, setup, machine, budget, measure=measure, apply=apply)


def settle(
    facts: BaseFacts,
    setup: Setup,
    machine: Machine,
    budget: int,
    *,
    measure: Callable[[], int | None],
    apply: Callable[[dict[str, int]], None],
) -> Memory:
    """Tighten the layers' treatment until `measure()` (bytes; None: out of memory) is within `budget`, TRIES times at
    most: then the trainer's own halving of micro-batches has to do. `apply` takes layer counts by way."""
    predicted = memory.peak_bytes(facts, setup, gpu=machine.is_gpu)
    warnings: list[str] = []
    measured = measure()
    for _ in range(TRIES):
        if measured is not None and measured <= budget:
            break
        over = OVER * budget if measured is None else measured - budget
        tighter = _tighter(facts, setup, over)
        if tighter is None:
            warnings.append("no sparer treatment of the layers is left; micro-batches are halved where memory runs out")
            break
        took = "ran out of memory"
        if measured is not None:
            took = f"took {units.size(measured)} of {units.size(budget)}"
        setup, counts = tighter, memory.layers_by_way(facts, tighter)
        warnings.append(f"the measured micro-step {took}: layers now {_words(counts)}")
        apply(counts)
        measured = measure()
    counts = {way: n for way, n in memory.layers_by_way(facts, setup).items() if n}
    return Memory(predicted_bytes=predicted, measured_bytes=measured, layers=counts, said=warnings)


def _tighter(facts: BaseFacts, setup: Setup, over: float) -> Setup | None:
    """The fastest treatment whose activations take `over` bytes less than now."""
    room = sum(memory.activation_bytes(facts, setup).values()) - over
    try:
        plan = choose_activation_plan(facts, setup, room)
    except DoesNotFit:
        return None
    return replace(setup, checkpointing=False, ways=plan.ways)


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {way}" for way, count in counts.items() if count)


def longest_rows(rows: Rows, number: int, looked_at: int = 512) -> list[int]:
    """The `number` longest of the first rows; packed rows are nearly all of full length."""
    lengths = [len(rows[i]["input_ids"]) for i in range(min(len(rows), looked_at))]
    return np.argsort(np.negative(lengths), kind="stable")[:number].tolist()


def peak_of_a_micro_step(trainer: QTrainer, rows: Rows) -> int | None:
    """Peak bytes of one forward and backward pass over the longest micro-batch; None when memory ran out."""
    drawn = checkpoints.random_states()
    micro = trainer.data_collator([{"row": i} for i in longest_rows(rows, trainer.micro_batch)])
    inputs: Any = trainer._prepare_inputs(micro)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.trained_model.train()
    done = trainer._accumulate(trainer.trained_model, inputs, 1.0)
    peak = torch.cuda.max_memory_allocated()
    trainer.trained_model.zero_grad()
    checkpoints.set_random_states(drawn)
    torch.cuda.empty_cache()
    return None if done is None else peak
