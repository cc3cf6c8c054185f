"""`qmedtune bench train --context`: the longest single row that trains within each of several memory budgets.

One process loads the model once; for each budget, which a memory fraction enforces on a larger card, rows of growing
length go through whole optimiser steps until one runs out. All layers are offloaded. Without a GPU the lengths that the
memory plan predicts are told, and marked as that. Deliberately not here: speed.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from qmedtune import ui
from qmedtune.bench import random_bases
from qmedtune.bench.job import Job
from qmedtune.bench.result import BenchResult, Row
from qmedtune.bench.train import TIME_LIMIT_S, all_versions, write_results
from qmedtune.errors import RunError
from qmedtune.llama_shape import BaseFacts, facts_from_config
from qmedtune.planning import memory
from qmedtune.planning.machine import this_machine
from qmedtune.process import prepare

UNIT = 1024  # tokens
LONGEST = 1024 * UNIT
RESOLUTION = 32  # what is found is at most this share below the longest
OPTIMIZER = "adamw_8bit"


def bench_context(
    job: Job,
    budgets_gib: Sequence[float],
    *,
    results: Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    models: Path | None = None,
) -> BenchResult:
    """`{"bench", "device", "versions", "job", "rows"}`, a row per budget: `value` tokens (None where nothing was
    measured), `predicted` by the memory plan, `tried` lengths and whether they fit; `settled` is False where time ran
    out before. With `results`, what was tried is kept and not tried again. RunError where the process fails."""
    known: dict[str, dict[str, bool]] = {}
    if results and results.is_file():
        known = json.loads(results.read_text())
    marks = {gib: json.dumps([this_machine().name, job.shape, job.r, gib]) for gib in budgets_gib}
    settled = set()
    if this_machine().is_gpu:
        tried = {gib: dict(known.get(mark, {})) for gib, mark in marks.items()}
        for gib, length, fits in _probes(job, tried, time_limit_s, models):
            if length is None:
                settled.add(gib)
                continue
            known.setdefault(marks[gib], {})[str(length)] = fits
            write_results(known, results)
    rows = [_row(job, gib, known.get(mark, {}), gib in settled) for gib, mark in marks.items()]
    return {
        "bench": "context",
        "device": this_machine().name,
        "versions": all_versions(),
        "job": asdict(job),
        "rows": rows,
    }


def _row(job: Job, gib: float, tried: dict[str, bool], settled: bool) -> Row:
    fitting = [int(length) for length, fits in tried.items() if fits]
    return {
        "case": f"{gib:g} GiB", "contender": "qmedtune", "value": max(fitting, default=None), "unit": "tokens",
        "predicted": predicted(job, gib), "tried": tried, "settled": settled,
    }  # fmt: skip


def predicted(job: Job, gib: float) -> int:
    """Tokens of the longest row whose planned peak is within the budget."""
    facts = facts_from_config(job.shape, random_bases.config_of(random_bases.SHAPES[job.shape]), "shape")

    def fits(n: int) -> bool:
        return memory.peak_bytes(facts, _setup(job, n * UNIT, facts), gpu=True) <= gib * 2**30

    return UNIT * longest_that(fits, LONGEST // UNIT, 1, 10**9)


def _setup(job: Job, length: int, facts: BaseFacts) -> memory.Setup:
    return memory.Setup(
        length, 1, False, OPTIMIZER, "bfloat16", rank=job.r, attention="varlen", ways=(0, 0, 0, facts.layers)
    )


def longest_that(works: Callable[[int], bool], limit: int, guess: int, resolution: int = RESOLUTION) -> int:
    """The largest n up to `limit` for which `works`, which holds up to some n and fails beyond, or at most n /
    `resolution` less; 0 if for none. `guess` is where the search begins."""
    good, bad, n = 0, limit + 1, max(1, min(guess, limit))
    while bad - good > max(1, good // resolution):
        if works(n):
            good = n
        else:
            bad = n
        n = (good + bad) // 2
        if bad > limit:
            n = min(limit, good + max(1, good // 8))
        elif not good:
            n = bad - max(1, bad // 8)
    return good


def _probes(
    job: Job, known: dict[float, dict[str, bool]], time_limit_s: float, models: Path | None
) -> Iterator[tuple[float, int | None, bool]]:
    """(budget, length, whether it fits) as they are found; a length of None: nothing is left to try."""
    task = {"job": asdict(job), "budgets": list(known), "known": list(known.values())}
    deadline = time.monotonic() + time_limit_s
    with tempfile.TemporaryDirectory() as scratch, ui.progress_bar("bench context", len(known), "budgets") as bar:
        command = [
            sys.executable,
            "-m",
            "qmedtune.bench.context",
            json.dumps({**task, "seconds": time_limit_s}),
            str(models or scratch),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout
        try:
            for line in child.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    yield found["gib"], found["length"], found["fits"]
                    bar.update(list(known).index(found["gib"]) + (found["length"] is None), note=line.strip())
            if child.wait() and time.monotonic() < deadline:
                raise RunError(f"bench train --context: its process ended with {child.returncode}; see above")
        finally:
            child.kill()


# ------------------------------------------------------------------------------------------------- in its own process


def main() -> None:
    prepare()
    task, scratch = json.loads(sys.argv[1]), Path(sys.argv[2])
    job, deadline = Job(**task["job"]), time.monotonic() + task["seconds"]
    step = _step_of(job, scratch)
    slowest = 0.0
    for gib, known in zip(task["budgets"], task["known"], strict=True):

        def works(n: int, gib: float = gib, known: dict[str, bool] = known) -> bool:
            nonlocal slowest
            if (mark := str(n * UNIT)) not in known:
                if time.monotonic() + 2 * slowest > deadline:
                    raise TimeoutError
                started = time.monotonic()
                known[mark] = _fits(step, n * UNIT, gib)
                slowest = max(slowest, time.monotonic() - started)
                print(json.dumps({"gib": gib, "length": n * UNIT, "fits": known[mark]}), flush=True)
            return known[mark]

        try:
            longest_that(works, LONGEST // UNIT, max(1, predicted(job, gib) // UNIT))
        except TimeoutError:
            return
        print(json.dumps({"gib": gib, "length": None, "fits": True}), flush=True)


def _step_of(job: Job, scratch: Path) -> Callable[[int], None]:
    """A function that takes one optimiser step on a row of so many tokens, as training does."""
    import torch

    from qmedtune.bench import train_worker
    from qmedtune.modeling import activations
    from qmedtune.modeling.loss import token_nll
    from qmedtune.train import quiet_libraries
    from qmedtune.training import trainer

    quiet_libraries()
    model = train_worker.adapted(job, train_worker.model_folder(job, scratch), "auto")
    activations.set_ways(model.train(), {"offload": model.config.num_hidden_layers})
    section = train_worker.section_of(job).model_copy(update={"optimizer": OPTIMIZER})
    optimizer = trainer.make_optimizer(model, section)

    def step(length: int) -> None:
        row = train_worker.packed_row(replace(job, seq_len=length, document=length), model.config.vocab_size, 0)
        batch = {name: torch.from_numpy(values)[None].cuda() for name, values in row.items()}
        try:
            (token_nll(model, **batch) / length).backward()
            optimizer.step()
        finally:
            optimizer.zero_grad()

    step(UNIT)  # states, context and kernels are there from here on
    return step


def _fits(step: Callable[[int], None], length: int, gib: float) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    from qmedtune.bench.train_worker import limit_memory

    gc.collect()
    torch.cuda.empty_cache()
    limit_memory(gib)
    try:
        step(length)
        step(length)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    rows = []
    for row in result["rows"]:
        longest = "not measured"
        if row["value"] is not None:
            longest = f"{row['value']:,}"
            if not row["settled"]:
                longest += " or more"
        rows.append([row["case"], longest, f"{row['predicted']:,}"])
    return ["memory", "longest row (tokens)", "predicted"], rows


if __name__ == "__main__":
    main()
