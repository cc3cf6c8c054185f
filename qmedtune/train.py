"""The training stages: `cpt`, `sft`, `classify` (adapters on a frozen base) and `pretrain` (all parameters).

They differ in what is trained and where it starts; the loop is one: QTrainer over the packed rows. This file loads what
a stage trains, goes on where an attempt was, and leaves what the stage is for. Deliberately not here: what happens
between the steps (training/stage_callback.py).
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from qmedtune import model as models
from qmedtune import peak, peers, store, ui
from qmedtune.base import name_of_base, note_base
from qmedtune.batches import batch_rows, steps_in, too_few_steps
from qmedtune.data.packing import templates
from qmedtune.data.packing.classes import VALIDATION, LabelledRows
from qmedtune.data.packing.framing import write_template
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.group import Group
from qmedtune.interrupt import stop
from qmedtune.model_stack import ModelStack
from qmedtune.modeling import activations, sharding
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.planning.fit import setup_of
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import peak_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.record import device_name
from qmedtune.resolved import ResolvedRecipe, ResolvedStage
from qmedtune.results import (
    Attention,
    Classification,
    Kernels,
    Model,
    Packing,
    Trained,
)
from qmedtune.training import checkpoints
from qmedtune.training.classify import attach_head, document_nll, score
from qmedtune.training.confirm import confirm
from qmedtune.training.gpu_check import check_card
from qmedtune.training.resume import out_of_memory, resume_settings
from qmedtune.training.shared_base import SharedBase
from qmedtune.training.stage_callback import FollowerCallback, StageCallback
from qmedtune.training.trainer import Material, QTrainer, trainer_arguments

FOLLOWER_SEED = 1_000_003  # apart from every seed + index of a recipe: of dropout in the process of rank 1


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads. start: the model before it; tokens: folder of packed rows; validation: folder of packed rows
    per source."""

    start: ModelStack
    tokens: Path
    validation: Path | None = None


@dataclass(frozen=True)
class TrainingJob:
    """Stage `index` (0-based) of a resolved recipe, what it reads, and the folder that it writes."""

    recipe: ResolvedRecipe
    index: int
    inputs: StageInputs
    out: Path

    @property
    def stage(self) -> ResolvedStage:
        return self.recipe.stages[self.index]

    @property
    def name(self) -> str:
        return self.recipe.stage_names()[self.index]


@dataclass(frozen=True)
class Built:
    """A model to train, and how it computes. layers: how many are treated in which way; kernels, layers: only where an
    adapter is trained."""

    model: Any
    attention: Attention
    kernels: Kernels | None = None
    layers: dict[str, int] | None = None

    @property
    def computes(self) -> str:
        """Device and kernel path of this process, in words."""
        path = self.kernels.mode if self.kernels else "no kernels of ours"
        return f"{device_name()}: {path}, attention {self.attention.name}"


@dataclass(frozen=True)
class Loaded:
    """What is trained, and the rows that it is trained on with their ledger."""

    built: Built
    tokenizer: Any
    rows: PackedRows
    packed: Packing


@dataclass(frozen=True)
class TrainingStart:
    """Where training begins (None: at step 0), and which processes train along."""

    checkpoint: Path | None
    group: Group


def train_stage(
    recipe: ResolvedRecipe, index: int, inputs: StageInputs, out: Path, *, shared: SharedBase | None = None
) -> Trained:
    """Run stage `index` (0-based) of a resolved recipe, on the base that `shared` holds or loads (its own without one).

    Writes `out/adapter` (or `out/model` where all parameters are trained), `out/template.json` for SFT, the head and
    its scores for `classify`, and `out/metrics.jsonl`. An earlier attempt in `out` is continued from its last intact
    checkpoint.
    """
    job = TrainingJob(recipe, index, inputs, out)
    group = peers.call(job)
    loaded = _load(job, shared or SharedBase(), group)
    callback = _callback(job, loaded.tokenizer.pad_token_id)
    started = time.monotonic()
    checkpoint = checkpoints.last_intact(out)
    trainer = _trainer(job, loaded, callback, TrainingStart(checkpoint, group))
    total = loaded.packed.tokens.trained
    with ui.progress_bar(job.name, total=total, unit="tokens", completed=callback.tokens) as callback.bar:
        others = peers.wait(group)
        _agree(group, checkpoint)
        if callback.held_out and checkpoint is None:
            callback.validate(0)  # where the curve begins: what training changes is seen from its first step on
        try:
            with stop.graceful():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(recipe, index, trainer.state.global_step + 1) from error
        if trainer.state.global_step < callback.steps:
            stop.raise_if_requested()
    assert callback.tokens == total, "tokens trained differ from the packing ledger"
    callback.restore_best(loaded.built.model)
    trained = callback.trained(job.stage.kind, trainer, time.monotonic() - started)
    trained = _with_others(trained, loaded.built, others)
    trained = _finish(job, loaded, trainer, trained)
    # They know each other: only a collection frees them, and the next stage needs the room.
    del trainer, loaded, callback
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trained


def follow_stage(job: TrainingJob, shared: SharedBase, group: Group, ready: Callable[[str], None]) -> None:
    """Train along with the process that runs `train_stage` with the same job, and write nothing. `ready` is told how we
    compute, when all is done but the steps."""
    loaded = _load(job, shared, group)
    checkpoint = checkpoints.last_intact(job.out)
    held_out = {}
    if not (job.stage.classify and job.stage.classify.validation):  # documents are judged by rank 0 alone
        held_out = validation_rows(job.recipe, job.inputs.validation)
    callback = FollowerCallback(group, held_out, loaded.tokenizer.pad_token_id, job.recipe)
    trainer, steps, _ = _set_up(job, loaded, callback, TrainingStart(checkpoint, group))
    callback.begin(trainer, steps)
    begins_at = checkpoints.step_of(checkpoint) if checkpoint else 0
    torch.manual_seed(job.recipe.seed + job.index + FOLLOWER_SEED * group.rank + begins_at)  # other rows, other dropout
    ready(loaded.built.computes)
    _agree(group, checkpoint)
    if checkpoint is None:
        callback.validate()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    del trainer, loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _agree(group: Group, checkpoint: Path | None) -> None:
    """Raises RunError where the processes would not begin at the same step: a folder that they do not share."""
    if not group.same(checkpoints.step_of(checkpoint) if checkpoint else 0):
        raise RunError(
            "the processes of this run see different checkpoints\n"
            "the run folder must be one that all of them share: --out on a common file system"
        )


def _with_others(trained: Trained, built: Built, others: list[str]) -> Trained:
    """The result with how each process computes, where there are several."""
    if not others:
        return trained
    processes = [built.computes, *others]
    warnings = list(trained.warnings)
    if len(set(processes)) > 1:
        warnings.append(f"the processes compute differently: {'; '.join(processes)}")
    return trained.model_copy(update={"processes": processes, "warnings": warnings})


def _load(job: TrainingJob, shared: SharedBase, group: Group) -> Loaded:
    """Model, tokenizer and rows of the stage, in a process made ready for it."""
    recipe, base, tokens = job.recipe, job.inputs.start.base, job.inputs.tokens
    set_seed(recipe.seed + job.index)
    quiet_libraries()
    peak.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokenizer: Any = models.load_tokenizer(base)
    machine = this_machine()
    check_card(peak_bytes(base_facts(recipe.model), setup_of(recipe, job.index), gpu=machine.is_gpu), machine)
    built = _make_model(job, shared, group)
    models.check_tokenizer(tokenizer, built.model, base)
    if job.stage.classify:
        rows = LabelledRows(tokens)
        attach_head(built.model, rows, job.stage.classify)
    else:
        rows = PackedRows(tokens)
    sealed = store.read_seal(tokens)
    assert sealed is not None, "run.py has hashed it just now"
    packed = Packing.model_validate(sealed.facts)
    return Loaded(built, tokenizer, rows, packed)


def _make_model(job: TrainingJob, shared: SharedBase, group: Group) -> Built:
    recipe, stage, start = job.recipe, job.stage, job.inputs.start
    attention = stage.numerics.attention
    if stage.full:
        shared.drop()
        load = models.load_full
        if stage.kind == "pretrain":
            load = models.from_scratch
        model = load(start.base, recipe.model, attention=attention)
        return Built(model, models.attention_facts(model))
    if group.sharded:  # where there is room for all of it: each process then keeps its part, which no stage shares
        shared.drop()
        base = models.load_base(start.base, recipe.model, attention=attention, place=torch.device("cpu"))
    else:
        base = shared.load(start.base, recipe.model, attention=attention)
    set_seed(recipe.seed + job.index)  # whatever loading has drawn
    continued = stage.section.adapter in ("continue", "frozen")  # attach_head freezes what is frozen
    model = models.attach_adapter(base, recipe.adapter_of(job.index), start.adapters, continued=continued)
    kernels = models.install_kernels(model, recipe.model.kernels, models.device())
    if group.sharded:
        sharding.shard(model, models.device(), models.DTYPES[recipe.model.compute_dtype])
        kernels = models.recheck_kernels(model, kernels)
    layers = activations.install(model, stage.section.gradient_checkpointing)
    return Built(model, models.attention_facts(model), kernels, layers)


def validation_rows(recipe: ResolvedRecipe, folder: Path | None) -> dict[str, PackedRows]:
    if folder is None:
        return {}
    return {source: PackedRows(folder / source) for source in recipe.validation.on}


def _callback(job: TrainingJob, pad_id: int) -> StageCallback:
    held_out = validation_rows(job.recipe, job.inputs.validation)
    callback = StageCallback(job.name, job.out, held_out, pad_id, job.recipe)
    callback.judges = [source for source in job.recipe.judged_by(job.index) if source in held_out]
    if job.stage.classify and job.stage.classify.validation:
        callback.choose_by_documents(job.stage.classify.data, LabelledRows(job.inputs.tokens / VALIDATION))
    return callback


def _set_up(
    job: TrainingJob, loaded: Loaded, callback: TrainerCallback, begun: TrainingStart
) -> tuple[QTrainer, int, list[str]]:
    """(trainer, steps of the stage, warnings): the same in every process that trains it."""
    recipe, index, rows, checkpoint = job.recipe, job.index, loaded.rows, begun.checkpoint
    section, made_with, warnings = resume_settings(recipe, index, checkpoint)
    steps, batch = steps_in(section, len(rows)), batch_rows(section, len(rows))
    section = section.model_copy(update={"batch": batch, "micro_batch": min(section.micro_batch, batch)})
    few = None
    if not base_facts(recipe.model).builtin:
        few = too_few_steps(job.name, steps)
    if few and not checkpoint:
        ui.warn(few)
        warnings = [*warnings, few]
    decided = job.stage.numerics
    autocast = None
    if decided.autocast or decided.scaled:
        autocast = decided.dtype
    arguments = trainer_arguments(
        job.out,
        section,
        seed=recipe.seed,
        save_every=recipe.save.interval(steps),
        autocast=autocast,
        deterministic=recipe.deterministic,
        checkpointing=job.stage.full and section.gradient_checkpointing is True,
    )
    material = Material(loaded.built.model, loaded.tokenizer, rows, section)
    trainer = QTrainer(material, arguments, [callback], keep=recipe.save.keep, made_with=made_with, group=begun.group)
    trainer.remove_callback(PrinterCallback)
    if job.stage.classify:
        trainer.nll = document_nll
    return trainer, steps, warnings


def _trainer(job: TrainingJob, loaded: Loaded, callback: StageCallback, begun: TrainingStart) -> QTrainer:
    """The trainer at the step where the attempt begins, and `callback` with it; what is to be warned of is told by
    then."""
    trainer, steps, warnings = _set_up(job, loaded, callback, begun)
    checkpoint = begun.checkpoint
    callback.begin(trainer, steps)
    checkpoints.go_back(job.out, checkpoint)
    callback.rewind()
    begins_at = checkpoints.step_of(checkpoint) if checkpoint else 0
    for warning in warnings:
        callback.warn(begins_at, warning)
    callback.memory = confirm(job.recipe, job.index, trainer, loaded.rows)
    for line in callback.memory.said:
        ui.warn(line)
        callback.warn(0, line)
    if checkpoint:
        ui.note(f"{job.name} goes on after step {begins_at:,} of {steps:,}")
    return trainer


def _finish(job: TrainingJob, loaded: Loaded, trainer: QTrainer, trained: Trained) -> Trained:
    """Leave only what the stage is for: adapter, model or head, its template, the metrics. Returns the whole result."""
    stage, out, tokens, packed = job.stage, job.out, job.inputs.tokens, loaded.packed
    built, tokenizer = loaded.built, loaded.tokenizer
    warnings = [*trained.warnings, *models.fallbacks(built.kernels, built.attention)]
    told: dict[str, object] = {"attention": built.attention, "warnings": warnings}
    told |= {"tokens": packed.tokens, "mixture": packed.mixture}
    if built.kernels is not None:
        told |= {"kernels": built.kernels, "layers": built.layers}
    if (template := tokens / templates.FILE).is_file():
        shutil.copyfile(template, out / templates.FILE)
    if stage.classify:
        pad_id, batch = tokenizer.pad_token_id, trainer.micro_batch
        with trainer.compute_loss_context_manager():
            found = score(built.model, tokens, out, pad_id=pad_id, batch=batch, seed=job.recipe.seed)
        assert packed.classes is not None
        told["classification"] = Classification(**packed.classes.as_json(), **found.as_json())
    if stage.full:
        _save_model(built.model, tokenizer, out)
        told["model"] = Model(path=f"{job.name}/model")
    else:
        _save_adapters(job, built.model)
    return trained.model_copy(update=told)


def _save_model(model: Any, tokenizer: Any, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(str(out / "model"))
    tokenizer.save_pretrained(str(out / "model"))
    if (out / templates.FILE).is_file():
        write_template(out / "model", out)


def _save_adapters(job: TrainingJob, model: Any) -> None:
    """The trained adapter with what it was trained on, and the earlier ones where these were trained too."""
    stage, start, out = job.stage, job.inputs.start, job.out
    trained_on = name_of_base(job.recipe.model.base, start.base, job.inputs.tokens.parent.parent)
    if stage.section.adapter != "frozen":
        models.save_adapter(model, out / "adapter", trained_on)
    if stage.classify and stage.classify.train_earlier:
        for place, adapter in enumerate(list(model.peft_config)[:-1], start=1):
            models.save_adapter(model, out / f"earlier-{place}", trained_on, adapter)
    if stage.section.adapter != "frozen":
        below = start.adapters
        if stage.section.adapter == "continue":
            below = below[:-1]
        note_base(out / "adapter", trained_on, ModelStack(start.base, below), job.recipe.model.quantization)
