"""The static gate in a process without the interpreter, and what is made from measured results."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmedtune.bench import kernels as bench
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
    rows = compiled([86, 90, 120], kernels)
    assert {row["target"] for row in rows} == {"sm_86", "sm_90", "sm_120"}
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


def row(m: int, contender: str, value: float, shape: str = "q/o 4096x4096", kernel: str = "matmul") -> dict:
    return {
        "kernel": kernel, "shape": f"{shape} M={m}", "contender": contender, "value": value,
        "ratio": 1.5, "of_limit": 0.8,
    }  # fmt: skip


def test_crossover_is_the_last_row_count_that_wins_in_both_directions(publish):
    rows = [row(16, "qmedtune", 2), row(16, "cublas", 5), row(64, "qmedtune", 3), row(64, "cublas", 5)]
    rows += [row(64, "qmedtune", 9, kernel="matmul backward"), row(64, "cublas", 5, kernel="matmul backward")]
    rows += [row(128, "qmedtune", 1), row(128, "cublas", 5)]
    rows += [row(m, who, us, "down 4096x14336") for m in (16, 64) for who, us in (("qmedtune", 1), ("cublas", 5))]
    assert publish.crossover(rows) == [[4096, 4096, 16], [4096, 14336, 64]]
    assert publish.crossover([row(16, "qmedtune", 9), row(16, "cublas", 5)]) == [[4096, 4096, 0]]


def test_crossover_without_tensor_cores_is_that_of_the_few_rows_kernel(publish):
    rows = [row(m, "cublas", 5) for m in (1, 4, 8)]
    rows += [row(1, "qmedtune", 2, kernel="matmul:few_rows"), row(4, "qmedtune", 3, kernel="matmul:few_rows")]
    assert publish.crossover(rows) == [[4096, 4096, 4]]
    assert publish.crossover([*rows, row(4, "qmedtune", 6)]) == [[4096, 4096, 1]]  # the fused kernel goes first


@pytest.fixture
def published(publish, tmp_path, monkeypatch):
    """(publish on copies, its result file): what a GPU machine left behind."""
    for name in ("DISPATCH", "ROOT"):
        source = getattr(publish, name)
        copy = tmp_path / "dispatch.json" if name == "DISPATCH" else tmp_path
        (copy if name == "DISPATCH" else copy / "README.md").write_text(
            (source if name == "DISPATCH" else source / "README.md").read_text()
        )
        monkeypatch.setattr(publish, name, copy)
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "test-gpu.json"
    installed = {"torch": "2.12.0"}
    result = {
        "device": "Test GPU", "capability": "sm_90", "sources": bench.sources(),
        "versions": {**installed, "driver": "580"}, "rows": [row(16, "qmedtune", 2), row(16, "cublas", 5)],
    }  # fmt: skip
    file.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["publish.py", str(file)])
    return publish, file


def test_results_become_table_chart_and_dispatch_without_a_gpu(published):
    publish, file = published
    publish.main()
    assert "| Test GPU | matmul | q/o 4096x4096 M=16 | 2 | 0.8 | 1.5 |" in (publish.ROOT / "README.md").read_text()
    assert file.with_suffix(".svg").read_text().count("<rect") == 1
    written = json.loads(publish.DISPATCH.read_text())
    assert written["asm_refused"] == [] and written["fused_rows"]["sm_90"] == [[4096, 4096, 16]]
    assert written["fused_rows"]["default"] == [[4096, 4096, 64]]


def test_the_dispatch_table_needs_results_of_the_same_sources(published, capsys):
    publish, file = published
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sources": "others"}))
    before = publish.DISPATCH.read_text()
    publish.main()
    assert publish.DISPATCH.read_text() == before and "of other kernel sources" in capsys.readouterr().out


@pytest.mark.parametrize(("test", "refused"), [("test_matmul.test_split", True), ("test_rms_norm.test_rows", False)])
def test_failed_tests_gate_nothing_but_the_assembly(published, test, refused):
    publish, file = published
    module, name = test.split(".")
    case = f'<testcase classname="kernels.tests.{module}" name="{name}"><failure/></testcase>'
    file.with_suffix(".junit.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    publish.main()
    written = json.loads(publish.DISPATCH.read_text())
    assert written["asm_refused"] == (["sm_90"] if refused else [])
    assert written["fused_rows"]["sm_90"] == [[4096, 4096, 16]]


def test_bitsandbytes_is_beaten_only_in_every_shape_of_few_rows(publish):
    rows = [row(m, who, us) for m in (1, 8) for who, us in (("qmedtune", 2), ("bitsandbytes", 3))]
    assert publish.beats_gemm_4bit(rows) and not publish.beats_gemm_4bit(rows[:1])
    assert publish.beats_gemm_4bit([*rows, row(64, "qmedtune", 9), row(64, "bitsandbytes", 3)])
    assert not publish.beats_gemm_4bit([*rows, row(4, "qmedtune", 4), row(4, "bitsandbytes", 3)])


@pytest.fixture
def gpu(monkeypatch):
    """Just enough of a card for the bookkeeping around measurements."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **o: subprocess.CompletedProcess(a, 0, "580\n", ""))


def test_rows_are_kept_across_runs_and_ours_only_for_the_same_sources(gpu, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    rows = [row(16, who, 2.0) | {"gb_per_s": 1.0, "tflops": 1.0} for who in ("qmedtune", "cublas", "bitsandbytes")]
    out.write_text(json.dumps(bench._result([*rows, {"kernel": "all", "contender": "liger", "skipped": "time limit"}])))
    assert [kept["contender"] for kept in bench._resume(out)] == ["qmedtune", "cublas", "bitsandbytes"]
    monkeypatch.setattr(bench, "sources", lambda: "changed")
    assert [kept["contender"] for kept in bench._resume(out)] == ["bitsandbytes"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    assert bench._resume(out) == []


def test_a_case_that_fails_costs_its_row_alone(monkeypatch, capsys):
    from qmedtune.bench import contenders

    cases = [contenders.Timed(name, "1x1", lambda: None, 1.0) for name in ("bad", "good")]
    monkeypatch.setattr(contenders, "cases", lambda contender, quick: iter(cases))

    def timed(case):
        if case.kernel == "bad":
            raise RuntimeError("no such kernel\nstack")
        return 1e-6, 0.0

    monkeypatch.setattr(bench, "measure", timed)
    bench._child({"contender": "liger", "quick": False, "only": "", "seconds": 60, "done": []})
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["skipped"] == "RuntimeError: no such kernel" and "value" not in bad and good["value"] == 1.0


def test_rows_without_a_timed_limit_are_compared_with_the_roofline():
    limit = row(1, "limit", 4.0, "copy", "dequantize") | {"gb_per_s": 2000.0, "tflops": 0.0}
    bare = row(1, "limit", 4.0, "bare", "lora") | {"gb_per_s": 10.0, "tflops": 500.0}
    ours = row(1, "qmedtune", 4.0) | {"gb_per_s": 1000.0, "tflops": 50.0}
    large = row(512, "qmedtune", 4.0) | {"gb_per_s": 200.0, "tflops": 400.0}
    bench._add_ratios([limit, bare, ours, large])
    assert ours["of_limit"] == 0.5 and large["of_limit"] == 0.8 and limit["of_limit"] == 1.0


SHIM = """#!/bin/sh
case "$*" in
    *get_device_name*) echo test-gpu ;;
    *) echo "$*" >> "$LOG" ;;
esac
"""


def test_the_second_call_keeps_the_test_report_measures_and_publishes(tmp_path):
    """With a `python3` that only notes what it was asked."""
    shim, log, results = tmp_path / "bin" / "python3", tmp_path / "log", tmp_path / "results"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "tests.junit.xml").write_text("<testsuites/>")
    path = f"{shim.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LOG": str(log), "RESULTS": str(results)}
    subprocess.run([BENCHMARKS / "second_call.sh", tmp_path / "first"], env=environment, cwd=tmp_path, check=True)
    assert (results / "test-gpu.junit.xml").read_text() == "<testsuites/>"
    assert log.read_text().splitlines() == [
        f"kernels/benchmarks/benchmark_all.py --out {results}/test-gpu.json --seconds 205",
        f"kernels/benchmarks/publish.py {results}/test-gpu.json",
    ]


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


def test_small_weights_are_timed_with_a_cold_l2():
    bytes_ = 1024 * 4096 * 0.5159 + 2 * (1024 + 4096)
    assert bench.copies_of(bytes_) * bytes_ > 2 * 60e6  # twice what an H200 keeps
    assert bench.copies_of(3 * bench.COLD_BYTES) == 1
