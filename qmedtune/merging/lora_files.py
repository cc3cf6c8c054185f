"""Adapter folders as PEFT writes them, reduced to what they do to named weights: low-rank updates and replacements.

Merging an adapter that misses its modules is the quiet disaster of the field: the merged model is then the base. So
model_stack.py judges the folder first: every tensor belongs to a module of the base and has its shape, every targeted
module has its tensors, and variants whose mathematics is not W + scale * B @ A are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qmedtune.errors import RecipeError, RunError
from qmedtune.merging.tensors import Weights, open_file
from qmedtune.model_stack import ADAPTER_TENSORS, PREFIX, AdapterFolder, read_adapter

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LowRank:
    """One LoRA update of a weight matrix.

    W += scale * b @ a. a: [r, in], b: [out, r], fp32.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Updates:
    """What all adapters together do, by parameter name of the base. `full` replaces a weight by its trained copy;
    `copies` are to be the base's own values."""

    low_rank: dict[str, list[LowRank]] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> int:
        return len(self.low_rank.keys() | self.full.keys())


def read_adapters(folders: Sequence[Path], shapes: Shapes) -> Updates:
    """Read adapters in the order in which they were trained; of full copies the last one counts.

    shapes: every parameter of the base.
    Raises RecipeError naming the adapter and the file, tensor or module that does not fit.
    """
    updates = Updates()
    for folder in folders:
        adapter = read_adapter(folder, shapes)
        _add(updates, adapter, open_file(folder / ADAPTER_TENSORS))
    if both := sorted(updates.low_rank.keys() & updates.full.keys()):
        raise RecipeError(f"{folders[-1]}: {both[0]} has a low-rank update and a full copy\nmerge them one by one")
    return updates


def _add(updates: Updates, adapter: AdapterFolder, tensors: Weights) -> None:
    for module, facts in adapter.low_rank.items():
        a, b = (_finite(adapter, tensors, f"{PREFIX}{module}.lora_{part}.weight").float() for part in "AB")
        updates.low_rank.setdefault(f"{module}.weight", []).append(LowRank(a, b, facts.scale))
    updates.full.update({name: _finite(adapter, tensors, PREFIX + name) for name in adapter.full})
    updates.copies.update({name: tensors[stored] for name, stored in adapter.copies.items()})


def _finite(adapter: AdapterFolder, tensors: Weights, name: str) -> Tensor:
    if not bool(torch.isfinite(tensors[name]).all()):
        place = adapter.folder / ADAPTER_TENSORS
        raise RunError(f"{place}: {name} is not finite\nits training diverged: take an earlier checkpoint of it")
    return tensors[name]
