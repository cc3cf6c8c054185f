"""How fast training may go: from this run's own metrics, or assumed from what kind of machine it is.

Assumptions, marked as such wherever they are shown; `qmedtune bench train` measures.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from qmedtune.llama_shape import BaseFacts
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
    for name, tflops in CARD_TFLOPS.items():
        if name in machine.name:
            return tflops
    if not machine.bf16:
        return FP16_TFLOPS
    for gib, tflops in TFLOPS_BY_GIB[:-1]:
        if machine.memory_bytes <= gib * GIB:
            return tflops
    return TFLOPS_BY_GIB[-1][1]


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


def merge_seconds(facts: BaseFacts) -> float:
    """Reading the base and writing as much again."""
    return round(2 * facts.file_bytes / DISK_BYTES_PER_S, 1)


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
