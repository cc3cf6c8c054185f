"""`qmedtune bench merge`: time and memory of a merge, against PEFT's and against copying the same bytes.

A random-weight LLaMA and a LoRA on all its linear layers are written once; each contender then turns them into a merged
folder that is on the disk (sync included), in a process of its own, in turns. What is quoted are ratios within this one
run. Imports are not counted for anyone; the proof counts for qmedtune, the only one to give one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from qmedtune import ui
from qmedtune.bench import shapes
from qmedtune.bench.result import Result, Row
from qmedtune.bench.shapes import SHAPES
from qmedtune.errors import RecipeError, RunError
from qmedtune.process import prepare
from qmedtune.record import device_name, versions

CONTENDERS = {
    "cp": "cp of the base's folder, then sync: the bytes alone",
    "qmedtune": "qmedtune merge with its proof, then sync",
    "qmedtune-nf4": "the same of a model trained in NF4: with the shift from its quantised base",
    "peft": "PEFT merge_and_unload and save_pretrained in bfloat16, then sync: no proof",
}
RANK = 16
SAMPLE_S = 0.005
# A virtual machine hands memory back to its host about a second after it was freed, and to get it again for 2 GB of
# files costs a second: nobody starts on what the contender before freed (cp then took 1.3 s instead of 2.0 to 3.1).
SETTLE_S = 3.0
PROOF = ("kl", "lost", "elements", "violations", "rounding")


def bench_merge(
    shape: str = "1.1b", contenders: tuple[str, ...] = tuple(CONTENDERS), rounds: int = 3, scratch: Path | None = None
) -> Result:
    """Measure; returns `{"bench", "device", "versions", "job", "rows"}`, one row per contender: `value` is the median
    of seconds over the rounds, `ratio` the median over rounds of its seconds over the first contender's of that round,
    `peak_anonymous_bytes` the largest (anonymous memory: what the kernel cannot take back; imports included).

    scratch: a folder with room for twice the model. Raises RecipeError for an unknown shape or contender.
    """
    if shape not in SHAPES:
        raise RecipeError(f"bench merge: no shape {shape!r}\nallowed: {', '.join(SHAPES)}")
    for contender in contenders:
        if contender not in CONTENDERS:
            raise RecipeError(f"bench merge: no contender {contender!r}\nallowed: {', '.join(CONTENDERS)}")
    measured: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder, ui.stage("bench merge", None, "runs") as bar:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        weight_bytes = shapes.write_model(SHAPES[shape], base)
        _write_adapter(shapes.tensors_of(SHAPES[shape]), adapter)
        for number in range(rounds):
            for contender in contenders:
                found = _measure(contender, base, adapter, Path(folder) / "out")
                measured.setdefault(contender, []).append(found)
                bar.update(number * len(contenders) + contenders.index(contender) + 1, note=contender)
    rows = []
    for contender, found in measured.items():
        rows.append(_row(contender, shape, found, measured[contenders[0]]))
    job = {"shape": shape, "weight_bytes": weight_bytes, "r": RANK, "rounds": rounds}
    return {"bench": "merge", "device": device_name(), "versions": versions(), "job": job, "rows": rows}


def _row(contender: str, shape: str, found: list[Row], first: list[Row]) -> Row:
    seconds, ratios, cpu_s, peaks = [], [], [], []
    for own, other in zip(found, first, strict=True):
        seconds.append(own["seconds"])
        ratios.append(own["seconds"] / other["seconds"])
        cpu_s.append(own["cpu_s"])
        peaks.append(own["peak_anonymous_bytes"])
    row: Row = {
        "case": "merge",
        "shape": shape,
        "contender": contender,
        "what": CONTENDERS[contender],
        "value": statistics.median(seconds),
        "unit": "s",
        "ratio": statistics.median(ratios),
        "spread": [min(seconds), max(seconds)],
        "cpu_s": statistics.median(cpu_s),
        "peak_anonymous_bytes": max(peaks),
    }
    for key in PROOF:
        if key in found[-1]:
            row[key] = found[-1][key]
    return row


def render(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table for people."""
    first = result["rows"][0]["contender"]
    rows = []
    for row in result["rows"]:
        low, high = row["spread"]
        cells = [row["contender"], f"{row['value']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['cpu_s']:.1f}"]
        rows.append([*cells, f"{row['ratio']:.2f}", f"{row['peak_anonymous_bytes'] / 1e6:.0f} MB"])
    return ["contender", "seconds", "spread", "CPU seconds", f"x {first}", "anonymous memory"], rows


def _measure(contender: str, base: Path, adapter: Path, out: Path) -> Row:
    """One contender in a process of its own; it leaves its figures in a file beside the output."""
    os.sync()
    time.sleep(SETTLE_S)
    command = [sys.executable, "-m", "qmedtune.bench.merge", contender, str(base), str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"bench merge: {contender} failed: {reason[:300]}\nis there room for twice the model here?")
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------- the adapter


def _write_adapter(tensors_of_base: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in tensors_of_base.items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, size[1], generator=generator) * size[1] ** -0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(size[0], RANK, generator=generator) * 0.01
    targets = sorted({name.split(".")[-2] for name in tensors_of_base if "_proj" in name})
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------- in its own process


def merge_with_qmedtune(base: Path, adapter: Path, out: Path, quantization: Literal["none", "nf4"] = "none") -> Row:
    from qmedtune.merge import MergeJob, merge
    from qmedtune.model_stack import ModelStack
    from qmedtune.recipe import MergeSection, ModelSection

    out.mkdir()
    model = ModelSection(base=str(base), quantization=quantization, compute_dtype="bfloat16")
    facts = merge(MergeJob(ModelStack(base, (adapter,)), MergeSection(), model), out)
    return {key: facts[key] for key in PROOF}


def merge_with_peft(base: Path, adapter: Path, out: Path) -> Row:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)  # pyright: ignore
    return {}


def copy(base: Path, adapter: Path, out: Path) -> Row:
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    return {}


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The peak of this process' anonymous memory in bytes while inside, sampled every 5 ms."""
    peak = [_anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], _anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def main() -> None:
    prepare()
    contender, *paths = sys.argv[1:]
    base, adapter, out = map(Path, paths)
    if contender != "cp":  # what it imports, before the clock starts
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import qmedtune.merge  # noqa: F401
    nf4 = partial(merge_with_qmedtune, quantization="nf4")
    work = {"cp": copy, "qmedtune": merge_with_qmedtune, "qmedtune-nf4": nf4, "peft": merge_with_peft}[contender]
    with anonymous_peak() as peak:
        started, cpu_s = time.monotonic(), sum(os.times()[:4])
        figures = work(base, adapter, out)
        os.sync()
        seconds = time.monotonic() - started
    cpu_s = sum(os.times()[:4]) - cpu_s
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_anonymous_bytes": peak[0], **figures}))


if __name__ == "__main__":
    main()
