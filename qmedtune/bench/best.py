"""`qmedtune bench train --best`: each contender at the setting that it is fastest with, found by trying.

Short runs over micro-batches of 1, 2, 4 ... rows, each with every layer kept and with every layer recomputed. The rows
of an optimiser step, and so what is learnt from it, stay. Deliberately not here: attention, compilation and kernels,
which are contenders of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qmedtune.bench.job import Job

STEPS, WARMUP_STEPS = 5, 2  # of a try


def best_job(job: Job, measure: Callable[[Job], dict[str, Any]]) -> tuple[Job | None, list[dict[str, Any]]]:
    """(`job` at its fastest setting, what was tried). None where time ran out first; `job` itself where every setting
    failed. `measure` gives `tokens_per_s`, or `absent` and perhaps `later`, of a job."""
    tried: list[dict[str, Any]] = []
    for checkpointing in (True, False):
        for micro_batch in _sizes(job.rows):
            setting = {"micro_batch": micro_batch, "checkpointing": checkpointing}
            found = measure(replace(job, **setting, steps=STEPS, warmup_steps=WARMUP_STEPS))
            if "later" in found:
                return None, tried
            tried.append({**setting, "tokens_per_s": found.get("tokens_per_s"), "failed": found.get("absent")})
            if "absent" in found:  # out of memory: more rows need more
                break
    good = [each for each in tried if each["tokens_per_s"]]
    if not good:
        return job, tried
    fastest = max(good, key=lambda each: each["tokens_per_s"])
    return replace(job, micro_batch=fastest["micro_batch"], checkpointing=fastest["checkpointing"]), tried


def _sizes(rows: int) -> list[int]:
    """1, 2, 4 ... up to all rows of a step."""
    sizes = [2**power for power in range(rows.bit_length())]
    return [size for size in sizes if size < rows] + [rows]
