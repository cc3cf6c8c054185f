"""The first eight minutes on a CUDA card: what is learnt most from, told as it is learnt, gating nothing.

    python3 kernels/benchmarks/first_call.py OUT          # 480 s; a card, torch and the wheels of carry_wheels.sh
    python3 kernels/benchmarks/first_call.py OUT --dry    # every part with small shapes on a CPU, a minute and a half
    python3 kernels/benchmarks/first_call.py OUT --dry --together    # the same in one process, for CI

OUT/first_call.jsonl gets a line for each finding, written at once: whatever is cut off has been told. Beside it lie
tests.junit.xml, profile.txt and sanitizer.txt. Each probe runs in a process of its own with a limit of its own; one
that crashes, hangs or runs out of time costs only itself. second_call.sh re-measures and writes what dispatch trusts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOTAL_S = 480.0
LOG = "first_call.jsonl"


@dataclass(frozen=True)
class Call:
    """Where findings go, and whether this is the dry run. together: probes and trainings share a process, because of
    the 80 s that a dry run takes 60 are imports, made 14 times."""

    out: Path
    dry: bool
    together: bool = False

    def tell(self, probe: str, **finding: Any) -> None:
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"probe": probe, **finding}) + "\n")

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def scratch(self) -> Path:
        """For models and runs, beside the results: those are few files."""
        folder = Path(os.environ.get("SCRATCH") or tempfile.gettempdir()) / "qmedtune-first-call"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def timed(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one that warms up. For calls of a millisecond: the host's part counts."""
        import torch

        times = []
        for number in range(4 if self.dry else 12):
            if not self.dry:
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if not self.dry:
                torch.cuda.synchronize()
            if number:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def rotated(self, setups: Sequence[Callable[[], Callable[[], object]]]) -> float:
        """The same for calls of microseconds: replays of a CUDA graph of those that `setups` make, on buffers that are
        not in the L2; dry, the first of them."""
        if self.dry:
            return self.timed(setups[0]())
        from qmedtune.bench.kernels import replayed

        return statistics.median(replayed(setups))

    def finding(self, probe: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One measurement; what it raises is its finding."""
        try:
            self.tell(probe, what=what, **measure())
        except Exception as error:  # the next measurement may still work
            self.tell(probe, what=what, failed=f"{type(error).__name__}: {last_line(str(error))}")


def last_line(text: str) -> str:
    """At most 300 characters of it; "" where there is none."""
    return (text.strip().splitlines() or [""])[-1][:300]


def half() -> Any:
    import torch

    capable = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    return torch.bfloat16 if capable else torch.float16


# ------------------------------------------------------------------------------------------------------------- probes


def machine(call: Call) -> None:
    """Versions, who else is on the card, copy bandwidth, a product that only tensor cores limit."""
    import torch
    from qmedtune_kernels import dispatch

    from qmedtune.bench.train import all_versions

    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    others = "" if call.dry else subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    call.tell("machine", versions=all_versions(), others=others.splitlines())
    call.tell("machine", paths=dispatch.describe(torch.device(call.device)))
    size = 2**22 if call.dry else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=call.device)
    target, side = torch.empty_like(source), 256 if call.dry else 8192
    call.finding("machine", "copy", lambda: {"gb_per_s": 2 * size / call.timed(lambda: target.copy_(source)) / 1e9})
    a = torch.randn(side, side, device=call.device).to(half())
    call.finding("machine", f"{side} cube", lambda: {"tflops": 2 * side**3 / call.timed(lambda: a @ a) / 1e12})


def tests(call: Call) -> None:
    """The GPU tests, to a file; their result gates nothing but trust in inline assembly (publish.py)."""
    report = call.out / "tests.junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    chosen = ["kernels/tests", "-m", "gpu", "-n", "8"]
    chosen = ["kernels/tests/test_rms_norm.py", "-k", "misfits"] if call.dry else chosen
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    call.tell("tests", status=done.returncode, last=last_line(done.stdout))


def train(call: Call) -> None:
    """A whole stage through the real trainer, in both 16-bit types; dry: fewer documents, one type, no scores."""
    fewer = [f"data.{source}.max_records=40" for source in ("literature", "notes", "general", "instructions")]
    fewer += ["evaluate.tasks=[]", "evaluate.perplexity=[]"]
    for dtype in ("bfloat16",) if call.dry else ("bfloat16", "float16"):
        out = call.scratch / f"run-{dtype}-{os.getpid()}"
        command = [sys.executable, "-m", "qmedtune", "run", "recipes/micro.yaml", "--offline", "--out", str(out)]
        for setting in (f"model.compute_dtype={dtype}", *(fewer if call.dry else ())):
            command += ["--set", setting]
        status, error = _run_here(command[3:]) if call.together else _run_apart(command)
        call.tell("train", dtype=dtype, status=status, **_logged(out), error=error)
        shutil.rmtree(out, ignore_errors=True)


def _run_apart(command: list[str]) -> tuple[int, str]:
    """(exit status, what it last said where it failed)."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, last_line(done.stderr) if done.returncode else ""


def _run_here(words: list[str]) -> tuple[int, str]:
    from qmedtune import cli

    with contextlib.chdir(ROOT):
        return cli.invoke(words), ""


def _logged(run: Path) -> dict[str, Any]:
    """Of a run's training steps: how many, the first loss and the last, the speed of the last."""
    steps = []
    for path in sorted(run.rglob("metrics.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        steps += [line for line in lines if "loss" in line]
    if not steps:
        return {"steps": 0}
    ends = [steps[0]["loss"], steps[-1]["loss"]]
    return {"steps": len(steps), "losses": ends, "tokens_per_s": steps[-1].get("tokens_per_s")}


def decode(call: Call) -> None:
    """Dequantising by each way, into a buffer alone and with room beside W; the fused product at 1, 2 and 4 programs a
    processor beside bitsandbytes' gemm_4bit."""
    import torch
    from qmedtune_kernels import matmul, nf4, tiles

    from qmedtune.bench.kernels import copies_of

    n, k = (128, 256) if call.dry else (14336, 4096)
    read, written = n * k * 0.516, n * k * 2
    weights = quantised(n, k, call.device, 1 if call.dry else copies_of(read))

    def into(weight: Any, beside: int, path: str) -> Callable[[], object]:
        out = torch.empty(n, k + beside, dtype=half(), device=call.device)[:, :k]
        return lambda: nf4.dequantize(weight, half(), out, path)

    for path in ("reference",) if call.dry else ("gather", "shuffle"):
        for beside in (0, 64):
            setups = [partial(into, weight, beside, path) for weight in weights[: copies_of(read + written)]]
            rate = lambda s=setups: {"gb_per_s": (read + written) / call.rotated(s) / 1e9}  # noqa: E731
            call.finding("decode", f"dequantise {path} beside {beside}", rate)

    def product(multiply: Callable[..., object], x: Any, weight: Any) -> Callable[[], object]:
        return lambda: multiply(x, weight)

    for rows in (1, 4, 8, 16, 64):
        x = torch.randn(rows, k, device=call.device).to(half())
        theirs = [partial(product, matmul.by_bitsandbytes, x, weight) for weight in weights]
        call.finding("decode", f"gemm_4bit M={rows}", lambda s=theirs: {"us": 1e6 * call.rotated(s)})
        for programs in (1, 2, 4):
            tiles.PROGRAMS = programs
            fused = partial(matmul.matmul, path="reference" if call.dry else "fused")
            ours = [partial(product, fused, x, weight) for weight in weights]
            call.finding("decode", f"fused M={rows}, {programs} programs", lambda s=ours: {"us": 1e6 * call.rotated(s)})


def quantised(n: int, k: int, device: str, copies: int) -> list[Any]:
    """The same random [n, k] as NF4 with nested scales, each in memory of its own."""
    import bitsandbytes.functional as bnb
    import torch
    from qmedtune_kernels import NF4Weight

    random = torch.randn(n, k, device=device).to(half())
    packed, state = bnb.quantize_4bit(random, quant_type="nf4", compress_statistics=True)
    two = state.state2
    assert two is not None
    weight = NF4Weight(packed, state.absmax, 64, (n, k), two.code, two.absmax, state.offset)
    return [replace(weight, packed=packed.clone(), absmax=state.absmax.clone()) for _ in range(copies)]


def linear(call: Call) -> None:
    """What an adapter costs as more columns of the contraction, and as a pass over the result."""
    import torch
    import torch.nn.functional as F

    m, n, k = (64, 96, 128) if call.dry else (8192, 14336, 4096)
    make = lambda *shape: torch.randn(*shape, device=call.device).to(half())  # noqa: E731
    for extra in (0, 16, 48, 64):
        x, w = make(m, k + extra), make(n, k + extra)
        call.finding("linear", f"K + {extra}", lambda x=x, w=w: {"ms": 1e3 * call.timed(lambda: F.linear(x, w))})
    y, xa, b = make(m, n), make(m, 16), make(16, n)
    call.finding("linear", "addmm_", lambda: {"ms": 1e3 * call.timed(lambda: y.addmm_(xa, b))})


def attention(call: Call) -> None:
    """Whether torch's kernel for variable lengths takes fewer heads of keys than of queries without being asked."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from qmedtune.modeling import attention as ours

    length, heads = (64, 4) if call.dry else (16384, 32)
    q, k, v = (torch.randn(1, h, length, 64, device=call.device).to(half()) for h in (heads, heads // 4, heads // 4))
    position = torch.arange(length, device=call.device)[None] % (length // 4)
    bounds, longest = ours.document_bounds(position)
    given = {"cu_seq_lens_q": bounds, "max_length_q": longest}
    one = lambda: ours.varlen(None, q, k, v, None, **given)  # noqa: E731
    call.finding("attention", "as trained", lambda: {"ms": 1e3 * call.timed(one)})
    flat = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    many = [x.repeat_interleave(heads // x.shape[1], dim=1) for x in flat]
    full = lambda: varlen_attn(*many, bounds, bounds, longest, longest, window_size=(-1, 0))  # noqa: E731
    call.finding("attention", "keys repeated", lambda: {"ms": 1e3 * call.timed(full)})
    bare = lambda: varlen_attn(*flat, bounds, bounds, longest, longest, window_size=(-1, 0))  # noqa: E731
    call.finding("attention", "keys not repeated, not asked for", lambda: {"ms": 1e3 * call.timed(bare)})


def layers(call: Call) -> None:
    """A step at 8B widths with two and eight layers, one and four rows at a time, ours beside TRL's, and a layer's cost
    by difference; 32k tokens with layers kept, recomputed and offloaded: what was allocated, reserved and planned."""
    peers = ("qmedtune",) if call.dry else ("qmedtune", "trl-tuned", "trl-liger")
    shallow, deep = ("tiny", "tiny-9-layers") if call.dry else ("8b-2-layers", "8b-8-layers")
    by_rows(call, 1, (shallow, deep), peers)
    long = {"seq_len": 64 if call.dry else 32768, "rows": 1, "micro_batch": 1, "steps": 3, "warmup_steps": 1}
    for what, way in (
        ("kept", {"checkpointing": False}),
        ("recomputed", {"checkpointing": True}),
        ("offloaded", {"memory_gib": OFFLOADS_GIB[call.dry]}),  # the plan, given so little
    ):
        _trained(call, f"long {what}", deep, long | way, "qmedtune")
    if not call.dry:
        by_rows(call, 4, (shallow, deep), peers)


# Budgets within which every layer has to be offloaded: of eight layers at 8B widths and 32k tokens (18 GiB recompute
# four of them), and of the dry run's.
OFFLOADS_GIB = {False: 16.0, True: 0.01}


def by_rows(call: Call, micro_batch: int, shapes: tuple[str, str], contenders: tuple[str, ...]) -> None:
    """Both depths of each contender, then the difference by layer."""
    from qmedtune.bench.random_bases import SHAPES

    chosen = {"rows": 4, "micro_batch": micro_batch, "steps": 4, "warmup_steps": 1, "checkpointing": False}
    chosen |= {"seq_len": 32, "steps": 2} if call.dry else {}
    few, many = (SHAPES[shape]["layers"] for shape in shapes)
    for name in contenders:
        what = f"{name}, {micro_batch} rows at a time"
        found = [_trained(call, f"{what}, {shape}", shape, chosen, name) for shape in shapes]
        steps = [_step_seconds(each, chosen["rows"] * each["job"]["seq_len"]) for each in found if each]
        if None in steps or len(steps) < 2:
            continue
        peaks = [each["peak_memory_bytes"] for each in found]
        ms, size = (1e3 * (steps[1] - steps[0]) / (many - few), (peaks[1] - peaks[0]) / (many - few))
        call.tell("layers", what=f"{what}, one layer", ms=round(ms, 3), peak_bytes=round(size))


def _step_seconds(found: dict[str, Any], tokens: int) -> float | None:
    speed = found.get("all_tokens_per_s")
    return tokens / speed if speed else None


def _trained(call: Call, what: str, shape: str, chosen: dict[str, Any], contender: str) -> dict[str, Any]:
    """What a contender measured, told as well; {} where it failed."""
    found: dict[str, Any] = {}
    call.finding("layers", what, lambda: found.update(_measured(call, shape, chosen, contender)) or found)
    return found


def _measured(call: Call, shape: str, chosen: dict[str, Any], contender: str) -> dict[str, Any]:
    from dataclasses import asdict

    from qmedtune.bench import train_worker
    from qmedtune.bench.job import job_of
    from qmedtune.bench.train import Folders, _run
    from qmedtune.planning import memory

    job = job_of(shape, chosen)
    folders = Folders(call.scratch, call.scratch)
    if call.together:
        measured = _figures(call, job)
    else:
        measured = _run(job, contender, folders, 60.0 * (20 if call.dry else 1))
    found = measured.model_dump(mode="json", exclude_none=True)
    kept = {key: value for key, value in found.items() if key not in ("losses", "checkpoints")}
    if contender == "qmedtune" and "layers" in found:
        setup = train_worker.setup_of(job)
        kept["planned_bytes"] = memory.peak_bytes(train_worker.facts_of(job), setup, gpu=not call.dry)
    return {"job": asdict(job), **kept}


def _figures(call: Call, job: Any) -> Any:
    """What qmedtune measures of a job in this process."""
    from qmedtune.bench import train_worker
    from qmedtune.bench.result import Measurement

    clock = train_worker.Clock(job)
    train_worker.qmedtune(job, train_worker.model_folder(job, call.scratch), clock, "auto")
    return Measurement.model_validate(train_worker.figures(job, clock))


def profile(call: Call) -> None:
    """One step of the real trainer at 8B widths, by kernel: a line with where its time goes, and profile.txt."""
    from torch.autograd import DeviceType

    from qmedtune.bench import train_worker
    from qmedtune.bench.job import job_of
    from qmedtune.modeling.quiet import quiet_libraries

    chosen = {"rows": 1, "micro_batch": 1, "steps": 4, "warmup_steps": 1, "checkpointing": False}
    job = job_of("tiny" if call.dry else "8b-2-layers", chosen | ({"seq_len": 32} if call.dry else {}))
    quiet_libraries()
    clock = profiler_of(job, call)
    train_worker.qmedtune(job, train_worker.model_folder(job, call.scratch), clock, "auto")
    spent = "self_cpu_time_total" if call.dry else "self_device_time_total"
    found = clock.profiled.key_averages()
    (call.out / "profile.txt").write_text(found.table(sort_by=spent, row_limit=60, max_name_column_width=80))
    where = DeviceType.CPU if call.dry else DeviceType.CUDA  # the card's time stands at its kernels and at who asked
    microseconds = {event.key: getattr(event, spent) for event in found if event.device_type == where}
    longest = sorted(microseconds, key=microseconds.__getitem__, reverse=True)[:20]
    call.tell(
        "profile", step_ms=round(1e3 * (clock.marks[-1] - clock.marks[-2]), 3),
        busy_ms=round(sum(microseconds.values()) / 1e3, 3),
        launches=sum(event.count for event in found if "LaunchKernel" in event.key),
        by_kernel_ms={key[:80]: round(microseconds[key] / 1e3, 3) for key in longest},
    )  # fmt: skip


def profiler_of(job: Any, call: Call) -> Any:
    """A clock of bench train that profiles the last step."""
    import torch
    from torch.profiler import ProfilerActivity

    from qmedtune.bench.train_worker import Clock

    activities = [ProfilerActivity.CPU] + ([] if call.dry else [ProfilerActivity.CUDA])

    class Profiler(Clock):
        def __init__(self) -> None:
            super().__init__(job)
            self.profiled = torch.profiler.profile(activities=activities)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == job.steps - 1:
                self.profiled.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == job.steps:
                self.profiled.stop()

    return Profiler()


SANITIZED = """
import torch
from qmedtune_kernels import startup_check
for check in (startup_check.plain_difference, startup_check.assembly_difference):
    print(check.__name__, check(torch.device("cuda")) or "right")
"""


def sanitizer(call: Call) -> None:
    """compute-sanitizer over every kernel's first use; where the tool is absent (a bare image) that is the finding."""
    from shutil import which

    tool = which("compute-sanitizer")
    if tool is None:
        return call.tell("sanitizer", absent="compute-sanitizer is not installed")
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, sys.executable, "-c", SANITIZED]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with (call.out / "sanitizer.txt").open("a") as file:
            file.write(f"== {kind}\n{done.stdout[-20000:]}\n")
        call.tell("sanitizer", tool=kind, status=done.returncode, last=last_line(done.stdout))


# Probe and its limit in seconds: they sum to TOTAL_S; a probe that is faster leaves its time to those behind it.
PROBES: dict[Callable[[Call], None], float] = {
    machine: 25, tests: 90, train: 60, decode: 40, linear: 35, attention: 15, layers: 150, profile: 25, sanitizer: 40,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--together", action="store_true", help="dry: in one process, without limits")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.together and not given.dry:
        parser.error("--together: on a card each probe has a process and a limit of its own; it goes with --dry")
    call = Call(given.out.resolve(), given.dry, given.together)
    call.out.mkdir(parents=True, exist_ok=True)
    by_name = {probe.__name__: probe for probe in PROBES}
    if given.probe:
        return by_name[given.probe](call)
    if call.together:
        return _in_this_process(call)
    patience = 20 if call.dry else 1  # a dry run may share its CPU
    deadline, spare = time.monotonic() + patience * TOTAL_S, 0.0
    for probe, seconds in PROBES.items():
        limit = patience * seconds
        began = time.monotonic()
        left = min(limit + spare, deadline - began)
        status = _in_a_process(call, probe.__name__, left) if left > 1 else "no time was left"
        took = time.monotonic() - began
        spare = max(0.0, limit + spare - took)
        call.tell(probe.__name__, ended=status, seconds=round(took, 1))


PLACES = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
OF_TESTS = ("TRITON_INTERPRET", "QMEDTUNE_KERNELS")  # variables that would measure something else


def _in_this_process(call: Call) -> None:
    """Every probe, one after the other; the run must end well to the last of them."""
    sys.path[:0] = PLACES
    for variable in OF_TESTS:
        os.environ.pop(variable, None)
    for probe in PROBES:
        began, said = time.monotonic(), ""
        try:
            probe(call)
        except Exception as error:  # told as a process's end is
            said = f"{type(error).__name__}: {last_line(str(error))}"
        call.tell(probe.__name__, ended=said, seconds=round(time.monotonic() - began, 1))


def _in_a_process(call: Call, name: str, seconds: float) -> str:
    """ "" when it ended well, else its status or last words."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*PLACES, os.environ.get("PYTHONPATH")]))}
    for variable in OF_TESTS:
        environment.pop(variable, None)
    command = [sys.executable, str(Path(__file__).resolve()), str(call.out), "--probe", name]
    command += ["--dry"] if call.dry else []
    status, said = ended_by(command, environment, seconds)
    if status is None:
        return f"cut after {seconds:.0f} s"
    return "" if status == 0 else f"status {status}: {last_line(said)}"


def ended_by(command: list[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """(exit status, stderr) of a command; None where its time ran out: then whatever it has started ends with it, or
    its own processes would stay on the card beside the next probe."""
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, ""
    return child.returncode, said


if __name__ == "__main__":
    main()
