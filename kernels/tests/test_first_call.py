"""The first call on a card, dry: every part runs with small shapes on a CPU, and tells what it finds as it finds it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_call.py"
TOLD = {
    "machine": ("copy", "256 cube"),
    "decode": ("dequantise reference beside 0", "gemm_4bit M=1", "fused M=8, 4 programs"),
    "linear": ("K + 0", "K + 48", "addmm_"), "attention": ("as trained",), "layers": ("qmedtune tiny x 2 x 64",),
}  # fmt: skip


def test_every_part_of_the_first_call_runs_and_tells(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "--dry"], check=True)
    lines = [json.loads(line) for line in (tmp_path / "first_call.jsonl").read_text().splitlines()]
    ended = {line["probe"]: line["ended"] for line in lines if "ended" in line}
    probes = "machine tests train decode linear attention layers profile sanitizer"
    assert list(ended) == probes.split()
    assert not any(ended.values()), ended
    for probe, names in TOLD.items():
        found = {line.get("what"): line for line in lines if line["probe"] == probe}
        assert all("failed" not in found[name] for name in names), found
    layers = next(line for line in lines if line.get("what") == TOLD["layers"][0])
    assert layers["planned_bytes"] > 0 and layers["tokens_per_s"] > 0
    assert all(line["status"] == 0 for line in lines if line["probe"] in ("tests", "train") and "status" in line)
    assert len(list(tmp_path.iterdir())) <= 8


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
