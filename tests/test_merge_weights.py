"""`merge.weights`: what of each stage is merged, against sums worked by hand and against PEFT."""

from __future__ import annotations

from pathlib import Path

import llama_folders
import pytest
import torch
from conftest import MICRO
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmedtune import merge as merging
from qmedtune.errors import MergeRefused, RecipeError
from qmedtune.lineage import parts_of
from qmedtune.merging import weighing
from qmedtune.merging.weighing import Share
from qmedtune.model_stack import ModelStack
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import MergeSection, ModelSection, Recipe
from qmedtune.steps import Step, steps_of
from qmedtune.store import HashCache

MODEL = ModelSection(base="x", quantization="none", compute_dtype="bfloat16")
EMBEDDINGS = {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_folders.llama2_folder(tmp_path / "base", dtype=torch.float32)


def merged(base: Path, shares: list[Share], out: Path, dtype: str = "float32") -> tuple[dict, dict[str, torch.Tensor]]:
    """Facts and weights of a merge by these shares."""
    out.mkdir()
    section = MergeSection(dtype=dtype)  # type: ignore[arg-type]
    stack = ModelStack(base, merging.stack_of(shares))
    facts = merging.merge(merging.MergeJob(stack, section, MODEL, shares=shares), out)
    return facts.as_json(), load_file(out / "model.safetensors")


def update_of(adapter: Path, name: str, scale: float = 2.0) -> torch.Tensor:
    """fp64 scale x B @ A of one weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name.replace('.weight', f'.lora_{part}.weight')}"].double() for part in "AB")
    return scale * b @ a


def test_a_continued_stage_is_the_later_update_minus_the_earlier_one(base: Path, tmp_path: Path):
    cpt = llama_folders.write_adapter(base, tmp_path / "cpt", seed=1, **EMBEDDINGS)
    sft = llama_folders.write_adapter(base, tmp_path / "sft", seed=2, **EMBEDDINGS)
    shares = [Share("01-cpt", cpt, None, 0.7), Share("02-sft", sft, cpt, 1.25)]
    facts, found = merged(base, shares, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    first, last = update_of(cpt, name), update_of(sft, name)
    expected = weights[name].double() + 0.7 * first + 1.25 * (last - first)
    assert (found[name].double() - expected).abs().max() < 1e-6
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        start = weights[name].double()
        first, last = (
            load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name}"].double()
            for adapter in (cpt, sft)
        )
        expected = start + 0.7 * (first - start) + 1.25 * (last - first)
        assert (found[name].double() - expected).abs().max() < 1e-6
    assert facts["violations"] == 0 and facts["weights"] == {"01-cpt": 0.7, "02-sft": 1.25}
    assert not list(tmp_path.glob(".out.blend*"))


def test_stacked_adapters_are_pefts_cat_of_them(base: Path, tmp_path: Path):
    """ "linear" of PEFT mixes A of one with B of another, and is not the sum."""
    from peft import PeftModel

    one = llama_folders.write_adapter(base, tmp_path / "one", seed=1)
    two = llama_folders.write_adapter(base, tmp_path / "two", seed=2, r=4, use_rslora=True)
    facts, found = merged(base, [Share("01-cpt", one, None, 0.6), Share("02-sft", two, None, 1.5)], tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(one), "one")
    model.load_adapter(str(two), "two")
    model.add_weighted_adapter(["one", "two"], [0.6, 1.5], "both", combination_type="cat")
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() < 2e-6, name
    assert facts["violations"] == 0


def test_the_first_stage_alone_is_its_own_merge_bit_for_bit(base: Path, tmp_path: Path):
    cpt = llama_folders.write_adapter(base, tmp_path / "cpt", seed=1)
    sft = llama_folders.write_adapter(base, tmp_path / "sft", seed=2)
    shares = [Share("01-cpt", cpt, None, 1.0), Share("02-sft", sft, cpt, 0.0)]
    _, found = merged(base, shares, tmp_path / "out", "bfloat16")
    (tmp_path / "plain").mkdir()
    merging.merge(merging.MergeJob(ModelStack(base, (cpt,)), MergeSection(), MODEL), tmp_path / "plain")
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_weights_of_one_are_the_plain_merge():
    recipe = load_recipe(MICRO, ["merge.weights={01-cpt: 1, 02-sft: 1.0}"]).recipe
    places = [Path(part.adapter) for part in parts_of(recipe)]
    assert merging.shares_of(recipe, recipe.merge.weights, places) == []
    assert merging.shares_of(recipe, {"01-cpt": 0.5}, places) == [
        Share("01-cpt", places[0], None, 0.5),
        Share("02-sft", places[1], places[0], 1.0),
    ]
    plain = load_recipe(MICRO).recipe
    weighed, unweighed = merge_step(recipe), merge_step(plain)
    assert weighed.needs == unweighed.needs and weighed.section == unweighed.section


def merge_step(recipe: Recipe) -> Step:
    hashes = HashCache(Path("unwritten"))
    return next(step for step in steps_of(recipe, recipe, hashes) if step.name == "merged")


@pytest.mark.parametrize("fault", ["a factor", "a blended copy"])
def test_the_proof_finds_a_wrong_weight(fault: str, base: Path, tmp_path: Path, monkeypatch):
    cpt = llama_folders.write_adapter(base, tmp_path / "cpt", seed=1, **EMBEDDINGS)
    sft = llama_folders.write_adapter(base, tmp_path / "sft", seed=2, **EMBEDDINGS)
    shares = [Share("01-cpt", cpt, None, 0.7), Share("02-sft", sft, cpt, 1.0)]
    if fault == "a factor":
        real = weighing.summed

        def summed(terms):
            return [weighing.Term(term.adapter, term.factor * 1.01) for term in real(terms)]

        monkeypatch.setattr(merging, "summed", summed)
    else:
        real_blend = weighing.blend

        def blend(read, terms, source, folder):
            found = real_blend(read, terms, source, folder)
            tensor = found["lm_head.weight"].clone()
            tensor[7, 3] *= 1.001
            return {**found, "lm_head.weight": tensor}

        monkeypatch.setattr(merging, "blend", blend)
    with pytest.raises(MergeRefused):
        merged(base, shares, tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["merge.weights={03-sft: 0.5}"], "allowed: 01-cpt, 02-sft"),
        (["merge.weights={01-cpt: 3}"], "merge.weights"),
        (["merge.weights={01-cpt: 0.5}", "stages[1].sft.adapter=merge_then_new"], "is folded into the base"),
        (["merge.weights={01-cpt: 0.5}", "evaluate.precision=nf4"], "without merge.weights"),
    ],
)
def test_what_is_refused_in_a_recipe(overrides: list[str], told: str):
    with pytest.raises(RecipeError, match=told):
        load_recipe(MICRO, overrides)


def test_a_recipe_without_weights_is_written_as_before():
    assert "weights" not in load_recipe(MICRO).recipe.model_dump(mode="json")["merge"]


def test_a_weight_of_nothing_that_is_finite(base: Path, tmp_path: Path):
    cpt = llama_folders.write_adapter(base, tmp_path / "cpt", seed=1)
    tensors = load_file(cpt / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, cpt / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="not finite"):
        merged(base, [Share("01-cpt", cpt, None, 0.5)], tmp_path / "out")
