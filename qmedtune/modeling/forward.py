"""Forward passes over batches of prompts: read once, continued from the key/value cache.

Prompts are left-padded. What all prompts of a group begin with (the template's opening, the examples before every
question) is read once for the whole group, and its cache is repeated for each batch: few-shot prompts are mostly that.
Deliberately absent: what is asked of the model (scoring.py, generation.py), attention that cannot take masks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from qmedtune.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_PASS_TOKENS = 1024  # 16 PubMedQA prompts of 1,100 tokens: 0.50 s alone, 0.79 s eight at a time (one core)
MIN_SHARED_TOKENS = 16  # below it, one more pass costs more than it saves
MIN_SHARED_PART = (
    0.125  # behind a shared beginning attention needs a mask: 32 of 1,100 tokens made a CPU a fifth slower
)


@dataclass(frozen=True)
class Shared:
    """What a group of prompts begins with: `tokens` tokens, read into `cache` as one row."""

    tokens: int
    cache: DynamicCache


def common_tokens(prompts: Sequence[list[int]]) -> int:
    """Length of the beginning that all prompts share; each keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)  # in dictionary order, what these two share all others share
    most = min(len(prompt) for prompt in prompts) - 1
    for place in range(most):
        if first[place] != last[place]:
            return place
    return most


@torch.no_grad()
def read_shared(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Shared | None:
    """Read the common beginning of at least two prompts; None where it is too small a part of them."""
    if len(prompts) < 2:
        return None
    count = common_tokens(prompts)
    total = sum(len(prompt) for prompt in prompts)
    if count < MIN_SHARED_TOKENS or count * len(prompts) < MIN_SHARED_PART * total:
        return None
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompts[0][:count]], device=model.device)
    hidden_states(model, ids, None, torch.arange(count, device=model.device)[None], cache=cache)
    return Shared(count, cache)


@dataclass
class Prefix:
    """A batch of prompts that the model has read. mask: [B, L] bool; last: [B, H], the hidden states that predict the
    next token (by `exact_logits` where options are compared, by `next_logits` where the model writes)."""

    cache: DynamicCache
    mask: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor


def prefill(model: PreTrainedModel, prompts: list[list[int]], shared: Shared | None = None) -> Prefix:
    """Read a batch of prompts behind what they share (all of it a beginning of each)."""
    skip = shared.tokens if shared else 0
    passes = [_read(model, part, shared) for part in _passes(model, prompts, skip)]
    if len(passes) == 1:
        return passes[0]
    return _joined(passes)


def _passes(model: PreTrainedModel, prompts: list[list[int]], skip: int) -> list[list[list[int]]]:
    """Prompts that are read together: all of them, but on a CPU long ones alone and without a mask."""
    if model.device.type != "cpu":
        return [prompts]
    parts: list[list[list[int]]] = []
    longest = 0  # tokens of the last part's longest prompt
    for prompt in prompts:
        longest = max(longest, len(prompt) - skip)
        if parts and (len(parts[-1]) + 1) * longest <= CPU_PASS_TOKENS:
            parts[-1].append(prompt)
        else:
            parts.append([prompt])
            longest = len(prompt) - skip
    return parts


def _read(model: PreTrainedModel, prompts: list[list[int]], shared: Shared | None) -> Prefix:
    """One pass over prompts, left-padded."""
    skip = shared.tokens if shared else 0
    sizes = [len(prompt) for prompt in prompts]
    width = max(sizes)
    padded = []
    for prompt in prompts:
        padded.append([0] * (width - len(prompt)) + prompt[skip:])
    ids = torch.tensor(padded, device=model.device)
    lengths = torch.tensor(sizes, device=model.device)
    own = torch.arange(width - skip, device=model.device) >= (width - lengths)[:, None]
    mask = torch.cat([own.new_ones(len(prompts), skip), own], dim=-1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, skip:]
    cache = DynamicCache(config=model.config)
    if shared:
        cache = _repeated(shared.cache, len(prompts))
    last = hidden_states(model, ids, mask, positions, cache=cache)[:, -1]
    check_numbers(last)
    return Prefix(cache, mask, lengths, last)


def _joined(passes: list[Prefix]) -> Prefix:
    """Several passes as one batch, padded on the left: what is read next (options, an answer's tokens) is read once."""
    width = max(part.mask.shape[1] for part in passes)
    cache = passes[0].cache
    for place in range(len(cache.layers)):
        keys, values = [], []
        for part in passes:
            layer: Any = part.cache.layers[place]
            missing = width - layer.keys.shape[2]
            keys.append(F.pad(layer.keys, (0, 0, missing, 0)))
            values.append(F.pad(layer.values, (0, 0, missing, 0)))
        joined: Any = cache.layers[place]
        joined.keys, joined.values = torch.cat(keys), torch.cat(values)
    masks, lengths, last = [], [], []
    for part in passes:
        masks.append(F.pad(part.mask, (width - part.mask.shape[1], 0)))
        lengths.append(part.lengths)
        last.append(part.last)
    return Prefix(cache, torch.cat(masks), torch.cat(lengths), torch.cat(last))


def check_numbers(values: torch.Tensor) -> None:
    """Refuse to score a broken model: the largest of nan is the first option, so it would always answer A. RunError."""
    if values.isnan().any():
        raise RunError(
            "the model's scores are not numbers (nan): its weights are broken, or overflow in this precision\n"
            "evaluate it in float32, or take an earlier checkpoint"
        )


def _repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """A copy of a cache of one row as `count` rows."""
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(count)
    return rows


def hidden_states(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    cache: DynamicCache | None,
) -> torch.Tensor:
    """Last hidden states [B, T, H]; the vocabulary matrix is applied only where it is needed."""
    decoder = causal_model(model).get_decoder()
    return decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def causal_model(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper (its adapters live in the layers), or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the layers work in; embeddings and adapters may be fp32 beside it."""
    return causal_model(model).get_decoder().norm.weight.dtype


HEAD_ELEMENTS = 2**26  # of the head at a time in fp32: 256 MB, 16,384 of 128,256 rows of an 8B LLaMA


def next_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the token after each hidden state as generation sees them: [..., H] -> float32 [..., V].

    Multiplied in the model's dtype. A trained head is an fp32 copy beside a 16-bit model; it multiplies in 16 bit, as
    in training.
    """
    head = causal_model(model).get_output_embeddings()
    return F.linear(hidden, head.weight.to(hidden.dtype), getattr(head, "bias", None)).float()


def exact_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The same logits with products and sums in fp32: [..., H] -> float32 [..., V].

    bfloat16 rounds logits around 20 to 1/8: of 156 two- to five-way questions 8 then had two best options, and 6
    predictions of 104 were not those of fp32 (SmolLM2-135M). The head's values stay those of the model's dtype.
    """
    head = causal_model(model).get_output_embeddings()
    bias = getattr(head, "bias", None)
    rows = max(1, HEAD_ELEMENTS // head.weight.shape[1])
    states = hidden.float()
    parts = []
    for part in head.weight.split(rows):
        parts.append(F.linear(states, part.to(hidden.dtype).float()))
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return logits if bias is None else logits + bias.float()


def max_positions(model: PreTrainedModel) -> int:
    return model.config.max_position_embeddings
