"""The first call on a card, dry: every part runs with small shapes on a CPU, and tells what it finds as it finds it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_call.py"
TOLD = {
    "machine": ("copy", "256 cube"),
    "decode": ("dequantise reference beside 0", "gemm_4bit M=1", "fused M=8, 4 programs"),
    "linear": ("K + 0", "K + 48", "addmm_"),
    "attention": ("as trained",),
    "layers": (
        "qmedtune, 1 rows at a time, tiny", "qmedtune, 1 rows at a time, tiny-9-layers", "long kept",
        "long recomputed", "long offloaded", "qmedtune, 1 rows at a time, one layer",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["--together", pytest.param("", marks=pytest.mark.slow)])
def dry(request, tmp_path_factory):
    """(the folder of results, the lines told) of a dry run: in one process, or (slow) each probe in its own, as on a
    card."""
    out, scratch = tmp_path_factory.mktemp("first_call"), tmp_path_factory.mktemp("scratch")
    command = [sys.executable, str(SCRIPT), str(out), "--dry", *filter(None, [request.param])]
    subprocess.run(command, check=True, env=os.environ | {"SCRATCH": str(scratch)})
    return out, [json.loads(line) for line in (out / "first_call.jsonl").read_text().splitlines()]


def test_every_part_of_the_first_call_runs_and_tells(dry):
    out, lines = dry
    ended = {line["probe"]: line["ended"] for line in lines if "ended" in line}
    probes = "machine tests train decode linear attention layers profile sanitizer"
    assert list(ended) == probes.split()
    assert not any(ended.values()), ended
    for probe, names in TOLD.items():
        found = {line.get("what"): line for line in lines if line["probe"] == probe}
        assert all("failed" not in found[name] for name in names), found
    assert all(line["status"] == 0 for line in lines if line["probe"] in ("tests", "train") and "status" in line)
    assert len([path for path in out.rglob("*") if path.is_file()]) <= 8


def test_the_real_trainer_runs_and_one_of_its_steps_is_profiled(dry):
    out, lines = dry
    stage = next(line for line in lines if line["probe"] == "train" and "dtype" in line)
    assert stage["steps"] > 1 and all(0 < loss < 20 for loss in stage["losses"])
    step = next(line for line in lines if line["probe"] == "profile" and "step_ms" in line)
    products = [name for name in step["by_kernel_ms"] if name in ("aten::mm", "aten::addmm")]
    assert products and step["busy_ms"] > 0 and step["step_ms"] > 0
    assert "aten::mm" in (out / "profile.txt").read_text()


def test_layers_are_kept_recomputed_and_offloaded_and_the_plan_stands_beside(dry):
    long = {line["what"]: line for line in dry[1] if line.get("what", "").startswith("long ")}
    assert {what: line["layers"] for what, line in long.items()} == {
        "long kept": {"keep": 9}, "long recomputed": {"recompute": 9}, "long offloaded": {"offload": 9}
    }  # fmt: skip
    assert all(line["planned_bytes"] > 0 and line["tokens_per_s"] > 0 for line in long.values())


def test_the_smaller_budget_makes_a_card_offload_every_layer(script):
    """Not only the dry run's: what the plan would choose on the card needs no card."""
    from qmedtune.bench import train_worker
    from qmedtune.bench.job import job_of

    for dry, shape, tokens in ((False, "8b-8-layers", 32768), (True, "tiny-9-layers", 64)):
        chosen = {"seq_len": tokens, "rows": 1, "micro_batch": 1, "memory_gib": script.OFFLOADS_GIB[dry]}
        assert set(train_worker.layers_of(job_of(shape, chosen))) == {"offload"}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("first_call_script", SCRIPT)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_limits_leave_a_minute_of_the_call(script):
    assert sum(script.PROBES.values()) == script.TOTAL_S == 480


def test_a_finding_that_fails_is_told_and_does_not_stop_the_next(tmp_path, script):
    call = script.Call(tmp_path, True)
    call.finding("p", "bad", lambda: 1 / 0)
    call.finding("p", "good", lambda: {"value": 1})
    told = [json.loads(line) for line in (tmp_path / script.LOG).read_text().splitlines()]
    assert told[0]["failed"].startswith("ZeroDivisionError") and told[1]["value"] == 1


def test_a_probe_that_is_cut_takes_the_processes_that_it_started_along(tmp_path, script):
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    assert script.ended_by([sys.executable, "-c", parent], os.environ, 10.0) == (None, "")
    assert time.monotonic() - began < 90
    started = int(mark.read_text())
    until = time.monotonic() + 30  # a busy machine takes its time to end what it was told to
    while _runs(started) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _runs(started)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_how_a_probe_ended_is_told(script):
    assert script.ended_by([sys.executable, "-c", "import sys; sys.exit('no room')"], os.environ, 60) == (
        1,
        "no room\n",
    )
