"""Contenders that make a folder on the disk, each in a process of its own, in turns: `bench merge` and `bench export`.

A worker is the module `qmedtune.bench.<name>`, called with a contender and paths; it ends in `work_alone`. What is
quoted are ratios within one run. Imports are counted for nobody, the wait for the disk is counted for everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmedtune import ui
from qmedtune.bench.random_bases import SHAPES
from qmedtune.bench.result import BenchResult, Row
from qmedtune.errors import RecipeError, RunError
from qmedtune.record import device_name, versions
from qmedtune.results import Facts

SAMPLE_S = 0.005
# A virtual machine hands memory back to its host about a second after it was freed, and to get it again for 2 GB of
# files costs a second: nobody starts on what the contender before freed (cp then took 1.3 s instead of 2.0 to 3.1).
SETTLE_S = 3.0


class MadeFolder(Facts):
    """One folder that a contender has made. cpu_s: of all cores; peak_anonymous_bytes: what the kernel cannot take
    back, imports included; figures: of its proof."""

    seconds: float
    cpu_s: float
    peak_anonymous_bytes: int
    figures: Row = {}


@dataclass(frozen=True)
class Bench:
    """A benchmark whose contenders are measured in rounds, each in a process of its own.

    name: of the benchmark and of its module; contenders: what is measured, and what each is in words.
    """

    name: str
    contenders: Mapping[str, str]

    def check(self, shape: str, chosen: Sequence[str]) -> None:
        """RecipeError for a shape or a contender that there is not."""
        if shape not in SHAPES:
            raise RecipeError(f"bench {self.name}: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
        for contender in chosen:
            if contender not in self.contenders:
                allowed = ", ".join(self.contenders)
                raise RecipeError(f"bench {self.name}: no contender {contender!r}\nallowed: {allowed}")


def measure_rounds(
    bench: Bench, chosen: Sequence[str], rounds: int, given: Sequence[Path]
) -> dict[str, list[MadeFolder]]:
    """Every contender in each round. given: the folders that a worker reads; what it makes lies beside the first, and
    is removed."""
    measured: dict[str, list[MadeFolder]] = {contender: [] for contender in chosen}
    out = given[0].with_name("out")
    done = 0
    with ui.progress_bar(f"bench {bench.name}", None, "runs") as bar:
        for _ in range(rounds):
            for contender in chosen:
                measured[contender].append(measure_one(bench, contender, [*given, out]))
                done += 1
                bar.update(done, note=contender)
    return measured


def measure_one(bench: Bench, contender: str, paths: Sequence[Path]) -> MadeFolder:
    """One contender in a process of its own; the last of `paths` is what it makes. RunError where it fails."""
    os.sync()
    time.sleep(SETTLE_S)
    command = [sys.executable, "-m", f"qmedtune.bench.{bench.name}", contender, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(
            f"bench {bench.name}: {contender} failed: {reason[:300]}\nis there room for twice the model here?"
        )
    shutil.rmtree(paths[-1])
    return MadeFolder.model_validate_json(done.stdout.splitlines()[-1])


def result_of(bench: Bench, measured: Mapping[str, list[MadeFolder]], job: Row) -> BenchResult:
    """A row for each contender: `value` is the median of seconds over the rounds, `ratio` the median over rounds of its
    seconds over the first contender's of that round, `peak_anonymous_bytes` the largest."""
    first = next(iter(measured.values()))
    rows = []
    for contender, found in measured.items():
        rows.append({
            "case": bench.name,
            "shape": job["shape"],
            "contender": contender,
            "what": bench.contenders[contender],
            **_figures(found, first),
        })  # fmt: skip
    return {"bench": bench.name, "device": device_name(), "versions": versions(), "job": job, "rows": rows}


def _figures(found: Sequence[MadeFolder], first: Sequence[MadeFolder]) -> Row:
    seconds: list[float] = []
    ratios: list[float] = []
    cpu_s: list[float] = []
    peaks: list[int] = []
    for own, other in zip(found, first, strict=True):
        seconds.append(own.seconds)
        ratios.append(own.seconds / other.seconds)
        cpu_s.append(own.cpu_s)
        peaks.append(own.peak_anonymous_bytes)
    return {
        "value": statistics.median(seconds),
        "unit": "s",
        "ratio": statistics.median(ratios),
        "spread": [min(seconds), max(seconds)],
        "cpu_s": statistics.median(cpu_s),
        "peak_anonymous_bytes": max(peaks),
        **found[-1].figures,
    }


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table for people."""
    first = result["rows"][0]["contender"]
    rows = []
    for row in result["rows"]:
        low, high = row["spread"]
        cells = [row["contender"], f"{row['value']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['cpu_s']:.1f}"]
        rows.append([*cells, f"{row['ratio']:.2f}", f"{row['peak_anonymous_bytes'] / 1e6:.0f} MB"])
    return ["contender", "seconds", "spread", "CPU seconds", f"x {first}", "anonymous memory"], rows


# ------------------------------------------------------------------------------------------------- in its own process


def work_alone(work: Callable[[], Row]) -> None:
    """Do it, wait for the disk, and print what it took as a `MadeFolder`."""
    with anonymous_peak() as peak:
        started, cpu_s = time.monotonic(), sum(os.times()[:4])
        figures = work()
        os.sync()
        seconds = time.monotonic() - started
    cpu_s = sum(os.times()[:4]) - cpu_s
    made = MadeFolder(seconds=seconds, cpu_s=cpu_s, peak_anonymous_bytes=peak[0], figures=figures)
    print(json.dumps(made.as_json()))


def copy(folder: Path, out: Path) -> Row:
    """The bytes alone."""
    subprocess.run(["cp", "-r", str(folder), str(out)], check=True)
    return {}


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The peak of this process' anonymous memory in bytes while inside, sampled every 5 ms."""
    peak = [anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def anonymous_bytes() -> int:
    """Of this process now: what the kernel cannot take back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024
