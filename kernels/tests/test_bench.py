"""The static gate in a process without the interpreter, and what is made from measured results."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmedtune.bench.kernels import bench_kernels, failures
from qmedtune.errors import RunError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAM = """
import json, sys
from qmedtune.bench.static import static_rows
print(json.dumps(static_rows(tuple(json.loads(sys.argv[1])), sys.argv[2])))
"""


def compiled(architectures: list[int], kernels: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(architectures), kernels]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernels", ["matmul forward M<=16 nested", "dequantize shuffle"])
def test_decoding_kernels_stay_within_their_instruction_limits(kernels):
    rows = compiled([86, 90], kernels)
    assert {row["target"] for row in rows} == {"sm_86", "sm_90"}
    assert failures({"rows": rows}) == []
    assert all(row["spills"] == 0 and 0 < row["ins_per_element"] <= 10 for row in rows)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture():
    rows = compiled([75, 80, 86, 89, 90, 100, 120], "")
    assert failures({"rows": rows}) == []
    assert {"sm_75", "sm_120"} <= {row["target"] for row in rows}


def test_static_gate_says_that_it_needs_the_compiler():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 given"):
        bench_kernels(static=True)


def test_failures_name_kernel_target_and_limit():
    good = {"kernel": "b", "target": "sm_90", "failures": []}
    bad = {"kernel": "a", "target": "sm_90", "failures": ["8 bytes spilled"]}
    assert failures({"rows": [good, bad]}) == ["a on sm_90: 8 bytes spilled"]


def test_measuring_without_a_gpu_is_one_clear_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RunError, match="no CUDA device here.*--static"):
        bench_kernels()


@pytest.fixture
def publish():
    spec = importlib.util.spec_from_file_location("publish", BENCHMARKS / "publish.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(m: int, contender: str, value: float, shape: str = "q/o 4096x4096") -> dict:
    return {
        "kernel": "matmul", "shape": f"{shape} M={m}", "contender": contender, "value": value,
        "ratio": 1.5, "of_limit": 0.8,
    }  # fmt: skip


def test_crossover_is_the_last_row_count_that_wins_on_every_shape(publish):
    rows = [row(16, "qmedtune", 2), row(16, "cublas", 5), row(64, "qmedtune", 3), row(64, "cublas", 5)]
    rows += [row(64, "qmedtune", 9, "down"), row(64, "cublas", 5, "down")]
    rows += [row(128, "qmedtune", 1), row(128, "cublas", 5)]
    assert publish.crossover(rows) == 16
    assert publish.crossover([row(16, "qmedtune", 9), row(16, "cublas", 5)]) == 0


def test_results_become_table_chart_and_dispatch(publish, tmp_path, monkeypatch):
    result = {"device": "Test GPU", "rows": [row(16, "qmedtune", 2), row(16, "cublas", 5)]}
    assert "| Test GPU | matmul | q/o 4096x4096 M=16 | 2 | 0.8 | 1.5 |" in publish.table([result])
    assert publish.chart(result).count("<rect") == 1
    copy = tmp_path / "dispatch.json"
    copy.write_text(publish.DISPATCH.read_text())
    monkeypatch.setattr(publish, "DISPATCH", copy)
    publish.update_dispatch(result, "sm_90")
    written = json.loads(copy.read_text())
    assert written["asm_verified"] == ["sm_90"] and written["fused_rows"]["sm_90"] == 16


def test_readme_has_the_marks_that_publish_fills(publish):
    text = (publish.ROOT / "README.md").read_text()
    assert text.count(publish.BEGIN) == text.count(publish.END) == 1


def test_nothing_but_relative_imports_torch_and_triton():
    standard = {"__future__", "json", "math", "os", "functools", "pathlib", "dataclasses", "collections", "types"}
    allowed = {"torch", "triton", "typing", *standard}
    for file in (BENCHMARKS.parent / "torch-ext" / "qmedtune_kernels").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")) and not line.startswith("from ."):
                assert line.split()[1].split(".")[0] in allowed, f"{file.name}: {line}"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails, as where it is not installed
import torch
from qmedtune_kernels import Adapter, dispatch, lora, rms_norm
x = torch.randn(3, 64)
y = lora.linear(x, torch.randn(32, 64), [Adapter(torch.randn(4, 64), torch.randn(32, 4), 2.0)])
assert y.shape == (3, 32) and rms_norm.rms_norm(x, torch.ones(64), 1e-5).shape == x.shape
dispatch.capability = lambda device: 90
print(dispatch.describe(torch.device("cpu"))["lora"])
try:
    dispatch.uses_triton(torch.device("cpu"), "triton")
except ValueError as error:
    print(error)
"""


def test_the_package_imports_and_computes_without_triton():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "reference: Triton is not installed",
        "kernels: triton given, but it is not installed; allowed here: auto, reference",
    ]


def test_elementwise_cases_run_and_name_the_same_shapes(monkeypatch):
    from qmedtune.bench import elementwise

    monkeypatch.setattr(elementwise, "INTERMEDIATE", 64)
    named = {}
    for contender in ("limit", "qmedtune", "torch", "bitsandbytes"):
        cases = list(elementwise.elementwise(contender, 4, torch.float32, "cpu"))
        named[contender] = [case[:2] for case in cases]
        for _, _, setup, moved in cases:
            call = setup()
            call(), call()
            assert moved > 0
    assert named["limit"] == named["qmedtune"] == named["torch"] and len(named["limit"]) == 3
    assert named["bitsandbytes"] == []
