"""The process of one contender of `qmedtune bench train`: which code it runs, and where its figures go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qmedtune.bench import train_peers
from qmedtune.bench.job import Job
from qmedtune.bench.train_worker import Clock, ablated, figures, limit_memory, model_folder, qmedtune
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.process import prepare


def run(contender: str, job: Job, folder: Path, clock: Clock) -> None:
    if contender.startswith("without-"):
        ablated(job, folder, clock, contender)
    elif contender.startswith("qmedtune"):
        qmedtune(job, folder, clock, "reference" if contender.endswith("reference") else "auto")
    else:
        train_peers.PEERS[contender](job, folder, clock)


def main() -> None:
    prepare()
    contender, text, models, target = sys.argv[1:5]
    job = Job(**json.loads(text))
    quiet_libraries()
    folder = model_folder(job, Path(models))
    limit_memory(job.memory_gib)
    clock = Clock(job)
    run(contender, job, folder, clock)
    if clock.gradient:
        from safetensors.torch import save_file

        save_file(clock.gradient, Path(target).with_suffix(".gradient.safetensors"))
    Path(target).write_text(json.dumps(figures(job, clock)))
