"""Next-token cross entropy of packed rows without full logits, for training, validation and perplexity alike.

Under a frozen head it is qmedtune_kernels' (two products); where the head is trained, chunks of positions through
torch's own cross entropy, recomputed in backward, on CUDA TRL's fused LM head (chunks of vocabulary in Triton).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from qmedtune_kernels.cross_entropy import frozen_head_nll
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qmedtune.modeling.attention import packed_inputs
from qmedtune.modeling.collation import Rows, collate, supervised_weight
from qmedtune.modeling.forward import causal_model
from qmedtune.modeling.sharding import whole

# Logits held at once on the CPU: 2**24 fp32 values are 64 MiB.
MAX_LOGITS = 2**24


def token_nll(
    model: Any, input_ids: Tensor, labels: Tensor, position_ids: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """Summed negative log-likelihood, a 0-dim fp32 tensor, differentiable.

    The first three inputs are int64 [rows, length]. `position_ids` restart at every document, which isolates documents
    from each other in attention; `labels` are -100 where nothing is to be predicted and are shifted by one here.
    `weights` fp32 [rows, length] scale the loss of each label; None is 1 for all.
    """
    nll = label_nll(model, input_ids, labels, position_ids)
    return nll.sum() if weights is None else (nll * weights[:, 1:][labels[:, 1:] != -100]).sum()


def label_nll(model: Any, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
    """Negative log-likelihood of every label, fp32 [labels that are not -100, behind the first of each row]."""
    hidden = packed_hidden(model, input_ids, position_ids)
    targets = labels[:, 1:]
    wanted = targets != -100
    picked, targets = hidden[:, :-1][wanted], targets[wanted]
    if torch.is_autocast_enabled(kind := picked.device.type):  # the last norm has left them in fp32
        picked = picked.to(torch.get_autocast_dtype(kind))
    head = causal_model(model).get_output_embeddings()
    return head_nll(picked, whole(head.weight).to(picked.dtype), targets, getattr(head, "kernels", "auto"))


@dataclass(frozen=True)
class RowsNll:
    """One batch of rows, measured. nll: fp32 [N], nats, of the N labels that are predicted; labels: int64 [N], their
    ids; scale: fp32 [N] where the labels have weights; weight: what the batch's sum is divided by."""

    rows: Sequence[int]
    nll: Tensor
    labels: Tensor
    scale: Tensor | None
    weight: float

    def total(self) -> float:
        """Summed loss in nats, as training sums it."""
        return float(self.nll.sum() if self.scale is None else (self.nll * self.scale).sum())


def rows_nll(model: Any, rows: Rows, batches: Iterable[Sequence[int]], pad_id: int = 0) -> Iterator[RowsNll]:
    """Negative log-likelihoods of packed rows, a batch of row numbers at a time, documents isolated from each other.

    Validation and perplexity both sum these. Call it with the model in eval mode.
    """
    device = next(model.parameters()).device
    for batch in batches:
        collated = collate([rows[i] for i in batch], pad_id)
        labels = collated["labels"].to(device)
        with torch.no_grad():
            nll = label_nll(model, collated["input_ids"].to(device), labels, collated["position_ids"].to(device))
        targets = labels[:, 1:]
        wanted = targets != -100
        weights = collated.get("weights")
        scale = None if weights is None else weights.to(device)[:, 1:][wanted]
        yield RowsNll(batch, nll, targets[wanted], scale, supervised_weight(collated))


def packed_hidden(model: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states [rows, length, hidden] of packed rows, documents isolated from each other."""
    causal_lm = causal_model(model)
    inputs = packed_inputs(str(causal_lm.config._attn_implementation), input_ids, position_ids)
    return causal_lm.model(**inputs, use_cache=False).last_hidden_state.view(*input_ids.shape, -1)


def head_nll(hidden: Tensor, weight: Tensor, targets: Tensor, path: str = "auto") -> Tensor:
    """fp32 [T]: of targets [T] under hidden [T, D] and the output matrix [V, D], in one dtype."""
    if not len(targets):  # rows of which nothing is supervised: none of the ways below is made for no rows
        return hidden.float().sum(-1)
    if not weight.requires_grad:
        return frozen_head_nll(hidden, weight, targets, path)
    return (_fused_nll if hidden.is_cuda else _chunked_nll)(hidden, weight, targets)


def _fused_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    chunk = 8192  # vocabulary columns per tile
    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",))
    return -outputs[0]


def _piece_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _chunked_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    rows = max(1, MAX_LOGITS // weight.shape[0])
    if len(targets) <= rows:
        return _piece_nll(hidden, weight, targets)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_piece_nll, h, weight, t, use_reentrant=False) for h, t in pieces])
