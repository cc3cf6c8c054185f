"""Checkpoints of a stage: all that a stopped training needs to go on as if it had never stopped.

Weights, optimiser, schedule, loss scale and random states as safetensors and JSON (nothing is pickled), the metrics so
far and the best weights so far. Built as `checkpoint.partial`, sealed with a sha256 manifest, then renamed: a
`checkpoint-N` is complete or not there, and only intact ones are resumed from. When to save is Trainer's business.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmedtune import store, ui
from qmedtune.disk import link
from qmedtune.model import trainable

WEIGHTS, STATES, STATE = "trained.safetensors", "states.safetensors", "state.json"
BEST, METRICS = "best.safetensors", "metrics.jsonl"
TRAINER_STATE = "trainer_state.json"  # Trainer's name for its own
KEY = "checkpoint"
TENSOR = "tensor of states.safetensors"
OTHER_FILES_BYTES = 1 << 20  # state.json (optimiser groups, Python's and numpy's generators), trainer_state.json, seal


class Generators(TypedDict):
    """Random states, as `random` and numpy give them."""

    python: Any
    numpy: list[Any]


class OptimizerState(TypedDict):
    """As torch gives it, with names in the place of tensors."""

    param_groups: Any
    state: Any


class StateJson(TypedDict):
    """state.json. scheduler, scaler: as torch gives them."""

    optimizer: OptimizerState
    scheduler: Any
    scaler: Any
    random: Generators


@dataclass(frozen=True)
class States:
    """What a training goes on from, beside its weights: tensors by name, and all that is none."""

    tensors: dict[str, Tensor]
    plain: StateJson


@dataclass(frozen=True)
class Checkpoint:
    """Training after `step` optimiser steps: the trained `weights`, `states` as `states_of` gives them, Trainer's own
    state, and `facts` for the seal."""

    step: int
    weights: Mapping[str, Tensor]
    states: States
    trainer_state: Any
    facts: Mapping[str, object]


def save(building: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Seal a checkpoint of a stage below `building`, its folder, then drop all but the newest `keep` intact ones.

    RunError where the disk has no room for it: what was sealed before stays.
    """
    scratch = building / store.SCRATCH
    step, weights, states = checkpoint.step, checkpoint.weights, checkpoint.states
    needed = OTHER_FILES_BYTES
    for tensor in (*weights.values(), *states.tensors.values()):
        needed += tensor.nbytes
    store.check_room(scratch, needed, f"checkpoint {step}")
    partial = scratch / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed save
    partial.mkdir(parents=True)
    save_file(_plain(weights), partial / WEIGHTS)
    save_file(states.tensors, partial / STATES)
    store.write_json(partial / STATE, states.plain)
    checkpoint.trainer_state.save_to_json(str(partial / TRAINER_STATE))
    if (building / METRICS).is_file():
        shutil.copyfile(building / METRICS, partial / METRICS)
    if (scratch / BEST).is_file():
        link(scratch / BEST, partial / BEST)
    store.seal(partial, KEY, {"step": step, **checkpoint.facts})
    folder = scratch / f"checkpoint-{step}"
    store.discard(folder)  # one that is there was damaged, and passed over
    store.rename(partial, folder)
    intact = sealed(building)
    for path in found(building):
        if path not in intact:
            store.discard(path)
    for path in superseded(intact, folder, keep):
        store.discard(path)
    return folder


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def found(building: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    numbered = []
    for path in (building / store.SCRATCH).glob("checkpoint-*"):
        if path.name.rpartition("-")[2].isdigit():
            numbered.append(path)
    return sorted(numbered, key=step_of)


def sealed(building: Path) -> list[Path]:
    """Checkpoints that are as they were sealed, going by sizes and times, oldest first."""
    return [path for path in found(building) if store.intact(path, KEY)]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def superseded(checkpoints: list[Path], newest: Path, keep: int) -> list[Path]:
    """What may go once `newest` is sealed. Those of later steps go first: they were damaged, and passed over."""
    later, others = [], []
    for path in checkpoints:
        if step_of(path) > step_of(newest):
            later.append(path)
        else:
            others.append(path)
    return later + others[:-keep]


def last_intact(building: Path) -> Path | None:
    """The newest checkpoint whose every file matches its seal; damaged ones are passed over with a warning."""
    for path in reversed(found(building)):
        if store.intact(path, KEY, full=True):
            return path
        ui.warn(f"{path.name} is damaged; continuing from the one before")
    return None


def go_back(building: Path, checkpoint: Path | None) -> None:
    """Metrics and best weights as they were at the checkpoint (none without one): what came after is done again."""
    best = building / store.SCRATCH / BEST
    best.unlink(missing_ok=True)
    if checkpoint and (checkpoint / BEST).is_file():
        link(checkpoint / BEST, best)
    lines = ""
    if checkpoint and (checkpoint / METRICS).is_file():
        lines = (checkpoint / METRICS).read_text(encoding="utf-8")
    store.write_atomic(building / METRICS, lines)


# ------------------------------------------------------------------------------------------------- what is in a folder


def save_trained(model: torch.nn.Module, path: Path) -> None:
    """Everything trainable, exactly, under its parameter name. Complete under `path`, or not there."""
    partial = path.with_name(f"{path.name}.partial")
    save_file(_plain(trainable(model)), partial)
    store.rename(partial, path)


def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Put saved weights back into the same parameters; dtypes and trainability stay as they are."""
    saved = load_file(path)
    trained = trainable(model)
    assert saved.keys() == trained.keys(), "the checkpoint belongs to another set of trained weights"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def states_of(optimizer: Any, scheduler: Any, scaler: Any) -> States:
    """Of an optimiser, its schedule, the loss scale (None without fp16) and the random generators, as they are now."""
    whole = optimizer.state_dict()
    tensors = random_states()
    plain = _take_tensors(whole["state"], "optimizer", tensors)
    numpy_state: Any = np.random.get_state()
    scale = None
    if scaler:
        scale = scaler.state_dict()
    described: StateJson = {
        "optimizer": {"param_groups": whole["param_groups"], "state": plain},
        "scheduler": scheduler.state_dict(),
        "scaler": scale,
        "random": {"python": random.getstate(), "numpy": [*numpy_state[:1], numpy_state[1].tolist(), *numpy_state[2:]]},
    }
    return States(_unshared(tensors), described)


def _take_tensors(value: Any, name: str, into: dict[str, Tensor]) -> Any:
    """`value` with every tensor put into `into` and its name in its place. bitsandbytes nests its 8-bit states."""
    if isinstance(value, Tensor):
        into[name] = value.detach().contiguous()
        return {TENSOR: name}
    if not isinstance(value, dict):
        return value
    return {key: _take_tensors(inner, f"{name}.{key}", into) for key, inner in value.items()}


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    return {key: _put_tensors(inner, tensors) for key, inner in value.items()}


def random_states() -> dict[str, Tensor]:
    """Torch's generators: uint8 tensors."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit optimisers keep one quantisation table for all parameters; safetensors wants it once for each."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def load_optimizer(checkpoint: Path, optimizer: Any, scheduler: Any) -> None:
    described = _described(checkpoint)
    kept = _put_tensors(described["optimizer"]["state"], load_file(checkpoint / STATES))
    state = {int(index): of_parameter for index, of_parameter in kept.items()}  # JSON made its keys strings
    optimizer.load_state_dict({"state": state, "param_groups": described["optimizer"]["param_groups"]})
    scheduler.load_state_dict(described["scheduler"])


def load_scaler(checkpoint: Path, scaler: Any) -> None:
    if scaler is not None:
        scaler.load_state_dict(_described(checkpoint)["scaler"])


def load_random(checkpoint: Path) -> None:
    kept = _described(checkpoint)["random"]
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(kept["numpy"]))
    states = {}
    with safe_open(checkpoint / STATES, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith("random."):
                states[name] = file.get_tensor(name)
    set_random_states(states)


def _described(checkpoint: Path) -> StateJson:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
