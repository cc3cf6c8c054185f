"""Clean the sources of a recipe on many machines, with datatrove, into shards that `data:` reads as they are.

    pip install 'qmedtune[datatrove]'           # and 'qmedtune[ray]' for --executor ray
    python examples/many_machines.py recipe.yaml /shared/corpus --tasks 64 --executor slurm --partition cpu

Cleaning, identifiers, benchmark text, duplicates and near duplicates are those of the recipe, over all shards of all
its sources: the kept records and the ledger (/shared/corpus/<source>/ledger.json) are those of a run on one machine.
Then, in the recipe that trains, `literature: {path: /shared/corpus/literature/shards, kind: literature}`;
examples/cluster.md says what else changes there. The same command goes on where a job was interrupted.
"""

# datatrove and ray are extras:
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Before datatrove and ray are imported: values of variables stay out of logs, and nothing is reported home.
SAFE = {"LOGURU_DIAGNOSE": "NO", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.update(SAFE)

from qmedtune.data.shards import blocks, passes  # noqa: E402
from qmedtune.data.shards.job import JobPlaces, plan_job  # noqa: E402
from qmedtune.errors import QmedtuneError, RunError  # noqa: E402
from qmedtune.parsing.loader import load_recipe  # noqa: E402


def executor(asked: argparse.Namespace, step: blocks.PipelineOfJob, before: Any) -> Any:
    """Of one pipeline; `before`: the executor of the one before it. Change here what your cluster wants otherwise."""
    name, pipeline, tasks = step
    # Finished shards are known by their hashes, not by datatrove's marks: one that was lost is made again.
    common = {"tasks": tasks, "logging_dir": str(asked.out / "logs" / name), "skip_completed": False}
    if asked.executor == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            pipeline, time=asked.time, partition=asked.partition, job_name=name, depends=before, workers=asked.workers,
            mem_per_cpu_gb=asked.memory_gb, slurm_logs_folder=str(asked.out / "logs" / name / "slurm"), **common,
        )  # fmt: skip
    if asked.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(pipeline, workers=asked.workers, mem_per_cpu_gb=asked.memory_gb, **common)
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(pipeline, workers=min(tasks, max(1, asked.workers)), **common)


def connect_to_ray(address: str | None, workers: int) -> None:
    """To the cluster at `address`, or to one of this machine alone. Raises RunError where it does not answer."""
    import ray

    told = {"env_vars": {**SAFE, "QMEDTUNE_SECRETS": os.environ.get("QMEDTUNE_SECRETS", "")}}
    try:
        if address:
            ray.init(address=address, runtime_env=told)
        else:
            ray.init(num_cpus=max(1, workers), include_dashboard=False, runtime_env=told)
    except Exception as error:  # Ray raises plain ones
        raise RunError(
            f"Ray: {str(error).splitlines()[0]}\n"
            "see `ray status`, or the logs below /tmp/ray; without Ray: --executor local, or slurm"
        ) from None


def run(asked: argparse.Namespace) -> None:
    """Raises QmedtuneError with the first message of a task that failed."""
    job = plan_job(load_recipe(asked.recipe).recipe, asked.out, asked.tasks)
    shutil.rmtree(asked.out / blocks.ERRORS, ignore_errors=True)
    if not passes.is_whole(asked.out):
        if asked.executor == "ray":
            connect_to_ray(asked.address, asked.workers)
        run_all(asked, blocks.pipelines(job, asked.out))
    if asked.executor == "slurm" and not passes.is_whole(asked.out):
        print(f"submitted; errors will lie in {asked.out / blocks.ERRORS}, ledgers in {asked.out}/<source>/ledger.json")
        return
    for name, ledger in passes.ledgers(asked.out).items():
        told = [f"{count:,} {fate}" for fate, count in ledger.records.as_json().items()]
        print(f"{name}: {', '.join(told)}\n  {JobPlaces(asked.out, name).shards}")


def run_all(asked: argparse.Namespace, steps: list[blocks.PipelineOfJob]) -> None:
    """One pipeline after the other; Slurm is only told to."""
    before = None
    for step in steps:
        before = executor(asked, step, before)
        try:
            before.run()
        except Exception as error:  # a task's: datatrove raises it again here, or (Ray) leaves it in its logs
            raise RunError(problems(asked.out) or f"{step.name}: {type(error).__name__}: {error}") from None
        if asked.executor != "slurm" and (said := problems(asked.out)):
            raise RunError(said)


def problems(out: Path) -> str:
    """The first message in errors/, and how many others there are; empty for none."""
    messages = blocks.errors_in(out)
    if len(messages) > 1:
        return f"{messages[0]}\n({len(messages) - 1} other messages in {out / blocks.ERRORS})"
    return "".join(messages)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path, help="a folder that all machines see under this path")
    parser.add_argument("--tasks", type=int, default=4, help="shards of each source, at most one a file")
    parser.add_argument("--workers", type=int, default=-1, help="how many tasks at once")
    parser.add_argument("--executor", default="local", choices=["local", "slurm", "ray"])
    parser.add_argument("--memory-gb", type=int, default=2, help="of each task; `compare` needs 30 bytes a record")
    parser.add_argument("--partition", default="cpu", help="of Slurm")
    parser.add_argument("--time", default="04:00:00", help="limit of each task, of Slurm")
    parser.add_argument("--address", help="of a running Ray cluster; without it one is started on this machine")
    asked = parser.parse_args()
    asked.out = asked.out.absolute()
    try:
        run(asked)
    except QmedtuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
