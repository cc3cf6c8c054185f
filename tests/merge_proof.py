"""The table of the merge's proof: right merges, all accepted; planted faults, all refused, each by its tensor.

    python tests/merge_proof.py --base DIR [--adapter DIR ...] [--write docs/merging.md]

Right merges are written by the product and in other orders of summation, for adapters of several ranks, scales and
sizes, in three dtypes, to the nearest number and stochastically. Faults are planted in the files of right ones, as a
bug, a disk or a mistaken folder would. `--adapter`: a trained one, used beside the random ones (its copies at .3 and .1
of its size stand for short runs). Without `--base` a random LLaMA of two layers is taken: what
tests/test_merge_proof.py runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_folders import llama3_folder, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmedtune.errors import MergeRefused, RunError
from qmedtune.merge import MergeJob, merge
from qmedtune.merging.disk_llama import DiskLlama, open_llama
from qmedtune.merging.lora_files import LowRank, Updates, read_adapters
from qmedtune.merging.parallel import workers
from qmedtune.merging.proof import MergeProof, Reference, check_readings
from qmedtune.merging.reference import read_base, read_updates
from qmedtune.merging.rounding import Rounding
from qmedtune.merging.tensors import open_weights
from qmedtune.model import DTYPES
from qmedtune.model_stack import INDEX, SINGLE, ModelStack
from qmedtune.recipe import MergeSection, ModelSection

TOKENS = np.random.default_rng(5).integers(0, 400, (1, 24))
SEED = 17
BEGIN, END = "<!-- merge-proof begins -->", "<!-- merge-proof ends -->"


@dataclass(frozen=True)
class Case:
    """A right merge: adapters onto a base, written as `section` says."""

    name: str
    base: Path
    adapters: list[Path]
    section: MergeSection

    @property
    def job(self) -> MergeJob:
        model = ModelSection(base=str(self.base), quantization="none", compute_dtype="float32")
        model = model if self.section.base == "full16" else model.model_copy(update={"quantization": "nf4"})
        return MergeJob(ModelStack(self.base, tuple(self.adapters)), self.section, model, SEED, TOKENS)


@dataclass
class Merged:
    """A right merge on disk, and what is needed to plant a fault in it or to write it in another order."""

    case: Case
    folder: Path
    opened: DiskLlama
    updates: Updates
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.section.dtype]

    @property
    def rounding(self) -> Rounding:
        return self.case.job.stochastic if self.case.section.rounding == "stochastic" else self.case.job.nearest

    def layer(self, part: str, number: int = 1) -> str:
        return next(name for name in self.updates.low_rank if f"layers.{number}." in name and part in name)

    def low_rank(self, name: str) -> list[LowRank]:
        return self.updates.low_rank[name]

    def weight(self, name: str) -> Tensor:
        """fp64, before any update."""
        return self.opened.source(name).double()

    def delta(self, name: str) -> Tensor:
        return sum((u.scale * (u.b.double() @ u.a.double()) for u in self.low_rank(name)), torch.tensor(0.0))

    def exact(self, name: str) -> Tensor:
        return self.weight(name) + self.delta(name)

    def written(self, name: str) -> Tensor:
        return open_weights(self.folder)[name].clone()

    def put(self, name: str, value: Tensor, rounding: Rounding | None = None) -> None:
        """Write a tensor over the one in its file, rounded as the merge would."""
        how = rounding or self.rounding
        rounded = value if value.dtype == self.dtype else how(value.float().clone(), name, 0)
        file = self.folder / open_weights(self.folder).files[name]
        begin, data = data_offset(file, name), rounded.contiguous().view(torch.uint8).numpy().tobytes()
        with file.open("r+b") as handle:
            handle.seek(begin)
            handle.write(data)


def data_offset(file: Path, name: str) -> int:
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return 8 + size + header[name]["data_offsets"][0]


# ------------------------------------------------------------------------------------------- other orders of summation


def fp64_sum(merged: Merged) -> None:
    for name in merged.updates.low_rank:
        merged.put(name, merged.exact(name))


def scaled_b_first(merged: Merged) -> None:
    for name, updates in merged.updates.low_rank.items():
        total = merged.opened.source(name).float()
        for update in updates:
            total = total + (update.b * update.scale) @ update.a
        merged.put(name, total)


def halves_of_r(merged: Merged) -> None:
    for name, updates in merged.updates.low_rank.items():
        total = merged.opened.source(name).float()
        for update in updates:
            half = len(update.a) // 2
            total = total + update.scale * (update.b[:, :half] @ update.a[:half])
            total = total + update.scale * (update.b[:, half:] @ update.a[half:])
        merged.put(name, total)


def update_by_update(merged: Merged) -> None:
    """All updates first, then the base."""
    for name, updates in merged.updates.low_rank.items():
        total = sum(update.scale * (update.a.T @ update.b.T).T for update in updates)
        merged.put(name, total + merged.opened.source(name).float())


ORDERS: dict[str, Callable[[Merged], None]] = {
    "fp64 sum": fp64_sum,
    "(s B) A": scaled_b_first,
    "halves of r": halves_of_r,
    "updates first, transposed": update_by_update,
}


# ------------------------------------------------------------------------------------------------------------- faults


def skipped(part: str) -> Callable[[Merged], str]:
    def plant(merged: Merged) -> str:
        name = merged.layer(part)
        merged.put(name, merged.weight(name))
        return f"{part} of layer 1.*skipped"

    return plant


def weakest_skipped(merged: Merged) -> str:
    name = min(merged.updates.low_rank, key=lambda n: float(merged.delta(n).norm()))
    merged.put(name, merged.weight(name))
    return "skipped"


def rows_without_update(merged: Merged) -> str:
    name = merged.layer("down_proj")
    value = merged.exact(name)
    value[16:32] = merged.weight(name)[16:32]
    merged.put(name, value)
    return "down_proj of layer 1.*skipped, in "


def rows_zeroed(merged: Merged) -> str:
    name = merged.layer("up_proj")
    value = merged.exact(name)
    value[16:32] = 0
    merged.put(name, value)
    return "up_proj of layer 1.*zero, in rows 16 to 31"


def scaled_by(factor: float) -> Callable[[Merged], str]:
    def plant(merged: Merged) -> str:
        for name in merged.updates.low_rank:
            merged.put(name, merged.weight(name) + factor * merged.delta(name))
        return f"scale was {factor:.3g}|scale was 0.899"

    return plant


def one_scaled(merged: Merged) -> str:
    name = merged.layer("o_proj")
    merged.put(name, merged.weight(name) + 1.02 * merged.delta(name))
    return "o_proj of layer 1.*scale was 1.02"


def alpha_over_sqrt_r(merged: Merged) -> str:
    for name in merged.updates.low_rank:
        rank = len(merged.low_rank(name)[0].a)
        merged.put(name, merged.weight(name) + rank**0.5 * merged.delta(name))
    return r"alpha over sqrt\(r\)|merged twice"  # the same for rank 4


def merged_twice(merged: Merged) -> str:
    for name in merged.updates.low_rank:
        merged.put(name, merged.weight(name) + 2 * merged.delta(name))
    return "merged twice|sqrt"


def layers_swapped(merged: Merged) -> str:
    one, other = (merged.layer("gate_proj", number) for number in (0, 1))
    merged.put(one, merged.weight(one) + merged.delta(other))
    merged.put(other, merged.weight(other) + merged.delta(one))
    return "gate_proj of layer .*adapter of gate_proj of layer"


def update_transposed(merged: Merged) -> str:
    name = merged.layer("q_proj")
    merged.put(name, merged.weight(name) + merged.delta(name).T)
    return "q_proj of layer 1.*transposed"


def base_transposed(merged: Merged) -> str:
    name = merged.layer("q_proj")
    merged.put(name, merged.weight(name).T + merged.delta(name))
    return "q_proj of layer 1.*transposed"


def other_tensor(merged: Merged) -> str:
    one, other = (merged.layer("v_proj", number) for number in (0, 1))
    merged.put(one, merged.written(other))
    return "v_proj of layer 0.*as if it was v_proj of layer 1"


def other_base(merged: Merged) -> str:
    """A shard of another revision: all weights of a layer .1 % away."""
    for part in ("q_proj", "down_proj"):
        name = merged.layer(part)
        noise = 1 + 1e-3 * torch.randn(merged.weight(name).shape, generator=merged.random, dtype=torch.float64)
        merged.put(name, merged.weight(name) * noise + merged.delta(name))
    return "of layer 1.*other"


def update_rounded_first(merged: Merged) -> str:
    for name in merged.updates.low_rank:
        merged.put(name, merged.weight(name) + merged.delta(name).to(merged.dtype).double())
    return "rounded"


def all_in_16_bit(merged: Merged) -> str:
    for name, updates in merged.updates.low_rank.items():
        total = merged.opened.source(name).to(merged.dtype)
        for update in updates:
            total = total + (update.b.to(merged.dtype) @ update.a.to(merged.dtype)) * update.scale
        merged.put(name, total)
    return "rounded|other|scale"


def toward_zero(merged: Merged) -> str:
    for name in merged.updates.low_rank:
        value = merged.exact(name)
        near = value.to(merged.dtype)
        past = near.double().abs() > value.abs()
        inward = torch.nextafter(near, torch.zeros_like(near))
        merged.put(name, torch.where(past, inward, near))
    return "toward zero"


def other_noise(merged: Merged) -> str:
    """Stochastic where nearest was meant, or with another seed."""
    for name in merged.updates.low_rank:
        merged.put(name, merged.exact(name), Rounding(merged.dtype, SEED + 1))
    return "rounded"


def rounded_twice(merged: Merged) -> str:
    by = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16, torch.float32: torch.bfloat16}[merged.dtype]
    for name in merged.updates.low_rank:
        merged.put(name, merged.exact(name).to(by).to(merged.dtype))
    return "rounded|other"


def one_element(merged: Merged) -> str:
    name = merged.layer("up_proj")
    value = merged.written(name)
    value[3, 5] *= 2
    merged.put(name, value)
    return "up_proj of layer 1.*single elements"


def not_a_number(merged: Merged) -> str:
    name = merged.layer("k_proj")
    value = merged.written(name)
    value[0, 0] = float("nan")
    merged.put(name, value)
    return "k_proj of layer 1.*not finite"


def norm_off(merged: Merged) -> str:
    name = "model.layers.1.input_layernorm.weight"
    merged.put(name, merged.weight(name) * 1.01)
    return "input_layernorm of layer 1.*multiplied by 1.01"


def embedding_rows(merged: Merged) -> str:
    name = "model.embed_tokens.weight"
    value = merged.written(name)
    value[100:108] = 0
    merged.put(name, value)
    return "the embedding.*rows 100 to 107"


def stage_forgotten(number: int) -> Callable[[Merged], str]:
    def plant(merged: Merged) -> str:
        for name, updates in merged.updates.low_rank.items():
            kept = updates[:number] + updates[number + 1 :]
            total = merged.weight(name)
            for update in kept:
                total = total + update.scale * (update.b.double() @ update.a.double())
            merged.put(name, total)
        return f"adapter {number + 1} of 2 was left out|skipped"

    return plant


def onto_nf4(merged: Merged) -> str:
    model = ModelSection(base="x", compute_dtype="bfloat16")
    for name in merged.updates.low_rank:
        merged.put(name, merged.opened.nf4(name, model).double() + merged.delta(name))
    return "other base weights"


def tensors_of(merged: Merged) -> tuple[Path, dict[str, Tensor]]:
    """A weight file with norms in it, and what it holds."""
    file = merged.folder / open_weights(merged.folder).files["model.layers.1.input_layernorm.weight"]
    return file, load_file(file)


def extra_tensor(merged: Merged) -> str:
    file, tensors = tensors_of(merged)
    save_file({**tensors, "model.vision.weight": torch.ones(2).to(merged.dtype)}, file, metadata={"format": "pt"})
    return "model.vision.weight|stale"


def missing_tensor(merged: Merged) -> str:
    file, tensors = tensors_of(merged)
    tensors.pop(next(name for name in tensors if "layernorm" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    return "layernorm"


def wider_tensor(merged: Merged) -> str:
    file, tensors = tensors_of(merged)
    name = next(name for name in tensors if "layernorm" in name)
    other = torch.float32 if merged.dtype != torch.float32 else torch.bfloat16
    save_file({**tensors, name: tensors[name].to(other)}, file, metadata={"format": "pt"})
    return "layernorm of layer .* was written as"


def stray_file(merged: Merged) -> str:
    save_file({"model.norm.weight": torch.ones(4)}, merged.folder / "old.safetensors", metadata={"format": "pt"})
    return "old.safetensors"


def two_formats(merged: Merged) -> str:
    """model.safetensors and an index: transformers reads the first, others the second."""
    file, tensors = tensors_of(merged)
    if (merged.folder / INDEX).is_file():
        everything = {name: merged.written(name) for name in open_weights(merged.folder).files}
        save_file(everything, merged.folder / SINGLE, metadata={"format": "pt"})
    else:
        shard = "model-00001-of-00001.safetensors"
        shutil.copyfile(file, merged.folder / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (merged.folder / INDEX).write_text(json.dumps(index))
    return "both there"


def tie_flag_turned(merged: Merged) -> str:
    path = merged.folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    return "tie_word_embeddings|output layer|lm_head"


def lost_head(merged: Merged) -> str:
    """The trained head is dropped and the embedding tied in its place."""
    path = merged.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for file in sorted(merged.folder.glob("*.safetensors")):
        tensors = load_file(file)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    index = merged.folder / INDEX
    if index.is_file():
        known = json.loads(index.read_text())
        known["weight_map"].pop("lm_head.weight", None)
        index.write_text(json.dumps(known))
    return "output layer is lost"


def copy_not_taken(merged: Merged) -> str:
    merged.put("lm_head.weight", merged.weight("lm_head.weight"))
    return "the output layer.*trained copy was not taken"


def reader_scale(merged: Merged) -> str:
    """A fault that merge and file share: every update was read with another scale."""
    for name, updates in merged.updates.low_rank.items():
        merged.updates.low_rank[name] = [replace(update, scale=update.scale * 1.02) for update in updates]
        merged.put(name, merged.exact(name))
    return "read in two ways.*scale"


def reader_module(merged: Merged) -> str:
    name = merged.layer("q_proj")
    merged.put(name, merged.weight(name))
    del merged.updates.low_rank[name]
    return "only PEFT finds a low-rank update"


def stale_index(merged: Merged) -> str:
    index = merged.folder / INDEX
    known = json.loads(index.read_text())
    files = sorted(set(known["weight_map"].values()))
    name = next(name for name, file in known["weight_map"].items() if file == files[0])
    known["weight_map"][name] = files[-1]
    index.write_text(json.dumps(known))
    return "stale"


EVERYWHERE: dict[str, Callable[[Merged], str]] = {
    "one up_proj skipped": skipped("up_proj"),
    "one q_proj skipped": skipped("q_proj"),
    "weakest module skipped": weakest_skipped,
    "16 rows of the update missing": rows_without_update,
    "16 rows zero": rows_zeroed,
    "one o_proj scaled by 1.02": one_scaled,
    "scale +2 %": scaled_by(1.02),
    "scale -10 %": scaled_by(0.9),
    "update transposed (q_proj)": update_transposed,
    "base transposed (q_proj)": base_transposed,
    "adapters of two layers swapped": layers_swapped,
    "one element doubled": one_element,
    "other noise": other_noise,
}
OF_ONE = {
    "alpha/sqrt(r)": alpha_over_sqrt_r,
    "merged twice": merged_twice,
    "another layer's tensor": other_tensor,
    "a shard of another revision": other_base,
    "W + 16-bit(BA)": update_rounded_first,
    "all in 16 bit": all_in_16_bit,
    "rounded toward zero": toward_zero,
    "rounded by another 16 bit first": rounded_twice,
    "not a number": not_a_number,
    "one norm +1 %": norm_off,
    "8 embedding rows zero": embedding_rows,
    "onto NF4's values": onto_nf4,
    "an extra tensor": extra_tensor,
    "a missing tensor": missing_tensor,
    "a tensor of another dtype": wider_tensor,
    "a stray file": stray_file,
    "model.safetensors and an index": two_formats,
    "tie flag turned": tie_flag_turned,
    "scale misread by the merge": reader_scale,
    "a module overlooked by the merge": reader_module,
}
OF_STACK = {"stage 1 forgotten": stage_forgotten(0), "stage 2 forgotten": stage_forgotten(1)}
OF_HEAD = {"head lost": lost_head, "trained head not taken": copy_not_taken}


# -------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Row:
    """One line of the table. `refused`: the message, None where it was accepted."""

    merge: str
    fault: str | None
    refused: str | None
    lost: float | None = None
    swallowed: float | None = None


def scaled_copy(adapter: Path, out: Path, factor: float) -> Path:
    """The adapter with its B times `factor`: an update of the same kind after a shorter run."""
    shutil.copytree(adapter, out)
    file = out / "adapter_model.safetensors"
    tensors = {name: t * factor if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    (out / "trained_on.json").unlink(missing_ok=True)
    return out


def random_adapters(base: Path, folder: Path) -> dict[str, list[Path]]:
    """Ranks 4 to 64, plain and rslora, updates of 3e-4 to 3e-2 of the weights, a stack, trained copies."""
    settings: dict[str, tuple[int, float, dict[str, Any]]] = {
        "r4 tiny": (1, 0.0006, {"r": 4, "lora_alpha": 8}),
        "r16": (2, 0.01, {"r": 16, "lora_alpha": 32}),
        "r16 small": (3, 0.001, {"r": 16, "lora_alpha": 32}),
        "r64 rslora": (4, 0.004, {"r": 64, "lora_alpha": 16, "use_rslora": True}),
        "r7 odd scale": (5, 0.02, {"r": 7, "lora_alpha": 10}),
        "r8 q, v": (6, 0.02, {"target_modules": ["q_proj", "v_proj"]}),
        "r8 + head": (7, 0.02, {"modules_to_save": ["lm_head"]}),
        "r8 + both ends": (8, 0.02, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    }
    made = {n: [write_adapter(base, folder / n, seed=s, size=z, **more)] for n, (s, z, more) in settings.items()}
    return {**made, "stack r16 + r4": [*made["r16"], *made["r4 tiny"]]}


def right_cases(base: Path, adapters: dict[str, list[Path]]) -> Iterator[Case]:
    for name, folders in adapters.items():
        for dtype in ("bfloat16", "float16", "float32"):
            yield Case(f"{name}, {dtype}", base, folders, MergeSection(dtype=dtype, rounding="nearest"))
        yield Case(f"{name}, bfloat16 stochastic", base, folders, MergeSection(rounding="stochastic"))
    first = next(iter(adapters.values()))
    yield Case("float16 stochastic", base, first, MergeSection(dtype="float16", rounding="stochastic"))
    yield Case("onto NF4, bfloat16", base, first, MergeSection(base="nf4", rounding="nearest"))
    yield Case("auto", base, first, MergeSection())


def merged_by_product(case: Case, folder: Path) -> tuple[Merged, dict[str, Any]]:
    folder.mkdir(parents=True)
    facts = merge(case.job, folder).as_json()
    opened = open_llama(case.base)
    return Merged(case, folder, opened, read_adapters(case.adapters, opened.shapes)), facts


def prove(merged: Merged) -> dict[str, Any]:
    case = merged.case
    base, updates = read_base(case.base, merged.opened.weights), read_updates(case.adapters, merged.opened.model)
    with workers() as pool:
        check_readings(merged.updates, Reference(base, updates))
        proof = MergeProof(
            base=merged.opened,
            reference=Reference(base, updates),
            merged=merged.folder,
            section=case.section,
            model=case.job.model,
            rounding=merged.rounding,
            pool=pool,
        )
        return proof.run(TOKENS).as_json()


def accept(cases: Sequence[Case], scratch: Path, orders: int) -> Iterator[Row]:
    """Right merges; the first `orders` of them also in every other order of summation."""
    for number, case in enumerate(cases):
        merged, facts = merged_by_product(case, scratch / "right")
        yield Row(case.name, None, None, facts["lost"], facts["swallowed"])
        for name, write in ORDERS.items() if number < orders else ():
            write(merged)
            yield _judged(merged, f"{case.name}, {name}", None)
        shutil.rmtree(scratch / "right")


def refuse(case: Case, faults: dict[str, Callable[[Merged], str]], scratch: Path) -> Iterator[tuple[Row, str]]:
    """Each fault planted in a copy of the right merge; the row, and what its refusal must say."""
    merged, _ = merged_by_product(case, scratch / "right")
    for name, plant in faults.items():
        shutil.copytree(scratch / "right", scratch / "wrong")
        opened = merged.opened
        copy = Merged(case, scratch / "wrong", opened, read_adapters(case.adapters, opened.shapes))
        expected = plant(copy)
        yield _judged(copy, case.name, name), expected
        shutil.rmtree(scratch / "wrong")
    shutil.rmtree(scratch / "right")


def _judged(merged: Merged, name: str, fault: str | None) -> Row:
    try:
        facts = prove(merged)
    except (MergeRefused, RunError) as refused:
        return Row(name, fault, str(refused).splitlines()[0])
    return Row(name, fault, None, facts["lost"], facts["swallowed"])


def fault_plan(base: Path, adapters: dict[str, list[Path]]) -> Iterator[tuple[Case, dict[str, Any]]]:
    first, *rest = [name for name in adapters if not name.startswith("r8") and len(adapters[name]) == 1][:3]
    nearest = MergeSection(rounding="nearest")
    quick = all(len(folders) == 1 for folders in adapters.values())
    yield Case(f"{first}, bfloat16", base, adapters[first], nearest), EVERYWHERE if quick else {**EVERYWHERE, **OF_ONE}
    if quick:
        return
    for name in rest[:1]:
        yield Case(f"{name}, bfloat16", base, adapters[name], nearest), EVERYWHERE
    for dtype in ("float16", "float32"):
        section = MergeSection(dtype=dtype, rounding="nearest")
        faults = {n: f for n, f in EVERYWHERE.items() if n != "other noise" or dtype == "float16"}
        yield Case(f"{first}, {dtype}", base, adapters[first], section), faults
    yield Case(f"{first}, stochastic", base, adapters[first], MergeSection(rounding="stochastic")), EVERYWHERE
    stack = next(folders for folders in adapters.values() if len(folders) > 1)
    yield Case("stack, bfloat16", base, stack, nearest), OF_STACK
    yield Case("trained head, bfloat16", base, adapters["r8 + head"], nearest), OF_HEAD
    if (base / INDEX).is_file():
        yield Case("shards, bfloat16", base, adapters[first], nearest), {"stale index": stale_index}


def table(base: Path, adapters: dict[str, list[Path]], scratch: Path) -> tuple[list[Row], list[Row]]:
    right, wrong = [], []
    for row in accept(list(right_cases(base, adapters)), scratch, orders=3):
        right.append(row)
        print(f"right  {row.merge}: {row.refused or 'accepted'}", file=sys.stderr)
    for case, faults in fault_plan(base, adapters):
        for row, _ in refuse(case, faults, scratch):
            wrong.append(row)
            print(f"wrong  {row.merge}, {row.fault}: {row.refused or 'ACCEPTED'}", file=sys.stderr)
    return right, wrong


def markdown(right: list[Row], wrong: list[Row], base: str) -> str:
    accepted, caught = sum(row.refused is None for row in right), sum(row.refused is not None for row in wrong)
    lines = [
        f"{accepted} of {len(right)} right merges of {base} accepted, {caught} of {len(wrong)} planted faults refused.",
        "",
        "| right merge | verdict | lost of the change (KL) | elements swallowed |",
        "|---|---|---|---|",
        *(f"| {r.merge} | {r.refused or 'accepted'} | {_share(r.lost)} | {_share(r.swallowed)} |" for r in right),
        "",
        "| merge | planted fault | refused with |",
        "|---|---|---|",
        *(f"| {r.merge} | {r.fault} | {r.refused or '**accepted**'} |" for r in wrong),
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def write_page(page: Path, text: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put the tables between their marks."""
    begin, end = marks
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path, help="a trained one of that base")
    parser.add_argument("--quick", action="store_true", help="the given adapter alone: 15 right merges, 13 faults")
    parser.add_argument("--write", type=Path, help="a page with the marks of the tables")
    parser.add_argument("--name", default="the base", help="what the page calls the base")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = asked.base or llama3_folder(scratch / "base")
        adapters = {}
        if asked.adapter:
            adapters = {"trained": [scaled_copy(asked.adapter, scratch / "t1", 1.0)]}
            adapters |= {f"trained x{f}": [scaled_copy(asked.adapter, scratch / f"t{f}", f)] for f in (0.1, 0.3, 3.0)}
        adapters |= {} if asked.quick else random_adapters(base, scratch)
        right, wrong = table(base, adapters, scratch)
    text = markdown(right, wrong, asked.name)
    if asked.write:
        write_page(asked.write, text)
    print(text if not asked.write else text.splitlines()[0])
    failed = [row for row in right if row.refused] + [row for row in wrong if not row.refused]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
