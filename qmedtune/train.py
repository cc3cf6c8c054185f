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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from qmedtune import model as models
from qmedtune import peak, peers, store, ui
from qmedtune.base import name_of_base, note_base
from qmedtune.batches import batch_rows, steps_in, too_few_steps
from qmedtune.data.packing import templates
from qmedtune.data.packing.classes import LabelledRows
from qmedtune.data.packing.framing import write_template
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.group import ALONE, Group
from qmedtune.interrupt import stop
from qmedtune.model_stack import adapters_in
from qmedtune.modeling import activations
from qmedtune.modeling.loss import rows_nll
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.planning.fit import numerics_of, setup_of
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import peak_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
from qmedtune.results import Logged, Memory, Trained, Validation
from qmedtune.training import checkpoints
from qmedtune.training.card import check_card
from qmedtune.training.checkpoints import BEST, METRICS
from qmedtune.training.classify import attach_head, document_nll, score
from qmedtune.training.confirm import confirm
from qmedtune.training.resume import out_of_memory, resume_settings
from qmedtune.training.shared_base import SharedBase
from qmedtune.training.trainer import QTrainer, number, trainer_arguments

FOLLOWER_SEED = 1_000_003  # apart from every seed + index of a recipe, for the random numbers of dropout
# A loss this many times the median of so many steps before it is logged as a spike.
SPIKE, SPIKE_WINDOW = 2.0, 50


def train_stage(
    recipe: Recipe, index: int, inputs: dict[str, Path], out: Path, shared: SharedBase | None = None
) -> dict[str, Any]:
    """Run stage `index` (0-based) of a resolved recipe, on the base that `shared` holds or loads (its own without one).

    `inputs`: `base` (model folder), `tokens` (packed rows), `validation` (folder of packed rows per source, may be
    absent), `adapter-1` ... (earlier adapters in order). Writes `out/adapter` (or `out/model` where all parameters are
    trained), `out/template.json` for SFT, the head and its scores for `classify`, and `out/metrics.jsonl`; returns the
    facts of run.json's stage entry. An earlier attempt in `out` is continued from its last intact checkpoint.
    """
    stage, name = recipe.stages[index], recipe.stage_names()[index]
    group = peers.call(recipe, index, inputs, out)
    made = _make(recipe, index, inputs, shared or SharedBase())
    model, tokenizer, packed, facts = made.model, made.tokenizer, made.packed, made.facts
    callback = StageCallback(
        name, out, validation_rows(recipe, inputs.get("validation")), tokenizer.pad_token_id, recipe, group
    )
    callback.judges = [source for source in recipe.judged_by(index) if source in callback.held_out]
    started = time.monotonic()
    trainer = _run(recipe, index, made, callback, out)
    facts |= callback.facts(trainer, time.monotonic() - started)
    facts["warnings"] += models.fallbacks(facts)
    facts |= {"kind": stage.kind, "tokens": packed["tokens"], "mixture": packed["mixture"]}
    if (template := inputs["tokens"] / templates.FILE).is_file():
        shutil.copyfile(template, out / templates.FILE)
    if stage.classify:
        with trainer.compute_loss_context_manager():
            found = score(model, inputs["tokens"], tokenizer.pad_token_id, trainer.micro_batch, recipe.seed, out)
        facts |= {"classification": packed["classes"] | found}
    trained_on = name_of_base(recipe.model.base, inputs["base"], inputs["tokens"].parent.parent)
    if stage.section.adapter != "frozen":
        _finish(model, tokenizer, stage.full, trained_on, out)
    if stage.classify and stage.classify.train_earlier:
        for place, adapter in enumerate(list(model.peft_config)[:-1], start=1):
            models.save_adapter(model, out / f"earlier-{place}", trained_on, adapter)
    if not stage.full and stage.section.adapter != "frozen":
        below = adapters_in(inputs)
        if stage.section.adapter == "continue":
            below = below[:-1]
        note_base(out / "adapter", trained_on, inputs["base"], below, recipe.model.quantization)
    if stage.full:
        facts["model"] = {"path": f"{name}/model"}
    # They know each other: only a collection frees them, and the next stage needs the room.
    del trainer, model, callback, made
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Trained.model_validate(facts).as_json()


def follow_stage(
    recipe: Recipe, index: int, inputs: dict[str, Path], out: Path, shared: SharedBase, group: Group,
    ready: Callable[[], None],
) -> None:  # fmt: skip
    """Train along with the process that runs `train_stage` with the same arguments; nothing is written. `ready` is
    called when there is nothing left to do before the first step."""
    made = _make(recipe, index, inputs, shared)
    set_up = _set_up(recipe, index, made, out, FollowerCallback(group))
    if set_up.checkpoint is None:
        torch.manual_seed(recipe.seed + index + FOLLOWER_SEED * group.rank)  # of dropout: other rows, other masks
    ready()
    _agree(group, set_up)
    set_up.trainer.train(resume_from_checkpoint=set_up.checkpoint and str(set_up.checkpoint))
    del made, set_up
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Made:
    """What is trained, on what. `facts`: of run.json, as far as they are known."""

    model: Any
    tokenizer: Any
    rows: PackedRows
    packed: dict[str, Any]
    facts: dict[str, Any]


def _make(recipe: Recipe, index: int, inputs: dict[str, Path], shared: SharedBase) -> _Made:
    stage = recipe.stages[index]
    set_seed(recipe.seed + index)
    quiet_libraries()
    peak.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokenizer: Any = models.load_tokenizer(inputs["base"])
    machine = this_machine()
    check_card(peak_bytes(base_facts(recipe.model), setup_of(recipe, index, machine), gpu=machine.is_gpu), machine)
    model, facts = _make_model(recipe, index, inputs, shared)
    models.check_tokenizer(tokenizer, model, inputs["base"])
    if stage.classify:
        rows = LabelledRows(inputs["tokens"])
        attach_head(model, rows, stage.classify)
    else:
        rows = PackedRows(inputs["tokens"])
    packed = json.loads((inputs["tokens"] / store.SEAL).read_text())["facts"]
    return _Made(model, tokenizer, rows, packed, facts)


def _make_model(recipe: Recipe, index: int, inputs: dict[str, Path], shared: SharedBase) -> tuple[Any, dict[str, Any]]:
    stage = recipe.stages[index]
    attention = numerics_of(recipe, index, this_machine()).attention
    if stage.full:
        shared.drop()
        load = models.load_full
        if stage.kind == "pretrain":
            load = models.from_scratch
        model = load(inputs["base"], recipe.model, attention=attention)
        return model, {"attention": models.attention_facts(model)}
    base = shared.load(inputs["base"], recipe.model, attention=attention)
    set_seed(recipe.seed + index)  # whatever loading has drawn
    earlier = adapters_in(inputs)
    continued = stage.section.adapter in ("continue", "frozen")  # attach_head freezes what is frozen
    model = models.attach_adapter(base, recipe.adapter_of(index), earlier, continued=continued)
    kernels = models.install_kernels(model, recipe.model.kernels)
    return model, {
        "kernels": kernels,
        "attention": models.attention_facts(model),
        "layers": activations.install(model, number(stage.section.gradient_checkpointing)),
    }


def validation_rows(recipe: Recipe, folder: Path | None) -> dict[str, PackedRows]:
    if folder is None:
        return {}
    return {source: PackedRows(folder / source) for source in recipe.validation.on}


@dataclass(frozen=True)
class _SetUp:
    """A trainer, and where it begins: at the checkpoint where there is one."""

    trainer: QTrainer
    steps: int
    checkpoint: Path | None
    warnings: list[str]

    @property
    def begins_at(self) -> int:
        return checkpoints.step_of(self.checkpoint) if self.checkpoint else 0


def _set_up(recipe: Recipe, index: int, made: _Made, out: Path, callback: StageCallback | FollowerCallback) -> _SetUp:
    checkpoint = checkpoints.last_intact(out)
    section, made_with, warnings = resume_settings(recipe, index, checkpoint)
    steps, batch = steps_in(section, len(made.rows)), batch_rows(section, len(made.rows))
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
    trainer = QTrainer(
        made.model, arguments, made.rows, section, made.tokenizer, keep, made_with, [callback], callback.group
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.stages[index].classify:
        trainer.nll = document_nll
    callback.steps = steps
    return _SetUp(trainer, steps, checkpoint, warnings)


def _agree(group: Group, set_up: _SetUp) -> None:
    """Raises RunError where the processes would not begin at the same step: a folder that they do not share."""
    if not group.same(set_up.begins_at):
        raise RunError(
            "the processes of this run see different checkpoints\n"
            "the run folder must be one that all of them share: --out on a common file system"
        )


def _run(recipe: Recipe, index: int, made: _Made, callback: StageCallback, out: Path) -> QTrainer:
    set_up = _set_up(recipe, index, made, out, callback)
    trainer, steps, checkpoint, begins_at = set_up.trainer, set_up.steps, set_up.checkpoint, set_up.begins_at
    callback.begin(trainer)
    checkpoints.go_back(out, checkpoint)
    callback.rewind()
    for warning in set_up.warnings:
        callback.warn(begins_at, warning)
    callback.memory = confirm(recipe, index, trainer, made.rows)
    for line in callback.memory.said:
        ui.warn(line)
        callback.warn(0, line)
    if checkpoint:
        ui.note(f"{callback.name} goes on after step {begins_at:,} of {steps:,}")
    total = made.packed["tokens"]["trained"]
    with ui.stage(callback.name, total=total, unit="tokens", completed=callback.tokens) as callback.bar:
        if callback.held_out and not checkpoint:
            callback.validate(0)  # where the curve begins: what training changes is seen from its first step on
        peers.wait(callback.group)
        _agree(callback.group, set_up)
        try:
            with stop.graceful():
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(recipe, index, trainer.state.global_step + 1) from error
        if trainer.state.global_step < steps:
            stop.raise_if_requested()
    assert callback.tokens == total, "tokens trained differ from the packing ledger"
    callback.restore_best(made.model)
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
class FollowerCallback(TrainerCallback):
    """Trainer callback of a process that trains along: it stops when the one that leads does."""

    group: Group
    steps: int = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.group.any(False) and state.global_step < self.steps:
            control.should_training_stop = True


@dataclass
class StageCallback(TrainerCallback):
    """Trainer callback of one stage: logs metrics, validates, keeps the best weights, stops when asked."""

    name: str
    out: Path
    held_out: dict[str, PackedRows]
    pad_id: int
    recipe: Recipe
    group: Group = ALONE
    steps: int = 0
    bar: Any = None
    tokens: int = 0
    memory: Memory = Memory()  # noqa: RUF009 - frozen
    losses: list[float] = field(default_factory=list)
    validation: list[Validation] = field(default_factory=list)
    judges: list[str] = field(default_factory=list)
    _marked: tuple[float, int] = (0.0, 0)

    def begin(self, trainer: QTrainer) -> None:
        self.trainer = trainer
        every = self.recipe.validation.every
        if every == "auto":
            every = max(10, self.steps // 5)
        self.every = every
        self._marked = (time.monotonic(), 0)

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
            file.write(json.dumps({"stage": self.name, **line}) + "\n")

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
        if self.group.any(stop.requested) and state.global_step < self.steps:
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
                loss = mean_loss(model, rows, self.pad_id, batch)
                losses[name] = loss
                if not math.isfinite(loss):
                    losses[name] = None  # JSON has no NaN
                    broken.append(f"step {step}: validation loss on {name} is {loss}")
        self.write({"step": step, "validation": losses})
        for warning in broken:
            ui.warn(warning)
            self.warn(step, warning)
        self.validation.append(Validation.model_validate({"step": step, **losses}))
        if self.recipe.validation.keep_best and step == self._kept_step():
            checkpoints.save_trained(model, self.out / store.SCRATCH / BEST)
        self.bar.update(self.tokens, note="")
        self._marked = (time.monotonic(), self.tokens)

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
        if self.recipe.validation.keep_best and self._kept_step() is not None:
            checkpoints.load_trained(model, self.out / store.SCRATCH / BEST)
        for name, weights in models.trainable(model).items():
            if not torch.isfinite(weights).all():
                raise RunError(
                    f"{self.name}: {name} is not finite after step {self.steps}; the stage was not sealed\n"
                    "its training diverged: try a lower lr, or max_grad_norm below 1.0"
                )

    def facts(self, trainer: QTrainer, seconds: float) -> dict[str, object]:
        """Fields of results.Trained. `seconds` of wall time, of the training alone."""
        speeds, warnings = [], []
        for line in logged(self.out / METRICS):
            if line.tokens_per_s is not None:
                speeds.append(line.tokens_per_s)
            if line.warning is not None:
                warnings.append(line.warning)
        kept, kept_by, step_s = None, [], None
        if self.recipe.validation.keep_best:
            kept = self._kept_step()
        if kept:
            kept_by = self.judges
        if trainer.step_seconds:
            step_s = round(statistics.median(trainer.step_seconds), 3)
        return {
            "steps": self.steps,
            "batch": trainer.section.batch,
            "kept_step": kept or self.steps,
            "kept_by": kept_by,
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
            "tokens_per_s": round(sorted(speeds)[len(speeds) // 2], 1),
            "train_seconds": round(seconds, 2),
            "data_share": round(trainer.data_seconds / max(seconds, 1e-9), 5),
            "slowest_save_s": round(max(trainer.save_seconds, default=0.0), 3),
            "step_s": step_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "memory": self.memory,
            "micro_batch": trainer.micro_batch,
            "validation": self.validation,
            "warnings": warnings,
        }


def logged(path: Path) -> list[Logged]:
    """The lines of a metrics.jsonl."""
    return [Logged.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peak_memory_bytes() -> int:
    """Of this stage: peak allocated memory of the GPU, or the peak resident size of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak.resident_bytes()
