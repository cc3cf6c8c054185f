"""A LLaMA's tensors as GGUF names them, and the order in which it stores the rows of q_proj and k_proj.

transformers turns the two halves of a head against each other, llama.cpp neighbouring rows: the rows of each head are
interleaved on the way. Left as they are, a model still writes plausible text, and every third token is another one.
Both orders are facts of the two formats. Deliberately not here: values and types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qmedtune.errors import RunError
from qmedtune.model_stack import EMBEDDING, HEAD

if TYPE_CHECKING:
    from transformers import LlamaConfig

ENDS = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
IN_A_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """`blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`."""
    if name in ENDS:
        return ENDS[name]
    found = IN_A_LAYER.fullmatch(name)
    if found is None or found[2] not in PARTS:
        raise RunError(f"{name}: GGUF has no name for this tensor of a LLaMA\nexport it with --as transformers")
    return f"blk.{found[1]}.{PARTS[found[2]]}.{found[3]}"


@dataclass(frozen=True)
class Heads:
    """How many heads ask, how many answer, and how many numbers each has."""

    count: int
    kv: int
    size: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Heads:
        count = config.num_attention_heads
        return cls(count, config.num_key_value_heads or count, config.head_dim or config.hidden_size // count)


def row_order(name: str, rows: int, heads: Heads) -> Tensor | None:
    """int64 [rows]: which row of transformers' tensor each row of the file is; None where the order is the same."""
    count = {"q_proj": heads.count, "k_proj": heads.kv}.get(name.split(".")[-2])
    if count is None:
        return None
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)
