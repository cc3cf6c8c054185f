"""A LLaMA that reads its weights while it runs: what a merge changed, measured on a few tokens without holding a model.

fp32 on the CPU, layer by layer, blocks of rows side by side. One pass can run two models that share their weights: the
first half of the batch meets the adapters, the second half the bare base. Deliberately not for more than a few hundred
tokens: every forward pass reads the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmedtune.merging.lora_files import Updates
from qmedtune.merging.methods import Source
from qmedtune.merging.parallel import Apply, in_fp32
from qmedtune.merging.tensors import row_blocks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Load = Callable[[str], Source]
Visit = Callable[[str, slice, Source, Tensor], None]
"""Called with name, rows, the weight and, in fp32, its rows, once they were used; it may overwrite these."""


@dataclass(frozen=True)
class Streamed:
    """Where a streamed model's weights come from. `load(name)` gives the stored tensor; `updates` are applied on top,
    full copies in its place. with_bare: the second half of the batch runs without updates. visit: see Visit."""

    load: Load
    updates: Updates = field(default_factory=Updates)
    with_bare: bool = False
    visit: Visit | None = None
    apply: Apply = map

    def weight(self, name: str) -> Source:
        return self.updates.full[name] if name in self.updates.full else self.load(name)

    def bare(self, name: str) -> Source | None:
        """The weight of the second half, where it is another one."""
        return self.load(name) if self.with_bare and name in self.updates.full else None


def halves(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Batch halves; all and nothing where it is not split."""
    size = len(x) // 2 if split else len(x)
    return x[:size], x[size:]


class StreamedLinear(nn.Module):
    """x @ W.T + bias + sum of scale * (x @ A.T) @ B.T in fp32, W being read when it is needed, in blocks of rows."""

    def __init__(self, name: str, source: Streamed, has_bias: bool):
        super().__init__()
        self.name, self.source = f"{name}.weight", source
        self.bias = f"{name}.bias" if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        source, name = self.source, self.name
        weight, bare = source.weight(name), source.bare(name)
        inputs, rest = (part.flatten(0, -2) for part in halves(x, bare is not None))
        transposed = torch.empty(len(weight), len(inputs))
        others = torch.empty(len(weight), len(rest))

        def fill(rows: slice) -> None:  # W @ x.T: for a few dozen tokens faster than x @ W.T, as MKL does it
            if bare is not None:
                torch.mm(in_fp32(bare[rows]), rest.T, out=others[rows])
            block = in_fp32(weight[rows])
            torch.mm(block, inputs.T, out=transposed[rows])
            if source.visit:
                source.visit(name, rows, weight, block)

        list(source.apply(fill, row_blocks(tuple(weight.shape))))
        y = torch.cat([transposed.T, others.T]).view(*x.shape[:-1], -1)
        adapted, _ = halves(y, source.with_bare)
        meets, _ = halves(x, source.with_bare)
        for update in source.updates.low_rank.get(name, ()):
            adapted += F.linear(F.linear(meets, update.a), update.b) * update.scale
        if self.bias is not None:
            _add_bias(y, source, self.bias)
        return y


def _add_bias(y: Tensor, source: Streamed, name: str) -> None:
    bare = source.bare(name)
    first, second = halves(y, bare is not None)
    first += source.weight(name).float()
    if bare is not None:
        second += bare.float()


class StreamedEmbedding(nn.Module):
    """Rows of an embedding on disk, fp32."""

    def __init__(self, name: str, source: Streamed):
        super().__init__()
        self.name, self.source = f"{name}.weight", source

    def forward(self, ids: Tensor) -> Tensor:
        weight, bare = self.source.weight(self.name), self.source.bare(self.name)
        first, second = halves(ids, bare is not None)
        found = weight[first].float()
        return found if bare is None else torch.cat([found, bare[second].float()])


class StreamedNorm(nn.Module):
    """LlamaRMSNorm, with a weight for each half of the batch."""

    def __init__(self, name: str, source: Streamed, eps: float):
        super().__init__()
        self.name, self.source, self.eps = f"{name}.weight", source, eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bare = self.source.weight(self.name).float(), self.source.bare(self.name)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if bare is None:
            return normed * weight
        first, second = halves(normed, True)
        return torch.cat([first * weight, second * bare.float()])


def streamed_model(skeleton: LlamaForCausalLM, source: Streamed) -> LlamaForCausalLM:
    """`skeleton` (on the meta device) as a model that reads `source` as it runs."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    model = copy.deepcopy(skeleton).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            _put(model, name, StreamedLinear(name, source, module.bias is not None))
        elif isinstance(module, nn.Embedding):
            _put(model, name, StreamedEmbedding(name, source))
        elif isinstance(module, LlamaRMSNorm):
            _put(model, name, StreamedNorm(name, source, module.variance_epsilon))
    model.model.rotary_emb = LlamaRotaryEmbedding(skeleton.config)
    return model


def _put(model: nn.Module, name: str, value: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def from_parameters(parameters: Mapping[str, Tensor]) -> Load:
    def load(name: str) -> Source:
        return parameters[name]

    return load


def logits_of(model: Any, ids: Tensor, source: Streamed) -> list[Tensor]:
    """[rows, length, vocab] with the updates, and, if the model runs `with_bare`, a second one of the bare base."""
    batch = torch.cat([ids, ids]) if source.with_bare else ids
    with torch.no_grad():
        found = model(input_ids=batch, use_cache=False).logits
    first, second = halves(found, source.with_bare)
    return [first, second] if source.with_bare else [first]


def logits_of_all(models: Sequence[Any], ids: Tensor, sources: Sequence[Streamed]) -> list[list[Tensor]]:
    """`logits_of` of several models side by side: while one waits for its last blocks or attends, another's are
    computed."""
    with ThreadPoolExecutor(len(models)) as each:
        return list(each.map(logits_of, models, repeat(ids), sources))
