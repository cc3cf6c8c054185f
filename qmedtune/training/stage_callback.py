"""The Trainer callback of a training stage: metrics, held-out losses, the best weights, stopping when asked.

It writes `metrics.jsonl` of its stage and finds in it where an interrupted attempt was. Deliberately not here: the
optimiser steps themselves (trainer.py), and what is left of a stage when it ends (train.py).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qmedtune import model as models
from qmedtune import peak, store, ui
from qmedtune.data.packing.classes import LabelledRows
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.group import ALONE, Group
from qmedtune.interrupt import stop
from qmedtune.modeling.loss import rows_nll
from qmedtune.resolved import ResolvedClassify, ResolvedRecipe
from qmedtune.results import Logged, Loss, Memory, Trained, Validation
from qmedtune.training import checkpoints
from qmedtune.training.checkpoints import BEST, METRICS
from qmedtune.training.classify import validation_loss
from qmedtune.training.trainer import QTrainer

# A loss this many times the median of so many steps before it is logged as a spike.
SPIKE, SPIKE_WINDOW = 2.0, 50


def mean_loss(model: Any, rows: PackedRows, pad_id: int, batch: int, *, group: Group = ALONE) -> float:
    """Mean next-token loss (nats per supervised token) over packed rows, documents isolated from each other. Each
    process of the group reads a part of the micro-batches of `batch` rows, and all get the same."""
    was_training = model.training
    model.eval()
    batches = [range(start, min(start + batch, len(rows))) for start in range(0, len(rows), batch)]
    turns = group.turns(len(batches))
    total, count = 0.0, 0.0
    ours = [batches[turn % len(batches)] for turn in turns]
    for turn, found in zip(turns, rows_nll(model, rows, ours, pad_id), strict=True):
        if turn < len(batches):
            total += found.total()
            count += found.weight
    model.train(was_training)
    total, count = group.sums([total, count])
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

    def warn(self, step: int, warning: str) -> None:
        """Into the metrics, and from there into the report; it stays when the stage is stopped and resumed."""
        self.write({"step": step, "warning": warning})

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
        if self.trainer.group.any(stop.requested) and state.global_step < self.steps:
            control.should_save = control.should_training_stop = True

    def validate(self, step: int) -> None:
        """Losses on the held-out rows after `step` optimiser steps; the best weights so far are kept."""
        self.bar.update(self.tokens, note="validating")
        model = self.trainer.trained_model
        losses: dict[str, float | None] = {}
        broken = []
        with self.trainer.compute_loss_context_manager():
            for name, rows in self.held_out.items():
                loss = self._loss(rows)
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

    def _loss(self, rows: PackedRows) -> float:
        model, batch = self.trainer.trained_model, self.trainer.micro_batch
        if isinstance(rows, LabelledRows):  # documents by rank 0 alone: there are few
            return validation_loss(model, rows, self.pad_id, batch)
        return mean_loss(model, rows, self.pad_id, batch, group=self.trainer.group)

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


class FollowerCallback(TrainerCallback):
    """Trainer callback of a process that trains along: it validates and stops when the one that leads does."""

    def __init__(self, group: Group, held_out: dict[str, PackedRows], pad_id: int, recipe: ResolvedRecipe):
        self.group, self.held_out, self.pad_id, self.recipe = group, held_out, pad_id, recipe

    def begin(self, trainer: QTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        self.every = self.recipe.validation.interval(steps, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and (state.global_step % self.every == 0 or state.global_step == self.steps):
            self.validate()

    def validate(self) -> None:
        """This process's part of the losses on held-out rows."""
        with self.trainer.compute_loss_context_manager():
            for rows in self.held_out.values():
                model, batch = self.trainer.trained_model, self.trainer.micro_batch
                mean_loss(model, rows, self.pad_id, batch, group=self.group)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.group.any(False) and state.global_step < state.max_steps:
            control.should_training_stop = True


def logged(path: Path) -> list[Logged]:
    """The lines of a metrics.jsonl."""
    return [Logged.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peak_memory_bytes() -> int:
    """Of this stage: peak allocated memory of the GPU, or the peak resident size of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak.resident_bytes()
