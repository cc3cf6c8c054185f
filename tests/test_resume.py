"""Stopped after any optimiser step and started again, a stage ends with the same bits; so does the next one.

The quick part takes the borders; every step, and 50 injected NaNs, by `pytest -m slow tests/test_resume.py`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from stages import assert_same, losses, stop_after, train_hard

from qmedtune import interrupt, store, train
from qmedtune.errors import RunError
from qmedtune.parsing.loader import load_recipe
from qmedtune.training import checkpoints, trainer


def check_stop(hard_run: MicroRun, uninterrupted: list[Path], index: int, steps: list[int], tmp_path: Path) -> None:
    """Stop after each of `steps`, one after the other, in one attempt; then finish it."""
    adapters = [uninterrupted[0] / "adapter"] if index else []
    out = tmp_path / "-".join(map(str, [index, *steps]))
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.StageCallback, "on_step_end", stop_after(step))
            with pytest.raises(interrupt.Interrupted):
                train_hard(hard_run, index, out, *adapters)
        interrupt.stop.signal = None
        found = checkpoints.last_intact(out)
        assert found and checkpoints.step_of(found) == step
    train_hard(hard_run, index, out, *adapters)
    assert_same(out, uninterrupted[index])


def num_steps(out: Path) -> int:
    return len(losses(out))


def test_stopped_in_either_stage(hard_run: MicroRun, uninterrupted: list[Path], tmp_path: Path):
    check_stop(hard_run, uninterrupted, 0, [2, 5], tmp_path)
    check_stop(hard_run, uninterrupted, 1, [num_steps(uninterrupted[1]) - 1], tmp_path)


@pytest.mark.slow
def test_stopped_at_every_step(hard_run: MicroRun, uninterrupted: list[Path], tmp_path: Path):
    for index, out in enumerate(uninterrupted):
        for step in range(1, num_steps(out)):
            check_stop(hard_run, uninterrupted, index, [step], tmp_path)


def poison(step: int, value: float, place: str, patch: pytest.MonkeyPatch) -> None:
    """The loss, or one element of one gradient, becomes `value` in optimiser step `step`."""
    original = trainer.QTrainer._accumulate

    def accumulate(self, model, inputs, supervised):
        loss = original(self, model, inputs, supervised)
        if self.state.global_step + 1 == step and place == "loss":
            return loss * value
        if self.state.global_step + 1 == step:
            weights = random.Random(step).choice(list(trainer.trainable(model).values()))
            weights.grad.view(-1)[0] = value
        return loss

    patch.setattr(trainer.QTrainer, "_accumulate", accumulate)


def check_poison(hard_run: MicroRun, step: int, value: float, place: str, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(step, value, place, patch)
        with pytest.raises(RunError, match=rf"step {step}: {place}.* is (nan|inf); no update.*learning rate.*batch"):
            train_hard(hard_run, 0, out)
    found = checkpoints.last_intact(out)
    assert (checkpoints.step_of(found) if found else 0) == (step - 1) // 3 * 3
    assert len(losses(out)) == step - 1


def test_a_gradient_that_is_not_finite_stops_before_the_update(hard_run: MicroRun, tmp_path: Path):
    check_poison(hard_run, 5, float("inf"), "gradient norm", tmp_path / "out")


@pytest.mark.slow
def test_fifty_poisoned_steps(hard_run: MicroRun, uninterrupted: list[Path], tmp_path: Path):
    rng = random.Random(7)
    for number in range(50):
        step = rng.randint(1, num_steps(uninterrupted[0]))
        value = rng.choice([float("nan"), float("inf"), float("-inf")])
        place = rng.choice(["loss", "gradient norm"])
        check_poison(hard_run, step, abs(value), place, tmp_path / str(number))
        train_hard(hard_run, 0, tmp_path / str(number))
        assert_same(tmp_path / str(number), uninterrupted[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_deterministic_runs_on_a_gpu_agree_bit_for_bit(tmp_path: Path):
    """50 steps with the recipe's own kernels and dtypes: equal losses, gradient norms and weights."""
    from qmedtune.run import run

    settings = ["deterministic=true", "stages[0].cpt.tokens=13000", "stages[0].cpt.seq_len=64", "save.every=20"]
    loaded = load_recipe(MICRO, settings)
    for name in ("a", "b"):
        run(loaded.recipe, loaded.text, tmp_path / name, offline=True, until="01-cpt")
    assert num_steps(tmp_path / "a" / "01-cpt") >= 50
    assert_same(tmp_path / "a" / "01-cpt", tmp_path / "b" / "01-cpt")


def test_what_was_trained_on_is_noted_beside_the_adapter(uninterrupted: list[Path]):
    from qmedtune.base import TRAINED_ON

    cpt, sft = (out / "adapter" / TRAINED_ON for out in uninterrupted)
    assert cpt.read_text() == sft.read_text()  # one base; the second stage continues the first one's adapter
    assert not (uninterrupted[0] / store.SCRATCH / "checkpoint.partial").exists()
