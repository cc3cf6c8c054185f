"""Causal attention on a CPU in blocks of queries, over rows of packed documents.

torch's fused kernel works on every (query, key) pair of a masked row and takes 87 ms of CPU time a layer for 4 rows of
512 tokens (9 heads of 64, 3 of keys, bf16, forward and backward, one thread of an EPYC with AVX512-BF16); the products
and passes below take 64. Per block of BLOCK queries only the keys from its first document's start on are read.
Scores and softmax are in fp32, as in torch's kernel; only what enters a second product is rounded to the input's dtype.
Deliberately not here: dropout, caches, sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # queries; 128 takes 76 ms where 64 takes 64: the scores of a block stay in the cache


@dataclass(frozen=True)
class Block:
    """Queries [start, end) of each row, which see keys from `first` on; those from `partly` on not all of them do:
    hidden bool [rows or 1, 1, queries, end - partly]."""

    start: int
    end: int
    first: int
    partly: int
    hidden: Tensor


def document_starts(position_ids: Tensor) -> Tensor:
    """Bool [B, L]: where a document of rows [B, L] starts: with each row, and where positions do not go on by one."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def blocks_of(position_ids: Tensor) -> tuple[Block, ...]:
    """The blocks of rows [B, L]. Made once a batch."""
    length = position_ids.shape[1]
    index = torch.arange(length)
    starts = torch.where(document_starts(position_ids), index, 0).cummax(dim=1)[0]
    found = []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        first = int(starts[:, start].min())
        keys, queries = index[first:end], index[start:end, None]
        hidden = (keys > queries) | (keys < starts[:, start:end, None])
        if bool((hidden == hidden[:1]).all()):
            hidden = hidden[:1]
        partly = int(hidden.flatten(0, 1).any(dim=0).int().argmax())  # one query and one key: nothing, column 0
        found.append(Block(start, end, first, first + partly, hidden[:, None, :, partly:].clone()))
    return tuple(found)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], *, scale: float) -> Tensor:
    """query [B, H, L, D], key and value [B, Hkv, L, D] of one float dtype -> [B, H, L, D]; differentiable."""
    return _Attention.apply(query, key, value, blocks, scale)


class _Attention(torch.autograd.Function):
    """Keeps its inputs alone; a block's chances (softmax of its scores) are made again in the backward pass."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        heads = _Grouped(query, key, value, scale)
        output = torch.empty_like(heads.query)
        for block in blocks:
            here, keys = slice(block.start, block.end), slice(block.first, block.end)
            product = torch.bmm(heads.chances(block).to(query.dtype), heads.value[:, keys])
            output[:, :, here] = product.view_as(output[:, :, here])
        return output.view(query.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value = ctx.saved_tensors
        heads = _Grouped(query, key, value, ctx.scale)
        doutput = gradient.reshape(heads.query.shape)
        dquery, value32 = torch.empty_like(heads.query), heads.value.float()
        dkey, dvalue = (torch.zeros_like(heads.key, dtype=torch.float32) for _ in range(2))
        for block in ctx.blocks:
            here, keys = slice(block.start, block.end), slice(block.first, block.end)
            chances, dblock = heads.chances(block), doutput[:, :, here].flatten(1, 2)
            dvalue[:, keys] += torch.bmm(chances.to(query.dtype).transpose(1, 2), dblock)
            dchances = torch.bmm(dblock.float() * ctx.scale, value32[:, keys].transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data(dchances, chances, -1, torch.float32).to(query.dtype)
            dquery[:, :, here] = torch.bmm(dscores, heads.key[:, keys]).view_as(dquery[:, :, here])
            dkey[:, keys] += torch.bmm(dscores.transpose(1, 2), heads.query[:, :, here].flatten(1, 2))
        dkey, dvalue = dkey.to(key.dtype).view(key.shape), dvalue.to(value.dtype).view(value.shape)
        return dquery.view(query.shape), dkey, dvalue, None, None


class _Grouped:
    """The heads that share keys beside each other: query [B Hkv, heads, L, D], key and value [B Hkv, L, D]; queries
    (scaled) and keys in fp32 too, for their product."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float):
        self.rows, kv_heads, length, width = key.shape
        self.query = query.reshape(self.rows * kv_heads, query.shape[1] // kv_heads, length, width)
        self.key, self.value = (x.reshape(self.rows * kv_heads, length, width) for x in (key, value))
        self.query32, self.key32 = self.query.float() * scale, self.key.float()

    def chances(self, block: Block) -> Tensor:
        """fp32 [B Hkv, heads * queries, keys]."""
        picked = self.query32[:, :, block.start : block.end].flatten(1, 2)
        scores = torch.bmm(picked, self.key32[:, block.first : block.end].transpose(1, 2))
        by_row = scores.view(self.rows, -1, block.end - block.start, block.end - block.first)
        by_row[..., block.partly - block.first :].masked_fill_(block.hidden, float("-inf"))
        return scores.softmax(-1)
