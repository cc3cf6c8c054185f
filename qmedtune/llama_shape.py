"""The shape of a LLaMA as its config.json states it: widths, and what follows from them. No torch, no file is read.

Deliberately not here: where a base's configuration lies (planning/shapes.py), and its tensors (model_stack.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qmedtune.errors import RecipeError
from qmedtune.model_files import JsonObject

BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2}
# About how many rows the built-in bases' embeddings have, until they are made (their tokenizers are trained first).
BUILTIN_VOCAB = {"builtin:tiny": 1408, "builtin:micro": 1088}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class BaseFacts:
    """A LLaMA shape. Widths in elements, `file_bytes` as stored (in `stored_dtype`), `source` says where it is from."""

    name: str
    source: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_positions: int
    rope_theta: float
    rope_type: str
    stored_dtype: str
    folder: str | None = None
    measured_bytes: int | None = None
    largest_shard_bytes: int | None = None

    @property
    def builtin(self) -> bool:
        """Whether it is a tiny base, which is pretrained on this machine; one that is fetched is a real base."""
        return self.name in BUILTIN_VOCAB

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the seven linears of one layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Elements that NF4 quantises: all linears of all layers, never lm_head."""
        return self.layers * sum(i * o for i, o in self.linear_shapes.values())

    @property
    def embedding_parameters(self) -> int:
        """embed_tokens, and lm_head where it is a matrix of its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters

    @property
    def file_bytes(self) -> int:
        """Size of the stored weights: measured where they are local, otherwise parameters x element size."""
        return self.measured_bytes or self.parameters * BYTES_OF.get(self.stored_dtype, 2)


def facts_from_config(
    name: str,
    config: JsonObject,
    source: str,
    *,
    folder: str | None = None,
    measured_bytes: int | None = None,
    largest_shard_bytes: int | None = None,
    stored_dtype: str | None = None,
) -> BaseFacts:
    """Read a transformers config.json (4.x or 5.x spelling). RecipeError where it is no LLaMA or lacks a width."""
    if config.get("model_type") != "llama":
        raise RecipeError(
            f"model.base: {name} is a {config.get('model_type')!r} model\n"
            "allowed: LLaMA-family models (model_type llama): Llama 1 to 3.3, TinyLlama, Meditron, PMC-LLaMA ..."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        heads = config["num_attention_heads"]
        return BaseFacts(
            name=name,
            source=source,
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_type=rope.get("rope_type") or rope.get("type") or "default",
            stored_dtype=stored_dtype or config.get("dtype") or config.get("torch_dtype") or "float16",
            folder=folder,
            measured_bytes=measured_bytes,
            largest_shard_bytes=largest_shard_bytes,
        )
    except KeyError as error:
        raise RecipeError(f"model.base: config.json of {name} lacks {error}\nfetch the model again") from error
