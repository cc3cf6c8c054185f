"""Adapter folders as PEFT writes them, reduced to what they do to named weights: low-rank updates and replacements.

Merging an adapter that misses its modules is the quiet disaster of the field: the merged model is then the base. So
every tensor must belong to a module of the base and have its shape, every module that the adapter's configuration
targets must have its tensors, and variants whose mathematics is not W + scale * B @ A are refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from qmedtune.errors import RecipeError
from qmedtune.merging.tensors import Weights, open_file
from qmedtune.model import check_folder

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of peft 0.21 under which the update of a linear layer is something else than scale * B @ A.
OTHER_MATHEMATICS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication", "arrow_config",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that leave the base's weights as they are (pissa, olora, loftq, corda and lora_ga change them).
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LowRank:
    """W += scale * b @ a. a: [r, in], b: [out, r], fp32."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Updates:
    """What all adapters together do, by parameter name of the base. `full` replaces a weight by its trained copy."""

    low_rank: dict[str, list[LowRank]] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> int:
        return len(self.low_rank.keys() | self.full.keys())


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    config: LoraConfig
    tensors: Weights

    def refuse(self, what: str, then: str = "merge it onto the base that it was trained on") -> RecipeError:
        return RecipeError(f"{self.folder}: {what}\n{then}")

    def saves(self, module: str) -> bool:
        """Whether the module was trained as a full copy. A head tied to a trained embedding goes unlisted."""
        listed = any(f".{module}".endswith(f".{m}") for m in self.config.modules_to_save or ())
        return listed or (module == "lm_head" and self.config.ensure_weight_tying)

    def shaped(self, name: str, expected: tuple[int, ...]) -> Tensor:
        """The tensor, fp32 or as stored, of which the base asks the shape `expected`."""
        stored = PREFIX + name
        if stored not in self.tensors.files:
            raise self.refuse(f"tensor {stored} is missing", "the adapter is incomplete; train or fetch it again")
        given = self.tensors.shape(stored)
        if given != expected:
            raise self.refuse(f"{stored} has the shape {list(given)}, the base asks for {list(expected)}")
        return self.tensors[stored]


def read_adapters(folders: Sequence[Path], shapes: Shapes, linears: Sequence[str]) -> Updates:
    """Read adapters in the order in which they were trained; of full copies the last one counts.

    shapes: every parameter of the base; linears: module names of its linear layers.
    Raises RecipeError naming the adapter and the tensor or module that does not fit, RunError for a damaged file.
    """
    updates = Updates()
    for folder in folders:
        config = _read_config(folder / CONFIG)
        check_folder(folder)
        adapter = _Adapter(folder, config, open_file(folder / TENSORS))
        modules = _targeted(adapter, linears)
        for module in modules:
            updates.low_rank.setdefault(f"{module}.weight", []).append(_low_rank(adapter, module, shapes))
        rest = adapter.tensors.files.keys() - {f"{PREFIX}{m}.lora_{part}.weight" for m in modules for part in "AB"}
        for stored in sorted(rest):
            name = stored.removeprefix(PREFIX)
            if name not in shapes or not adapter.saves(name.removesuffix(".weight")):
                raise adapter.refuse(f"tensor {stored} belongs to no module of the base")
            updates.full[name] = adapter.shaped(name, shapes[name])
        _check_saved(adapter)
    if both := sorted(updates.low_rank.keys() & updates.full.keys()):
        raise RecipeError(f"{folders[-1]}: {both[0]} has a low-rank update and a full copy\nmerge them one by one")
    return updates


def _read_config(path: Path) -> LoraConfig:
    from peft import LoraConfig

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file\ngive an adapter folder as PEFT writes it") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({error})\ntrain or fetch the adapter again") from error
    odd = [key for key in OTHER_MATHEMATICS if raw.get(key)]
    odd += ["peft_type"] if raw.get("peft_type") != "LORA" else []
    odd += ["bias"] if raw.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if raw.get("init_lora_weights", True) not in PLAIN_INITS else []
    if odd:
        raise RecipeError(f"{path}: {odd[0]}: {raw.get(odd[0])!r} cannot be merged here\nallowed: plain LoRA, rslora")
    return LoraConfig(**{key: value for key, value in raw.items() if key in LoraConfig.__dataclass_fields__})


def _targeted(adapter: _Adapter, linears: Sequence[str]) -> list[str]:
    """The linear layers that the adapter's configuration targets; each of its targets must be one of them."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = adapter.config.target_modules
    found = [m for m in linears if targets and check_target_module_exists(adapter.config, m)]
    for target in sorted(targets) if isinstance(targets, set) else ():
        if not any(f".{module}".endswith(f".{target}") for module in found):
            raise adapter.refuse(f"its target {target} is no linear layer of the base")
    if not found and not adapter.config.modules_to_save:
        raise adapter.refuse(f"its target_modules ({targets}) hit no module of the base")
    return found


def _low_rank(adapter: _Adapter, module: str, shapes: Shapes) -> LowRank:
    from peft.utils.other import get_pattern_key

    config = adapter.config
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    rows, columns = shapes[f"{module}.weight"]
    a = adapter.shaped(f"{module}.lora_A.weight", (rank, columns))
    b = adapter.shaped(f"{module}.lora_B.weight", (rows, rank))
    return LowRank(a.float(), b.float(), alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _check_saved(adapter: _Adapter) -> None:
    stored = [f".{name.removesuffix('.weight')}" for name in adapter.tensors.files]
    for module in adapter.config.modules_to_save or ():
        if not any(name.endswith(f".{module}") for name in stored):
            raise adapter.refuse(f"the trained copy of {module} is missing", "the adapter is incomplete")
