"""What the contenders of `qmedtune bench train` are given: a shape, rows, steps and the settings they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qmedtune.bench.random_bases import SHAPES
from qmedtune.errors import RecipeError


@dataclass(frozen=True)
class Job:
    """One comparison: `rows` rows of `seq_len` tokens make an optimiser step, documents of `document` tokens
    on average."""

    shape: str = "tiny"
    seq_len: int = 64
    rows: int = 32
    micro_batch: int = 32
    document: int = 16
    steps: int = 30
    warmup_steps: int = 5  # not counted
    r: int = 32
    alpha: float = 64.0
    train_embeddings: bool = True
    checkpointing: bool = False  # every layer recomputed, by contenders that do not say otherwise
    lr: float = 1e-3
    seed: int = 0
    memory_gib: float | None = None  # of the card, enforced; None: all of it


def job_of(shape: str, chosen: dict[str, Any]) -> Job:
    """The job of a shape: the tiny one's as it stands, the built-in base's four rows of 512 tokens, others rows of 4096
    one at a time, 40 steps of which 20 warm up, layers recomputed; LoRA alone but for the tiny one. `chosen` overrides.
    Raises RecipeError for an unknown shape."""
    if shape not in SHAPES:
        raise RecipeError(f"bench train: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    if shape == "tiny":
        return replace(Job(), **chosen)
    if shape == "builtin:smollm2":
        small = Job(shape, 512, 4, 4, 512, 8, 3, 16, 32.0, train_embeddings=False, lr=2e-4)
        return replace(small, **chosen)
    large = Job(shape, 4096, 4, 1, 1024, 40, 20, 16, 32.0, train_embeddings=False, checkpointing=True, lr=2e-4)
    return replace(large, **chosen)
