"""What a merge is held against: base and adapters as training read them, by transformers and by PEFT.

The merge has readers of its own (disk_llama.py, lora_files.py). An error that they make is made again by whatever uses
them, so the proof uses none of it: transformers' from_pretrained says what the base is and what was published (files,
names, tied ends), PEFT says what the adapters are (A, B, scale, full copies). transformers maps the files: a 1.1B model
costs 3 MB of memory and .2 s. Deliberately no arithmetic here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qmedtune.errors import RunError
from qmedtune.merging.lora_files import LowRank, Updates
from qmedtune.merging.tensors import Weights
from qmedtune.model_stack import EMBEDDING, HEAD

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class ReadModel:
    """Parameters by name, mapped from disk; the head also where it is tied, then the same tensor as the embedding."""

    parameters: Mapping[str, Tensor]
    unexpected: list[str]

    @property
    def tied(self) -> bool:
        return self.parameters[HEAD] is self.parameters[EMBEDDING]


def read_model(folder: Path, dtype: torch.dtype) -> ReadModel:
    """A model folder as transformers loads it. RunError where tensors are missing or of another shape."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # of ends that are not tied, of buffers of old checkpoints: judged by the proof
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",  # a config may name code of the Hub
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(said)
    model, told = found
    if lost := sorted([*told["missing_keys"], *told["mismatched_keys"]], key=str):
        raise RunError(
            f"{folder}: transformers finds no tensor {lost[0]} there (of {len(lost)})\nnothing was published"
        )
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        parameters[HEAD] = parameters[EMBEDDING]
    return ReadModel(parameters, sorted(told["unexpected_keys"]))


def read_base(folder: Path, stored: Weights) -> ReadModel:
    """The base in the dtype that most of it is stored in, in which transformers maps it. Single tensors of a wider
    dtype (norms in fp32) are taken as they are stored, if transformers' are the same, rounded."""
    sizes: dict[torch.dtype, int] = {}
    for name in stored.files:
        tensor = stored[name]
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    read = read_model(folder, max(sizes, key=lambda dtype: sizes[dtype]))
    if len(sizes) == 1:
        return read
    parameters = {name: _as_stored(name, tensor, stored) for name, tensor in read.parameters.items()}
    if read.tied:
        parameters[HEAD] = parameters[EMBEDDING]
    return ReadModel(parameters, read.unexpected)


def _as_stored(name: str, read: Tensor, stored: Weights) -> Tensor:
    if name not in stored.files:
        return read
    own = stored[name]
    return own if torch.equal(own.to(read.dtype), read) else read


def read_updates(folders: Sequence[Path], skeleton: LlamaForCausalLM) -> Updates:
    """The adapters as PEFT attaches them to a base without weights, in order; of full copies the last one counts.

    skeleton: the base's modules on the meta device.
    """
    updates = Updates()
    for folder in folders:
        low_rank, full = _read_adapter(folder, skeleton)
        for name, update in low_rank.items():
            updates.low_rank.setdefault(name, []).append(update)
        updates.full.update(full)
    return updates


def _read_adapter(folder: Path, skeleton: LlamaForCausalLM) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, load_peft_weights

    config = LoraConfig.from_pretrained(str(folder))
    model: Any = PeftModel(copy.deepcopy(skeleton), config, low_cpu_mem_usage=True)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:  # PEFT moves an adapter to where its layer is: to the CPU, on which this holds nothing
        base_layer: Any = layer.get_base_layer()
        base_layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), low_cpu_mem_usage=True)
    low_rank: dict[str, LowRank] = {}
    full: dict[str, Tensor] = {}
    modules: list[tuple[str, Any]] = list(model.base_model.model.named_modules())
    for path, module in modules:
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            lora: Any = module
            a, b = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
            low_rank[f"{path}.weight"] = LowRank(a.float(), b.float(), float(lora.scaling["default"]))
        elif isinstance(module, ModulesToSaveWrapper):
            trained: Any = module.modules_to_save["default"]
            saved = trained.named_parameters()
            full |= {f"{path}.{name}": parameter.detach() for name, parameter in saved}
    return low_rank, full


def difference(merged_by: Updates, peft_reads: Updates) -> str | None:
    """The first adapter tensor, or scale, in which what the merge folded is not what PEFT reads; None if all agree."""
    for what, ours, theirs in (
        ("low-rank update", merged_by.low_rank, peft_reads.low_rank),
        ("trained copy", merged_by.full, peft_reads.full),
    ):
        if odd := sorted(ours.keys() ^ theirs.keys()):
            by = "the merge" if odd[0] in ours else "PEFT"
            return f"{odd[0]}: only {by} finds a {what} of it"
    for name, updates in merged_by.low_rank.items():
        if found := _differing(updates, peft_reads.low_rank[name]):
            return f"{name}: {found}"
    for name, saved in merged_by.full.items():
        if not torch.equal(saved, peft_reads.full[name].to(saved.dtype)):
            return f"{name}: its trained copy is another one than PEFT reads"
    return None


def _differing(ours: Sequence[LowRank], theirs: Sequence[LowRank]) -> str | None:
    if len(ours) != len(theirs):
        return f"{len(ours)} updates were folded, PEFT reads {len(theirs)}"
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if mine.scale != other.scale:
            return f"adapter {number} was folded with scale {mine.scale:g}, PEFT reads {other.scale:g}"
        if not (torch.equal(mine.a, other.a) and torch.equal(mine.b, other.b)):
            return f"adapter {number} was folded with other tensors than PEFT reads"
    return None


def tie_flag(folder: Path) -> bool:
    """What config.json says; transformers ignores it where both ends are stored and differ, other programs do not."""
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False))
