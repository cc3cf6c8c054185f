"""Trained embeddings and heads beside a model in 16 bit: fp32 copies that compute in the model's dtype.

Deliberately not here: which are trained (PEFT's `modules_to_save`, model.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MasterEmbedding(nn.Embedding):
    """A trained fp32 copy whose output is in the compute dtype."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx).to(self.compute_dtype)


class MasterHead(nn.Linear):
    """A trained fp32 copy that multiplies in its input's dtype; the gradient arrives in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def compute_in(dtype: torch.dtype, wrapper: Any) -> None:
    """Let the copies that PEFT trains give out, or multiply in, `dtype`, as the layers beside them."""
    for copy in wrapper.modules_to_save.values():
        if type(copy) is nn.Embedding:
            copy.__class__ = MasterEmbedding
            setattr(copy, "compute_dtype", dtype)  # noqa: B010
        elif type(copy) is nn.Linear:
            copy.__class__ = MasterHead
