"""`qmedtune bench train`: training speed of qmedtune against what a user would install instead.

Every contender trains the same random-weight LLaMA from the same adapter on the same packed tokens, in a process of its
own (Unsloth patches its peers), in turns, several rounds; what is quoted are ratios within a round. Speed stands beside
correctness: on the tiny shape the loss curve and the adapters' first gradient are compared with an fp32 loop's.
Contenders whose package is absent are listed as absent, not skipped silently. Deliberately not here: what each
contender does (train_process.py, train_worker.py, train_peers.py), the longest context (context.py).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from qmedtune import hashes, ui
from qmedtune.bench.best import best_job
from qmedtune.bench.job import Job
from qmedtune.bench.random_bases import SHAPES, tensors_of
from qmedtune.bench.result import BenchResult, Measurement, Row, Try
from qmedtune.errors import RecipeError
from qmedtune.planning.machine import this_machine
from qmedtune.record import versions
from qmedtune.results import Json

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
GPU_ONLY = (
    "trl-compiled", "without-linears", "without-norms", "without-rope", "without-swiglu", "without-loss",
    "without-varlen",
)  # fmt: skip
AS_THEY_COME = ("trl",)  # what it shows is the defaults
OURS = ("qmedtune", "without-")
REFERENCE = "fp32"
# Dense bf16 (T4: fp16) TFLOP/s of the data sheets, what utilisation is quoted of.
SHEET_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71, "T4": 65}
TIME_LIMIT_S = 540.0  # of a call; what is missing then is measured by the next, where results are kept
NO_TIME = Measurement(absent="no time was left: run again with --results", later=True)
SHORTEST_S = 20.0  # no contender is begun with less time left


@dataclass(frozen=True)
class Limits:
    """What a call may use. results: file in which measurements are kept; models: folder for the random model; best:
    each contender at its fastest setting (best.py)."""

    rounds: int = 3
    results: Path | None = None
    time_limit_s: float = TIME_LIMIT_S
    models: Path | None = None
    best: bool = False


@dataclass(frozen=True)
class FastestJob:
    """A contender's job; None where time ran out while its fastest setting was looked for. `tried`: None where no
    setting was looked for."""

    job: Job | None
    tried: list[Try] | None = None


def bench_train(
    job: Job,
    contenders: Sequence[str],
    *,
    rounds: int = 3,
    results: Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    models: Path | None = None,
    best: bool = False,
) -> BenchResult:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}` with one row per contender: `value` is the
    median over rounds of supervised tokens/s (after the warm-up steps), `ratio` the median over rounds of this
    contender's speed over the first contender's in the same round. With `results`, finished measurements are kept
    there and not made again; with `models`, the random model too. `best`: each contender at its fastest setting
    (best.py), `setting` and `tried` in its row. Raises RecipeError for an unknown contender."""
    for name in contenders:
        _check(name)
    if job.steps <= job.warmup_steps:
        raise RecipeError(f"bench train: {job.steps} steps, of which {job.warmup_steps} warm up\ngive more --steps")
    limits = Limits(rounds, results, time_limit_s, models, best)
    with tempfile.TemporaryDirectory() as scratch, ui.progress_bar("bench train", None, "runs") as bar:
        rows = _rows(job, contenders, limits, _Runs(limits, Path(scratch), bar))
    return {
        "bench": "train",
        "device": this_machine().name,
        "versions": all_versions(),
        "job": asdict(job),
        "rows": rows,
    }


@dataclass(frozen=True)
class Code:
    """A contender's name, and the checkout whose code it runs: None is this one. `qmedtune@../before` is another
    commit's, measured in turns with this one's."""

    name: str
    checkout: Path | None

    @classmethod
    def of(cls, contender: str) -> Code:
        name, _, checkout = contender.partition("@")
        return cls(name, Path(checkout).expanduser().resolve() if checkout else None)

    def environment(self) -> dict[str, str]:
        """For its process, which runs in the checkout's folder."""
        if self.checkout is None:
            return {**os.environ}
        places = [str(self.checkout), str(self.checkout / "kernels" / "torch-ext")]
        if already := os.environ.get("PYTHONPATH"):
            places.append(already)
        return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def _check(contender: str) -> None:
    """RecipeError for a contender that there is not."""
    code = Code.of(contender)
    if code.name not in CONTENDERS:
        allowed = ", ".join([*CONTENDERS, "qmedtune@CHECKOUT"])
        raise RecipeError(f"bench train: no contender {contender!r}\nallowed: {allowed}")
    if code.checkout is None:
        return
    if not code.name.startswith(OURS):
        raise RecipeError(f"bench train: {contender}: code of another checkout is qmedtune's\ngive qmedtune@CHECKOUT")
    if not (code.checkout / "qmedtune" / "bench" / "train_process.py").is_file():
        raise RecipeError(
            f"bench train: {contender}: {code.checkout} is no checkout of qmedtune with this benchmark\n"
            "make one: git worktree add FOLDER COMMIT"
        )


def _rows(job: Job, contenders: Sequence[str], limits: Limits, runs: _Runs) -> list[Row]:
    chosen = {name: FastestJob(job) for name in contenders}
    for name in contenders:
        if limits.best and name not in AS_THEY_COME:
            plans = job.memory_gib is not None and name.startswith(OURS)
            chosen[name] = FastestJob(*best_job(job, partial(runs.once, name), plans=plans))
    measured: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for number, name in _turns(contenders, limits.rounds):
        at = chosen[name].job
        if measured[name] and measured[name][-1].absent:
            continue  # what failed once, or has no time, is not begun again
        if at is None:
            measured[name].append(NO_TIME)
        else:
            measured[name].append(runs.once(name, at, number))
    rows = []
    for name, found in measured.items():
        row = _row(chosen[name].job or job, name, found, measured[contenders[0]])
        rows.append(row | _setting(chosen[name]))
    return rows


@dataclass(frozen=True)
class Folders:
    """Where a contender leaves what it found, and where random models are written once for all."""

    scratch: Path
    models: Path


class _Runs:
    """Measurements of one call, each made once and kept where there is a file for them."""

    def __init__(self, limits: Limits, scratch: Path, bar: ui.ProgressBar):
        self.kept, self.bar = MeasurementCache(limits.results), bar
        self.folders = Folders(scratch, limits.models or scratch)
        self.deadline = time.monotonic() + limits.time_limit_s

    def once(self, name: str, job: Job, number: int = 0) -> Measurement:
        self.bar.update(self.bar.completed + 1, note=name)
        left = self.deadline - time.monotonic()
        return self.kept.measurement(job, name, number, partial(measure, job, name, self.folders, left))


def all_versions() -> dict[str, str | None]:
    """Of the libraries, of the peers that are installed, and of the driver."""
    found = versions()
    for name in ("flash-attn", "liger-kernel", "unsloth", "unsloth_zoo", "axolotl"):
        if find_spec(name.replace("-", "_")):
            found[name] = version(name)
    if this_machine().is_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        if driver:
            found["driver"] = driver.splitlines()[0]
    return found


def _turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """(round, contender), the order reversed in every second round: a machine that grows slower favours nobody."""
    turns = []
    for number in range(rounds):
        order = names
        if number % 2:
            order = names[::-1]
        for name in order:
            turns.append((number, name))
    return turns


def _mark(job: Job, contender: str) -> str:
    return json.dumps([contender, this_machine().name, asdict(job)])


def write_results(known: Mapping[str, object], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")


class MeasurementCache:
    """Measurements by contender, machine and job, in a file where one is given."""

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, list[Json]] = {}
        if path and path.is_file():
            self.known = json.loads(path.read_text())

    def measurement(self, job: Job, name: str, number: int, make: Callable[[], Measurement]) -> Measurement:
        """The one of this number, made if it is not there; what only lacked time is not kept."""
        known = self.known.setdefault(_mark(job, name), [])
        if len(known) > number:
            return Measurement.model_validate(known[number])
        found = make()
        if not found.later:
            known.append(found.as_json())
            write_results(self.known, self.path)
        return found


def _setting(chosen: FastestJob) -> Row:
    if chosen.tried is None:
        return {}
    setting = None
    if chosen.job:
        setting = {"micro_batch": chosen.job.micro_batch, "checkpointing": chosen.job.checkpointing}
    return {"setting": setting, "tried": [each.as_json() for each in chosen.tried]}


def measure(job: Job, contender: str, folders: Folders, seconds: float) -> Measurement:
    """One run of a contender in its own process, compared with the fp32 loop's where the shape is small."""
    if why := _absent(Code.of(contender).name):
        return Measurement(absent=why)
    if seconds < SHORTEST_S:
        return NO_TIME
    scratch = folders.scratch / f"{job.steps} steps"  # a reference is of so many
    scratch.mkdir(exist_ok=True)
    folders = replace(folders, scratch=scratch)
    if job.shape == "tiny" and not (scratch / f"{REFERENCE}.json").is_file():
        _run(job, REFERENCE, folders, seconds)
    found = _run(job, contender, folders, seconds)
    if job.shape == "tiny" and found.tokens_per_s is not None:
        return found.model_copy(update=_against_reference(scratch, contender))
    return found


def _absent(contender: str) -> str:
    if contender in NEEDS and find_spec(NEEDS[contender]) is None:
        return f"{NEEDS[contender]} is not installed"
    if contender in GPU_ONLY and not this_machine().is_gpu:
        return "it needs a GPU"
    return ""


def _target(scratch: Path, contender: str) -> Path:
    """Where its process writes its figures; a checkout's folder is no file name."""
    code = Code.of(contender)
    name = code.name
    if code.checkout is not None:
        name += f"-{hashes.sha256_json(str(code.checkout))[:12]}"
    return (scratch / f"{name}.json").resolve()


def _run(job: Job, contender: str, folders: Folders, seconds: float) -> Measurement:
    target, code = _target(folders.scratch, contender), Code.of(contender)
    target.unlink(missing_ok=True)
    program = "from qmedtune.bench.train_process import main; main()"
    if contender == "unsloth":  # it patches what is imported after it
        program = f"import unsloth; {program}"
    models = str(folders.models.resolve())
    command = [sys.executable, "-c", program, code.name, json.dumps(asdict(job)), models, str(target)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=code.environment(),
            cwd=code.checkout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Measurement(absent=f"not finished within {seconds:.0f} s", later=True)
    if done.returncode != 0 or not target.is_file():
        said = done.stderr.strip().splitlines() or ["no message"]
        return Measurement(absent=f"failed: {said[-1][:300]}")
    return Measurement.model_validate_json(target.read_bytes())


def _against_reference(scratch: Path, contender: str) -> dict[str, float]:
    """Cosine of the adapters' first gradient to the fp32 loop's, and the widest gap of the losses."""
    import torch
    from safetensors.torch import load_file

    gradients, losses = [], []
    for name in (contender, REFERENCE):
        target = _target(scratch, name)
        gradients.append(load_file(target.with_suffix(".gradient.safetensors")))
        losses.append(Measurement.model_validate_json(target.read_bytes()).losses)
    ours, theirs = gradients
    assert ours.keys() == theirs.keys(), f"{contender} trains other adapters than {REFERENCE}"
    flat = []
    for found in gradients:
        parts = [found[name].flatten().double() for name in sorted(found)]
        flat.append(torch.cat(parts))
    gap = max(abs(mine - other) for mine, other in zip(*losses, strict=True))
    return {
        "gradient_cosine": round(float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)), 6),
        "loss_gap": round(gap, 5),
    }


# ------------------------------------------------------------------------------------------------------ what is told

MEDIANS = ("first_step_s", "load_s", "data_share")
PEAKS = ("peak_memory_bytes", "reserved_bytes", "device_bytes", "host_bytes", "host_anonymous_bytes")
OF_THE_LAST = ("gradient_cosine", "loss_gap", "layers", "card")


def _row(job: Job, contender: str, measured: list[Measurement], first: list[Measurement]) -> Row:
    row: Row = {"case": contender, "contender": contender, "unit": "tokens/s", "what": _what(contender)}
    good, speeds = [], []
    for found in measured:
        if found.tokens_per_s is not None:
            good.append(found)
            speeds.append(found.tokens_per_s)
    if not good:
        why = "not measured"
        if measured:
            why = measured[-1].absent
        return {**row, "value": None, "ratio": None, "absent": why}
    row |= {"value": round(statistics.median(speeds), 1), "spread": [round(min(speeds), 1), round(max(speeds), 1)]}
    row |= {"rounds": len(good)} | _ratios(measured, first)
    for name in MEDIANS:
        if name in good[0].model_fields_set:
            row[name] = round(statistics.median(getattr(found, name) for found in good), 4)
    for name in PEAKS:
        if name in good[0].model_fields_set:
            row[name] = max(getattr(found, name) for found in good)
    for name in OF_THE_LAST:
        if name in good[-1].model_fields_set:
            row[name] = getattr(good[-1], name)
    row |= utilisation(job, statistics.median(found.all_tokens_per_s for found in good))
    return row | {"loss": {"first": good[0].losses[0], "last": good[0].losses[-1]}}


def _what(contender: str) -> str:
    code = Code.of(contender)
    if code.checkout is None:
        return CONTENDERS[code.name]
    return f"{CONTENDERS[code.name]}, by the code of another checkout"


def _ratios(measured: list[Measurement], first: list[Measurement]) -> Row:
    """Speed over the first contender's, round by round. cpu_ratio: by CPU seconds a step in place of the clock; on a
    CPU it tells how far other processes were in the way."""
    by_clock, by_cpu = [], []
    for found, other in zip(measured, first, strict=False):
        if found.tokens_per_s is not None and other.tokens_per_s is not None:
            by_clock.append(found.tokens_per_s / other.tokens_per_s)
            by_cpu.append(other.cpu_s / found.cpu_s)
    if not by_clock:
        return {"ratio": None, "ratio_spread": None, "cpu_ratio": None}
    return {
        "ratio": round(statistics.median(by_clock), 3),
        "ratio_spread": [round(min(by_clock), 3), round(max(by_clock), 3)],
        "cpu_ratio": round(statistics.median(by_cpu), 3),
    }


def utilisation(job: Job, tokens_per_s: float) -> dict[str, float]:
    """TFLOP/s of the model, and their share of the card's data sheet: 4 for each weight that is multiplied and token
    (forward and input gradients; what is recomputed is not counted)."""
    sizes = tensors_of(SHAPES[job.shape])
    weights = 0
    for name, size in sizes.items():
        looked_up = name == "model.embed_tokens.weight" and "lm_head.weight" in sizes  # tied, it is the head too
        if len(size) > 1 and not looked_up:
            weights += size[0] * size[1]
    tflops = 4 * weights * tokens_per_s / 1e12
    for card, sheet in SHEET_TFLOPS.items():
        if card in this_machine().name:
            return {"tflops": round(tflops, 3), "utilisation": round(tflops / sheet, 4)}
    return {"tflops": round(tflops, 3)}


def setting_words(row: Row) -> str:
    """What follows a contender's description: the setting that `--best` found for a row, "" where none was searched."""
    if not row.get("setting"):
        return ""
    words = "all kept"
    if row["setting"]["checkpointing"]:
        words = "all recomputed"
    if "layers" in row:
        words = ", ".join(f"{count} {way}" for way, count in row["layers"].items())
    return f"; at its best: {row['setting']['micro_batch']} rows at a time, layers {words}"


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    columns = ["contender", "tokens/s", "ratio", "first step", "peak memory", "loss", "to fp32", ""]
    rows = []
    for row in result["rows"]:
        if row["value"] is None:
            rows.append([row["contender"], *["-"] * 6, row["absent"]])
            continue
        ratio, near = "-", ""
        if row["ratio"] is not None:
            low, high = row["ratio_spread"]
            ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        if "loss_gap" in row:
            near = f"cos {row['gradient_cosine']:.4f}, loss ±{row['loss_gap']:.3f}"
        loss = f"{row['loss']['first']:.3f} -> {row['loss']['last']:.3f}"
        memory = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB"
        cells = [f"{row['value']:,.0f}", ratio, f"{row['first_step_s']:.1f} s", memory, loss, near]
        rows.append([row["contender"], *cells, row["what"] + setting_words(row)])
    return columns, rows
