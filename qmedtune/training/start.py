"""A training stage up to its first step: model, rows and trainer, the same in every process that trains it.

The process that leads goes on in train.py, which logs, validates and writes; the others train along (`follow_stage`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from qmedtune import model as models
from qmedtune import peak, store, ui
from qmedtune.batches import batch_rows, steps_in, too_few_steps
from qmedtune.data.packing.classes import LabelledRows
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.group import Group
from qmedtune.model_stack import ModelStack
from qmedtune.modeling import activations
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.planning.fit import numerics_of, setup_of
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import peak_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
from qmedtune.record import device_name
from qmedtune.results import Attention, Kernels, Packing
from qmedtune.training import checkpoints
from qmedtune.training.card import check_card
from qmedtune.training.classify import attach_head, document_nll
from qmedtune.training.resume import resume_settings
from qmedtune.training.shared_base import SharedBase
from qmedtune.training.trainer import QTrainer, number, trainer_arguments

FOLLOWER_SEED = 1_000_003  # apart from every seed + index of a recipe: of dropout in the process of rank 1


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads. start: the model before it; tokens: folder of packed rows; validation: folder of packed rows
    per source."""

    start: ModelStack
    tokens: Path
    validation: Path | None = None


@dataclass(frozen=True)
class Built:
    """A model to train, on what, and how it computes. layers: how many are treated in which way; kernels, layers: only
    where an adapter is trained."""

    model: Any
    tokenizer: Any
    rows: PackedRows
    packed: Packing
    attention: Attention
    kernels: Kernels | None = None
    layers: dict[str, int] | None = None

    @property
    def computes(self) -> str:
        """Device and kernel path of this process, in words."""
        path = self.kernels.mode if self.kernels else "no kernels of ours"
        return f"{device_name()}: {path}, attention {self.attention.name}"


@dataclass(frozen=True)
class Start:
    """A trainer, and where it begins: at the checkpoint where there is one. steps: of the whole stage."""

    trainer: QTrainer
    steps: int
    checkpoint: Path | None
    warnings: list[str]

    @property
    def begins_at(self) -> int:
        return checkpoints.step_of(self.checkpoint) if self.checkpoint else 0

    def agree(self) -> None:
        """Raises RunError where the processes would not begin at the same step: a folder that they do not share."""
        if not self.trainer.group.same(self.begins_at):
            raise RunError(
                "the processes of this run see different checkpoints\n"
                "the run folder must be one that all of them share: --out on a common file system"
            )

    @property
    def resumes_from(self) -> str | None:
        return str(self.checkpoint) if self.checkpoint else None


def build(recipe: Recipe, index: int, inputs: StageInputs, shared: SharedBase) -> Built:
    """The model of stage `index`, with what it is trained on."""
    set_seed(recipe.seed + index)
    quiet_libraries()
    peak.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start, tokens = inputs.start, inputs.tokens
    tokenizer: Any = models.load_tokenizer(start.base)
    machine = this_machine()
    check_card(peak_bytes(base_facts(recipe.model), setup_of(recipe, index, machine), gpu=machine.is_gpu), machine)
    stage = recipe.stages[index]
    attention = numerics_of(recipe, index, machine).attention
    kernels, layers = None, None
    if stage.full:
        model = _full_model(recipe, index, start, shared, attention)
    else:
        base = shared.load(start.base, recipe.model, attention=attention)
        set_seed(recipe.seed + index)  # whatever loading has drawn
        continued = stage.section.adapter in ("continue", "frozen")  # attach_head freezes what is frozen
        model = models.attach_adapter(base, recipe.adapter_of(index), start.adapters, continued=continued)
        kernels = models.install_kernels(model, recipe.model.kernels)
        layers = activations.install(model, number(stage.section.gradient_checkpointing))
    attended = models.attention_facts(model)
    models.check_tokenizer(tokenizer, model, start.base)
    if stage.classify:
        rows = LabelledRows(tokens)
        attach_head(model, rows, stage.classify)
    else:
        rows = PackedRows(tokens)
    sealed = store.read_seal(tokens)
    assert sealed is not None, "run.py has hashed it just now"
    packed = Packing.model_validate(sealed.facts)
    return Built(model, tokenizer, rows, packed, attended, kernels, layers)


def _full_model(recipe: Recipe, index: int, start: ModelStack, shared: SharedBase, attention: str) -> Any:
    shared.drop()
    load = models.load_full
    if recipe.stages[index].kind == "pretrain":
        load = models.from_scratch
    return load(start.base, recipe.model, attention=attention)


def set_up(recipe: Recipe, index: int, built: Built, out: Path, callback: TrainerCallback, group: Group) -> Start:
    """The trainer of stage `index`, to go on from the last intact checkpoint in `out`."""
    checkpoint = checkpoints.last_intact(out)
    section, made_with, warnings = resume_settings(recipe, index, checkpoint)
    rows = built.rows
    steps, batch = steps_in(section, len(rows)), batch_rows(section, len(rows))
    section = section.model_copy(update={"batch": batch, "micro_batch": min(number(section.micro_batch), batch)})
    few = None
    if not base_facts(recipe.model).builtin:
        few = too_few_steps(recipe.stage_names()[index], steps)
    if few and not checkpoint:
        ui.warn(few)
        warnings = [*warnings, few]
    save_every = recipe.save.every
    if save_every == "auto":
        save_every = max(20, steps // 10)
    decided = numerics_of(recipe, index, this_machine())
    autocast = None
    if decided.autocast or decided.scaled:
        autocast = decided.dtype
    arguments = trainer_arguments(
        out,
        section,
        seed=recipe.seed,
        save_every=save_every,
        autocast=autocast,
        deterministic=recipe.deterministic,
        checkpointing=recipe.stages[index].full and section.gradient_checkpointing is True,
    )
    keep = recipe.save.keep
    trainer = QTrainer(built.model, arguments, rows, section, built.tokenizer, keep, made_with, [callback], group)
    trainer.remove_callback(PrinterCallback)
    if recipe.stages[index].classify:
        trainer.nll = document_nll
    return Start(trainer, steps, checkpoint, warnings)


# ---- the other processes ---------------------------------------------------------------------------------------------


class FollowerCallback(TrainerCallback):
    """Trainer callback of a process that trains along: it stops when the one that leads does."""

    def __init__(self, group: Group):
        self.group = group

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.group.any(False) and state.global_step < state.max_steps:
            control.should_training_stop = True


@dataclass(frozen=True)
class Followed:
    """What a process is told that trains along: the stage that the one that leads gives to `train_stage`."""

    recipe: Recipe
    index: int
    inputs: StageInputs
    out: Path


def follow_stage(told: Followed, shared: SharedBase, group: Group, ready: Callable[[str], None]) -> None:
    """Train along, and write nothing. `ready` is told how we compute, when all is done but the steps."""
    recipe, index = told.recipe, told.index
    built = build(recipe, index, told.inputs, shared)
    start = set_up(recipe, index, built, told.out, FollowerCallback(group), group)
    torch.manual_seed(recipe.seed + index + FOLLOWER_SEED * group.rank + start.begins_at)  # other rows, other dropout
    ready(built.computes)
    start.agree()
    start.trainer.train(resume_from_checkpoint=start.resumes_from)
    del built, start
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
