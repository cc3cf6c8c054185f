"""Stages that train all parameters, from scratch with the recipe's own shape or from a base; what such a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MICRO
from llama_folders import llama3_folder
from safetensors.torch import load_file

from qmedtune import base
from qmedtune import model as models
from qmedtune.errors import RecipeError
from qmedtune.evaluation.open_model import locate
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import ModelSection
from qmedtune.run import run, steps_of
from qmedtune.store import HashCache

SHAPE = "{hidden: 128, layers: 2, heads: 4, kv_heads: 2, intermediate: 192, max_positions: 128}"
FROM_SCRATCH = (
    "stages=[{pretrain: {mix: {literature: 1, notes: 1}, tokens: 4000, batch: 8, seq_len: 64}}]",
    f"model.shape={SHAPE}",
)
ALL_PARAMETERS = ("stages[0].cpt.adapter=none", "stages[1].sft.adapter=none")


def steps(*settings: str) -> dict[str, dict[str, str]]:
    recipe, _ = resolve(load_recipe(MICRO, settings).recipe)
    return {step.name: step.needs for step in steps_of(recipe, recipe, HashCache(Path("unwritten")))}


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch") / "run"
    loaded = load_recipe(MICRO, FROM_SCRATCH)
    run(loaded.recipe, loaded.text, out, offline=True)
    return out


def test_a_model_of_the_recipes_own_shape_is_trained_and_compared_with_its_untrained_self(from_scratch: Path):
    result = json.loads((from_scratch / "run.json").read_text())
    assert result["status"] == "finished" and result["merge"] is None
    assert result["stages"][0]["model"] == {"path": "01-pretrain/model"}
    config = json.loads((from_scratch / "01-pretrain/model/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (128, 2, 32)
    perplexity = result["evaluation"]["perplexity"]["literature"]
    assert perplexity["base"] > 900 > 600 > perplexity["final"]  # about 1,000 tokens are equally likely at first
    assert result["evaluation"]["tasks"]["facts"]["base"]["accuracy"] < 0.3


def test_a_run_without_merge_is_found_by_the_commands_that_take_a_run(from_scratch: Path):
    assert locate(str(from_scratch)).base == from_scratch / "01-pretrain/model"


def test_all_parameters_of_a_base_are_trained(micro_run, tmp_path: Path):
    from qmedtune.train import train_stage

    recipe, _ = resolve(load_recipe(MICRO, ALL_PARAMETERS).recipe)
    facts = train_stage(recipe, 0, micro_run.inputs(), tmp_path).as_json()
    before, after = load_file(micro_run.base / "model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert before.keys() == after.keys() and facts["model"] == {"path": "01-cpt/model"}
    assert all((before[name].float() - after[name].float()).abs().max() > 0 for name in before)
    assert not (tmp_path / "adapter").exists()


def test_the_chain_of_full_and_adapter_stages():
    both = steps(*ALL_PARAMETERS)
    assert both["02-sft"]["base"] == "01-cpt/model" and "merged" not in both
    assert both["evaluation"] == {
        "base": "02-sft/model", "merged": "02-sft/model", "origin": "base", "template": "02-sft",
        "validation": "data/validation",
    }  # fmt: skip
    then_lora = steps(ALL_PARAMETERS[0])
    assert then_lora["merged"]["base"] == "01-cpt/model" and then_lora["merged"]["adapter-1"] == "02-sft/adapter"
    lora_first = steps(ALL_PARAMETERS[1])
    assert lora_first["02-sft-base"]["adapter-1"] == "01-cpt/adapter" and lora_first["02-sft"]["base"] == "02-sft-base"
    scratch = steps(*FROM_SCRATCH)["evaluation"]
    assert (scratch["untrained"], scratch["base"]) == ("base", "01-pretrain/model") and "origin" not in scratch


def test_memory_and_learning_rate_follow_from_what_is_trained():
    full = make_plan(load_recipe(MICRO, ALL_PARAMETERS).recipe)
    assert full["stages"][0]["trained_parameters"] == full["base"]["parameters"]
    own = make_plan(load_recipe(MICRO, FROM_SCRATCH).recipe)
    assert own["base"]["hidden"] == 128 and own["stages"][0]["trained_parameters"] == own["base"]["parameters"]
    assert full["stages"][0]["lr"] == 3e-4


def test_a_shape_is_for_models_from_scratch_and_must_divide():
    with pytest.raises(RecipeError, match="only a recipe that begins with `pretrain` sets it"):
        load_recipe(MICRO, [f"model.shape={SHAPE}"])
    with pytest.raises(RecipeError, match="multiple of `heads`"):
        load_recipe(MICRO, [*FROM_SCRATCH, "model.shape.heads=3"])


def test_quantised_weights_cannot_be_trained_themselves(tmp_path: Path):
    folder = llama3_folder(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(RecipeError, match="16-bit original"):
        models.load_full(folder, load_recipe(MICRO).recipe.model)


def test_an_untrained_model_knows_nothing(micro_run):
    recipe, _ = resolve(load_recipe(MICRO, FROM_SCRATCH).recipe)
    torch.manual_seed(0)
    model = models.from_scratch(micro_run.base, recipe.model)
    assert model.config.max_position_embeddings == 128 and model.model.layers[0].self_attn.head_dim == 32


def test_a_model_from_scratch_needs_no_weights_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """GatorTronGPT's recipe takes a tokenizer from the Hub: a few files, not the 13 GB beside them."""
    asked: list[list[str]] = []

    def download(name, revision=None, allow_patterns=(), local_files_only=False):
        asked.append(list(allow_patterns))
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    section = ModelSection(base="owner/name")
    assert base.identify(section, offline=True, shape_only=True).make() == tmp_path
    assert "*.safetensors" not in asked[0]
    with pytest.raises(RecipeError, match="no \\*.safetensors"):
        base.identify(section, offline=True)
    assert "*.safetensors" in asked[1]
