"""What a stage computes in and attends with: resolve.py asks once, planner and trainer take its answer. No torch.

Deliberately not here: whether the libraries beside torch are installed in the run's own process (modeling/attention.py
only runs what was decided), and what fits (fit.py).
"""

from __future__ import annotations

from importlib.util import find_spec

from qmedtune.errors import RecipeError
from qmedtune.planning.machine import Machine
from qmedtune.recipe import ModelSection
from qmedtune.resolved import Numerics

VARLEN = "varlen"
TAKE_BOUNDS = (VARLEN, "flash_attention_2")  # kernels that isolate documents by their lengths
VARLEN_CAPABILITY = 8.0  # Ampere: below it there are no kernels for variable lengths
# torch's fused attention on the CPU takes 21 ms a layer (forward and backward) at 32 rows of 64 tokens where plain
# matrix products take 6; at 128 tokens 22 against 10, at 256 they meet (1 thread, bf16, 4 heads of 64, 2026-11-22).
EAGER_UP_TO_TOKENS = 128


def numerics(model: ModelSection, *, full: bool, seq_len: int, machine: Machine) -> Numerics:
    """Of one stage. `model.compute_dtype` is resolved; `full`: all parameters are trained.

    Trained parameters are always fp32. An adapter stage holds its frozen weights in the compute dtype, so nothing is
    cast. A full stage on a GPU casts its fp32 weights for each product (torch's autocast; norms, residuals and the
    softmax stay fp32). On a CPU it stays in fp32: the built-in base's quality was tuned there, and autocast casts every
    weight again in each step, which costs small models more than the products gain.
    """
    autocast = full and machine.is_gpu and model.compute_dtype != "float32"
    dtype = model.compute_dtype if autocast or not full else "float32"
    return Numerics(dtype, autocast, dtype == "float16", _attention(model.attention, dtype, seq_len, machine))


def why_dtype(decided: Numerics, machine: Machine) -> str:
    """One sentence for the plan of a full stage."""
    if decided.autocast:
        return f"products in {decided.dtype} from fp32 weights (autocast); norms, residuals and AdamW in fp32"
    return "fp32 weights and products" + ("" if machine.is_gpu else ": a CPU trains all parameters in fp32")


def _attention(stated: str, dtype: str, seq_len: int, machine: Machine) -> str:
    if stated != "auto":
        check_attention(stated, machine.capability, dtype)
        return stated
    if machine.capability is None:
        return "eager" if seq_len <= EAGER_UP_TO_TOKENS else VARLEN
    return VARLEN if machine.capability >= VARLEN_CAPABILITY and dtype != "float32" else "sdpa"


def check_attention(attention: str, capability: float | None, dtype: str) -> None:
    """RecipeError where a stated attention cannot run. `capability`: of the GPU, None on a CPU."""
    if attention == "flash_attention_2" and (capability is None or not find_spec("flash_attn")):
        why = "it needs a GPU" if capability is None else "the flash-attn package is not installed"
        raise RecipeError(f"model.attention: flash_attention_2 given, {why}\nallowed here: auto, {VARLEN}, sdpa")
    if attention not in TAKE_BOUNDS or capability is None:
        return
    if capability < VARLEN_CAPABILITY or dtype == "float32":
        found = f"compute capability {capability}" if capability < VARLEN_CAPABILITY else "compute_dtype: float32"
        raise RecipeError(
            f"model.attention: {attention} given with {found}; its kernels need 8.0 (Ampere) and 16 bit\n"
            "allowed here: auto or sdpa (documents isolated by a mask)"
        )
