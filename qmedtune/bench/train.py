"""`qmedtune bench train`: training speed of qmedtune against what a user would install instead.

Every contender trains the same random-weight LLaMA from the same adapter on the same packed tokens, in a process of its
own (Unsloth patches its peers), in turns, several rounds; what is quoted are ratios within a round. Speed stands beside
correctness: on the tiny shape the loss curve and the adapters' first gradient are compared with an fp32 loop's.
Contenders whose package is absent are listed as absent, not skipped silently. Deliberately not here: what each
contender does (train_process.py, train_worker.py, train_peers.py), the longest context (context.py).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.bench.best import best_job
from qmedtune.bench.job import Job
from qmedtune.bench.shapes import SHAPES, tensors_of
from qmedtune.errors import RecipeError
from qmedtune.planning.machine import this_machine
from qmedtune.record import versions

CONTENDERS = {
    "torch-loop": "a bare PyTorch loop: dequantised bf16 linears, naive LoRA, AdamW; no trainer around it",
    "peft": "a plain loop over transformers and PEFT in bf16: LoRA on all linears, AdamW; no trainer around it",
    "peft-nf4": "the same over a base that bitsandbytes holds in NF4",
    "trl": "TRL + PEFT + bitsandbytes on their defaults: gradient checkpointing, 8 rows at a time, accumulated",
    "trl-tuned": "the same with qmedtune's micro-batch and checkpointing, FlashAttention where installed",
    "trl-compiled": "trl-tuned with torch.compile and flex attention",
    "trl-liger": "trl-tuned with Liger's kernels",
    "sft-trainer": "stock SFTTrainer over the dequantised model with PEFT LoRA",
    "unsloth": "Unsloth's FastLanguageModel with TRL",
    "axolotl": "Axolotl's LoRA kernels under trl-tuned",
    "qmedtune-reference": "qmedtune with PyTorch operations",
    "qmedtune": "qmedtune as a recipe runs it",
    "without-linears": "qmedtune, linears and LoRA by their PyTorch reference",
    "without-norms": "qmedtune, norms by their PyTorch reference",
    "without-rope": "qmedtune, rotary embedding by its PyTorch reference",
    "without-swiglu": "qmedtune, SwiGLU by its PyTorch reference",
    "without-loss": "qmedtune, cross entropy in chunks of PyTorch operations",
    "without-varlen": "qmedtune, sdpa with a mask in place of attention by lengths",
}
NEEDS = {"unsloth": "unsloth", "axolotl": "axolotl", "trl-liger": "liger_kernel"}
# A CPU has no kernels to leave out, and torch.compile would compile for minutes there.
GPU_ONLY = ("trl-compiled", *(name for name in CONTENDERS if name.startswith("without-")))
AS_THEY_COME = ("trl",)  # what it shows is the defaults
REFERENCE = "fp32"
# Dense bf16 (T4: fp16) TFLOP/s of the data sheets, what utilisation is quoted of.
SHEET_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71, "T4": 65}
TIME_LIMIT_S = 540.0  # of a call; what is missing then is measured by the next, where results are kept
NO_TIME = {"absent": "no time was left: run again with --results", "later": True}
SHORTEST_S = 20.0  # no contender is begun with less time left


def bench_train(
    job: Job,
    contenders: Sequence[str],
    rounds: int = 3,
    results: Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    models: Path | None = None,
    best: bool = False,
) -> dict[str, Any]:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}` with one row per contender: `value` is the
    median over rounds of supervised tokens/s (after the warm-up steps), `ratio` the median over rounds of this
    contender's speed over the first contender's in the same round. With `results`, finished measurements are kept
    there and not made again; with `models`, the random model too. `best`: each contender at its fastest setting
    (best.py), `setting` and `tried` in its row. Raises RecipeError for an unknown contender."""
    if unknown := [c for c in contenders if c not in CONTENDERS]:
        raise RecipeError(f"bench train: no contender {unknown[0]!r}\nallowed: {', '.join(CONTENDERS)}")
    if job.steps <= job.warmup_steps:
        raise RecipeError(f"bench train: {job.steps} steps, of which {job.warmup_steps} warm up\ngive more --steps")
    kept, deadline = Kept(results), time.monotonic() + time_limit_s
    with tempfile.TemporaryDirectory() as scratch, ui.stage("bench train", None, "runs") as bar:

        def once(one: Job, name: str, number: int = 0) -> dict[str, Any]:
            bar.update(bar.completed + 1, note=name)
            left = deadline - time.monotonic()
            return kept.measurement(
                one, name, number, lambda: measure(one, name, Path(scratch), models or Path(scratch), left)
            )

        searched = [name for name in contenders if best and name not in AS_THEY_COME]
        chosen: dict[str, tuple[Job | None, list[dict[str, Any]]]] = dict.fromkeys(contenders, (job, []))
        for name in searched:
            plans = job.memory_gib is not None and name.startswith(("qmedtune", "without-"))
            chosen[name] = best_job(job, partial(once, name=name), plans=plans)
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for number, name in _turns(contenders, rounds):
            at = chosen[name][0]
            if all("tokens_per_s" in m for m in measured[name]):
                measured[name].append(once(at, name, number) if at else NO_TIME)
    rows = [_row(chosen[name][0] or job, name, found, measured[contenders[0]]) for name, found in measured.items()]
    if best:
        rows = [row | _setting(*chosen[row["contender"]]) if row["contender"] in searched else row for row in rows]
    return {
        "bench": "train",
        "device": this_machine().name,
        "versions": all_versions(),
        "job": asdict(job),
        "rows": rows,
    }


def all_versions() -> dict[str, str | None]:
    """Of the libraries, of the peers that are installed, and of the driver."""
    peers = ("flash-attn", "liger-kernel", "unsloth", "unsloth_zoo", "axolotl")
    found = {name: version(name) for name in peers if find_spec(name.replace("-", "_"))}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout if this_machine().is_gpu else ""
    return versions() | found | ({"driver": driver.splitlines()[0]} if driver.strip() else {})


def _turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """(round, contender), the order reversed in every second round: a machine that grows slower favours nobody."""
    return [(number, name) for number in range(rounds) for name in (names[::-1] if number % 2 else names)]


def _mark(job: Job, contender: str) -> str:
    return json.dumps([contender, this_machine().name, asdict(job)])


def write_results(known: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")


class Kept:
    """Measurements by contender, machine and job, in a file where one is given."""

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path and path.is_file() else {}

    def measurement(self, job: Job, name: str, number: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The one of this number, made if it is not there; what only lacked time is not kept."""
        known = self.known.setdefault(_mark(job, name), [])
        if len(known) > number:
            return known[number]
        found = make()
        if "later" not in found:
            known.append(found)
            write_results(self.known, self.path)
        return found


def _setting(job: Job | None, tried: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = {"micro_batch": job.micro_batch, "checkpointing": job.checkpointing} if job else None
    return {"setting": chosen, "tried": tried}


def measure(job: Job, contender: str, scratch: Path, models: Path, seconds: float) -> dict[str, Any]:
    """One run of a contender in its own process, compared with the fp32 loop's where the shape is small. `absent`
    says why there are no figures; `later` marks what only lacked time."""
    if why := _absent(contender):
        return {"absent": why}
    if seconds < SHORTEST_S:
        return NO_TIME
    scratch = scratch / f"{job.steps} steps"  # a reference is of so many
    scratch.mkdir(exist_ok=True)
    if job.shape == "tiny" and not (scratch / f"{REFERENCE}.json").is_file():
        _run(job, REFERENCE, scratch, models, seconds)
    found = _run(job, contender, scratch, models, seconds)
    if job.shape == "tiny" and "tokens_per_s" in found:
        found |= _against_reference(scratch, contender)
    return found


def _absent(contender: str) -> str:
    if contender in NEEDS and find_spec(NEEDS[contender]) is None:
        return f"{NEEDS[contender]} is not installed"
    return "it needs a GPU" if contender in GPU_ONLY and not this_machine().is_gpu else ""


def _run(job: Job, contender: str, scratch: Path, models: Path, seconds: float) -> dict[str, Any]:
    target = scratch / f"{contender}.json"
    target.unlink(missing_ok=True)
    first = f"import {NEEDS[contender]}; " if contender == "unsloth" else ""  # before what it patches
    program = f"{first}from qmedtune.bench.train_process import main; main()"
    command = [sys.executable, "-c", program, contender, json.dumps(asdict(job)), str(models), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"absent": f"not finished within {seconds:.0f} s", "later": True}
    if done.returncode != 0 or not target.is_file():
        return {"absent": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(target.read_text())


def _against_reference(scratch: Path, contender: str) -> dict[str, float]:
    """Cosine of the adapters' first gradient to the fp32 loop's, and the widest gap of the losses."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(scratch / f"{name}.gradient.safetensors") for name in (contender, REFERENCE))
    assert ours.keys() == theirs.keys(), f"{contender} trains other adapters than {REFERENCE}"
    flat = []
    for found in (ours, theirs):
        flat.append(torch.cat([found[name].flatten().double() for name in sorted(found)]))
    losses = [json.loads((scratch / f"{name}.json").read_text())["losses"] for name in (contender, REFERENCE)]
    return {
        "gradient_cosine": round(float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)), 6),
        "loss_gap": round(max(abs(a - b) for a, b in zip(*losses, strict=True)), 5),
    }


# ------------------------------------------------------------------------------------------------------ what is told


def _row(job: Job, contender: str, measured: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": contender, "contender": contender, "unit": "tokens/s", "what": CONTENDERS[contender]}
    good = [m for m in measured if "tokens_per_s" in m]
    if not good:
        return {**row, "value": None, "ratio": None, "absent": measured[-1]["absent"] if measured else "not measured"}
    speeds = [m["tokens_per_s"] for m in good]
    both = [(m, f) for m, f in zip(measured, first, strict=False) if "tokens_per_s" in m and "tokens_per_s" in f]
    pairs = [m["tokens_per_s"] / f["tokens_per_s"] for m, f in both]
    steady = ("first_step_s", "load_s", "data_share")
    highest = ("peak_memory_bytes", "reserved_bytes", "device_bytes", "host_bytes", "host_anonymous_bytes")
    told = ("gradient_cosine", "loss_gap", "layers", "card")
    figures: dict[str, Any] = {}
    for key in steady:
        if key in good[0]:
            figures[key] = round(statistics.median(m[key] for m in good), 4)
    for key in highest:
        if key in good[0]:
            figures[key] = max(m[key] for m in good)
    return {
        **row,
        "value": round(statistics.median(speeds), 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        "rounds": len(good),
        "ratio": round(statistics.median(pairs), 3) if pairs else None,
        "ratio_spread": [round(min(pairs), 3), round(max(pairs), 3)] if pairs else None,
        # By CPU seconds a step in place of the clock: on a CPU, how far other processes were in the way.
        "cpu_ratio": round(statistics.median(f["cpu_s"] / m["cpu_s"] for m, f in both), 3) if pairs else None,
        **figures,
        **{key: good[-1][key] for key in told if key in good[-1]},
        **utilisation(job, statistics.median(m["all_tokens_per_s"] for m in good)),
        "loss": {"first": good[0]["losses"][0], "last": good[0]["losses"][-1]},
    }


def utilisation(job: Job, tokens_per_s: float) -> dict[str, float]:
    """TFLOP/s of the model, and their share of the card's data sheet: 4 for each weight that is multiplied and token
    (forward and input gradients; what is recomputed is not counted)."""
    sizes = {name: size for name, size in tensors_of(SHAPES[job.shape]).items() if len(size) > 1}
    weights = sum(rows * columns for name, (rows, columns) in sizes.items() if "embed_tokens" not in name)
    if "lm_head.weight" not in sizes:  # tied: the head multiplies by the embedding
        rows, columns = sizes["model.embed_tokens.weight"]
        weights += rows * columns
    tflops = 4 * weights * tokens_per_s / 1e12
    sheet = next((peak for name, peak in SHEET_TFLOPS.items() if name in this_machine().name), None)
    return {"tflops": round(tflops, 3), **({"utilisation": round(tflops / sheet, 4)} if sheet else {})}


def setting_words(row: dict[str, Any]) -> str:
    """What follows a contender's description: the setting that `--best` found for a row, "" where none was searched."""
    if not row.get("setting"):
        return ""
    all_layers = {"all": "recomputed" if row["setting"]["checkpointing"] else "kept"}
    layers = {str(count): way for way, count in row["layers"].items()} if "layers" in row else all_layers
    words = ", ".join(f"{n} {w}" for n, w in layers.items())
    return f"; at its best: {row['setting']['micro_batch']} rows at a time, layers {words}"


def render(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    columns = ["contender", "tokens/s", "ratio", "first step", "peak memory", "loss", "to fp32", ""]
    rows = []
    for row in result["rows"]:
        if row["value"] is None:
            rows.append([row["contender"], *["-"] * 6, row["absent"]])
            continue
        memory, loss = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB", row["loss"]
        ratio = "-" if row["ratio"] is None else "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_spread"])
        cells = [f"{row['value']:,.0f}", ratio, f"{row['first_step_s']:.1f} s", memory]
        near = f"cos {row['gradient_cosine']:.4f}, loss ±{row['loss_gap']:.3f}" if "loss_gap" in row else ""
        what = row["what"] + setting_words(row)
        rows.append([row["contender"], *cells, f"{loss['first']:.3f} -> {loss['last']:.3f}", near, what])
    return columns, rows
