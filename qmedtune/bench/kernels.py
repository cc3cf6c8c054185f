"""`qmedtune bench kernels`: the kernels against the physical limit and against what a user would install instead.

One process per contender (Unsloth patches globally), rows appended to a file as they are measured, so an interrupted
run goes on where it stopped; rows of our kernels count only for the sources they were measured with. Each row: CUDA
graph over rotating buffers (cold L2), median of 25 replays.
Deliberately not here: what is timed (contenders.py), the gate without a GPU (static.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from qmedtune.bench.result import BenchResult, Row
from qmedtune.bench.static import static_rows
from qmedtune.errors import RunError

REPLAYS = 25
COLD_BYTES = 256 * 2**20  # rotated over at least this much: four times an H200's L2 (60 MB)
MOST_COPIES = 256  # calls in one CUDA graph
TIME_LIMIT_S = 480
GRACE_S = 60  # a contender that hangs is ended this long after its time
OURS = ("qmedtune", "cublas")  # both decode with our kernels


def bench_kernels(
    *,
    static: bool = False,
    out: Path | None = None,
    quick: bool = False,
    only: str = "",
    time_limit_s: float = TIME_LIMIT_S,
) -> BenchResult:
    """{"bench", "device", "versions", "rows"} of the bench JSON.

    static: compile for every architecture and read the machine code; needs no GPU; `failures` lists broken limits.
    Otherwise measure on the CUDA device, keeping the rows already in `out`. only: kernels whose name contains it.
    Raises RunError without a CUDA device.
    """
    if static:
        rows = static_rows(kernels=only)
        return {"bench": "kernels static", "device": "none", "versions": versions(), "rows": rows}
    import torch

    if not torch.cuda.is_available():
        raise RunError("bench kernels: no CUDA device here. What works without one: qmedtune bench kernels --static")
    from qmedtune.bench.contenders import CONTENDERS

    rows, deadline = _resume(out), time.monotonic() + time_limit_s
    for contender in CONTENDERS:
        task = {"contender": contender, "quick": quick, "only": only, "seconds": deadline - time.monotonic()}
        rows = _measure_in_a_process(task, rows, out)
    return _result(rows)


def failures(result: BenchResult) -> list[str]:
    """One line per broken limit of a static result."""
    found = []
    for row in result["rows"]:
        for failure in row.get("failures", ()):
            found.append(f"{row['kernel']} on {row['target']}: {failure}")
    return found


def versions() -> dict[str, str]:
    """Installed versions of everything that is measured, and the driver where there is one."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "triton", "bitsandbytes", "liger-kernel", "unsloth"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def sources() -> str:
    """A fingerprint of the kernels' code: results belong to it."""
    spec = importlib.util.find_spec("qmedtune_kernels")
    assert spec and spec.origin
    code = hashlib.sha256()
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()[:16]


def _result(rows: list[Row]) -> BenchResult:
    import torch

    _add_ratios(rows)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "bench": "kernels", "device": torch.cuda.get_device_name(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()), "sources": sources(),
        "versions": {**versions(), "driver": driver}, "rows": rows,
    }  # fmt: skip


def _resume(out: Path | None) -> list[Row]:
    """Rows of an earlier run with the same device and versions; ours only of the same sources."""
    import torch

    if out is None or not out.exists():
        return []
    earlier = json.loads(out.read_text())
    earlier["versions"].pop("driver", None)
    if earlier["device"] != torch.cuda.get_device_name() or earlier["versions"] != versions():
        return []
    same = earlier.get("sources") == sources()
    return [row for row in earlier["rows"] if "value" in row and (same or row["contender"] not in OURS)]


def _measure_in_a_process(task: Row, rows: list[Row], out: Path | None) -> list[Row]:
    from qmedtune.bench.contenders import PACKAGES

    contender = task["contender"]
    package = PACKAGES.get(contender)
    if package and importlib.util.find_spec(package) is None:
        return [*rows, {"kernel": "all", "contender": contender, "skipped": f"{package} is not installed"}]
    if task["seconds"] <= 0:
        return [*rows, {"kernel": "all", "contender": contender, "skipped": "time limit"}]
    rows = [row for row in rows if row["contender"] != contender or "value" in row]
    done = []
    for row in rows:
        if row["contender"] == contender:
            done.append([row["kernel"], row["shape"]])
    command = [sys.executable, "-m", "qmedtune.bench.kernels", json.dumps({**task, "done": done})]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    watch = threading.Timer(task["seconds"] + GRACE_S, child.kill)
    watch.start()
    for line in child.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(_result(rows), indent=1) + "\n")
    watch.cancel()
    if child.wait() != 0:
        rows.append({"kernel": "all", "contender": contender, "skipped": f"process ended with {child.returncode}"})
    return rows


def _add_ratios(rows: list[Row]) -> None:
    """ratio: the best other contender's time over the row's; of_limit: the limit's time over the row's, where the limit
    was timed, else the roofline's: the larger share of the best copy bandwidth and of the best bare cuBLAS rate."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "value" in row:
            groups.setdefault((row["kernel"].split(":")[0], row["shape"]), []).append(row)
    bandwidth = rate = 0.0
    for row in rows:
        if row["contender"] == "limit" and "value" in row:
            bandwidth = max(bandwidth, row["gb_per_s"])
            rate = max(rate, row["tflops"])
    for group in groups.values():
        _compare(group, bandwidth, rate)


def _compare(group: list[Row], bandwidth: float, rate: float) -> None:
    """The contenders of one kernel and shape. bandwidth: GB/s; rate: TFLOP/s; 0 where no limit was timed."""
    times = {row["contender"]: row["value"] for row in group}
    limit = times.pop("limit", None)
    for row in group:
        others = [value for contender, value in times.items() if contender != row["contender"]]
        row["ratio"] = row["of_limit"] = None
        if others:
            row["ratio"] = round(min(others) / row["value"], 3)
        if limit:
            row["of_limit"] = round(limit / row["value"], 3)
        elif bandwidth and rate:
            row["of_limit"] = round(max(row["gb_per_s"] / bandwidth, row["tflops"] / rate), 3)


def _child(task: Row) -> None:
    """Measure one contender, a JSON line per row on stdout."""
    import torch

    from qmedtune.bench.contenders import cases

    deadline = time.monotonic() + task["seconds"]
    for case in cases(task["contender"], task["quick"]):
        if [case.kernel, case.shape] in task["done"] or task["only"] not in case.kernel:
            continue
        row = {"kernel": case.kernel, "shape": case.shape, "contender": task["contender"]}
        if time.monotonic() > deadline:
            print(json.dumps({**row, "skipped": "time limit"}), flush=True)
            continue
        try:
            row |= _timed(case)
        except Exception as error:  # one case of one peer must not cost the rows after it
            row["skipped"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()


def _timed(case) -> Row:
    seconds, spread = measure(case)
    row = {"value": round(seconds * 1e6, 3), "unit": "us", "spread": round(spread, 4)}
    row |= {"gb_per_s": round(case.bytes / seconds / 1e9, 1), "tflops": round(case.flops / seconds / 1e12, 2)}
    return row if case.error is None else {**row, "error": case.error()}


@cache
def _stream():
    """One for all cases: each stream has a scratch buffer of its own."""
    import torch

    return torch.cuda.Stream()


def copies_of(bytes_: float) -> int:
    """Sets of buffers that are rotated: together at least COLD_BYTES, however small one is (k/v of 8B: 2 MB)."""
    return max(1, min(MOST_COPIES, -(-COLD_BYTES // int(bytes_))))


def measure(case) -> tuple[float, float]:
    """(median seconds of one call, (p90 - p10) / median) over replays of a CUDA graph of calls on rotating buffers."""
    times = replayed([case.setup] * copies_of(case.bytes))
    median = statistics.median(times)
    return median, (times[int(0.9 * len(times))] - times[int(0.1 * len(times))]) / median


def replayed(setups: Sequence[Callable[[], Callable[[], object]]]) -> list[float]:
    """Seconds of a call, ascending over replays of one CUDA graph of the calls that `setups` make, in turn: what the
    host takes does not count, and buffers that rotate through more than the L2 are read from memory."""
    import torch

    stream = _stream()
    with torch.cuda.stream(stream):  # autograd runs a backward on its forward's stream: it must be the captured one
        calls = [setup() for setup in setups]
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times[5:])


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
