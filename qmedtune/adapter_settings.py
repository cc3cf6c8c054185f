"""What adapter_config.json may say: a plain LoRA for causal language models, as PEFT writes it.

Each setting that changes what an update of a layer is must be one that is read here; any other that is set is refused.
Deliberately not here: whether the tensors fit the settings (model_stack.py), remote code (model_settings.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune.model_files import as_list, as_object, read_json, refuse
from qmedtune.model_settings import check_pattern

if TYPE_CHECKING:
    from peft import LoraConfig

# Settings of peft 0.21 that are read here or change nothing once an adapter is trained. Each other one that is set
# means that the update of a layer is something else than scale * B @ A.
READ = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "ensure_weight_tying", "bias",
    "init_lora_weights",
})  # fmt: skip
HARMLESS = frozenset({
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
})  # fmt: skip
# Initialisations that leave the base's weights as they are (pissa, olora, loftq, corda and lora_ga change them).
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
CAUSAL = "CAUSAL_LM"


def read_lora(path: Path) -> LoraConfig:
    """The adapter_config.json of a plain LoRA. RecipeError names the setting that cannot be used, and what can be."""
    from peft import LoraConfig

    raw = read_json(path)
    for key, allowed in (("peft_type", ("LORA",)), ("task_type", (CAUSAL, None)), ("bias", ("none",))):
        if raw.get(key, allowed[0]) not in allowed:
            what = f"{key}: {raw[key]!r} cannot be used here"
            refuse(path, what, "allowed: plain LoRA for causal language models (LORA, CAUSAL_LM), rslora, no biases")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        what = f"init_lora_weights: {raw['init_lora_weights']!r} changes the base that the adapter belongs on"
        refuse(
            path,
            what,
            "convert it to a plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)",
        )
    known = READ | HARMLESS
    for key, value in raw.items():
        if key not in known and value:
            why = "" if key in LoraConfig.__dataclass_fields__ else ", a setting that peft 0.21 does not know,"
            refuse(path, f"{key}: {str(value)[:60]!r}{why} cannot be used here", "allowed: plain LoRA, rslora")
    _check_values(path, raw)
    return LoraConfig(**{key: value for key, value in raw.items() if key in READ})


def _check_values(path: Path, raw: Mapping[str, Any]) -> None:
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 2**20:
        refuse(path, f"r: {str(rank)[:40]!r}", "allowed: a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        refuse(path, f"lora_alpha: {str(alpha)[:40]!r}", "allowed: a number")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value: object = raw.get(key)
        is_pattern = isinstance(value, str) and key != "modules_to_save"
        if value is not None and not is_pattern and not _are_names(as_list(value)):
            refuse(path, f"{key}: {str(value)[:60]!r}", "allowed: a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        said: object = raw.get(key) or {}
        if not _are_numbers(as_object(said)):
            refuse(path, f"{key}: {str(said)[:60]!r}", "allowed: numbers above 0 by module")
    layers: object = raw.get("layers_to_transform")
    if layers is not None and not _are_counts(_each(layers)):
        refuse(path, f"layers_to_transform: {str(layers)[:60]!r}", "allowed: numbers of layers")
    for pattern in _patterns(raw):
        check_pattern(path, pattern)


def _each(value: object) -> list[object]:
    """The entries of a list; anything else is the only one."""
    listed = as_list(value)
    if listed is None:
        return [value]
    return listed


def _are_names(values: list[Any] | None) -> bool:
    return values is not None and all(isinstance(value, str) for value in values)


def _are_numbers(values: Mapping[str, Any] | None) -> bool:
    if values is None:
        return False
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**20:
            return False
    return True


def _are_counts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def _patterns(raw: Mapping[str, Any]) -> Iterator[object]:
    """What PEFT takes for a regular expression."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(raw.get(key), str):
            yield raw[key]
    yield from _each(raw.get("layers_pattern") or [])
    for key in ("rank_pattern", "alpha_pattern"):
        yield from raw.get(key) or {}
