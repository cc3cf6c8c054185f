"""Several processes against one on the same stage: how far their losses and adapters lie apart. Gloo on a CPU.

    python tests/agreement.py                                   # builtin:tiny, four processes, fp32
    python tests/agreement.py --base smollm2 --layers 6 --processes 2
    python tests/agreement.py --base smollm2 --layers 6 --processes 2 --dtype bfloat16 --shard

An sft stage of at least 20 steps: rows with unequal supervised tokens, several micro-batches a step, prompts that count
a third, a border between two epochs, a short last batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmedtune import peers, train
from qmedtune import run as spine
from qmedtune.base import builtin_folder
from qmedtune.model_stack import ModelStack
from qmedtune.parsing.loader import load_recipe
from qmedtune.planning.machine import this_machine
from qmedtune.planning.resolve import resolve
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Trained
from qmedtune.training import checkpoints

ROOT = Path(__file__).parent.parent
STEPS = 20
SETTINGS = (
    "stages[1].sft.batch=3",
    "stages[1].sft.micro_batch=1",
    "stages[1].sft.epochs=2.3",
    "stages[1].sft.loss_on=0.3",
    "data.literature.max_records=20",
    "data.notes.max_records=20",
    "data.general.max_records=20",
    "stages[0].cpt.tokens=1000",
    "validate.on=[literature]",
)
TINY = ("model.base=builtin:tiny", "stages[1].sft.seq_len=64")
SMOLLM2 = ("stages[1].sft.seq_len=96", "adapter.r=8")


@dataclass(frozen=True)
class Case:
    """base: `tiny`, or the folder of a model; dtype: what is computed in."""

    base: str
    processes: int
    dtype: str = "float32"
    sharded: bool = False

    @property
    def settings(self) -> list[str]:
        own = TINY if self.base == "tiny" else (f"model.base={self.base}", *SMOLLM2)
        return [*SETTINGS, *own, f"model.compute_dtype={self.dtype}"]

    def recipe(self, cards: int) -> ResolvedRecipe:
        more = ["shard=true"] if self.sharded and cards > 1 else []
        loaded = load_recipe(ROOT / "recipes" / "micro.yaml", [*self.settings, *more])
        resolved, _ = resolve(loaded.recipe, replace(this_machine(), cards=cards))
        return resolved


@dataclass(frozen=True)
class Apart:
    """How far several processes lie from one: losses of `steps` steps (of them `first` to `last`), weights of the
    adapter; `weight`: the largest of one process; `processes`: how each computed."""

    steps: int
    loss: float
    weights: float
    first: float
    last: float
    weight: float
    processes: list[str]


def cut(folder: Path, layers: int, out: Path) -> Path:
    """A model folder's first `layers` layers, with its tokenizer."""
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                parts = name.split(".")
                if "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers:
                    kept[name] = tensors.get_tensor(name)
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def compare(case: Case, work: Path) -> Apart:
    """Train the stage by one process, then by several that this one starts."""
    loaded = load_recipe(ROOT / "recipes" / "micro.yaml", case.settings)
    spine.run(loaded.recipe, loaded.text, work / "run", offline=True, until="data")
    one = _trained(case, work, 1)
    with peers.called(str(case.processes)):
        told = _trained(case, work, case.processes)
    losses, ours = _losses(work / "by-1"), _losses(work / f"by-{case.processes}")
    assert len(losses) == len(ours) >= STEPS, f"{len(losses)} steps, {len(ours)} by several"
    assert one.tokens == told.tokens
    weights, theirs = _adapter(work / "by-1"), _adapter(work / f"by-{case.processes}")
    differing = max(float((tensor - theirs[name]).abs().max()) for name, tensor in weights.items())
    return Apart(
        steps=len(losses),
        loss=max(abs(x - y) for x, y in zip(losses, ours, strict=True)),
        weights=differing,
        first=losses[0],
        last=losses[-1],
        weight=max(float(tensor.abs().max()) for tensor in weights.values()),
        processes=told.processes,
    )


def _trained(case: Case, work: Path, processes: int) -> Trained:
    out = work / f"by-{processes}"
    out.mkdir()
    base = Path(case.base)
    if case.base == "tiny":
        base = builtin_folder("builtin:tiny") / "01-pretrain" / "model"
    data = work / "run" / "data"
    inputs = train.StageInputs(ModelStack(base), data / "02-sft", data / "validation")
    return train.train_stage(case.recipe(processes), 1, inputs, out)


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / checkpoints.METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--layers", type=int, default=6, help="of smollm2, that are kept")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shard", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, base = Path(folder), given.base
        if base == "smollm2":
            from llama_folders import smollm2_folder

            base = str(cut(smollm2_folder(work), given.layers, work / "base"))
        apart = compare(Case(base, given.processes, given.dtype, given.shard), work / "compared")
    print(f"{given.processes} processes against one, {given.base}, {given.dtype}{', sharded' * given.shard}:")
    print(f"{apart.steps} steps, loss {apart.first:.3f} to {apart.last:.3f}: at most {apart.loss:.1e} apart")
    print(f"adapter, weights up to {apart.weight:.2g}: at most {apart.weights:.1e} apart")
    print("\n".join(apart.processes))


if __name__ == "__main__":
    main()
