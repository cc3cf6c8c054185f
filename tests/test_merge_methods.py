"""`merge.with`: formulas by hand and by mergekit, endpoints bit for bit, the proof, unequal parts refused by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import llama_folders
import pytest
import torch
from conftest import MICRO
from safetensors.torch import load_file, save_file

from qmedtune import merge as merging
from qmedtune.cli import invoke
from qmedtune.errors import MergeRefused, RecipeError, RunError
from qmedtune.merging import methods, other_model
from qmedtune.merging.sibling import Mixing, Sibling, check_alike, find
from qmedtune.model_stack import ModelStack
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import MergeSection, ModelSection

MODEL = ModelSection(base="x", quantization="none", compute_dtype="bfloat16")
EMBEDDINGS = {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}
WEIGHTS, K_PROJ = "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
EMBED, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_folders.llama2_folder(tmp_path / "base", dtype=torch.float32)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return llama_folders.write_adapter(base, tmp_path / "adapter", seed=1, **EMBEDDINGS)


def sibling_of(base: Path, folder: Path, size: float = 0.1) -> Path:
    """The base, trained on by somebody else: every weight moved by `size` of its spread."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(5)
    weights = load_file(base / WEIGHTS)
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        weights[name] = (tensor.float() + size * noise).to(tensor.dtype)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def mixed(base: Path, adapter: Path, other: Path, out: Path, mixing: dict, **section):
    """Result and weights of a merge with another model."""
    out.mkdir()
    asked = MergeSection.model_validate({"dtype": "float32", **section})
    how = Mixing(Sibling(str(other), other, None), cosine=check_alike(base, Sibling(str(other), other, None)), **mixing)
    job = merging.MergeJob(ModelStack(base, (adapter,)), asked, MODEL, mixing=how)
    return merging.merge(job, out), load_file(out / WEIGHTS)


def trained(base: Path, adapter: Path, name: str) -> torch.Tensor:
    """fp64 base + adapter of one weight, or its trained copy."""
    tensors, start = load_file(adapter / "adapter_model.safetensors"), load_file(base / WEIGHTS)[name].double()
    if f"base_model.model.{name}" in tensors:
        return tensors[f"base_model.model.{name}"].double()
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{stem}.lora_A.weight" not in tensors:
        return start
    return start + 2.0 * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()


def slerp_by_hand(share: float, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    cosine = float((one * two).sum() / one.norm() / two.norm())
    if cosine > 0.9995:
        return (1 - share) * one + share * two
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * two) / math.sin(angle)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_numbers_worked_by_hand():
    assert methods.linear(0.25) == methods.Mix(0.75, 0.25)
    assert methods.task_arithmetic(0.25) == methods.Mix(1.0, 0.25, -0.25)
    # At a right angle, half way is 45 degrees: sin 45 / sin 90 of each, and the length stays 1.
    half = methods.slerp(0.5, 0.0)
    assert half.trained == pytest.approx(math.sqrt(0.5)) and half.other == pytest.approx(math.sqrt(0.5))
    third = methods.slerp(1 / 3, 0.0)  # 30 degrees on
    assert (third.trained, third.other) == (pytest.approx(math.sqrt(0.75)), pytest.approx(0.5))
    assert methods.slerp(0.3, 0.9996) == methods.linear(0.3)
    assert methods.slerp(0.0, 0.1) == methods.linear(0.0) and methods.slerp(1.0, 0.1) == methods.linear(1.0)


def test_a_mixed_tensor_is_the_same_whatever_it_is_read_with():
    one, two = torch.randn(40, 12), torch.randn(40, 12).bfloat16()
    source = methods.mixed([(0.3, one), (0.7, two), (0.0, one)])
    whole = (0.3 * one.double() + 0.7 * two.double()).float()
    assert torch.equal(source[...] if isinstance(source, methods.WeightedSum) else source, whole)
    assert torch.equal(source[3:9], whole[3:9])
    assert torch.equal(source[torch.tensor([5, 1]), torch.tensor([2, 2])], whole[[5, 1], [2, 2]])
    assert methods.mixed([(1.0, one), (0.0, two)]) is one


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
@pytest.mark.parametrize("size", [0.02, 0.5])  # nearly parallel, and not
def test_every_tensor_is_what_the_formula_says(method: str, size: float, base: Path, adapter: Path, tmp_path: Path):
    other = sibling_of(base, tmp_path / "other", size)
    merged, found = mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 0.4})
    start, theirs = load_file(base / WEIGHTS), load_file(other / WEIGHTS)
    for name, tensor in found.items():
        one, two = trained(base, adapter, name), theirs[name].double()
        expected = 0.6 * one + 0.4 * two
        if method == "slerp":
            expected = slerp_by_hand(0.4, one, two)
        if method == "task_arithmetic":
            expected = one + 0.4 * (two - start[name].double())
        assert (tensor.double() - expected).abs().max() < 2e-6, name
    assert merged.violations == 0 and merged.elements == sum(tensor.numel() for tensor in found.values())
    assert (merged.method, merged.share) == (method, 0.4)
    assert merged.mixed_with is not None and merged.mixed_with.name == str(other)
    if method == "slerp":
        assert (merged.on_sphere or 0) > 10 if size == 0.5 else merged.on_sphere is not None


@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_mergekit_mixes_alike(method: str, size: float, base: Path, adapter: Path, tmp_path: Path):
    """Its own functions as an oracle, where it is installed (CONTRIBUTING.md has the command)."""
    pytest.importorskip("mergekit.merge_methods.batching")
    other = sibling_of(base, tmp_path / "other", size)
    _, found = mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 0.4})
    start, theirs = load_file(base / WEIGHTS), load_file(other / WEIGHTS)
    for name, tensor in found.items():
        ours = trained(base, adapter, name), theirs[name].double()
        expected = by_mergekit(method, 0.4, start[name].double(), *ours)
        assert (tensor.double() - expected).abs().max() < 2e-6, name


def by_mergekit(method: str, share: float, base: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """mergekit 0.1.5: what it makes of a trained tensor and another one of the same base."""
    from mergekit.merge_methods.base import TensorEntry, TensorGroup
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.merge_methods.slerp import slerp

    if method == "slerp":
        return slerp(torch.tensor([share]).double(), one[None], two[None])[0]
    weights = {"one": 1.0, "two": share}
    start, normalize = base, False
    if method == "linear":  # the same sum of changes, of which the weights add up to 1
        weights = {"one": 1 - share, "two": share}
    group = TensorGroup((TensorEntry("base", start, True), TensorEntry("one", one), TensorEntry("two", two)))
    rule = GeneralizedTaskArithmeticMerge(None, None, False, False, "sum", None, None)
    asked = {"weight": weights, "lambda": 1.0, "normalize": normalize, "int8_mask": False, "rescale": False}
    return rule.merge_group(group, **asked)


# ---- endpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_nothing_of_the_other_model_is_the_plain_merge(method: str, dtype: str, base: Path, adapter: Path, tmp_path):
    other = sibling_of(base, tmp_path / "other")
    _, found = mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 0.0}, dtype=dtype)
    (tmp_path / "plain").mkdir()
    section = MergeSection.model_validate({"dtype": dtype})
    merging.merge(merging.MergeJob(ModelStack(base, (adapter,)), section, MODEL), tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_all_of_the_other_model_is_that_model(method: str, base: Path, adapter: Path, tmp_path: Path):
    other = sibling_of(base, tmp_path / "other")
    merged, found = mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 1.0})
    for name, tensor in load_file(other / WEIGHTS).items():
        if not name.endswith("inv_freq"):
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert merged.modules == 0 and merged.violations == 0


def test_all_of_the_other_models_change_is_the_adapter_on_that_model(base: Path, tmp_path: Path):
    adapter = llama_folders.write_adapter(base, tmp_path / "plain-adapter", seed=1)  # no trained embeddings
    other = sibling_of(base, tmp_path / "other")
    _, found = mixed(base, adapter, other, tmp_path / "out", {"method": "task_arithmetic", "share": 1.0})
    (tmp_path / "folded").mkdir()
    section = MergeSection(dtype="float32")
    merging.merge(merging.MergeJob(ModelStack(other, (adapter,)), section, MODEL), tmp_path / "folded")
    for name, tensor in load_file(tmp_path / "folded" / WEIGHTS).items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_tied_ends_stay_tied_in_several_shards(method: str, tmp_path: Path):
    base = llama_folders.llama3_folder(tmp_path / "base")
    adapter = llama_folders.write_adapter(base, tmp_path / "adapter", seed=1)
    other = llama_folders.llama3_folder(tmp_path / "other")  # the same weights: its own sibling
    out = tmp_path / "out"
    out.mkdir()
    mixing = Mixing(Sibling("other", other, None), method, 0.5, 1.0)  # type: ignore[arg-type]
    job = merging.MergeJob(ModelStack(base, (adapter,)), MergeSection(rounding="stochastic"), MODEL, mixing=mixing)
    merged = merging.merge(job, out)
    assert merged.tied and merged.violations == 0 and len(list(out.glob("*.safetensors"))) == 3
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_other_models_tokenizer_and_ends_are_delivered(base: Path, adapter: Path, tmp_path: Path):
    other = sibling_of(base, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    mixed(base, adapter, other, tmp_path / "out", {"method": "linear", "share": 0.5})
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


# ---- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
@pytest.mark.parametrize("fault", ["share", "one element", "an angle"])
def test_the_proof_finds_a_wrong_mix(fault: str, method: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch):
    other = sibling_of(base, tmp_path / "other", 0.5)
    real = other_model.OtherModel.mixture

    def mixture(self, opened, updates, apply):
        made = real(self, opened, updates, apply)
        if fault == "share":
            return replace(made, share=made.share + 1e-3)
        if fault == "an angle":
            return replace(made, cosines={name: cosine + 1e-3 for name, cosine in made.cosines.items()})

        def read(name):
            tensor = made.other(name).clone()
            if name == NORM:
                tensor[7] *= 1.001
            return tensor

        return replace(made, other=read)

    monkeypatch.setattr(other_model.OtherModel, "mixture", mixture)
    if fault == "an angle" and method != "slerp":
        mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 0.4})  # asks for none
        return
    with pytest.raises(MergeRefused):
        mixed(base, adapter, other, tmp_path / "out", {"method": method, "share": 0.4})


def test_a_number_of_the_other_model_that_is_none(base: Path, adapter: Path, tmp_path: Path):
    other = sibling_of(base, tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    weights[NORM][3] = torch.nan
    save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
    for method in ("linear", "slerp"):
        with pytest.raises(RunError, match="not finite"):
            mixed(base, adapter, other, tmp_path / method, {"method": method, "share": 0.4})


# ---- unequal parts ---------------------------------------------------------------------------------------------------


def changed_config(folder: Path, **settings) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def renamed_token(folder: Path) -> Path:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def unequal(base: Path, folder: Path, what: str) -> Path:
    if what == "shapes":
        return llama_folders.llama2_folder(folder, dtype=torch.float32, intermediate_size=256)
    if what == "rows":
        return llama_folders.llama2_folder(folder, dtype=torch.float32, vocab_size=512)
    if what == "layers":
        return llama_folders.llama2_folder(folder, dtype=torch.float32, num_hidden_layers=1)
    if what == "tied":
        return llama_folders.llama2_folder(folder, dtype=torch.float32, tie_word_embeddings=True)
    if what == "another base":
        return llama_folders.llama2_folder(folder, dtype=torch.float32, seed=9)
    shutil.copytree(base, folder)
    if what == "scaling":
        return changed_config(folder, rope_scaling={"rope_type": "linear", "factor": 2.0})
    if what == "theta":
        return changed_config(folder, rope_theta=500000.0)
    if what == "heads":
        return changed_config(folder, num_attention_heads=2, num_key_value_heads=2)
    return renamed_token(folder)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("shapes", "other shapes"),
        ("rows", "another vocabulary"),
        ("layers", "missing there"),
        ("tied", "tied to the embedding"),
        ("another base", "comes from another base"),
        ("scaling", "other rope scaling"),
        ("theta", "other rope scaling"),
        ("heads", "num_attention_heads"),
        ("token", "another vocabulary"),
    ],
)
def test_unequal_parts_are_refused_by_name(what: str, told: str, base: Path, tmp_path: Path):
    other = unequal(base, tmp_path / "other", what)
    with pytest.raises(RecipeError, match=told) as error:
        check_alike(base, Sibling("the other", other, None))
    assert "the other" in str(error.value) and 1 < len(str(error.value).splitlines()) <= 6


def test_an_adapter_is_no_model_to_mix_with(base: Path, adapter: Path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    with pytest.raises(RecipeError, match="merge it first"):
        find(str(adapter), offline=True)
    with pytest.raises(RecipeError, match="merge.with"):
        find(str(base.parent / "nowhere"), offline=True)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["merge.method=slerp"], "add `with: MODEL`"),
        (["merge.lambda=0.3"], "add `with: MODEL`"),
        (["merge.with=m", "merge.lambda=1.3"], "merge.lambda"),
        (["merge.with=m", "merge.base=nf4"], "mixed in 16 bit"),
        (["merge.with=m", "evaluate.precision=nf4"], "without merge.with"),
        (["merge.with=m", "merge.lambda=0.3", "merge.sweep={}"], "keep one of"),
        (["merge.with=m", "merge.sweep={lambda: [0, 0.5, 0.5]}"], "is there twice"),
        (["merge.with=m", "merge.sweep={max_general_loss: 0.1}"], "kind: general"),
        (["merge.with=m", "merge.sweep={choose: answers}", "evaluate.generate=false"], "evaluate.generate is off"),
        (
            ["merge.with=m", "merge.method=task_arithmetic", "stages[1].sft.adapter=merge_then_new"],
            "allowed: linear, slerp",
        ),
        (["merge.with=m", "stages[1].sft.adapter=none"], "leaves a whole model"),
        (["ablate={arms: [merge]}"], "merge.with"),
    ],
)
def test_what_is_refused_in_a_recipe(overrides: list[str], told: str):
    with pytest.raises(RecipeError, match=told):
        load_recipe(MICRO, overrides)


def test_a_recipe_without_another_model_is_written_as_before():
    written = load_recipe(MICRO).recipe.model_dump(mode="json", by_alias=True)
    assert not written["merge"].keys() & {"with", "method", "lambda", "sweep"}
    assert "development" not in written["evaluate"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_mixes_an_adapter_with_a_folder(base: Path, tmp_path: Path, capsys):
    adapter = llama_folders.write_adapter(base, tmp_path / "lora", seed=1)
    other = sibling_of(base, tmp_path / "other")
    out = tmp_path / "merged"
    asked = ["merge", str(adapter), "--base", str(base), "--out", str(out), "--with", str(other), "--lambda", "0.25"]
    assert invoke([*asked, "--method", "slerp", "--dtype", "float32", "--offline"]) == 0
    assert "slerp, lambda 0.25" in capsys.readouterr().out
    name = K_PROJ
    one, two = trained(base, adapter, name), load_file(other / WEIGHTS)[name].double()
    assert (load_file(out / WEIGHTS)[name].double() - slerp_by_hand(0.25, one, two)).abs().max() < 2e-6
    assert invoke(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "b"), "--lambda", "0.2"]) == 2
