"""`qmedtune bench train --best`: each contender at the setting that it is fastest with, found by trying.

Short runs over micro-batches of 1, 2, 4 ... rows, each with every layer recomputed and with every layer kept; within a
memory budget qmedtune treats its layers as its plan says, and only micro-batches are tried. The rows of an optimiser
step, and so what is learnt from it, stay. Deliberately not here: attention, compilation and kernels, which are
contenders of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qmedtune.bench.job import Job
from qmedtune.bench.result import Measurement, Try

STEPS, WARMUP_STEPS = 5, 2  # of a try


def best_job(job: Job, measure: Callable[[Job], Measurement], *, plans: bool = False) -> tuple[Job | None, list[Try]]:
    """(`job` at its fastest setting, what was tried). None where time ran out first; `job` itself where every setting
    failed. A measurement has another `micro_batch` than its job's where memory ran out and it was made smaller.
    `plans`: the contender decides itself what is recomputed."""
    tried: list[Try] = []
    for checkpointing in (job.checkpointing,) if plans else (True, False):
        for micro_batch in _sizes(job.rows):
            setting = replace(job, micro_batch=micro_batch, checkpointing=checkpointing)
            found = measure(replace(setting, steps=STEPS, warmup_steps=WARMUP_STEPS))
            if found.later:
                return None, tried
            tried.append(_outcome(found, setting))
            if "out of memory" in (tried[-1].failed or "").lower():  # more rows need more
                break
    fastest = None
    for each in tried:
        if each.tokens_per_s and (fastest is None or each.tokens_per_s > (fastest.tokens_per_s or 0)):
            fastest = each
    if fastest is None:
        return job, tried
    return replace(job, micro_batch=fastest.micro_batch, checkpointing=fastest.checkpointing), tried


def _outcome(found: Measurement, job: Job) -> Try:
    speed, failed = found.tokens_per_s, found.absent
    if found.micro_batch not in (None, job.micro_batch):
        speed, failed = None, f"out of memory: it went on with {found.micro_batch} rows at a time"
    return Try(micro_batch=job.micro_batch, checkpointing=job.checkpointing, tokens_per_s=speed, failed=failed)


def _sizes(rows: int) -> list[int]:
    """1, 2, 4 ... and all rows of a step; only what divides them, for peers accumulate whole micro-batches."""
    sizes = []
    size = 1
    while size < rows and rows % size == 0:
        sizes.append(size)
        size *= 2
    return [*sizes, rows]
