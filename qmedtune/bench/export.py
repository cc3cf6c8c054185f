"""`qmedtune bench export`: time and memory of an export as GGUF, against copying the same bytes.

A random-weight LLaMA with a byte-level tokenizer is written once; each contender then makes a file of it that is on the
disk (sync included), in a process of its own, in turns. Imports are not counted; the proof counts for qmedtune.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from qmedtune.bench import random_bases
from qmedtune.bench.random_bases import SHAPES
from qmedtune.bench.result import BenchResult, Row
from qmedtune.bench.rounds import Bench, copy, measure_rounds, render, result_of, work_alone
from qmedtune.process import prepare

CONTENDERS = {
    "cp": "cp of the folder, then sync: the bytes alone",
    "bf16": "qmedtune export --quant bf16 with its proof, then sync",
    "f16": "the same to f16: every number is rounded again",
    "q8_0": "the same to Q8_0: half the bytes",
    "q4_0": "the same to Q4_0",
}
BENCH = Bench("export", CONTENDERS)
__all__ = ["CONTENDERS", "bench_export", "render"]


def bench_export(
    shape: str = "1.1b", contenders: tuple[str, ...] = tuple(CONTENDERS), rounds: int = 3, scratch: Path | None = None
) -> BenchResult:
    """Measure; one row per contender (rounds.py: `result_of`), with the divergence that its proof found.

    scratch: a folder with room for twice the model. Raises RecipeError for an unknown shape or contender.
    """
    BENCH.check(shape, contenders)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model = Path(folder) / "model"
        weight_bytes = random_bases.write_model(SHAPES[shape], model)
        _write_tokenizer(model)
        measured = measure_rounds(BENCH, contenders, rounds, [model])
    return result_of(BENCH, measured, {"shape": shape, "weight_bytes": weight_bytes, "rounds": rounds})


def _write_tokenizer(folder: Path) -> None:
    """The smallest that encodes any text; the rows that it leaves are padding."""
    from qmedtune import tiny

    tiny.build_tokenizer(tiny.world_of("builtin:micro")).save_pretrained(str(folder))


def main() -> None:
    prepare()
    contender, model, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if contender != "cp":  # what it imports, before the clock starts
        import transformers.models.llama.modeling_llama  # noqa: F401

        import qmedtune.exporting.card
        import qmedtune.exporting.vocabulary  # noqa: F401
    work = partial(copy, model, out)
    if contender != "cp":
        work = partial(_export, contender, model, out)
    work_alone(work)


def _export(quant: str, model: Path, out: Path) -> Row:
    from qmedtune.export import ExportJob, export

    done = export(ExportJob(str(model), out, "gguf", quant))
    assert done.proof is not None
    return {"kl": done.proof.kl}


if __name__ == "__main__":
    main()
