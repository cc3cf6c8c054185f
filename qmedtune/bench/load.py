"""`qmedtune bench load`: seconds and host memory until a base is ready to train, as a stage loads it.

From 16-bit shards, which are quantised on the way (transformers and bitsandbytes take tensor by tensor from the mapped
file), and from a folder that is NF4 already. The files have just been written, so they are in the page cache. Every
round is a process of its own; imports and the start of CUDA are not counted. On a CPU the model is then held in 16 bit
in host memory, which the figure contains.
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
from qmedtune.bench import shapes
from qmedtune.bench.shapes import SHAPES
from qmedtune.bench.train import all_versions
from qmedtune.errors import RecipeError, RunError
from qmedtune.planning.machine import this_machine

CASES = {
    "16-bit": "bf16 shards, quantised to NF4 while they are read",
    "nf4": "a folder that bitsandbytes has quantised before",
}


def bench_load(
    shape: str = "tiny", cases: tuple[str, ...] = tuple(CASES), rounds: int = 3, scratch: Path | None = None
) -> dict[str, Any]:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}`, a row per case: `value` is the median of
    seconds, `host_bytes` the highest anonymous memory above what the process held before, `largest_shard_bytes` and
    `weight_bytes` of the folder. Raises RecipeError for an unknown shape or case, RunError where loading fails."""
    if shape not in SHAPES:
        raise RecipeError(f"bench load: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    if unknown := [case for case in cases if case not in CASES]:
        raise RecipeError(f"bench load: no case {unknown[0]!r}\nallowed: {', '.join(CASES)}")
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder, ui.stage("bench load", len(cases) * rounds, "runs") as bar:
        for case in cases:
            base = Path(folder) / case
            for made in Path(folder).iterdir():
                shutil.rmtree(made)
            (shapes.write_model if case == "16-bit" else shapes.write_nf4_model)(SHAPES[shape], base)
            found = []
            for _ in range(rounds):
                found.append(_measure(base))
                bar.update(len(rows) * rounds + len(found), note=case)
            rows.append(_row(case, shape, base, found))
    job = {"shape": shape, "rounds": rounds}
    return {"bench": "load", "device": this_machine().name, "versions": all_versions(), "job": job, "rows": rows}


def _row(case: str, shape: str, base: Path, found: list[dict[str, float]]) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    seconds = [f["seconds"] for f in found]
    return {
        "case": case,
        "shape": shape,
        "contender": "qmedtune",
        "what": CASES[case],
        "value": round(statistics.median(seconds), 3),
        "unit": "s",
        "spread": [round(min(seconds), 3), round(max(seconds), 3)],
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
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qmedtune import model as models
    from qmedtune.bench.merge import anonymous_peak
    from qmedtune.recipe import ModelSection
    from qmedtune.train import quiet_libraries

    quiet_libraries()
    base, gpu = Path(sys.argv[1]), torch.cuda.is_available()
    if gpu:
        torch.zeros(1, device="cuda")
    with anonymous_peak() as peak:
        before, started = peak[0], time.monotonic()
        models.load_base(base, ModelSection(base=str(base), compute_dtype="bfloat16"))
        if gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    device_bytes = torch.cuda.max_memory_allocated() if gpu else 0
    print(json.dumps({"seconds": seconds, "host_bytes": peak[0] - before, "device_bytes": device_bytes}))


def render(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    rows = [
        [
            row["case"],
            f"{row['value']:.1f}",
            f"{row['spread'][0]:.1f} to {row['spread'][1]:.1f}",
            f"{row['host_bytes'] / 2**30:.2f} GiB",
            f"{row['largest_shard_bytes'] / 2**30:.2f} GiB",
            f"{row['weight_bytes'] / 2**30:.2f} GiB",
        ]
        for row in result["rows"]
    ]
    return ["case", "seconds", "spread", "host memory", "largest shard", "weights"], rows


if __name__ == "__main__":
    main()
