"""What the proof of a merge accepts and refuses: the whole table of tests/merge_proof.py on a random LLaMA, and folders
that are read in two ways."""

import json
import re
import shutil
from pathlib import Path

import merge_proof
import pytest
import torch
from llama_folders import llama2_folder, llama3_folder, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmedtune import base as bases
from qmedtune.errors import RecipeError
from qmedtune.merge import MergeJob, merge
from qmedtune.merging.elements import ElementCheck, Expected
from qmedtune.merging.lora_files import LowRank
from qmedtune.merging.rounding import Rounding, noise_bits, unit
from qmedtune.merging.tensors import open_weights
from qmedtune.model_stack import INDEX, SINGLE, ModelStack
from qmedtune.recipe import MergeSection, ModelSection

MODEL = ModelSection(base="here", quantization="none", compute_dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return llama3_folder(tmp_path_factory.mktemp("proof") / "base")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    return merge_proof.random_adapters(base, tmp_path_factory.mktemp("adapters"))


def test_every_right_merge_is_accepted(base, adapters, tmp_path):
    cases = list(merge_proof.right_cases(base, adapters))
    rows = list(merge_proof.accept(cases, tmp_path, orders=3))
    assert len(rows) >= 40
    assert [row for row in rows if row.refused] == []


def test_every_planted_fault_is_refused_by_its_tensor(base, adapters, tmp_path):
    found = []
    for case, faults in merge_proof.fault_plan(base, adapters):
        for row, expected in merge_proof.refuse(case, faults, tmp_path):
            assert row.refused, f"{row.merge}: {row.fault} was accepted"
            assert re.search(expected, row.refused), (row.merge, row.fault, row.refused)
            found.append(row)
    assert len(found) >= 60


# ---------------------------------------------------------------------------------------------------------- the bound


def check_of(weight, updates, written, rounding) -> int:
    expected = Expected("w", tuple(updates))
    check = ElementCheck(rounding, {"w": expected}, {"w": written})
    check.block("w", slice(0, len(weight)), weight, weight.float().clone())
    return check.total().violations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_sums_in_any_order_are_within_the_bound(dtype, size):
    """Also where weight and update cancel, and where many ranks are summed one by one."""
    torch.manual_seed(0)
    weight = (torch.randn(96, 80) * 0.02).to(torch.bfloat16)
    updates = [LowRank(torch.randn(r, 80), torch.randn(96, r) * 0.02 * size, s) for r, s in ((64, 2.0), (7, 1 / 3))]
    total = weight.float()
    for update in updates:
        part = torch.zeros_like(total)
        for k in torch.randperm(len(update.a)):
            part = part + torch.outer(update.b[:, k], update.a[k])
        total = total + update.scale * part
    assert check_of(weight, updates, total.to(dtype), Rounding(dtype)) == 0
    cancelled = -sum((u.scale * u.b @ u.a for u in updates), torch.zeros(96, 80)).to(torch.bfloat16)
    total = cancelled.float()
    for update in updates:
        total = total + update.scale * (update.b @ update.a)
    assert check_of(cancelled, updates, total.to(dtype), Rounding(dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_neighbour_of_the_right_number_is_a_violation(dtype, seed):
    torch.manual_seed(1)
    weight = (torch.randn(64, 48) * 0.02).to(torch.bfloat16)
    update = LowRank(torch.randn(8, 48), torch.randn(64, 8) * 0.001, 2.0)
    rounding = Rounding(dtype, seed)
    exact = weight.double() + 2.0 * (update.b.double() @ update.a.double())
    right = rounding(exact.float(), "w", 0)
    assert check_of(weight, [update], right, rounding) == 0
    for towards in (1.0, -1.0):
        wrong = torch.nextafter(right, torch.full_like(right, towards))
        found = check_of(weight, [update], wrong, rounding)
        assert found >= 0.99 * wrong.numel(), "all but those that a right fp32 sum may round to either side"


def test_units_are_the_distance_to_the_next_number():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.tensor([1.0, 1.99, 0.0123, 7e-6, 6.2e-5, 3.0]).to(dtype)
        following = torch.nextafter(values, torch.full_like(values, 100.0))
        assert torch.equal(unit(values.double(), dtype), following.double() - values.double()), dtype


# ------------------------------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0123456, 3e-5, -2.5e-5, 1e-7, -1.99999])
def test_noise_is_right_on_average_and_takes_a_neighbour(dtype, value):
    block = torch.full((200_000,), value)
    exact = block[0].double()
    rounded = Rounding(dtype, 3)(block, "a", 0).double()
    step = unit(exact.abs(), dtype)
    assert ((rounded - exact).abs() < step).all()
    assert abs(float((rounded.mean() - exact) / step)) < 5 * 0.5 / 200_000**0.5


def test_noise_depends_on_seed_name_and_place_alone():
    block = torch.randn(1000, 7) * 0.02
    rounding = Rounding(torch.bfloat16, 11)
    whole = rounding(block.clone(), "a", 0)
    for border in (1, 3, 500):
        parts = [rounding(block[:border].clone(), "a", 0), rounding(block[border:].clone(), "a", border * 7)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(rounding(block.clone(), "b", 0), whole)
    assert not torch.equal(Rounding(torch.bfloat16, 12)(block.clone(), "a", 0), whole)
    first = noise_bits(17, "model.norm.weight", 0, 6).tolist()
    assert first == noise_bits(17, "model.norm.weight", 0, 100)[:6].tolist()
    assert first == NOISE, "files that are published name a seed: the noise must never change"


# By SplitMix64 in plain Python, from the first 8 bytes of sha256("17:model.norm.weight").
NOISE = [41798, 25381, 54328, 36787, 21031, 56656]


def job(folder, adapters, **section) -> MergeJob:
    return MergeJob(ModelStack(folder, tuple(adapters)), MergeSection(**section), MODEL, probe_ids=merge_proof.TOKENS)


def merged(job: MergeJob, out: Path) -> dict:
    out.mkdir()
    return merge(job, out).as_json()


def test_a_stochastic_file_says_how_to_draw_its_noise(base, adapters, tmp_path):
    facts = merged(job(base, adapters["r16 small"], rounding="stochastic"), tmp_path / "m")
    assert (facts["rounding"], facts["rounding_seed"]) == ("stochastic", 17)
    for file in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt", "rounding": "stochastic", "rounding_seed": "17"}
    again = merged(job(base, adapters["r16 small"], rounding="stochastic"), tmp_path / "n")
    assert facts["sha256"] == again["sha256"]


def test_auto_takes_nearest_where_little_is_lost_and_says_why(base, adapters, tmp_path):
    facts = merged(job(base, adapters["r16"]), tmp_path / "m")
    assert facts["rounding"] == "nearest" and facts["lost"] < 0.01 and "up to 1 % is fine" in facts["rounding_why"]


def drifting(adapter: Path, base: Path, out: Path) -> Path:
    """An update below half a unit nearly everywhere, of rank one, as little training leaves it."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        tensor.zero_()
        one = torch.randn(max(tensor.shape), generator=generator)
        if "lora_A" in name:
            tensor[0] = one.sign()
        else:
            tensor[:, 0] = 2e-4 * one
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def test_auto_takes_the_rounding_that_loses_less(base, adapters, tmp_path):
    small = drifting(adapters["r16"][0], base, tmp_path / "a")
    nearest = merged(job(base, [small], rounding="nearest"), tmp_path / "nearest")
    stochastic = merged(job(base, [small], rounding="stochastic"), tmp_path / "stochastic")
    auto = merged(job(base, [small]), tmp_path / "auto")
    assert nearest["lost"] > 0.01 and nearest["swallowed"] > 0.3
    best = min((nearest, stochastic), key=lambda facts: facts["lost"])
    assert (auto["rounding"], auto["sha256"]) == (best["rounding"], best["sha256"])
    assert "%" in auto["rounding_why"]


def test_nothing_is_lost_where_nothing_was_learnt(base, adapters, tmp_path):
    empty = merge_proof.scaled_copy(adapters["r16"][0], tmp_path / "a", 0.0)
    facts = merged(job(base, [empty]), tmp_path / "m")
    assert (facts["lost"], facts["swallowed"], facts["rounding"], facts["violations"]) == (None, None, "nearest", 0)


def test_stochastic_float32_is_a_contradiction(base, adapters, tmp_path):
    with pytest.raises(RecipeError, match="float32 keeps"):
        merged(job(base, adapters["r16"], rounding="stochastic", dtype="float32"), tmp_path / "m")


# ------------------------------------------------------------------------------------ folders that are read in two ways


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(input_ids=torch.from_numpy(merge_proof.TOKENS)).logits


def test_a_head_beside_a_tie_flag_is_kept(base, tmp_path):
    """Older PEFT merges of Llama-3.2-1B: tie_word_embeddings is true, and the files hold a head of their own."""
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    file = folder / open_weights(folder).files["model.norm.weight"]
    tensors = load_file(file)
    embedding = open_weights(folder)["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = (embedding.float() + 0.05 * torch.randn(embedding.shape)).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file.name
    (folder / INDEX).write_text(json.dumps(index))
    assert (logits(folder) - logits(base)).abs().max() > 0.1, "the head must matter"
    empty = merge_proof.scaled_copy(write_adapter(folder, tmp_path / "a"), tmp_path / "e", 0.0)
    facts = merged(job(folder, [empty]), tmp_path / "m")
    assert facts["tied"] is False
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(open_weights(tmp_path / "m")["lm_head.weight"], tensors["lm_head.weight"])
    assert (logits(tmp_path / "m") - logits(folder)).abs().max() < 1e-5


def test_a_tied_model_may_store_its_head_alone(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    for file in folder.glob("*.safetensors"):
        tensors = {("lm_head.weight" if "embed" in n else n): t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"].pop("model.embed_tokens.weight")
    (folder / INDEX).write_text(json.dumps(index))
    adapter = write_adapter(base, tmp_path / "a")
    facts = merged(job(folder, [adapter]), tmp_path / "m")
    reference = merged(job(base, [adapter]), tmp_path / "n")
    assert facts["tied"] is True
    assert (logits(tmp_path / "m") - logits(tmp_path / "n")).abs().max() == 0
    assert facts["elements"] == reference["elements"]


def test_of_one_file_and_shards_that_is_merged_which_training_reads(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    weights = open_weights(folder)
    other = {name: weights[name] * 1.5 for name in weights.files}
    save_file(other, folder / SINGLE, metadata={"format": "pt"})
    adapter = write_adapter(base, tmp_path / "a", size=0.0)
    facts = merged(job(folder, [adapter]), tmp_path / "m")
    assert facts["violations"] == 0
    written = open_weights(tmp_path / "m")
    assert torch.equal(written["model.norm.weight"], other["model.norm.weight"])
    assert (logits(tmp_path / "m") - logits(folder)).abs().max() == 0


def test_a_tensor_in_two_shards_is_refused(base, adapters, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    files = sorted(folder.glob("*.safetensors"))
    extra = dict(list(load_file(files[1]).items())[:1])
    save_file({**load_file(files[0]), **extra}, files[0], metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=f"{next(iter(extra))} is in"):
        merged(job(folder, adapters["r16"]), tmp_path / "m")


def test_weights_that_are_no_floats_are_refused(base, adapters, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name in tensors if "_proj" in name)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=f"{name} is stored as I32"):
        merged(job(folder, adapters["r16"]), tmp_path / "m")


def test_norms_in_fp32_beside_16_bit_weights(base, adapters, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "b"))
    for file in folder.glob("*.safetensors"):
        tensors = {n: t.float() * 1.0001 if "norm" in n else t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    facts = merged(job(folder, adapters["r16"], dtype="float32"), tmp_path / "m")
    assert facts["violations"] == 0
    name = "model.norm.weight"
    assert torch.equal(open_weights(tmp_path / "m")[name], open_weights(folder)[name])


def test_biases_are_proven(tmp_path):
    folder = llama2_folder(tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    tensors = load_file(folder / SINGLE)
    named = {name: t for name, t in tensors.items() if "attn" in name and "_proj" in name}
    biases = {name.replace(".weight", ".bias"): torch.randn(len(t)).to(t.dtype) for name, t in named.items()}
    save_file({**tensors, **biases}, folder / SINGLE, metadata={"format": "pt"})
    adapter = write_adapter(folder, tmp_path / "a")
    facts = merged(job(folder, [adapter], dtype="float16"), tmp_path / "m")
    weights = open_weights(tmp_path / "m")
    assert len(biases) == 8 and all(torch.equal(weights[name], bias) for name, bias in biases.items())
    assert facts["elements"] == sum(weights[name].numel() for name in weights.files)


def test_onto_nf4_of_a_model_trained_without_is_refused(base, adapters, tmp_path):
    with pytest.raises(RecipeError, match="no model on NF4's values was trained"):
        merged(job(base, adapters["r16"], base="nf4"), tmp_path / "m")


# ------------------------------------------------------------------------------------------------- recorded in training


def test_adapters_on_another_base_or_in_another_order_are_refused(base, adapters, tmp_path):
    one, two = (Path(shutil.copytree(adapters["r16"][0], tmp_path / name)) for name in ("one", "two"))
    bases.note_base(one, "builtin:tiny", ModelStack(base), "none")
    bases.note_base(two, "builtin:tiny", ModelStack(base, (one,)), "none")
    facts = merged(job(base, [one, two]), tmp_path / "m")
    assert facts["adapters"] == 2
    with pytest.raises(RecipeError, match="trained on top of 1 adapters"):
        merged(job(base, [two]), tmp_path / "n")
    other = llama3_folder(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="was trained on other weights"):
        merged(job(other, [one]), tmp_path / "o")


def test_the_name_of_a_base_inside_its_run_is_found_from_the_adapter_alone(base, adapters, tmp_path):
    run = tmp_path / "run"
    folded = run / "02-sft-base"
    shutil.copytree(base, folded)
    adapter = run / "02-sft" / "adapter"
    shutil.copytree(adapters["r16"][0], adapter)
    name = bases.name_of_base("builtin:tiny", folded, run)
    assert name == "../../02-sft-base" and bases.name_of_base("builtin:tiny", base, run) == "builtin:tiny"
    assert bases.base_in_run(adapter, name) is None, "only what training has noted"
    bases.note_base(adapter, name, ModelStack(folded), "nf4")
    assert bases.base_in_run(adapter, name) == folded.resolve()
    assert bases.base_in_run(adapter, "../../../elsewhere") is None
    assert bases.trained_quantization(adapter) == "nf4"
