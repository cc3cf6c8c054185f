"""Causal attention over packed documents by their lengths, for rows laid end to end: no mask, no padding, no leak.

A mask that isolates documents takes length^2 bytes a row (6 GB at 78k tokens) and computes what it hides; kernels for
variable lengths take the bounds of the documents alone. The FlashAttention package where it is installed, else torch's
own kernel; on a CPU blocks of queries (cpu_attention.py). One product per document is what they are tested against.
Registered with transformers under a new name; nothing of it is replaced. Deliberately not here: caches, generation.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from qmedtune.errors import RecipeError
from qmedtune.modeling import cpu_attention
from qmedtune.planning.numerics import TAKE_BOUNDS
from qmedtune.planning.numerics import VARLEN as NAME


def packed_inputs(attention: str, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Arguments for a LLaMA's forward over packed rows [B, L]; with variable lengths one row [1, B L] and its bounds,
    on a CPU the rows and their blocks, found once for all layers."""
    rows = {"input_ids": input_ids, "position_ids": position_ids}
    if attention not in TAKE_BOUNDS:
        return rows
    if input_ids.device.type == "cpu":
        return rows | {"document_blocks": cpu_attention.blocks_of(position_ids)}
    bounds, longest = document_bounds(position_ids)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": input_ids.reshape(1, -1), "position_ids": position_ids.reshape(1, -1), **lengths}


def document_bounds(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where the documents of rows [B, L] laid end to end begin and the last one ends, int32 [documents + 1], and the
    longest's length."""
    starts = cpu_attention.document_starts(position_ids)
    bounds = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=position_ids.numel()).int()
    return bounds, int(bounds.diff().max()) if len(bounds) > 1 else 0


def varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    position_ids: Tensor | None = None,
    document_blocks: tuple[cpu_attention.Block, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, L, D], key and value [B, Hkv, L, D] -> [B, L, H, D].

    Without bounds they are found from `position_ids` (of each row, if these are one row's), in every layer.
    """
    batch, _, length, _ = query.shape
    refused = {"a mask": attention_mask is not None, "dropout": dropout > 0, "a cache": key.shape[2] != length}
    if given := [what for what, is_given in refused.items() if is_given]:
        raise RecipeError(
            f"attention: {NAME} isolates documents by their lengths alone; it was given {given[0]}\n"
            "take attention: sdpa for this"
        )
    # Under autocast the rotation has left queries and keys in fp32, which the kernels do not take.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind := query.device.type) else value.dtype
    query, key, value = (part.to(dtype) for part in (query, key, value))
    if cu_seq_lens_q is None:
        positions = torch.arange(length, device=query.device)[None] if position_ids is None else position_ids
        if not query.is_cuda:
            blocks = document_blocks or cpu_attention.blocks_of(positions.expand(batch, -1))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return cpu_attention.attend(query, key, value, blocks, scale=scale).transpose(1, 2), None
        cu_seq_lens_q, max_length_q = document_bounds(positions.expand(batch, -1))
    packed = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    attend = _per_document if not query.is_cuda else _flash if _has_flash() else _torch
    query, key, value = packed
    output = attend(query, key, value, Documents(cu_seq_lens_q, max_length_q, scaling))
    return output.unflatten(0, (batch, length)), None


@functools.cache
def _has_flash() -> bool:
    """Asked once: a look-up on the disk takes as long as 24 small operations, and each layer would make it."""
    return find_spec("flash_attn") is not None


@functools.cache
def _takes_groups() -> bool:
    """Whether torch's kernel takes fewer heads of keys than of queries: from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Documents:
    """Rows laid end to end as documents: where they begin and the last ends, int32 [documents + 1]; the longest's
    length; scale: of the scores, None: 1 / sqrt(D)."""

    bounds: Tensor
    longest: int
    scale: float | None


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    bounds, longest, scale = documents.bounds, documents.longest, documents.scale
    return flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)


def _torch(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest, scale = documents.bounds, documents.longest, documents.scale
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and _takes_groups():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    output = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **options
    )
    assert isinstance(output, Tensor)
    return output


def _per_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    parts = []
    lengths = documents.bounds.diff().tolist()
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=documents.scale, enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(NAME, varlen)
