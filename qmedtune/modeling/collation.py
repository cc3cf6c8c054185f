"""Packed rows as padded tensors: one collator for training, validation, classification and perplexity.

Deliberately absent: which rows share a batch (the trainer's order, scoring's batches of similar length).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """Packed rows. Row i: int64 arrays `input_ids`, `labels` (unshifted), `position_ids` of the row's true length, and
    fp32 `weights` where prompts carry a part of the loss."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> dict[str, np.ndarray]: ...


def collate(rows: list[dict[str, np.ndarray]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows to the longest: int64 [rows, length] each. Padding is a document of its own (positions restart at 0)
    without labels: no token attends to it, nothing is learnt from it. `lengths` int64 [rows] are the true ones;
    `weights` fp32 [rows, length] are there where prompt tokens carry a part of the loss (`loss_on: 0.3`)."""
    lengths = [len(row["input_ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    batch = {"input_ids": np.full(shape, pad_id), "labels": np.full(shape, -100), "position_ids": np.zeros(shape, int)}
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for name, values in batch.items():
            values[i, :length] = row[name]
        batch["position_ids"][i, length:] = np.arange(shape[1] - length)
    if any("weights" in row for row in rows):
        batch["weights"] = np.zeros(shape, np.float32)
        for i, row in enumerate(rows):
            batch["weights"][i, : lengths[i]] = row.get("weights", row["labels"] != -100)
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    tensors["lengths"] = torch.tensor(lengths)
    return tensors


def supervised_weight(batch: dict[str, Tensor]) -> float:
    """What a batch's summed loss is divided by: its supervised tokens, or the sum of their weights."""
    if "weights" in batch:
        return float(batch["weights"][:, 1:].sum())
    return float((batch["labels"][:, 1:] != -100).sum())
