"""Read a corpus that is too large for one machine with datatrove, and leave shards that `data:` reads as they are.

    pip install 'qmedtune[datatrove]'
    python examples/many_machines.py /data/pmc /scratch/pmc_shards --tasks 64 --executor slurm --partition cpu

Every task reads its share of the files with this project's own readers (JATS, PubMed XML, MIMIC, S2ORC, JSON lines ...)
and writes `<task>.jsonl.gz`. Then, in a recipe: `literature: {path: /scratch/pmc_shards, kind: literature}`. Hygiene
stays with the recipe, because duplicates and PubMed versions reach across shards: give PubMed baselines and their
updates to `data:` directly, or they will not replace each other.
"""

# datatrove is an extra:
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from qmedtune.data.reading.sources import read_items, reading_order
from qmedtune.recipe import SourceSection


class MedicalReader(PipelineStep):
    """The sound records of every `world_size`-th file; patient, PMID and group go into `metadata`."""

    type, name = "READER", "qmedtune"

    def __init__(self, source: SourceSection):
        super().__init__()
        self.source = source

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        files = reading_order(self.source)[rank::world_size]
        for _, _, item in read_items(self.source, files) if files else ():
            if not isinstance(item, dict):
                self.stat_update(type(item).__name__.lower())
                continue
            known = {key: item[key] for key in ("patient", "pmid", "group") if key in item}
            yield Document(text=item["text"], id=item["id"], metadata=known)


def pipeline(source: SourceSection, out: Path) -> list[PipelineStep]:
    """Reader and writer; put datatrove's filters between them as you like."""
    return [MedicalReader(source), JsonlWriter(str(out))]


def executor(kind: str, steps: list[PipelineStep], tasks: int, logs: Path, partition: str) -> Any:
    if kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(steps, tasks=tasks, time="04:00:00", partition=partition, logging_dir=str(logs))
    if kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(steps, tasks=tasks, logging_dir=str(logs))
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", help="file, folder or pattern")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="literature", choices=["literature", "clinical", "general"])
    parser.add_argument("--format", default="auto")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--executor", default="local", choices=["local", "slurm", "ray"])
    parser.add_argument("--partition", default="cpu", help="of Slurm")
    asked = parser.parse_args()
    source = SourceSection(path=asked.corpus, kind=asked.kind, format=asked.format)
    logs = asked.out.with_name(f"{asked.out.name}-logs")
    executor(asked.executor, pipeline(source, asked.out), asked.tasks, logs, asked.partition).run()


if __name__ == "__main__":
    main()
