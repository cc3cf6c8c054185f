"""The training stages: `cpt`, `sft`, `classify` (adapters on a frozen base) and `pretrain` (all parameters).

They differ in what is trained and where it starts; the loop is one: QTrainer over the packed rows. This file owns what
happens around the steps: metrics, validation, the best weights, stopping, resuming.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from qmedtune import model as models
from qmedtune import peak, store, ui
from qmedtune.base import name_of_base, note_base
from qmedtune.batches import batch_rows, steps_in, too_few_steps
from qmedtune.data.packing import templates
from qmedtune.data.packing.classes import VALIDATION, LabelledRows
from qmedtune.data.packing.framing import write_template
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.interrupt import stop
from qmedtune.model_stack import ModelStack
from qmedtune.modeling import activations
from qmedtune.modeling.loss import rows_nll
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.planning.fit import setup_of
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import peak_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.resolved import ResolvedClassify, ResolvedRecipe, ResolvedStage
from qmedtune.results import (
    Attention,
    Classification,
    Kernels,
    Logged,
    Loss,
    Memory,
    Model,
    Packing,
    Trained,
    Validation,
)
from qmedtune.training import checkpoints
from qmedtune.training.card import check_card
from qmedtune.training.checkpoints import BEST, METRICS
from qmedtune.training.classify import attach_head, document_nll, score, validation_loss
from qmedtune.training.confirm import confirm
from qmedtune.training.resume import out_of_memory, resume_settings
from qmedtune.training.shared_base import SharedBase
from qmedtune.training.trainer import Material, QTrainer, trainer_arguments

# A loss this many times the median of so many steps before it is logged as a spike.
SPIKE, SPIKE_WINDOW = 2.0, 50


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


@dataclass(frozen=True)
class Loaded:
    """What is trained, and the rows that it is trained on with their ledger."""

    built: Built
    tokenizer: Any
    rows: PackedRows
    packed: Packing


def train_stage(
    recipe: ResolvedRecipe, index: int, inputs: StageInputs, out: Path, *, shared: SharedBase | None = None
) -> Trained:
    """Run stage `index` (0-based) of a resolved recipe, on the base that `shared` holds or loads (its own without one).

    Writes `out/adapter` (or `out/model` where all parameters are trained), `out/template.json` for SFT, the head and
    its scores for `classify`, and `out/metrics.jsonl`. An earlier attempt in `out` is continued from its last intact
    checkpoint.
    """
    job = TrainingJob(recipe, index, inputs, out)
    loaded = _load(job, shared or SharedBase())
    callback = _callback(job, loaded.tokenizer.pad_token_id)
    started = time.monotonic()
    checkpoint = checkpoints.last_intact(out)
    trainer = _trainer(job, loaded, callback, checkpoint)
    total = loaded.packed.tokens.trained
    with ui.stage(job.name, total=total, unit="tokens", completed=callback.tokens) as callback.bar:
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
    trained = _finish(job, loaded, trainer, trained)
    # They know each other: only a collection frees them, and the next stage needs the room.
    del trainer, loaded, callback
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trained


def _load(job: TrainingJob, shared: SharedBase) -> Loaded:
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
    built = _make_model(job, shared)
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


def _make_model(job: TrainingJob, shared: SharedBase) -> Built:
    recipe, stage, start = job.recipe, job.stage, job.inputs.start
    attention = stage.numerics.attention
    if stage.full:
        shared.drop()
        load = models.load_full
        if stage.kind == "pretrain":
            load = models.from_scratch
        model = load(start.base, recipe.model, attention=attention)
        return Built(model, models.attention_facts(model))
    base = shared.load(start.base, recipe.model, attention=attention)
    set_seed(recipe.seed + job.index)  # whatever loading has drawn
    continued = stage.section.adapter in ("continue", "frozen")  # attach_head freezes what is frozen
    model = models.attach_adapter(base, recipe.adapter_of(job.index), start.adapters, continued=continued)
    kernels = models.install_kernels(model, recipe.model.kernels)
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


def _trainer(job: TrainingJob, loaded: Loaded, callback: StageCallback, checkpoint: Path | None) -> QTrainer:
    """The trainer at the step of `checkpoint`, and `callback` with it; what is to be warned of is told by then."""
    recipe, index, rows = job.recipe, job.index, loaded.rows
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
    trainer = QTrainer(material, arguments, [callback], keep=recipe.save.keep, made_with=made_with)
    trainer.remove_callback(PrinterCallback)
    if job.stage.classify:
        trainer.nll = document_nll
    callback.begin(trainer, steps)
    checkpoints.go_back(job.out, checkpoint)
    callback.rewind()
    begins_at = checkpoints.step_of(checkpoint) if checkpoint else 0
    for warning in warnings:
        callback.warn(begins_at, warning)
    callback.memory = confirm(recipe, index, trainer, rows)
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
        note_base(out / "adapter", trained_on, start.base, below, job.recipe.model.quantization)


def mean_loss(model: Any, rows: PackedRows, pad_id: int, batch: int) -> float:
    """Mean next-token loss (nats per supervised token) over packed rows, documents isolated from each other."""
    was_training = model.training
    model.eval()
    batches = [range(start, min(start + batch, len(rows))) for start in range(0, len(rows), batch)]
    total, count = 0.0, 0.0
    for found in rows_nll(model, rows, batches, pad_id):
        total += found.total()
        count += found.weight
    model.train(was_training)
    return total / max(1.0, count)


@dataclass
class StageCallback(TrainerCallback):
    """Trainer callback of one stage: logs metrics, validates, keeps the best weights, stops when asked."""

    name: str
    out: Path
    held_out: dict[str, PackedRows]
    pad_id: int
    recipe: ResolvedRecipe
    bar: Any = None
    tokens: int = 0
    memory: Memory = Memory()  # noqa: RUF009 - frozen
    losses: list[float] = field(default_factory=list)
    validation: list[Validation] = field(default_factory=list)
    judges: list[str] = field(default_factory=list)
    by_documents: bool = False
    _marked: tuple[float, int] = (0.0, 0)

    def begin(self, trainer: QTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        section, epochs = trainer.section, None
        if self.by_documents and isinstance(section, ResolvedClassify):
            epochs = section.epochs
        self.every = self.recipe.validation.interval(steps, epochs)
        self._marked = (time.monotonic(), 0)

    def choose_by_documents(self, source: str, rows: LabelledRows) -> None:
        """Keep the weights whose loss on these documents is lowest."""
        self.held_out, self.judges, self.by_documents = {source: rows}, [source], True

    @property
    def keeps_best(self) -> bool:
        return self.by_documents or self.recipe.validation.keep_best

    def rewind(self) -> None:
        """Begin where the checkpoint was: metrics.jsonl holds the lines up to it."""
        self.losses, self.validation, self.tokens = [], [], 0
        for line in logged(self.out / METRICS):
            if line.loss is not None:
                self.losses.append(line.loss)
                self.tokens = line.tokens or 0
            if line.validation is not None:
                self.validation.append(Validation.model_validate({"step": line.step, **line.validation}))
        self.trainer.tokens_seen = self.tokens
        self._marked = (time.monotonic(), self.tokens)

    def write(self, line: dict[str, object]) -> None:
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, **line, "time": round(time.time(), 1)}) + "\n")

    def warn(self, step: int, said: str) -> None:
        """Into the metrics, and from there into the report; it stays when the stage is stopped and resumed."""
        self.write({"step": step, "warning": said})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now, before = time.monotonic(), self._marked
        self.tokens = self.trainer.tokens_seen
        self._marked = (now, self.tokens)
        speed = (self.tokens - before[1]) / max(1e-9, now - before[0])
        norm = logs["grad_norm"]
        if not math.isfinite(norm):
            norm = None  # fp16's loss scale was too high: that update was skipped. JSON has no infinity
        line: dict[str, object] = {"step": state.global_step, "loss": logs["loss"], "grad_norm": norm}
        line |= {"lr": logs["learning_rate"], "tokens": self.tokens, "tokens_per_s": round(speed, 1)}
        self.write({**line, "memory": peak_memory_bytes()})
        warnings = [*self.trainer.warnings, *self._spike(logs["loss"])]
        for warning in warnings:
            self.warn(state.global_step, f"step {state.global_step}: {warning}")
        self.trainer.warnings.clear()
        self.losses.append(logs["loss"])
        self.bar.update(self.tokens, loss=logs["loss"], tokens_per_s=speed, lr=logs["learning_rate"])
        if self.held_out and (state.global_step % self.every == 0 or state.global_step == self.steps):
            self.validate(state.global_step)

    def _spike(self, loss: float) -> list[str]:
        if len(self.losses) < SPIKE_WINDOW:
            return []
        usual = statistics.median(self.losses[-SPIKE_WINDOW:])
        if loss <= SPIKE * usual or not usual:
            return []
        return [f"loss {loss:.3f} is a spike (median before: {usual:.3f})"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stop.requested and state.global_step < self.steps:
            control.should_save = control.should_training_stop = True

    def validate(self, step: int) -> None:
        """Losses on the held-out rows after `step` optimiser steps; the best weights so far are kept."""
        self.bar.update(self.tokens, note="validating")
        batch = max(1, int(self.trainer.micro_batch))
        model = self.trainer.trained_model
        losses: dict[str, float | None] = {}
        broken = []
        with self.trainer.compute_loss_context_manager():
            for name, rows in self.held_out.items():
                loss = self._loss(model, rows, batch)
                losses[name] = loss
                if not math.isfinite(loss):
                    losses[name] = None  # JSON has no NaN
                    broken.append(f"step {step}: validation loss on {name} is {loss}")
        self.write({"step": step, "validation": losses})
        for warning in broken:
            ui.warn(warning)
            self.warn(step, warning)
        self.validation.append(Validation.model_validate({"step": step, **losses}))
        if self.keeps_best and step == self._kept_step():
            checkpoints.save_trained(model, self.out / store.SCRATCH / BEST)
        self.bar.update(self.tokens, note="")
        self._marked = (time.monotonic(), self.tokens)

    def _loss(self, model: Any, rows: PackedRows, batch: int) -> float:
        if isinstance(rows, LabelledRows):
            return validation_loss(model, rows, self.pad_id, batch)
        return mean_loss(model, rows, self.pad_id, batch)

    def _kept_step(self) -> int | None:
        """Where the losses that the stage is judged by are lowest in sum, first of equals; None where none is.

        Step 0 is not chosen: a stage that only makes it worse is told by its curve, not by weights of no training.
        """
        best, kept = math.inf, None
        for found in self.validation:
            if not found.step or not self.judges or None in found.losses.values():
                continue
            total = 0.0
            for source in self.judges:
                total += found.losses[source] or 0.0
            if total < best:
                best, kept = total, found.step
        return kept

    def restore_best(self, model: Any) -> None:
        if self.keeps_best and self._kept_step() is not None:
            checkpoints.load_trained(model, self.out / store.SCRATCH / BEST)
        for name, weights in models.trainable(model).items():
            if not torch.isfinite(weights).all():
                raise RunError(
                    f"{self.name}: {name} is not finite after step {self.steps}; the stage was not sealed\n"
                    "its training diverged: try a lower lr, or max_grad_norm below 1.0"
                )

    def trained(self, kind: str, trainer: QTrainer, seconds: float) -> Trained:
        """What was measured. `seconds` of wall time, of the training alone."""
        speeds, warnings = [], []
        for line in logged(self.out / METRICS):
            if line.tokens_per_s is not None:
                speeds.append(line.tokens_per_s)
            if line.warning is not None:
                warnings.append(line.warning)
        kept, kept_by, step_s = None, [], None
        if self.keeps_best:
            kept = self._kept_step()
        if kept:
            kept_by = self.judges
        if trainer.step_seconds:
            step_s = round(statistics.median(trainer.step_seconds), 3)
        return Trained(
            steps=self.steps,
            batch=trainer.section.batch,
            kept_step=kept or self.steps,
            kept_by=kept_by,
            loss=Loss(first=self.losses[0], last=self.losses[-1]),
            tokens_per_s=round(sorted(speeds)[len(speeds) // 2], 1),
            train_seconds=round(seconds, 2),
            data_share=round(trainer.data_seconds / max(seconds, 1e-9), 5),
            slowest_save_s=round(max(trainer.save_seconds, default=0.0), 3),
            step_s=step_s,
            peak_memory_bytes=peak_memory_bytes(),
            memory=self.memory,
            micro_batch=trainer.micro_batch,
            validation=self.validation,
            warnings=warnings,
            kind=kind,
        )


def logged(path: Path) -> list[Logged]:
    """The lines of a metrics.jsonl."""
    return [Logged.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peak_memory_bytes() -> int:
    """Of this stage: peak allocated memory of the GPU, or the peak resident size of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak.resident_bytes()
