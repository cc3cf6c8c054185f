"""The training stages: `cpt`, `sft` (adapters on a frozen base) and `pretrain` (from scratch, all parameters).

They differ in what is trained and where it starts; the loop is one: QTrainer over the packed rows. This file owns what
happens around the steps: metrics, validation, the best weights, stopping, resuming.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from qmedtune import model as models
from qmedtune import store, ui
from qmedtune.data import templates
from qmedtune.data.pack import PackedRows
from qmedtune.interrupt import stop
from qmedtune.recipe import Recipe
from qmedtune.training.loss import token_nll
from qmedtune.training.trainer import (
    QTrainer,
    collate,
    last_intact_checkpoint,
    load_trained,
    number,
    save_trained,
    sealed_checkpoints,
    step_of,
    supervised_weight,
    trainer_arguments,
)

METRICS = "metrics.jsonl"
BEST = "best"


def train_stage(recipe: Recipe, index: int, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run stage `index` (0-based) of a resolved recipe.

    `inputs`: `base` (model folder), `tokens` (packed rows), `validation` (folder of packed rows per source, may be
    absent), `adapter-1` ... (earlier adapters in order). Writes `out/adapter` (or `out/model` for `pretrain`),
    `out/template.json` for SFT and `out/metrics.jsonl`; returns the facts of run.json's stage entry. An earlier attempt
    in `out` is continued from its last intact checkpoint.
    """
    stage, name = recipe.stages[index], recipe.stage_names()[index]
    set_seed(recipe.seed + index)
    quiet_libraries()
    tokenizer: Any = models.load_tokenizer(inputs["base"])
    model, facts = _make_model(recipe, index, inputs)
    models.check_tokenizer(tokenizer, model, inputs["base"])
    rows = PackedRows(inputs["tokens"])
    packed = json.loads((inputs["tokens"] / store.SEAL).read_text())["facts"]
    loop = Loop(name, out, validation_rows(recipe, inputs.get("validation")), tokenizer.pad_token_id, recipe)
    started = time.monotonic()
    trainer = _run(recipe, index, model, tokenizer, rows, packed, loop, out)
    facts |= loop.facts(trainer, packed["tokens"], time.monotonic() - started)
    facts |= {"kind": stage.kind, "tokens": packed["tokens"], "mixture": packed["mixture"]}
    if (template := inputs["tokens"] / templates.FILE).is_file():
        shutil.copyfile(template, out / templates.FILE)
    _finish(model, tokenizer, stage.full, recipe.model.base, out)
    facts |= {"model": {"path": f"{name}/model"}} if stage.full else {}
    del trainer, model
    gc.collect()
    return facts


def quiet_libraries() -> None:
    """Our progress display replaces theirs; their warnings about what we set on purpose would only confuse."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # transformers 5.23 renames `gradient_checkpointing`; 5.17, which we also support, has only the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")


def _make_model(recipe: Recipe, index: int, inputs: dict[str, Path]) -> tuple[Any, dict[str, Any]]:
    stage = recipe.stages[index]
    seq_len = number(stage.section.seq_len)
    if stage.full:
        load = models.from_scratch if stage.kind == "pretrain" else models.load_full
        return load(inputs["base"], recipe.model, seq_len=seq_len), {}
    base = models.load_base(inputs["base"], recipe.model, seq_len=seq_len)
    count = sum(key.startswith("adapter-") for key in inputs)
    earlier = [inputs[f"adapter-{number}"] for number in range(1, count + 1)]
    continued = stage.section.adapter == "continue"
    model = models.attach_adapter(base, recipe.adapter, earlier, continued=continued)
    return model, {"kernels": models.install_kernels(model, recipe.model.kernels)}


def validation_rows(recipe: Recipe, folder: Path | None) -> dict[str, PackedRows]:
    return {source: PackedRows(folder / source) for source in recipe.validation.on} if folder else {}


def _run(
    recipe: Recipe,
    index: int,
    model: Any,
    tokenizer: Any,
    rows: PackedRows,
    packed: dict[str, Any],
    loop: Loop,
    out: Path,
) -> QTrainer:
    section = recipe.stages[index].section
    steps = -(-len(rows) // number(section.batch))
    save_every = recipe.save.every if recipe.save.every != "auto" else max(20, steps // 10)
    autocast = recipe.model.compute_dtype
    if autocast == "float32" or (autocast == "bfloat16" and not recipe.stages[index].full):
        autocast = None
    arguments = trainer_arguments(
        out,
        section,
        seed=recipe.seed,
        save_every=save_every,
        autocast=autocast,
        deterministic=recipe.deterministic,
    )
    trainer = QTrainer(model, arguments, rows, section, tokenizer, recipe.save.keep, [loop])
    trainer.remove_callback(PrinterCallback)
    loop.begin(trainer, steps)
    checkpoint = last_intact_checkpoint(out)
    loop.rewind(checkpoint)
    with ui.stage(loop.name, total=packed["tokens"]["trained"], unit="tokens", completed=loop.tokens) as loop.bar:
        with stop.graceful():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < steps:
            stop.raise_if_requested()
    assert loop.tokens == packed["tokens"]["trained"], "tokens trained differ from the packing ledger"
    loop.restore_best(model)
    return trainer


def _finish(model: Any, tokenizer: Any, full: bool, base_name: str, out: Path) -> None:
    """Leave only what the stage is for: the adapter (or the model), its template, the metrics."""
    if full:
        model.to(torch.bfloat16).save_pretrained(str(out / "model"))
        tokenizer.save_pretrained(str(out / "model"))
        if (out / templates.FILE).is_file():
            from qmedtune import merge

            merge.write_template(out / "model", out)
    else:
        models.save_adapter(model, out / "adapter", base_name)
    for leftover in [*out.glob("checkpoint-*"), out / BEST, out / "runs"]:
        shutil.rmtree(leftover, ignore_errors=True)


@torch.no_grad()
def mean_loss(model: Any, rows: PackedRows, pad_id: int, batch: int) -> float:
    """Mean next-token loss (nats per supervised token) over packed rows, documents isolated from each other."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0.0
    for start in range(0, len(rows), batch):
        picked = collate([rows[i] for i in range(start, min(start + batch, len(rows)))], pad_id)
        picked.pop("lengths")
        count += supervised_weight(picked)
        total += float(token_nll(model, **{name: x.to(device) for name, x in picked.items()}))
    model.train(was_training)
    return total / max(1.0, count)


@dataclass
class Loop(TrainerCallback):
    """What happens around the optimiser steps of one stage."""

    name: str
    out: Path
    held_out: dict[str, PackedRows]
    pad_id: int
    recipe: Recipe
    bar: Any = None
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    _marked: tuple[float, int] = (0.0, 0)

    def begin(self, trainer: QTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        every = self.recipe.validation.every
        self.every = every if every != "auto" else max(10, steps // 5)
        self._marked = (time.monotonic(), 0)

    def rewind(self, checkpoint: Path | None) -> None:
        """Forget the metrics after the checkpoint (all of them without one): those steps are run again."""
        path = self.out / METRICS
        last = step_of(checkpoint) if checkpoint else 0
        lines = _complete_lines(path)
        kept = [line for line in lines if line["step"] <= last]
        store.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        steps = [line for line in kept if "loss" in line]
        self.losses = [line["loss"] for line in steps]
        self.validation = [{"step": line["step"], **line["validation"]} for line in kept if "validation" in line]
        self.tokens = self.trainer.tokens_seen = steps[-1]["tokens"] if steps else 0
        self._marked = (time.monotonic(), self.tokens)

    def write(self, line: dict[str, Any]) -> None:
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, **line}) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now, before = time.monotonic(), self._marked
        self.tokens = self.trainer.tokens_seen
        self._marked = (now, self.tokens)
        speed = (self.tokens - before[1]) / max(1e-9, now - before[0])
        line = {"step": state.global_step, "loss": logs["loss"], "grad_norm": logs["grad_norm"]}
        line |= {"lr": logs["learning_rate"], "tokens": self.tokens, "tokens_per_s": round(speed, 1)}
        self.write({**line, "memory": peak_memory_bytes()})
        self.losses.append(logs["loss"])
        self.bar.update(self.tokens, loss=logs["loss"], tokens_per_s=speed, lr=logs["learning_rate"])
        if self.held_out and (state.global_step % self.every == 0 or state.global_step == self.steps):
            self._validate(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stop.requested and state.global_step < self.steps:
            control.should_save = control.should_training_stop = True

    def _validate(self, step: int) -> None:
        self.bar.update(self.tokens, note="validating")
        batch = max(1, int(self.trainer.micro_batch))
        model = self.trainer.trained_model
        losses = {name: mean_loss(model, rows, self.pad_id, batch) for name, rows in self.held_out.items()}
        self.write({"step": step, "validation": losses})
        self.validation.append({"step": step, **losses})
        if self.recipe.validation.keep_best and step == self._best()["step"]:
            folder = self.out / BEST
            folder.mkdir(exist_ok=True)
            save_trained(model, folder / f"{step}.tmp")
            (folder / f"{step}.tmp").replace(folder / f"{step}.safetensors")
        self.bar.update(self.tokens, note="")
        self._marked = (time.monotonic(), self.tokens)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was best up to each checkpoint: a run that goes on from one may not get better than that."""
        reached = [step_of(checkpoint) for checkpoint in sealed_checkpoints(self.out)]
        validated = [step for step in reached if self.validation and self.validation[0]["step"] <= step]
        needed = {str(self._best(up_to)["step"]) for up_to in validated}
        for path in (self.out / BEST).glob("*.safetensors"):
            if path.stem not in needed:
                path.unlink()

    def _best(self, up_to: int | None = None) -> dict[str, Any]:
        """The validation with the lowest mean over the sources, until step `up_to`; the earliest of equals."""
        seen = [v for v in self.validation if up_to is None or v["step"] <= up_to]
        return min(seen, key=lambda v: sum(v[s] for s in self.held_out) / len(self.held_out))

    def restore_best(self, model: Any) -> None:
        if self.recipe.validation.keep_best and self.validation:
            load_trained(model, self.out / BEST / f"{self._best()['step']}.safetensors")

    def facts(self, trainer: QTrainer, tokens: dict[str, int], seconds: float) -> dict[str, Any]:
        speeds = [line["tokens_per_s"] for line in _complete_lines(self.out / METRICS) if "loss" in line]
        kept = self._best()["step"] if self.recipe.validation.keep_best and self.validation else self.steps
        return {
            "steps": self.steps,
            "kept_step": kept,
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
            "tokens_per_s": round(sorted(speeds)[len(speeds) // 2], 1),
            "train_seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "micro_batch": trainer.micro_batch,
            "validation": self.validation,
            "warnings": list(trainer.halvings),
        }


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is dropped."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def peak_memory_bytes() -> int:
    """Peak allocated memory of the GPU, or the peak resident size of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
