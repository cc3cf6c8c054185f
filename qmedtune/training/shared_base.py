"""The frozen base from one training stage to the next: loaded and quantised once, while the GPU has nothing else to do.

A stage changes modules (adapters, kernels, hooks), never the base's tensors. So each gets modules of its own around the
same tensors: bit for bit what loading the base again would give. Torch is imported only when something is loaded.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmedtune.recipe import ModelSection


@dataclass
class SharedBase:
    """Holds the base that was loaded last, until another is asked for or it is dropped. Belongs to one run."""

    _key: tuple | None = None
    _model: Any = None
    _marks: dict[str, tuple] = field(default_factory=dict)

    def load(self, folder: Path, section: ModelSection, *, attention: str) -> Any:
        """What `model.load_base` gives. Its tensors are those of the model that the last call gave, if that was for the
        same files, section and attention; use one of the two only."""
        from qmedtune import model as models

        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
        key = folder.resolve(), files, section.model_dump_json(), attention
        if key != self._key or _marks(self._model) != self._marks:
            self.drop()
            self._model = models.load_base(folder, section, attention=attention)
            self._key, self._marks = key, _marks(self._model)
        return _modules_around(self._model)

    def drop(self) -> None:
        """Its memory is free then, if no stage holds the base."""
        if self._model is None:
            return
        import torch

        self._key, self._model, self._marks = None, None, {}
        gc.collect()  # bitsandbytes' weights and their modules know each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _marks(model: Any) -> dict[str, tuple]:
    """dtype and number of changes in place of every parameter: those of a frozen one stay. Writing through `.data` does
    not count, which nothing does to a base but fused.stack_rows, with the same values."""
    return {name: (p.dtype, p._version) for name, p in model.named_parameters()}


def _modules_around(model: Any) -> Any:
    """A deep copy of modules, configuration and buffers that shares parameters and the scales of quantised ones."""
    shared = [*model.parameters(), *(m.quant_state for m in model.modules() if getattr(m, "quant_state", None))]
    return copy.deepcopy(model, {id(value): value for value in shared}).requires_grad_(False)
