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
from qmedtune.planning.fit import numerics_of, setup_of
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import peak_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
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
from qmedtune.training.trainer import QTrainer, number, trainer_arguments

# A loss this many times the median of so many steps before it is logged as a spike.
SPIKE, SPIKE_WINDOW = 2.0, 50


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads. start: the model before it; tokens: folder of packed rows; validation: folder of packed rows
    per source."""

    start: ModelStack
    tokens: Path
    validation: Path | None = None


def train_stage(
    recipe: Recipe, index: int, inputs: StageInputs, out: Path, shared: SharedBase | None = None
) -> Trained:
    """Run stage `index` (0-based) of a resolved recipe, on the base that `shared` holds or loads (its own without one).

    Writes `out/adapter` (or `out/model` where all parameters are trained), `out/template.json` for SFT, the head and
    its scores for `classify`, and `out/metrics.jsonl`. An earlier attempt in `out` is continued from its last intact
    checkpoint.
    """
    stage, name = recipe.stages[index], recipe.stage_names()[index]
    set_seed(recipe.seed + index)
    quiet_libraries()
    peak.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start, tokens = inputs.start, inputs.tokens
    tokenizer: Any = models.load_tokenizer(start.base)
    machine = this_machine()
    check_card(peak_bytes(base_facts(recipe.model), setup_of(recipe, index, machine), gpu=machine.is_gpu), machine)
    built = _make_model(recipe, index, start, shared or SharedBase())
    model = built.model
    models.check_tokenizer(tokenizer, model, start.base)
    if stage.classify:
        rows = LabelledRows(tokens)
        attach_head(model, rows, stage.classify)
    else:
        rows = PackedRows(tokens)
    sealed = store.read_seal(tokens)
    assert sealed is not None, "run.py has hashed it just now"
    packed = Packing.model_validate(sealed.facts)
    callback = StageCallback(name, out, validation_rows(recipe, inputs.validation), tokenizer.pad_token_id, recipe)
    callback.judges = [source for source in recipe.judged_by(index) if source in callback.held_out]
    if stage.classify and stage.classify.validation:
        callback.choose_by_documents(stage.classify.data, LabelledRows(tokens / VALIDATION))
    started = time.monotonic()
    trainer = _run(recipe, index, model, tokenizer, rows, packed, callback, out)
    trained = callback.trained(stage.kind, trainer, time.monotonic() - started)
    warnings = [*trained.warnings, *models.fallbacks(built.kernels, built.attention)]
    told: dict[str, object] = {"attention": built.attention, "warnings": warnings}
    told |= {"tokens": packed.tokens, "mixture": packed.mixture}
    if built.kernels is not None:
        told |= {"kernels": built.kernels, "layers": built.layers}
    if (template := tokens / templates.FILE).is_file():
        shutil.copyfile(template, out / templates.FILE)
    if stage.classify:
        with trainer.compute_loss_context_manager():
            found = score(model, tokens, tokenizer.pad_token_id, trainer.micro_batch, recipe.seed, out)
        assert packed.classes is not None
        told["classification"] = Classification(**packed.classes.as_json(), **found.as_json())
    trained_on = name_of_base(recipe.model.base, start.base, tokens.parent.parent)
    if stage.section.adapter != "frozen":
        _finish(model, tokenizer, stage.full, trained_on, out)
    if stage.classify and stage.classify.train_earlier:
        for place, adapter in enumerate(list(model.peft_config)[:-1], start=1):
            models.save_adapter(model, out / f"earlier-{place}", trained_on, adapter)
    if not stage.full and stage.section.adapter != "frozen":
        below = start.adapters
        if stage.section.adapter == "continue":
            below = below[:-1]
        note_base(out / "adapter", trained_on, start.base, below, recipe.model.quantization)
    if stage.full:
        told["model"] = Model(path=f"{name}/model")
    # They know each other: only a collection frees them, and the next stage needs the room.
    del trainer, model, built, callback
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trained.model_copy(update=told)


@dataclass(frozen=True)
class Built:
    """A model to train, and how it computes. layers: how many are treated in which way; kernels, layers: only where an
    adapter is trained."""

    model: Any
    attention: Attention
    kernels: Kernels | None = None
    layers: dict[str, int] | None = None


def _make_model(recipe: Recipe, index: int, start: ModelStack, shared: SharedBase) -> Built:
    stage = recipe.stages[index]
    attention = numerics_of(recipe, index, this_machine()).attention
    if stage.full:
        shared.drop()
        load = models.load_full
        if stage.kind == "pretrain":
            load = models.from_scratch
        model = load(start.base, recipe.model, attention=attention)
        return Built(model, models.attention_facts(model))
    base = shared.load(start.base, recipe.model, attention=attention)
    set_seed(recipe.seed + index)  # whatever loading has drawn
    continued = stage.section.adapter in ("continue", "frozen")  # attach_head freezes what is frozen
    model = models.attach_adapter(base, recipe.adapter_of(index), start.adapters, continued=continued)
    kernels = models.install_kernels(model, recipe.model.kernels)
    layers = activations.install(model, number(stage.section.gradient_checkpointing))
    return Built(model, models.attention_facts(model), kernels, layers)


def validation_rows(recipe: Recipe, folder: Path | None) -> dict[str, PackedRows]:
    if folder is None:
        return {}
    return {source: PackedRows(folder / source) for source in recipe.validation.on}


def _run(
    recipe: Recipe,
    index: int,
    model: Any,
    tokenizer: Any,
    rows: PackedRows,
    packed: Packing,
    callback: StageCallback,
    out: Path,
) -> QTrainer:
    checkpoint = checkpoints.last_intact(out)
    section, made_with, warnings = resume_settings(recipe, index, checkpoint)
    steps, batch = steps_in(section, len(rows)), batch_rows(section, len(rows))
    section = section.model_copy(update={"batch": batch, "micro_batch": min(number(section.micro_batch), batch)})
    few = None
    if not base_facts(recipe.model).builtin:
        few = too_few_steps(callback.name, steps)
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
    trainer = QTrainer(model, arguments, rows, section, tokenizer, recipe.save.keep, made_with, [callback])
    trainer.remove_callback(PrinterCallback)
    if recipe.stages[index].classify:
        trainer.nll = document_nll
    callback.begin(trainer, steps)
    checkpoints.go_back(out, checkpoint)
    callback.rewind()
    begins_at, resumed_from = 0, None
    if checkpoint:
        begins_at, resumed_from = checkpoints.step_of(checkpoint), str(checkpoint)
    for warning in warnings:
        callback.warn(begins_at, warning)
    callback.memory = confirm(recipe, index, trainer, rows)
    for line in callback.memory.said:
        ui.warn(line)
        callback.warn(0, line)
    if checkpoint:
        ui.note(f"{callback.name} goes on after step {begins_at:,} of {steps:,}")
    total = packed.tokens.trained
    with ui.stage(callback.name, total=total, unit="tokens", completed=callback.tokens) as callback.bar:
        if callback.held_out and not checkpoint:
            callback.validate(0)  # where the curve begins: what training changes is seen from its first step on
        try:
            with stop.graceful():
                trainer.train(resume_from_checkpoint=resumed_from)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(recipe, index, trainer.state.global_step + 1) from error
        if trainer.state.global_step < steps:
            stop.raise_if_requested()
    assert callback.tokens == total, "tokens trained differ from the packing ledger"
    callback.restore_best(model)
    return trainer


def _finish(model: Any, tokenizer: Any, full: bool, base_name: str, out: Path) -> None:
    """Leave only what the stage is for: the adapter (or the model), its template, the metrics."""
    if full:
        model.to(torch.bfloat16).save_pretrained(str(out / "model"))
        tokenizer.save_pretrained(str(out / "model"))
        if (out / templates.FILE).is_file():
            write_template(out / "model", out)
    else:
        models.save_adapter(model, out / "adapter", base_name)


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
    recipe: Recipe
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
        every = self.recipe.validation.every
        if every == "auto" and self.by_documents:
            every = max(1, round(steps / number(trainer.section.epochs)))  # once an epoch
        elif every == "auto":
            every = max(10, steps // 5)
        self.every = every
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
            batch=number(trainer.section.batch),
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
