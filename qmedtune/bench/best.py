"""`qmedtune bench train --best`: each contender at the setting that it is fastest with, found by trying.

Short runs over micro-batches of 1, 2, 4 ... rows, each with every layer recomputed and with every layer kept; within a
memory budget qmedtune treats its layers as its plan says, and only micro-batches are tried. The rows of an optimiser
step, and so what is learnt from it, stay. Deliberately not here: attention, compilation and kernels, which are
contenders of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qmedtune.bench.job import Job

STEPS, WARMUP_STEPS = 5, 2  # of a try


def best_job(
    job: Job, measure: Callable[[Job], dict[str, Any]], *, plans: bool = False
) -> tuple[Job | None, list[dict[str, Any]]]:
    """(`job` at its fastest setting, what was tried). None where time ran out first; `job` itself where every setting
    failed. `measure` gives `tokens_per_s` (and `micro_batch`, where memory ran out and it was made smaller), or
    `absent` and perhaps `later`, of a job. `plans`: the contender decides itself what is recomputed."""
    tried: list[dict[str, Any]] = []
    for checkpointing in (job.checkpointing,) if plans else (True, False):
        for micro_batch in _sizes(job.rows):
            setting = {"micro_batch": micro_batch, "checkpointing": checkpointing}
            found = measure(replace(job, **setting, steps=STEPS, warmup_steps=WARMUP_STEPS))
            if "later" in found:
                return None, tried
            tried.append({**setting, **_outcome(found, micro_batch)})
            if "out of memory" in (tried[-1]["failed"] or "").lower():  # more rows need more
                break
    good = [each for each in tried if each["tokens_per_s"]]
    if not good:
        return job, tried
    fastest = max(good, key=lambda each: each["tokens_per_s"])
    return replace(job, micro_batch=fastest["micro_batch"], checkpointing=fastest["checkpointing"]), tried


def _outcome(found: dict[str, Any], micro_batch: int) -> dict[str, Any]:
    if (smaller := found.get("micro_batch", micro_batch)) != micro_batch:
        return {"tokens_per_s": None, "failed": f"out of memory: it went on with {smaller} rows at a time"}
    return {"tokens_per_s": found.get("tokens_per_s"), "failed": found.get("absent")}


def _sizes(rows: int) -> list[int]:
    """1, 2, 4 ... and all rows of a step; only what divides them, for peers accumulate whole micro-batches."""
    powers = [2**power for power in range(rows.bit_length())]
    return [size for size in powers if rows % size == 0 and size < rows] + [rows]
