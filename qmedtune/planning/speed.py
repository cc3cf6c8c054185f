"""How fast training may go: from this run's own metrics, or assumed from what kind of machine it is.

Assumptions, marked as such wherever they are shown; `qmedtune bench train` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qmedtune.llama_shape import BYTES_OF, BaseFacts
from qmedtune.planning.fit import DECODE_TOKENS
from qmedtune.planning.layers import slowdown
from qmedtune.planning.machine import GIB, Machine
from qmedtune.planning.memory import Setup
from qmedtune.planning.numerics import numerics
from qmedtune.recipe import ModelSection
from qmedtune.results import Logged

# Matrix throughput that cards reach with dense bf16 (T4: fp16), TFLOP/s: the achievable figures of the kernel notes.
CARD_TFLOPS = {
    "H200": 790,
    "H100": 700,
    "A100": 260,
    "4090": 160,
    "3090": 68,
    "A10": 70,
    "L40": 180,
    "L4": 60,
    "T4": 25,
}
# A card that is not listed, or only planned for: by its GiB, the slowest of that size (L4, 3090, A100, H100).
TFLOPS_BY_GIB = ((20, 60), (40, 68), (90, 260), (1000, 700))
FP16_TFLOPS = 25  # cards before bf16
# Share of it that a whole training step reaches: norms, attention, LoRA and launches take the rest. Assumed.
STEP_EFFICIENCY = 0.6
# One core: the built-in base trained at 8,700 tokens/s on 2 cores with AMX bf16, which is 48 GFLOP/s per core; fp32
# half of it (assumed).
CORE_GFLOPS = {"bfloat16": 48, "float32": 24, "float16": 8}
DISK_BYTES_PER_S = 0.5e9  # reading the base and writing the merged model
# ---- scoring: the model reads, nothing is trained ----
# On a CPU a pass alone is nearer to the machine's speed than a training step: SmolLM2 in bf16 read PubMedQA at 1.7
# times the FLOP/s that it trained with (2 cores with AMX, 2026-11-29).
READING_GAIN = {"cpu": 1.7, "cuda": 1.0}
# Python's own time a layer and pass, which is most of it where a single token is written: assumed for a GPU.
LAYER_SECONDS = {"cpu": 0.4e-3, "cuda": 0.8e-3}
# What a micro run took beside its work (13 s in all, 2026-11-29): importing torch and transformers once; building a
# model and its tokenizer; a stage's first validation and its last checkpoint.
START_SECONDS, MODEL_SECONDS, STAGE_SECONDS = 2.0, 0.5, 0.5
# Weights that are read for every token written, bytes/s; of a card, 60 % of what its memory is said to do.
CORE_BYTES_PER_S = 10e9
CARD_BYTES_PER_S = {
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100": 1.55e12,
    "4090": 1.0e12,
    "3090": 0.94e12,
    "A10": 0.6e12,
    "L40": 0.86e12,
    "L4": 0.3e12,
    "T4": 0.32e12,
}
BYTES_PER_S_BY_GIB = ((20, 0.3e12), (40, 0.94e12), (90, 1.55e12), (1000, 3.35e12))
NF4_BITS = 4.13  # of a weight with its share of the scales, which are quantised too


def flops_per_token(facts: BaseFacts, setup: Setup) -> float:
    """2 per weight and forward pass; LoRA differentiates inputs only (4 in all, 6 with recomputation), training from
    scratch weights too (6, 8). Attention over rows of `seq_len`: 2 h per earlier token, forward and twice backward."""
    weights = facts.linear_parameters + facts.vocab * facts.hidden
    per_weight = (6 if setup.full else 4) + 4 * (slowdown(facts, setup) - 1)
    attention = 6 * facts.layers * facts.hidden * setup.seq_len
    return per_weight * weights + attention


def machine_flops(machine: Machine, setup: Setup) -> float:
    """Assumed FLOP/s of a training step."""
    if not machine.is_gpu:
        return CORE_GFLOPS[setup.compute_dtype] * 1e9 * machine.cores
    return STEP_EFFICIENCY * 1e12 * _card_tflops(machine)


def _card_tflops(machine: Machine) -> float:
    if not machine.bf16 and not _listed(machine, CARD_TFLOPS):
        return FP16_TFLOPS
    return _of_card(machine, CARD_TFLOPS, TFLOPS_BY_GIB)


def _listed(machine: Machine, figures: Mapping[str, float]) -> str | None:
    """The name in `figures` that the card carries."""
    for name in figures:
        if name in machine.name:
            return name
    return None


def _of_card(machine: Machine, figures: Mapping[str, float], by_gib: Sequence[tuple[int, float]]) -> float:
    """The figure of a listed card, else that of the slowest of its size."""
    if name := _listed(machine, figures):
        return figures[name]
    for gib, figure in by_gib[:-1]:
        if machine.memory_bytes <= gib * GIB:
            return figure
    return by_gib[-1][1]


def tokens_per_s(facts: BaseFacts, setup: Setup, machine: Machine) -> float:
    """Assumed speed; decoding NF4 once per pass and micro-batch is counted in tokens (fit.py)."""
    decoding = 1 + DECODE_TOKENS[machine.kind] / setup.tokens
    return machine_flops(machine, setup) / (flops_per_token(facts, setup) * decoding)


def pretraining_seconds(facts: BaseFacts, machine: Machine) -> float:
    """Making a built-in base."""
    from qmedtune.tiny import DEFAULTS

    constants = DEFAULTS[facts.name].pretraining
    section = ModelSection(base=facts.name, compute_dtype="bfloat16" if machine.bf16 else "float32")
    decided = numerics(section, full=True, seq_len=constants.seq_len, machine=machine)
    setup = Setup(constants.seq_len, constants.batch_rows, False, "adamw", decided.dtype, full=True)
    return constants.tokens / tokens_per_s(facts, setup, machine)


@dataclass(frozen=True)
class Pace:
    """How fast one model reads and writes. flops: FLOP/s; weights, layers: of the model; bytes_per_s: of its weights,
    `weight_bytes` of which are read for every token that a batch writes."""

    flops: float
    weights: float
    weight_bytes: float
    bytes_per_s: float
    layers: int
    layer_seconds: float

    def read(self, tokens: float, passes: float) -> float:
        """Seconds for so many tokens of prompts or text in so many passes: 2 FLOPs a weight and token."""
        return 2 * self.weights * tokens / self.flops + passes * self.layers * self.layer_seconds

    def step(self, rows: float) -> float:
        """Seconds until a batch of `rows` answers is one token longer."""
        moved = self.weight_bytes / self.bytes_per_s
        return max(moved, 2 * self.weights * rows / self.flops) + self.layers * self.layer_seconds


def scoring_pace(facts: BaseFacts, machine: Machine, computed_in: str, weights: str) -> Pace:
    """Of a base or a merged model held in `weights` (a dtype, or nf4) that multiplies in `computed_in`."""
    if machine.is_gpu:
        flops = STEP_EFFICIENCY * 1e12 * _card_tflops(machine)
        bytes_per_s = STEP_EFFICIENCY * _of_card(machine, CARD_BYTES_PER_S, BYTES_PER_S_BY_GIB)
    else:
        flops = CORE_GFLOPS[computed_in] * 1e9 * machine.cores
        bytes_per_s = CORE_BYTES_PER_S * machine.cores
    head = facts.vocab * facts.hidden
    held = BYTES_OF[computed_in] * (facts.linear_parameters + head)
    if weights == "nf4" and machine.is_gpu:  # on a CPU they are decoded once
        held = NF4_BITS / 8 * facts.linear_parameters + BYTES_OF[computed_in] * head
    return Pace(
        flops=flops * READING_GAIN[machine.kind],
        weights=facts.linear_parameters + head,
        weight_bytes=held,
        bytes_per_s=bytes_per_s,
        layers=facts.layers,
        layer_seconds=LAYER_SECONDS[machine.kind],
    )


def load_seconds(facts: BaseFacts) -> float:
    """Until a base, or a merged model of its shape, is ready."""
    return MODEL_SECONDS + facts.file_bytes / DISK_BYTES_PER_S


def merge_seconds(facts: BaseFacts) -> float:
    """Reading the base, writing as much again, and loading both for the proof."""
    return round(2 * facts.file_bytes / DISK_BYTES_PER_S + 2 * MODEL_SECONDS, 1)


def last_tokens_per_s(run_dir: Path | None, stage: str) -> float | None:
    """The median of the last 50 logged steps of a stage in this run folder; None when there are none."""
    if run_dir is None:
        return None
    path = run_dir / stage / "metrics.jsonl"
    if not path.is_file():
        path = run_dir / ".building" / stage / "metrics.jsonl"
    if not path.is_file():
        return None
    speeds: list[float] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]:
        with suppress(ValidationError):  # cut by a kill, or damaged
            if speed := Logged.model_validate_json(line).tokens_per_s:
                speeds.append(speed)
    speeds = speeds[-50:]
    if not speeds:
        return None
    return sorted(speeds)[len(speeds) // 2]
