"""Training stages of the micro recipe as tests run, stop and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import MICRO, MicroRun
from safetensors.torch import load_file

from qmedtune import interrupt, plan, train
from qmedtune.parsing.loader import load_recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.training import checkpoints

# Dropout draws random numbers in every step; two micro-batches accumulate; sources are read several times; the
# best weights are put back at the end.
HARD = (
    "adapter.dropout=0.1",
    "stages[0].cpt.micro_batch=2",
    "stages[1].sft.micro_batch=8",
    "stages[0].cpt.tokens=2500",
    "data.literature.max_records=30",
    "data.instructions.max_records=60",
    "stages[1].sft.epochs=1.5",
    "validate.keep_best=true",
    "validate.every=2",
    "save.every=3",
)


def hard() -> ResolvedRecipe:
    recipe, _ = plan.resolve(load_recipe(MICRO, HARD).recipe)
    return recipe


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / checkpoints.METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def stop_after(step: int) -> Callable:
    """Raise the flag that SIGTERM raises, once this optimiser step is done."""
    original = train.StageCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            interrupt.stop.signal = 15
        original(self, args, state, control, **kwargs)

    return on_step_end


def train_hard(micro_run: MicroRun, index: int, out: Path, *adapters: Path) -> dict:
    out.mkdir(exist_ok=True)
    stage = ("01-cpt", "02-sft")[index]
    return train.train_stage(hard(), index, micro_run.inputs(stage, *adapters), out).as_json()


def outcome(out: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and weights."""
    lines = [json.loads(line) for line in (out / checkpoints.METRICS).read_text(encoding="utf-8").splitlines()]
    norms = [line["grad_norm"] for line in lines if "loss" in line]
    return losses(out), norms, load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    (losses_a, norms_a, weights_a), (losses_b, norms_b, weights_b) = outcome(a), outcome(b)
    assert losses_a == losses_b and norms_a == norms_b
    assert weights_a.keys() == weights_b.keys()
    for name, weights in weights_a.items():
        assert torch.equal(weights, weights_b[name]), name
