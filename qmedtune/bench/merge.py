"""`qmedtune bench merge`: time and memory of a merge, against PEFT's and against copying the same bytes.

A random-weight LLaMA and a LoRA on all its linear layers are written once; each contender then turns them into a merged
folder that is on the disk (sync included), in a process of its own, in turns. What is quoted are ratios within this one
run. Imports are not counted for anyone; the proof counts for qmedtune, the only one to give one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from qmedtune.allowed import Quantization
from qmedtune.bench import random_bases
from qmedtune.bench.random_bases import SHAPES
from qmedtune.bench.result import BenchResult, Row
from qmedtune.bench.rounds import Bench, copy, measure_rounds, render, result_of, work_alone
from qmedtune.process import prepare

__all__ = ["CONTENDERS", "bench_merge", "render"]

CONTENDERS = {
    "cp": "cp of the base's folder, then sync: the bytes alone",
    "qmedtune": "qmedtune merge with its proof, then sync",
    "qmedtune-nf4": "the same of a model trained in NF4: with the shift from its quantised base",
    "peft": "PEFT merge_and_unload and save_pretrained in bfloat16, then sync: no proof",
}
BENCH = Bench("merge", CONTENDERS)
RANK = 16
PROOF = {"kl", "lost", "elements", "violations", "rounding"}


def bench_merge(
    shape: str = "1.1b", contenders: tuple[str, ...] = tuple(CONTENDERS), rounds: int = 3, scratch: Path | None = None
) -> BenchResult:
    """Measure; one row per contender (rounds.py: `result_of`), with the figures of its proof.

    scratch: a folder with room for twice the model. Raises RecipeError for an unknown shape or contender.
    """
    BENCH.check(shape, contenders)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        weight_bytes = random_bases.write_model(SHAPES[shape], base)
        _write_adapter(random_bases.tensors_of(SHAPES[shape]), adapter)
        measured = measure_rounds(BENCH, contenders, rounds, [base, adapter])
    job = {"shape": shape, "weight_bytes": weight_bytes, "r": RANK, "rounds": rounds}
    return result_of(BENCH, measured, job)


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


def merge_with_qmedtune(base: Path, adapter: Path, out: Path, quantization: Quantization = "none") -> Row:
    from qmedtune.merge import MergeJob, merge
    from qmedtune.model_stack import ModelStack
    from qmedtune.recipe import MergeSection, ModelSection

    out.mkdir()
    model = ModelSection(base=str(base), quantization=quantization, compute_dtype="bfloat16")
    merged = merge(MergeJob(ModelStack(base, (adapter,)), MergeSection(), model), out)
    return merged.model_dump(include=PROOF)


def merge_with_peft(base: Path, adapter: Path, out: Path) -> Row:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)  # pyright: ignore
    return {}


def main() -> None:
    prepare()
    contender, *paths = sys.argv[1:]
    base, adapter, out = map(Path, paths)
    if contender != "cp":  # what it imports, before the clock starts
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import qmedtune.merge  # noqa: F401
    contenders = {
        "cp": partial(copy, base, out),
        "qmedtune": partial(merge_with_qmedtune, base, adapter, out),
        "qmedtune-nf4": partial(merge_with_qmedtune, base, adapter, out, "nf4"),
        "peft": partial(merge_with_peft, base, adapter, out),
    }
    work_alone(contenders[contender])


if __name__ == "__main__":
    main()
