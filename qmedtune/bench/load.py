"""`qmedtune bench load`: how long the GPU waits for anything but training: until a base is ready, as a stage loads it,
until the next stage has it, and for a checkpoint (r = 16 on all linears, AdamW in fp32).

From 16-bit shards, which are quantised on the way (transformers and bitsandbytes take tensor by tensor from the mapped
file), and from a folder that is NF4 already. The files have just been written, so they are in the page cache. Every
round is a process of its own; imports and the start of CUDA are not counted. On a CPU the model is then held in 16 bit
in host memory, which the figure contains. A checkpoint is written, hashed and on the disk beside the model.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.bench import random_bases
from qmedtune.bench.random_bases import SHAPES
from qmedtune.bench.result import BenchResult, Row
from qmedtune.bench.train import all_versions
from qmedtune.errors import RecipeError, RunError
from qmedtune.planning.machine import this_machine
from qmedtune.process import prepare

CASES = {
    "16-bit": "bf16 shards, quantised to NF4 while they are read",
    "nf4": "a folder that bitsandbytes has quantised before",
}

WAITS = ("next_stage_s", "checkpoint_s", "checkpoint_bytes")
RANK, SEQ_LEN = 16, 4096


def bench_load(
    shape: str = "tiny", cases: tuple[str, ...] = tuple(CASES), rounds: int = 3, scratch: Path | None = None
) -> BenchResult:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}`, a row per case, of medians: `value` is the
    seconds until the base is ready, `next_stage_s` until the next stage has it, `checkpoint_s` what a checkpoint of
    `checkpoint_bytes` takes. `host_bytes` is the highest anonymous memory while loading above that before,
    `largest_shard_bytes` and `weight_bytes` are the folder's. Raises RecipeError for an unknown shape or case, RunError
    where loading fails."""
    if shape not in SHAPES:
        raise RecipeError(f"bench load: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    for case in cases:
        if case not in CASES:
            raise RecipeError(f"bench load: no case {case!r}\nallowed: {', '.join(CASES)}")
    rows = []
    with (
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        ui.progress_bar("bench load", len(cases) * rounds, "runs") as bar,
    ):
        for case in cases:
            base = Path(folder) / case
            for made in Path(folder).iterdir():
                shutil.rmtree(made)
            write = random_bases.write_nf4_model if case == "nf4" else random_bases.write_model
            write(SHAPES[shape], base)
            found = []
            for _ in range(rounds):
                found.append(_measure(base))
                bar.update(len(rows) * rounds + len(found), note=case)
            rows.append(_row(case, shape, base, found))
    job = {"shape": shape, "rounds": rounds}
    return {"bench": "load", "device": this_machine().name, "versions": all_versions(), "job": job, "rows": rows}


def _row(case: str, shape: str, base: Path, found: list[dict[str, float]]) -> Row:
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    seconds = [f["seconds"] for f in found]
    waits = {}
    for key in WAITS:
        waits[key] = statistics.median(f[key] for f in found)
    return {
        "case": case,
        "shape": shape,
        "contender": "qmedtune",
        "what": CASES[case],
        "value": round(statistics.median(seconds), 3),
        "unit": "s",
        "spread": [round(min(seconds), 3), round(max(seconds), 3)],
        **waits,
        "host_bytes": max(f["host_bytes"] for f in found),
        "device_bytes": max(f["device_bytes"] for f in found),
        "largest_shard_bytes": max(sizes),
        "weight_bytes": sum(sizes),
    }


def _measure(base: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "qmedtune.bench.load", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RunError(f"bench load: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    prepare()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qmedtune.bench.rounds import anonymous_peak
    from qmedtune.planning.machine import this_machine
    from qmedtune.planning.numerics import numerics
    from qmedtune.recipe import ModelSection
    from qmedtune.train import quiet_libraries
    from qmedtune.training.shared_base import SharedBase

    quiet_libraries()
    base, gpu = Path(sys.argv[1]), torch.cuda.is_available()
    if gpu:
        torch.zeros(1, device="cuda")
    section, shared = ModelSection(base=str(base), compute_dtype="bfloat16"), SharedBase()
    attention = numerics(section, full=False, seq_len=SEQ_LEN, machine=this_machine()).attention
    with anonymous_peak() as peak:
        before, started = peak[0], time.monotonic()
        shared.load(base, section, attention=attention)
        if gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    device_bytes = torch.cuda.max_memory_allocated() if gpu else 0
    started = time.monotonic()
    model = shared.load(base, section, attention=attention)
    waits = {"next_stage_s": time.monotonic() - started, **_checkpoint(model, base.parent)}
    print(json.dumps({"seconds": seconds, "host_bytes": peak[0] - before, "device_bytes": device_bytes, **waits}))


def _checkpoint(model: Any, folder: Path) -> dict[str, float]:
    """Seconds and bytes of a checkpoint such as a stage writes on this base."""
    import torch
    from torch.optim.lr_scheduler import ConstantLR
    from transformers import TrainerState

    from qmedtune import model as models
    from qmedtune import store
    from qmedtune.bench import train_worker
    from qmedtune.bench.job import Job
    from qmedtune.recipe import AdapterSection
    from qmedtune.training import checkpoints
    from qmedtune.training.trainer import make_optimizer

    trained = models.trainable(models.attach_adapter(model, AdapterSection(r=RANK), [], continued=False))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(model, train_worker.section_of(Job()))
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        (Path(stage) / store.SCRATCH).mkdir()
        schedule = ConstantLR(optimizer)
        os.sync()
        started = time.monotonic()
        states = checkpoints.states_of(optimizer, schedule, None)
        checkpoint = checkpoints.Checkpoint(1, trained, states, TrainerState(), {})
        made = checkpoints.save(Path(stage), checkpoint, keep=1)
        seconds = time.monotonic() - started
        return {"checkpoint_s": seconds, "checkpoint_bytes": sum(p.stat().st_size for p in made.iterdir())}


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    rows = []
    for row in result["rows"]:
        low, high = row["spread"]
        cells = [row["case"], f"{row['value']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['next_stage_s']:.2f}"]
        cells.append(f"{row['checkpoint_s']:.2f} ({row['checkpoint_bytes'] / 1e6:.0f} MB)")
        for name in ("host_bytes", "largest_shard_bytes", "weight_bytes"):
            cells.append(f"{row[name] / 2**30:.2f} GiB")
        rows.append(cells)
    return ["case", "seconds", "spread", "next stage", "checkpoint", "host memory", "largest shard", "weights"], rows


if __name__ == "__main__":
    main()
