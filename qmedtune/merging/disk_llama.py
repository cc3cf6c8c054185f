"""A LLaMA that stays on disk: its parameters as names, shapes and mapped tensors.

An 8B model takes 16 GB in memory; here every large weight is mapped when it is needed, so that folding and proving need
a few hundred MB. Which files, names and tied ends count is what transformers makes of them (reference.py proves it).
Deliberately not here: running it (streamed.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qmedtune.errors import RecipeError
from qmedtune.merging.nf4_roundtrip import nf4_roundtrip
from qmedtune.merging.parallel import Apply
from qmedtune.merging.tensors import Weights, map_stored
from qmedtune.model import DTYPES, llama_config
from qmedtune.model_stack import EMBEDDING, HEAD, read_model
from qmedtune.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class DiskLlama:
    """A LLaMA folder whose tensors are read from disk block by block.

    A model folder. `model` is its skeleton on the meta device (no memory), `shapes` has every parameter (the output
    layer also where it is tied), `linears` are the module names of the linear layers. tied: whether both ends are one
    tensor, which config.json alone does not say."""

    folder: Path
    model: LlamaForCausalLM
    weights: Weights
    shapes: Mapping[str, tuple[int, ...]]
    linears: list[str]
    tied: bool

    def stored_as(self, name: str) -> str:
        """The name of the tensor in the files: tied ends are stored once, under either name."""
        other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
        return other if other and self.tied and name not in self.weights.files else name

    def source(self, name: str) -> Tensor:
        """The stored tensor; a tied output layer's is the embedding's."""
        return self.weights[self.stored_as(name)]

    def nf4(self, name: str, section: ModelSection, apply: Apply = map) -> Tensor:
        """As `source`, but with the values that training in NF4 works with, in its compute dtype."""
        dtype = DTYPES[section.compute_dtype]
        if name == HEAD or name.removesuffix(".weight") not in self.linears:  # bitsandbytes leaves the head alone
            return self.source(name).to(dtype)
        return nf4_roundtrip(self.source(name), dtype, double_quantization=section.double_quantization, apply=apply)


def open_llama(folder: Path) -> DiskLlama:
    """Open a LLaMA folder without loading it. Raises RecipeError for other architectures, quantised weights, missing
    or misshapen tensors, damaged files."""
    from transformers import LlamaForCausalLM

    read = read_model(folder)
    if read.quantised:
        raise RecipeError(f"{folder}: these weights are quantised\nmerging needs the 16-bit (or fp32) weights")
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(folder))
    weights = map_stored(folder, read.stored)
    tied = _are_tied(weights, model.config.tie_word_embeddings)
    return DiskLlama(folder, model, weights, read.shapes, read.linears, tied)


def _are_tied(weights: Weights, asked: bool) -> bool:
    """As transformers decides: a head of its own in the files counts, whatever config.json says, if it differs (older
    merges of Llama-3.2-1B have one beside `tie_word_embeddings: true`)."""
    if not asked or HEAD not in weights.files or EMBEDDING not in weights.files:
        return asked
    return torch.equal(weights[HEAD], weights[EMBEDDING])
