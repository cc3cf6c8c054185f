"""`qmedtune bench export`: time and memory of an export as GGUF, against copying the same bytes.

A random-weight LLaMA with a byte-level tokenizer is written once; each contender then makes a file of it that is on the
disk (sync included), in a process of its own, in turns. Imports are not counted; the proof counts for qmedtune.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qmedtune import ui
from qmedtune.bench import shapes
from qmedtune.bench.merge import SETTLE_S, anonymous_peak, render
from qmedtune.bench.result import Result, Row
from qmedtune.bench.shapes import SHAPES
from qmedtune.errors import RecipeError, RunError
from qmedtune.process import prepare
from qmedtune.record import device_name, versions

CONTENDERS = {
    "cp": "cp of the folder, then sync: the bytes alone",
    "bf16": "qmedtune export --quant bf16 with its proof, then sync",
    "f16": "the same to f16: every number is rounded again",
    "q8_0": "the same to Q8_0: half the bytes",
    "q4_0": "the same to Q4_0",
}
__all__ = ["CONTENDERS", "bench_export", "render"]


def bench_export(
    shape: str = "1.1b", contenders: tuple[str, ...] = tuple(CONTENDERS), rounds: int = 3, scratch: Path | None = None
) -> Result:
    """Measure; rows as of `bench merge`: `ratio` is the median over rounds of seconds over the first contender's.

    scratch: a folder with room for twice the model. Raises RecipeError for an unknown shape or contender.
    """
    if shape not in SHAPES:
        raise RecipeError(f"bench export: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    for contender in contenders:
        if contender not in CONTENDERS:
            raise RecipeError(f"bench export: no contender {contender!r}\nallowed: {', '.join(CONTENDERS)}")
    measured: dict[str, list[Row]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(dir=scratch) as folder, ui.stage("bench export", None, "runs") as bar:
        model = Path(folder) / "model"
        weight_bytes = shapes.write_model(SHAPES[shape], model)
        _write_tokenizer(model)
        for number in range(rounds):
            for contender in contenders:
                measured[contender].append(_measure(contender, model, Path(folder) / "out"))
                bar.update(number * len(contenders) + contenders.index(contender) + 1, note=contender)
    rows = []
    for contender, found in measured.items():
        rows.append(_row(contender, shape, found, measured[contenders[0]]))
    job = {"shape": shape, "weight_bytes": weight_bytes, "rounds": rounds}
    return {"bench": "export", "device": device_name(), "versions": versions(), "job": job, "rows": rows}


def _row(contender: str, shape: str, found: list[Row], first: list[Row]) -> Row:
    seconds = [run["seconds"] for run in found]
    ratios = [own / other["seconds"] for own, other in zip(seconds, first, strict=True)]
    return {
        "case": "export",
        "shape": shape,
        "contender": contender,
        "what": CONTENDERS[contender],
        "value": statistics.median(seconds),
        "unit": "s",
        "ratio": statistics.median(ratios),
        "spread": [min(seconds), max(seconds)],
        "cpu_s": statistics.median([run["cpu_s"] for run in found]),
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in found),
        "kl": found[-1].get("kl"),
    }


def _write_tokenizer(folder: Path) -> None:
    """The smallest that encodes any text; the rows that it leaves are padding."""
    from qmedtune import tiny

    tiny.build_tokenizer(tiny.world_of("builtin:micro")).save_pretrained(str(folder))


def _measure(contender: str, model: Path, out: Path) -> Row:
    """One contender in a process of its own."""
    os.sync()
    time.sleep(SETTLE_S)
    command = [sys.executable, "-m", "qmedtune.bench.export", contender, str(model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"bench export: {contender} failed: {reason[:300]}\nis there room for twice the model here?")
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    prepare()
    contender, model, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if contender != "cp":  # what it imports, before the clock starts
        import transformers.models.llama.modeling_llama  # noqa: F401

        import qmedtune.exporting.card
        import qmedtune.exporting.vocabulary  # noqa: F401
    with anonymous_peak() as peak:
        started, cpu_s = time.monotonic(), sum(os.times()[:4])
        figures = _work(contender, model, out)
        os.sync()
        seconds = time.monotonic() - started
    cpu_s = sum(os.times()[:4]) - cpu_s
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_anonymous_bytes": peak[0], **figures}))


def _work(contender: str, model: Path, out: Path) -> Row:
    if contender == "cp":
        subprocess.run(["cp", "-r", str(model), str(out)], check=True)
        return {}
    from qmedtune.export import ExportJob, export

    return {"kl": export(ExportJob(str(model), out, "gguf", contender))["proof"]["kl"]}


if __name__ == "__main__":
    main()
