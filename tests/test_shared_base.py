"""The base is loaded once for consecutive stages, and what is trained on it is what loading it again would give."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from stages import assert_same, hard

from qmedtune import model as models
from qmedtune import train
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import ModelSection
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
    hard_run: MicroRun, uninterrupted: list[Path], loads: list[Path], tmp_path: Path
):
    loads.clear()
    shared = SharedBase()
    for index, out in enumerate((tmp_path / "cpt", tmp_path / "sft")):
        out.mkdir()
        adapters = [tmp_path / "cpt" / "adapter"] if index else []
        inputs = hard_run.inputs(("01-cpt", "02-sft")[index], *adapters)
        train.train_stage(hard(), index, inputs, out, shared=shared)
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
    first, second = (shared.load(micro_run.base, section(micro_run.base), attention="eager") for _ in range(2))
    assert len(loads) == 1
    assert all(p is q for p, q in zip(first.parameters(), second.parameters(), strict=True))
    linears = [model.model.layers[0].mlp.up_proj for model in (first, second)]
    assert type(linears[0]).__name__ == "Linear4bit" and linears[0] is not linears[1]
    assert linears[0].quant_state is linears[1].quant_state is linears[1].weight.quant_state
    ids = torch.arange(5, 25)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_what_a_stage_does_to_its_modules_stays_its_own(micro_run: MicroRun):
    shared = SharedBase()
    first = shared.load(micro_run.base, section(micro_run.base), attention="eager")
    recipe = load_recipe(MICRO).recipe
    adapted = models.attach_adapter(first, recipe.adapter, [], continued=False)
    models.install_kernels(adapted, "auto")
    second = shared.load(micro_run.base, section(micro_run.base), attention="eager")
    assert not any("lora" in name for name, _ in second.named_modules())
    assert type(second.model.norm).__module__.startswith("transformers")
    assert not any(p.requires_grad for p in second.parameters())
    second.config.use_cache = True
    assert shared.load(micro_run.base, section(micro_run.base), attention="eager").config.use_cache is False


def test_another_file_section_attention_or_a_changed_weight_is_loaded_anew(
    micro_run: MicroRun, loads: list[Path], tmp_path: Path
):
    base = tmp_path / "base"
    base.mkdir()
    for path in micro_run.base.iterdir():
        if path.is_file():
            (base / path.name).write_bytes(path.read_bytes())
    shared = SharedBase()

    def loaded(attention: str = "eager", **changes) -> torch.nn.Module:
        before = len(loads)
        model = shared.load(base, section(base, **changes), attention=attention)
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


def test_what_it_gives_is_what_loading_gives(micro_run: MicroRun):
    """The other tests compare copies with copies: here with the model as loaded."""
    shared = SharedBase()
    for _ in range(2):
        given = shared.load(micro_run.base, section(micro_run.base), attention="eager")
    fresh = models.load_base(micro_run.base, section(micro_run.base), attention="eager")
    both = zip(given.state_dict().items(), fresh.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in both)
    assert [name for name, _ in given.named_buffers()] == [name for name, _ in fresh.named_buffers()]
    assert given.config.to_dict() == fresh.config.to_dict() and given.training == fresh.training
    ids = torch.arange(5, 25)[None]
    assert torch.equal(given(ids).logits, fresh(ids).logits)


def test_quantised_weights_are_freed_when_it_is_dropped(micro_run: MicroRun, monkeypatch: pytest.MonkeyPatch):
    """They and their modules know each other: only a collection of garbage finds them."""
    monkeypatch.setattr(models, "dequantize_linears", lambda *_: 0)
    shared = SharedBase()
    model = shared.load(micro_run.base, section(micro_run.base), attention="eager")
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    gc.disable()
    try:
        del model
        assert weight() is not None
        shared.drop()
        assert weight() is None
    finally:
        gc.enable()


def test_steps_that_need_the_room_begin_without_it(
    micro_run: MicroRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Also where the stage after was made before, and only an earlier one is made again."""
    from qmedtune.run import run

    held: list[tuple[str, bool]] = []
    load, drop = SharedBase.load, SharedBase.drop
    monkeypatch.setattr(SharedBase, "load", lambda self, *a, **o: held.append(("load", True)) or load(self, *a, **o))
    monkeypatch.setattr(SharedBase, "drop", lambda self: held.append(("drop", self._model is not None)) or drop(self))
    loaded = load_recipe(MICRO)
    folder = tmp_path / "run"
    run(loaded.recipe, loaded.text, folder, offline=True)
    assert [name for name, _ in held] == ["load", "drop", "load", "drop", "drop"]
    assert held[-2:] == [("drop", True), ("drop", False)]  # merging gave it up, evaluation found it gone
    held.clear()
    (folder / "01-cpt" / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    for made in ("merged", "evaluation"):
        shutil.rmtree(folder / made)
    run(loaded.recipe, loaded.text, folder, offline=True)
    assert [name for name, _ in held] == ["load", "drop", "drop", "drop"] and held[2][1]
