"""`qmedtune bench train`: training speed of qmedtune against what a user would install instead.

Every contender trains the same random-weight LLaMA on the same packed tokens, in a process of its own (Unsloth patches
its peers), in turns, several rounds; what is quoted are ratios within this one run. Speed stands beside the loss, so
that a fast wrong contender is seen. Contenders whose package is absent are listed as absent, not skipped silently.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.bench.shapes import POSITIONS, SHAPES
from qmedtune.errors import RecipeError, RunError
from qmedtune.record import device_name, versions

CONTENDERS = {
    "torch-loop": "a bare PyTorch loop: dequantised bf16 linears, naive LoRA, AdamW; no trainer around it",
    "trl": "TRL + PEFT + bitsandbytes on their defaults: gradient checkpointing, 8 rows at a time, accumulated",
    "trl-tuned": "the same without gradient checkpointing, and with qmedtune's micro-batch",
    "sft-trainer": "stock SFTTrainer over the dequantised model with PEFT LoRA",
    "qmedtune-reference": "qmedtune with PyTorch operations",
    "qmedtune": "qmedtune as a recipe runs it",
    "unsloth": "Unsloth's FastLanguageModel with TRL",
}
NEEDS = {"unsloth": "unsloth"}
LONGEST_ROWS = 4 * POSITIONS


@dataclass(frozen=True)
class Job:
    """One comparison: `rows` rows of `seq_len` tokens make an optimiser step, documents of `document` tokens."""

    shape: str = "tiny"
    seq_len: int = 64
    rows: int = 32
    micro_batch: int = 32
    document: int = 16
    steps: int = 30
    warmup_steps: int = 5
    r: int = 32
    alpha: float = 64.0
    train_embeddings: bool = True
    checkpointing: bool = False  # of contenders that do not say otherwise: every layer recomputed
    lr: float = 1e-3
    seed: int = 0
    memory_gib: float | None = None  # of the card, enforced; None: all of it


def job_of(shape: str, chosen: dict[str, int]) -> Job:
    """The job of a shape: the tiny one's as it stands, others rows of 4096 one at a time, 25 steps of which 20 warm up,
    LoRA alone, layers recomputed; `chosen` overrides. Raises RecipeError for an unknown shape."""
    if shape not in SHAPES:
        raise RecipeError(f"bench train: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    if shape == "tiny":
        return replace(Job(), **chosen)
    large = Job(shape, 4096, 4, 1, 1024, 40, 20, 16, 32.0, train_embeddings=False, checkpointing=True, lr=2e-4)
    return replace(large, **chosen)


def bench_context(job: Job, budgets_gib: Sequence[float], results: Path | None = None) -> dict[str, Any]:
    """The longest single row, in steps of 1024 tokens, that two steps of qmedtune train within each budget, which a
    memory fraction enforces on a larger card. Found by doubling, then halving the gap. Raises RunError without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise RunError("bench train --context: no CUDA device here; memory there is what it measures")
    known = json.loads(results.read_text()) if results and results.is_file() else {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch, ui.stage("bench context", len(budgets_gib), "budgets") as bar:
        for number, gib in enumerate(budgets_gib):

            def trains(length: int, gib: float = gib) -> bool:
                one = replace(job, seq_len=length, document=length, rows=1, micro_batch=1, steps=2, warmup_steps=1)
                mark = json.dumps([gib, length, job.shape])
                if mark not in known:
                    known[mark] = _measure(replace(one, memory_gib=gib), "qmedtune", Path(scratch), 540.0)
                    if results:
                        results.write_text(json.dumps(known, indent=1))
                return "tokens_per_s" in known[mark]

            longest = 1024 * longest_that(lambda n: trains(1024 * n), LONGEST_ROWS // 1024)
            rows.append({"case": f"{gib:g} GiB", "contender": "qmedtune", "value": longest, "unit": "tokens"})
            bar.update(number + 1)
    return {"bench": "context", "device": device_name(), "versions": versions(), "job": asdict(job), "rows": rows}


def longest_that(works: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` for which `works`, which holds up to some n and fails beyond; 0 if for none."""
    good, bad = 0, limit + 1
    n = 1
    while n < bad:
        if works(n):
            good, n = n, 2 * n
        else:
            bad = n
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def bench_train(
    job: Job, contenders: Sequence[str], rounds: int = 3, results: Path | None = None, timeout_s: float = 600.0
) -> dict[str, Any]:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}` with one row per contender: `value` is the
    median over rounds of tokens/s (non-pad, after the warm-up steps), `ratio` the median over rounds of this
    contender's speed over the first contender's in the same round. With `results`, finished rows are kept there and
    not measured again. Raises RecipeError for an unknown contender."""
    if unknown := [c for c in contenders if c not in CONTENDERS]:
        raise RecipeError(f"bench train: no contender {unknown[0]!r}\nallowed: {', '.join(CONTENDERS)}")
    if job.steps <= job.warmup_steps:
        raise RecipeError(f"bench train: {job.steps} steps, of which {job.warmup_steps} warm up\ngive more --steps")
    known = json.loads(results.read_text()) if results and results.is_file() else {}
    speeds: dict[str, list[dict[str, Any]]] = {c: known.get(_mark(job, c), []) for c in contenders}
    with tempfile.TemporaryDirectory() as scratch, ui.stage("bench train", len(contenders) * rounds, "runs") as bar:
        for number in range(rounds):
            for contender in contenders:
                if len(speeds[contender]) <= number:
                    speeds[contender].append(_measure(job, contender, Path(scratch), timeout_s))
                    known[_mark(job, contender)] = speeds[contender]
                    if results:
                        results.parent.mkdir(parents=True, exist_ok=True)
                        results.write_text(json.dumps(known, indent=1))
                bar.update(number * len(contenders) + list(contenders).index(contender) + 1, note=contender)
    rows = [_row(contender, measured, speeds[contenders[0]]) for contender, measured in speeds.items()]
    return {"bench": "train", "device": device_name(), "versions": versions(), "job": asdict(job), "rows": rows}


def _mark(job: Job, contender: str) -> str:
    return json.dumps([contender, asdict(job)])


def _measure(job: Job, contender: str, scratch: Path, timeout_s: float) -> dict[str, Any]:
    if contender in NEEDS and find_spec(NEEDS[contender]) is None:
        return {"absent": f"{NEEDS[contender]} is not installed"}
    target = scratch / "result.json"
    target.unlink(missing_ok=True)
    arguments = [contender, json.dumps(asdict(job)), str(scratch), str(target)]
    command = [sys.executable, "-m", "qmedtune.bench.train_worker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"absent": f"not finished within {timeout_s:.0f} s"}
    if done.returncode != 0 or not target.is_file():
        return {"absent": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(target.read_text())


def _row(contender: str, measured: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": contender, "contender": contender, "unit": "tokens/s", "what": CONTENDERS[contender]}
    good = [m for m in measured if "tokens_per_s" in m]
    if not good:
        return {**row, "value": None, "ratio": None, "absent": measured[0]["absent"]}
    speeds = [m["tokens_per_s"] for m in good]
    pairs = [m["tokens_per_s"] / f["tokens_per_s"] for m, f in zip(measured, first, strict=True)
             if "tokens_per_s" in m and "tokens_per_s" in f]  # fmt: skip
    return {
        **row,
        "value": round(statistics.median(speeds), 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        "ratio": round(statistics.median(pairs), 3) if pairs else None,
        "first_step_s": round(statistics.median(m["first_step_s"] for m in good), 2),
        "peak_memory_bytes": max(m["peak_memory_bytes"] for m in good),
        "loss": good[0]["loss"],
    }


def render(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    if result["bench"] == "context":
        return ["memory", "longest row (tokens)"], [[row["case"], f"{row['value']:,}"] for row in result["rows"]]
    columns = ["contender", "tokens/s", "ratio", "first step", "peak memory", "loss", ""]
    rows = []
    for row in result["rows"]:
        if row["value"] is None:
            rows.append([row["contender"], "-", "-", "-", "-", "-", row["absent"]])
            continue
        memory, loss = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB", row["loss"]
        cells = [f"{row['value']:,.0f}", f"{row['ratio']:.2f}", f"{row['first_step_s']:.1f} s", memory]
        rows.append([row["contender"], *cells, f"{loss['first']:.3f} -> {loss['last']:.3f}", row["what"]])
    return columns, rows
