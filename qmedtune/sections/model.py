"""`model:` and `adapter:`: what is trained from, how it is held and computed, and the adapter on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qmedtune.allowed import FloatDtype, Quantization
from qmedtune.fields import Auto, Positive, Section

Attention = Literal["auto", "varlen", "sdpa", "flex_attention", "flash_attention_2", "eager"]


class ShapeSection(Section):
    """A model's own widths for `pretrain`, in place of those of the base, which then gives tokenizer and constants."""

    hidden: Positive
    """Width of the model, in numbers per token: a multiple of `heads`."""
    layers: Positive
    """Number of transformer blocks."""
    heads: Positive
    """Number of attention heads: a divisor of `hidden`."""
    kv_heads: Positive | None = None
    """Number of key and value heads, each shared by `heads / kv_heads` heads; without it as many as `heads`."""
    intermediate: Positive
    """Width of the feed-forward blocks, usually 2.7 to 4 times `hidden`."""
    max_positions: Positive | None = None
    """Longest row in tokens; without it that of the base. Lower it for small models on short text."""

    @model_validator(mode="after")
    def _divides(self) -> ShapeSection:
        if self.hidden % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError("`hidden` must be a multiple of `heads`, and `heads` one of `kv_heads`")
        return self


class ModelSection(Section):
    """The base, and how it is held and computed while it is trained."""

    base: str
    """The LLaMA to start from: `builtin:tiny`, `builtin:smollm2`, a local folder or GGUF file, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; without it the newest. Give a commit to make a run repeatable."""
    shape: ShapeSection | None = None
    """Widths of a model that `pretrain` makes from nothing; without it those of the base."""
    quantization: Quantization = "nf4"
    """How frozen weights are held: in 4 bits (QLoRA) or in 16. Take `none` where memory allows, it is faster."""
    double_quantization: bool = True
    """Quantise the scales of NF4 too: 0.37 bits a weight less. Turn it off only to compare with models made
    without."""
    compute_dtype: Literal["auto", FloatDtype] = "auto"
    """Number format of products and activations; `auto`: bfloat16 where the device has it, else float16 on a GPU,
    float32 on a CPU. Leave it, except to compare."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Who computes norms, rotary embeddings, activations, NF4 and the loss; `auto`: Triton on a GPU, torch elsewhere.
    Take `reference` to look for the cause of a doubtful result."""
    attention: Attention = "auto"
    """What computes attention; `auto`: the fastest of this device that keeps packed documents apart. Leave it, except
    to compare."""


class AdapterSection(Section):
    """The LoRA adapter: what is trained instead of the model's own weights."""

    r: Positive = 16
    """Rank: width of the adapter's two matrices. Raise it (32, 64) for much text that is new to the base."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: it is multiplied by `alpha / r`. Keep it at twice `r`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that each training step leaves out. Try 0.05 where few records are repeated often;
    it costs memory and speed."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which layers get an adapter: all linear ones of each block, or a list such as `[q_proj, v_proj]`. A shorter list
    saves memory and learns less."""
    rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead (rank-stabilised LoRA). Turn it on for ranks above 64, with a smaller
    `alpha`."""
    train_embeddings: bool | Auto = "auto"
    """Train full copies of the embedding and the output layer too; `auto`: only for the built-in bases. Needs 16 bytes
    for each of their weights."""
