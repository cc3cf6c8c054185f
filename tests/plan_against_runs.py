"""Ten runs held against their plans: tokens, steps, memory, disk and time as predicted and as measured, as a Markdown
table.

    python tests/plan_against_runs.py [--out TABLE.md] [NAME ...]

Each run and its plan are processes of their own, on the CPU. What is measured is the run's own record (run.json) and
its folder. Exit code 1 where a figure is off by more than LIMIT and no reason is known for it (SAID); a time, which
other work on the machine makes longer, where it is off by more than TIME_FACTOR and the machine was not busy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune import store

ROOT = Path(__file__).parent.parent
LIMIT = 0.15
TIME_FACTOR = 2.0
MIB = 2**20
MICRO = "recipes/micro.yaml"
CLASSIFY = (
    "data.outcome={path: builtin:micro/outcomes, kind: clinical, split_by: patient, columns: {label: label}}",
    "adapter.train_embeddings=false",
    "stages=[{classify: {data: outcome, epochs: 4, seq_len: 16}}]",
    "evaluate={}",
    "validate={}",
)
AUDIT = ("audit={source: notes, prompts: instructions, repeats: [1, 4], canaries: 4}",)
SHAPE = "model.shape={hidden: 128, layers: 2, heads: 4, kv_heads: 2, intermediate: 192, max_positions: 128}"
SCRATCH = ("stages=[{pretrain: {mix: {literature: 1, notes: 1}, tokens: 8000, batch: 8, seq_len: 64}}]", SHAPE)
REAL = """\
name: real
model: {{base: {base}}}
adapter: {{r: 8, alpha: 16}}
data:
  notes: {{path: {notes}, kind: clinical, max_records: 60}}
  questions: {{path: {questions}, kind: instructions, template: alpaca, max_records: 40}}
stages:
  - cpt: {{mix: {{notes: 1}}, tokens: 4000, seq_len: 256}}
  - sft: {{data: questions, epochs: 1, seq_len: 512, max_truncated_fraction: 0.5}}
"""


@dataclass(frozen=True)
class Case:
    """A recipe of the repository with `--set`s, or the text of one."""

    name: str
    settings: tuple[str, ...] = ()
    recipe: str = MICRO
    text: str = ""


CASES = [
    Case("micro"),
    Case("no packing", ("stages[1].sft.packing=false",)),
    Case("classify, cut documents", CLASSIFY),
    Case("canaries", AUDIT),
    Case("folded base", ("adapter.train_embeddings=false", "stages[1].sft.adapter=merge_then_new")),
    Case("new adapter on top", ("adapter.train_embeddings=false", "stages[1].sft.adapter=new")),
    Case("windows and caps", ("data.literature.chunking=window", "data.notes.max_tokens=1500")),
    Case("from scratch", SCRATCH),
    Case("all parameters", ("stages[0].cpt.adapter=none", "stages[1].sft.adapter=none")),
    Case("keep best, epochs", ("validate.keep_best=true", "stages[0].cpt.tokens=auto", "stages[1].sft.epochs=3")),
]
# Why a figure may be off by more than LIMIT, by the name of the case ("" for all) and the figure.
BUSY = "not judged: other work on the machine"
ASSUMED = "speeds are assumed; with the machine alone within a factor of 2"
CONSTANT = "Python, libraries and what a run holds besides: 900 MiB are planned, 600 to 800 of them used"
SAID = {
    ("", "time, evaluation"): ASSUMED,
    ("", "time, loading to scores"): ASSUMED,
    ("", "time, busy, evaluation"): BUSY,
    ("", "time, busy, loading to scores"): BUSY,
    ("", "memory"): CONSTANT,
    ("", "host memory"): CONSTANT,
    ("", "disk, checkpoints"): "the most that are there at a time; none is left at the end",
    ("", "disk, best weights"): "gone at the end",
    ("", "disk, prepared text"): "sampled text, without the ids, hashes and rejects beside it",
    ("", "disk, packed tokens"): "tokens alone; a tiny stage's tables weigh as much",
}


@dataclass(frozen=True)
class Row:
    case: str
    figure: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0

    @property
    def said(self) -> str:
        return SAID.get((self.case, self.figure)) or SAID.get(("", self.figure.partition(": ")[2] or self.figure)) or ""

    @property
    def fine(self) -> bool:
        if self.said == ASSUMED:
            return 1 / TIME_FACTOR <= self.predicted / self.measured <= TIME_FACTOR
        below = self.said == CONSTANT and self.predicted < (1 - LIMIT) * self.measured  # too little is never excused
        return abs(self.off) <= LIMIT or (bool(self.said) and not below)


def command(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qmedtune", *arguments, "--json"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def rows_of(case: Case, folder: Path) -> Iterator[Row]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(case.text or (ROOT / case.recipe).read_text(encoding="utf-8"), encoding="utf-8")
    settings = [part for setting in case.settings for part in ("--set", setting)]
    run_dir = folder / "run"
    plan = command("plan", str(recipe), *settings, "--out", str(run_dir))
    result = command("run", str(recipe), *settings, "--out", str(run_dir), "--offline")
    for planned, stage in zip(plan["stages"], result["stages"], strict=True):
        yield Row(case.name, f"{stage['name']}: tokens", planned["trained"], stage["tokens"]["trained"])
        yield Row(case.name, f"{stage['name']}: steps", planned["steps"], stage["steps"])
        yield Row(case.name, f"{stage['name']}: memory", planned["peak_bytes"], stage["peak_memory_bytes"])
    highest = max(step_peaks(run_dir))
    yield Row(case.name, "host memory", plan["host"]["needed_bytes"], highest)
    times, name = times_of(result), "time"
    if os.getloadavg()[0] > (os.cpu_count() or 1) + 1:  # the run itself is one of them
        name = "time, busy"
    prepared = sum(step["seconds"] for step in result["steps"] if step["kind"] == "data")
    yield Row(case.name, f"{name}, data", plan["times"]["data"], prepared)
    yield Row(case.name, f"{name}, loading to scores", plan["seconds"] - plan["times"]["data"], sum(times.values()))
    if "evaluation" in times:
        yield Row(case.name, f"{name}, evaluation", plan["times"]["evaluation"], times["evaluation"])
    there = disk_of(run_dir, result)
    for part, size in plan["disk"]["parts"].items():
        yield Row(case.name, f"disk, {part}", size, there.get(part, 0))


def step_peaks(run_dir: Path) -> Iterator[int]:
    for seal in run_dir.rglob(store.SEAL):
        yield json.loads(seal.read_text(encoding="utf-8"))["facts"].get("host_peak_bytes", 0)


def times_of(result: dict[str, Any]) -> dict[str, float]:
    """Seconds of every step but those of the data."""
    return {step["name"]: step["seconds"] for step in result["steps"] if step["kind"] != "data"}


def disk_of(run_dir: Path, result: dict[str, Any]) -> dict[str, int]:
    """The run's folders by the plan's names for them."""
    stages = [stage["name"] for stage in result["stages"]]
    packed = {*stages, "validation"}
    prepared = [path for path in (run_dir / "data").iterdir() if path.name not in packed]
    return {
        "prepared text": sum(map(size_of, prepared)),
        "packed tokens": sum(size_of(run_dir / "data" / name) for name in stages),
        "adapters": sum(size_of(run_dir / name / "adapter") for name in stages),
        "stage models": sum(size_of(run_dir / name / "model") for name in stages),
        "folded bases": sum(map(size_of, run_dir.glob("*-base"))),
        "merged model": size_of(run_dir / "merged"),
    }


def size_of(folder: Path) -> int:
    """Weights, tokens and text below a folder; tokenizers and seals are small beside those of a real model."""
    small = (".json", ".jinja", ".md", ".model")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix not in small)


def shown(row: Row, value: float) -> str:
    if row.figure.startswith("disk") or row.figure.endswith("memory"):
        return f"{value / MIB:,.1f} MiB"
    if row.figure.startswith("time"):
        return f"{value:,.1f} s"
    return f"{value:,.0f}"


def markdown(rows: list[Row]) -> str:
    lines = ["| run | figure | predicted | measured | off | |", "| --- | --- | --: | --: | --: | --- |"]
    for row in rows:
        off = f"{row.off:+.0%}" if row.measured else ""
        cells = [row.case, row.figure, shown(row, row.predicted), shown(row, row.measured), off, row.said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def real_cases() -> list[Case]:
    """A real model on real text, where both are on this machine."""
    data = Path(os.environ.get("QMEDTUNE_REAL_DATA") or ROOT.parent / "shared" / "data")
    base = os.environ.get("QMEDTUNE_REAL_BASE", "builtin:smollm2")
    notes, questions = data / "clinical", data / "instructions" / "chatdoctor5k.json"
    if not notes.exists() or not questions.exists():
        return []
    return [Case("real model", text=REAL.format(base=base, notes=notes, questions=questions))]


def measured_rows(names: list[str]) -> list[Row]:
    cases = [case for case in [*CASES, *real_cases()] if not names or case.name in names]
    rows: list[Row] = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="qmedtune-plan-") as folder:
            rows += rows_of(case, Path(folder))
        print(f"{case.name}: done", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = measured_rows(given.names)
    (given.out.write_text if given.out else print)(markdown(rows))
    sys.exit(0 if all(row.fine for row in rows) else 1)


if __name__ == "__main__":
    main()
