"""Checkpoints without a training around them: what is in them comes back exactly, the last intact one is never lost."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import crash
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerState

from qmedtune import store
from qmedtune.training import checkpoints


def small_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, second = model.children()
    groups = [{"params": list(first.parameters()), "lr": 1e-2}, {"params": list(second.parameters()), "lr": 1e-3}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def adamw_8bit(model: torch.nn.Module) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=4096)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler) -> float:
    loss = model(torch.randn(8, 64) * random.random() + float(np.random.rand())).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return float(loss.detach())


def schedule(optimizer: torch.optim.Optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def save(stage: Path, number: int, keep: int = 2, model: torch.nn.Module | None = None, states=None) -> Path:
    weights = dict((model or torch.nn.Linear(2, 2)).named_parameters())
    states = states or checkpoints.States(checkpoints.random_states(), {"optimizer": {}})
    facts = {"tokens": 1}
    checkpoint = checkpoints.Checkpoint(number, weights, states, TrainerState(), facts)
    return checkpoints.save(stage, checkpoint, keep=keep)


@pytest.mark.parametrize("make", [adamw, adamw_8bit])
def test_everything_comes_back_exactly(make, tmp_path: Path):
    """Two trainings that go on from the same checkpoint give the same losses as the one that made it."""
    model = small_model(0)
    optimizer = make(model)
    scheduler, scaler = schedule(optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        step(model, optimizer, scheduler)
    saved = save(tmp_path, 3, model=model, states=checkpoints.states_of(optimizer, scheduler, scaler))
    expected = [step(model, optimizer, scheduler) for _ in range(3)]
    again = small_model(1)
    optimizer = make(again)
    scheduler, scaler = schedule(optimizer), torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoints.load_trained(again, saved / checkpoints.WEIGHTS)
    checkpoints.load_optimizer(saved, optimizer, scheduler)
    checkpoints.load_scaler(saved, scaler)
    checkpoints.load_random(saved)
    assert [step(again, optimizer, scheduler) for _ in range(3)] == expected
    assert scaler.get_scale() == 1024.0


def test_the_last_intact_checkpoint_is_never_lost(tmp_path: Path):
    """Saves, damages and failing saves in any order: once there was one, there is one, and never more than `keep`."""
    rng, number, intact = random.Random(3), 0, 0
    for _ in range(60):
        number += 1
        kind = rng.choice(["save", "save", "fail", "damage"])
        if kind == "save":
            save(tmp_path, number, keep=2)
            intact = number
        elif kind == "fail":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SafetensorError):
                patch.setattr(checkpoints, "save_file", full_disk)
                save(tmp_path, number, keep=2)
        elif len(found := checkpoints.sealed(tmp_path)) == 2:  # of two, the newest
            (found[1] / checkpoints.WEIGHTS).write_bytes(b"damaged")
            intact = checkpoints.step_of(found[0])
            number = intact  # training goes on from there
        last = checkpoints.last_intact(tmp_path)
        assert (checkpoints.step_of(last) if last else 0) == intact
        assert len(list((tmp_path / store.SCRATCH).glob("checkpoint-*"))) <= 2


def test_a_damaged_checkpoint_takes_no_intact_ones_place(tmp_path: Path):
    """Its seal can be read, its weights are damaged: counted, it would push out the one that was resumed from."""
    first, second = save(tmp_path, 3, keep=2), save(tmp_path, 7, keep=2)
    (second / checkpoints.WEIGHTS).write_bytes(b"damaged")
    save(tmp_path, 8, keep=2)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-3", "checkpoint-8"]
    assert store.intact(first, full=True)


def test_other_names_are_no_checkpoints(tmp_path: Path):
    saved = save(tmp_path, 3)
    shutil.copytree(saved, saved.with_name("checkpoint-3.copy"))
    assert checkpoints.last_intact(tmp_path) == saved


def test_a_checkpoint_on_a_bad_sector_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = save(tmp_path, 3), save(tmp_path, 6)
    read = store.sha256_file

    def failing(path: Path) -> str:
        if path.parent == second:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(store, "sha256_file", failing)
    assert checkpoints.last_intact(tmp_path) == first


def test_a_crash_at_any_system_call_of_a_save_leaves_an_intact_checkpoint(tmp_path: Path):
    stage = tmp_path / "stage"

    def start_over() -> None:
        shutil.rmtree(stage, ignore_errors=True)
        (stage / store.SCRATCH).mkdir(parents=True)
        checkpoints.save_trained(torch.nn.Linear(2, 2), stage / store.SCRATCH / checkpoints.BEST)
        save(stage, 1)
        save(stage, 2)

    def recover() -> None:
        for path in (stage / store.SCRATCH).glob("checkpoint-*"):
            assert store.intact(path, full=True), "half a checkpoint under its name"
        last = checkpoints.last_intact(stage)
        assert last is not None and checkpoints.step_of(last) in (2, 3)
        save(stage, 3 if checkpoints.step_of(last) == 2 else 4)
        assert len(checkpoints.sealed(stage)) == 2

    start_over()
    assert crash.everywhere(lambda: save(stage, 3), recover, start_over) > 15


def full_disk(*_):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_best_weights_and_metrics_go_back_to_the_checkpoint(tmp_path: Path):
    best, metrics = tmp_path / store.SCRATCH / checkpoints.BEST, tmp_path / checkpoints.METRICS
    best.parent.mkdir()
    checkpoints.save_trained(torch.nn.Linear(2, 2), best)
    metrics.write_text("one\n")
    first, kept = save(tmp_path, 1), best.read_bytes()
    assert (first / checkpoints.BEST).stat().st_ino == best.stat().st_ino  # a second name, not a second copy
    checkpoints.save_trained(torch.nn.Linear(2, 2), best)
    with metrics.open("a") as file:
        file.write("two\n")
    assert best.read_bytes() != kept and store.intact(first, full=True)
    checkpoints.go_back(tmp_path, first)
    assert best.read_bytes() == kept and metrics.read_text() == "one\n"
    checkpoints.go_back(tmp_path, None)
    assert not best.exists() and metrics.read_text() == ""
