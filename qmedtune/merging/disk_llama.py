"""A LLaMA that stays on disk: its parameters as names, shapes and mapped tensors, and as a model that reads its weights
while it runs.

An 8B model takes 16 GB in memory; here every large weight is read (mapped) when its layer runs and forgotten after it,
so that folding and proving need a few hundred MB. Deliberately fp32 only, on the CPU, and for proofs over a few hundred
tokens: every forward pass reads the whole model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmedtune.errors import RecipeError
from qmedtune.merging.lora_files import LowRank, Updates
from qmedtune.merging.nf4_roundtrip import nf4_roundtrip
from qmedtune.merging.parallel import Apply, in_fp32
from qmedtune.merging.tensors import Weights, open_weights, row_blocks
from qmedtune.model import DTYPES, check_folder
from qmedtune.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Load = Callable[[str], Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIGNS = 2


@dataclass(frozen=True)
class DiskLlama:
    """A model folder. `model` is its skeleton on the meta device (no memory), `shapes` has every parameter (the output
    layer also where it is tied), `linears` are the module names of the linear layers."""

    folder: Path
    model: LlamaForCausalLM
    weights: Weights
    shapes: dict[str, tuple[int, ...]]
    linears: list[str]

    @property
    def tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)

    def source(self, name: str) -> Tensor:
        """The stored tensor; a tied output layer's is the embedding's."""
        return self.weights[EMBEDDING if name == HEAD and self.tied else name]

    def nf4(self, name: str, section: ModelSection, apply: Apply = map) -> Tensor:
        """As `source`, but with the values that training in NF4 works with, in its compute dtype."""
        dtype = DTYPES[section.compute_dtype]
        if name == HEAD or name.removesuffix(".weight") not in self.linears:  # bitsandbytes leaves the head alone
            return self.source(name).to(dtype)
        return nf4_roundtrip(self.source(name), dtype, double_quantization=section.double_quantization, apply=apply)


def open_llama(folder: Path) -> DiskLlama:
    """Open a LLaMA folder without loading it. Raises RecipeError for other architectures, quantised weights, missing
    or misshapen tensors; RunError for damaged files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    check_folder(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != "llama":
        raise RecipeError(f"{folder}: model_type is {raw.get('model_type')!r}\nallowed: llama")
    if "quantization_config" in raw:
        raise RecipeError(f"{folder}: these weights are quantised\nmerging needs the 16-bit (or fp32) weights")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    base = DiskLlama(folder, model, open_weights(folder), shapes, linears)
    for name in base.shapes:
        _check_tensor(base, EMBEDDING if name == HEAD and base.tied else name)
    return base


def _check_tensor(base: DiskLlama, name: str) -> None:
    if name not in base.weights.files:
        raise RecipeError(f"{base.folder}: no tensor {name} in its weights\nfetch the model again")
    if base.weights.shape(name) != base.shapes[name]:
        raise RecipeError(
            f"{base.folder}: {name} has the shape {list(base.weights.shape(name))}\n"
            f"config.json asks for {list(base.shapes[name])}; fetch the model again"
        )


class StreamedLinear(nn.Module):
    """x @ W.T + bias + sum of scale * (x @ A.T) @ B.T in fp32, W being read when it is needed, in blocks of rows.

    `response` [SIGNS, out] is the same of `signs`, as of the last call, without the bias.
    """

    response: Tensor

    def __init__(self, load: Callable[[], Tensor], bias: Tensor | None, updates: Sequence[LowRank], apply: Apply):
        super().__init__()
        self.load, self.bias, self.updates, self.apply_to = load, bias, updates, apply

    def forward(self, x: Tensor) -> Tensor:
        weight = self.load()
        inputs = torch.cat([x.flatten(0, -2), signs(x.shape[-1])])
        transposed = torch.empty(len(weight), len(inputs))

        def fill(rows: slice) -> None:  # W @ x.T: for a few dozen tokens faster than x @ W.T, as MKL does it
            torch.mm(in_fp32(weight[rows]), inputs.T, out=transposed[rows])

        list(self.apply_to(fill, row_blocks(tuple(weight.shape))))
        y = transposed.T.contiguous()
        for update in self.updates:
            y += F.linear(F.linear(inputs, update.a), update.b) * update.scale
        y, self.response = y[:-SIGNS], y[-SIGNS:].clone()
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def norm(self) -> float:
        """The Frobenius norm of W."""
        weight = self.load()
        blocks = row_blocks(tuple(weight.shape))
        return math.hypot(*self.apply_to(lambda rows: float(in_fp32(weight[rows]).norm()), blocks))


@cache
def signs(width: int) -> Tensor:
    """[SIGNS, width] of +1 and -1 (seed 23). They meet every element of a weight, which tokens do not: with 64 random
    tokens the KL of a 1.1B LLaMA hardly moves (5.6e-5 to 6.3e-5) when a q_proj misses its adapter."""
    return torch.randint(0, 2, (SIGNS, width), generator=torch.Generator().manual_seed(23)).mul(2).sub(1).float()


class StreamedEmbedding(nn.Module):
    """Rows of an embedding on disk, fp32."""

    def __init__(self, load: Callable[[], Tensor]):
        super().__init__()
        self.load = load

    def forward(self, ids: Tensor) -> Tensor:
        return self.load()[ids].float()


def streamed_model(base: DiskLlama, load: Load, updates: Updates, apply: Apply = map) -> LlamaForCausalLM:
    """An fp32 LlamaForCausalLM whose linears and embedding read their weights with `load(name)` as they run.

    `updates.full` takes the place of what `load` gives; low-rank updates are applied beside the weight, unmerged.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def source(name: str) -> Callable[[], Tensor]:
        return lambda: updates.full[name] if name in updates.full else load(name)

    model = copy.deepcopy(base.model).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            bias = load(f"{name}.bias").float() if module.bias is not None else None
            weight = f"{name}.weight"
            _put(model, name, StreamedLinear(source(weight), bias, updates.low_rank.get(weight, []), apply))
        elif isinstance(module, nn.Embedding):
            _put(model, name, StreamedEmbedding(source(f"{name}.weight")))
    for name, _ in list(model.named_parameters()):  # what is left is small: the norms
        _put(model, name, nn.Parameter(source(name)().float(), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(base.model.config)
    return model


def _put(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
