"""The base is loaded once for consecutive stages, and what is trained on it is what loading it again would give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from test_resume import assert_same, hard, packed, uninterrupted  # noqa: F401  (fixtures)

from qmedtune import model as models
from qmedtune import steps, train
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import ModelSection, Recipe
from qmedtune.training.shared_base import SharedBase


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that bases were loaded from."""
    found: list[Path] = []
    load = models.load_base
    monkeypatch.setattr(models, "load_base", lambda folder, *a, **o: found.append(folder) or load(folder, *a, **o))
    return found


def section(base: Path, **changes) -> ModelSection:
    return ModelSection.model_validate({"base": str(base), "compute_dtype": "bfloat16", **changes})


def test_two_stages_on_one_base_give_the_bits_of_two_loads(
    packed: MicroRun, uninterrupted: list[Path], loads: list[Path], tmp_path: Path  # noqa: F811
):  # fmt: skip
    loads.clear()
    shared = SharedBase()
    for index, out in enumerate((tmp_path / "cpt", tmp_path / "sft")):
        out.mkdir()
        adapters = {"adapter-1": tmp_path / "cpt" / "adapter"} if index else {}
        inputs = packed.inputs(("01-cpt", "02-sft")[index], **adapters)
        train.train_stage(hard(), index, inputs, out, shared)
        assert_same(out, uninterrupted[index])
    assert len(loads) == 1


def test_a_run_loads_the_base_once_for_its_stages(micro_run: MicroRun, loads: list[Path], tmp_path: Path):
    from qmedtune.run import run

    loaded = load_recipe(MICRO)
    run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, until="02-sft")
    assert loads == [micro_run.base]


def test_quantised_weights_and_their_scales_are_the_same_tensors(
    micro_run: MicroRun, loads: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "dequantize_linears", lambda *_: 0)  # as on a GPU
    shared = SharedBase()
    first, second = (shared.load(micro_run.base, section(micro_run.base), seq_len=64) for _ in range(2))
    assert len(loads) == 1
    assert all(p is q for p, q in zip(first.parameters(), second.parameters(), strict=True))
    linears = [model.model.layers[0].mlp.up_proj for model in (first, second)]
    assert type(linears[0]).__name__ == "Linear4bit" and linears[0] is not linears[1]
    assert linears[0].quant_state is linears[1].quant_state is linears[1].weight.quant_state
    ids = torch.arange(5, 25)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_what_a_stage_does_to_its_modules_stays_its_own(micro_run: MicroRun):
    shared = SharedBase()
    first = shared.load(micro_run.base, section(micro_run.base), seq_len=64)
    recipe = load_recipe(MICRO).recipe
    adapted = models.attach_adapter(first, recipe.adapter, [], continued=False)
    models.install_kernels(adapted, "auto")
    second = shared.load(micro_run.base, section(micro_run.base), seq_len=64)
    assert not any("lora" in name for name, _ in second.named_modules())
    assert type(second.model.norm).__module__.startswith("transformers")
    assert not any(p.requires_grad for p in second.parameters())
    second.config.use_cache = True
    assert shared.load(micro_run.base, section(micro_run.base), seq_len=64).config.use_cache is False


def test_another_file_section_attention_or_a_changed_weight_is_loaded_anew(
    micro_run: MicroRun, loads: list[Path], tmp_path: Path
):
    base = tmp_path / "base"
    base.mkdir()
    for path in micro_run.base.iterdir():
        if path.is_file():
            (base / path.name).write_bytes(path.read_bytes())
    shared = SharedBase()

    def loaded(seq_len: int = 64, **changes) -> torch.nn.Module:
        before = len(loads)
        model = shared.load(base, section(base, **changes), seq_len=seq_len)
        assert len(loads) == before + 1
        return model

    model = loaded()
    loaded(compute_dtype="float32")
    model = loaded(attention="sdpa")
    model = loaded()
    os.utime(base / "model.safetensors")
    model = loaded()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    fresh = loaded()
    assert torch.equal(fresh.model.norm.weight * 2, model.model.norm.weight)
    shared.drop()
    loaded()


def recipe_of(*stages: dict) -> Recipe:
    recipe = load_recipe(MICRO).recipe
    made = [Recipe.model_fields["stages"].annotation.__args__[0].model_validate(stage) for stage in stages]
    return recipe.model_copy(update={"stages": made})


def test_it_is_held_only_while_the_next_stage_trains_on_it():
    cpt, sft = {"cpt": {"mix": {"literature": 1}, "tokens": 10}}, {"sft": {"data": "instructions"}}
    folded = {"sft": {"data": "instructions", "adapter": "merge_then_new"}}
    full = {"sft": {"data": "instructions", "adapter": "none"}}
    assert steps.base_goes_on(recipe_of(cpt, sft), 0)
    assert not steps.base_goes_on(recipe_of(cpt, sft), 1)
    assert not steps.base_goes_on(recipe_of(cpt, folded), 0)
    assert not steps.base_goes_on(recipe_of(cpt, full), 0)
