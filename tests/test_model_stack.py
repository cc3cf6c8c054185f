"""The judge of model and adapter folders: what PEFT and transformers load rightly passes, what they would load as
something else is refused by name, and merging what passes gives what PEFT computes."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qmedtune.errors import QmedtuneError, RecipeError
from qmedtune.merging.lora_files import read_adapters
from qmedtune.model_stack import ADAPTER_CONFIG, ADAPTER_TENSORS, INDEX, SINGLE, named_base, read_adapter, read_model

IDS = torch.arange(24)[None]


def llama(tied: bool = False, rows: int = 40) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def base(tmp_path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(call) -> str:
    with pytest.raises(QmedtuneError) as caught:
        call()
    assert 2 <= len(str(caught.value).splitlines()) <= 6
    return str(caught.value)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_the_parameters_are_those_of_transformers(tied, biases, tmp_path):
    config = llama(tied).config
    config.attention_bias = config.mlp_bias = biases
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    read = read_model(tmp_path / "m")
    assert read.shapes == {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(read.linears) == linears and (tmp_path / "m" / INDEX).is_file() and not read.notes


def test_both_ways_to_store_are_told(base):
    (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert "transformers reads the first" in read_model(base).notes[0]


def tensors_with(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return apply


def as_shards(names) -> object:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(
            json.dumps({"weight_map": names if names is None else dict.fromkeys(tensors, names)})
        )

    return apply


def fifo(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def decoy(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "decoy.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def config(**changes):
    return lambda folder: edit(folder, "config.json", **changes)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_MODELS = {
    "a tensor is missing": (tensors_with(lambda t: t.pop(UP)), f"tensor {UP} is missing (of 1)"),
    "a foreign tensor": (tensors_with(lambda t: t.update(evil=torch.zeros(1))), "'evil' is none of a LLaMA's"),
    "integers": (tensors_with(lambda t: t.update({UP: t[UP].int()})), f"{UP} is stored as I32"),
    "another shape": (tensors_with(lambda t: t.update({UP: t[UP][1:].clone()})), f"{UP} has the shape"),
    "a shard outside": (as_shards("../other/model.safetensors"), "outside its folder"),
    "a shard by its whole path": (as_shards("/etc/model.safetensors"), "outside its folder"),
    "a number for a shard": (as_shards(5), "names the shard 5"),
    "no map": (as_shards(None), "not an index of shards"),
    "a pipe": (fifo, "neither a file nor a folder"),
    "a folder": (lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), "no such file"),
    "an empty file": (lambda f: (f / SINGLE).write_bytes(b""), "damaged safetensors"),
    "truncated": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]), "damaged safetensors"),
    "pickle with a decoy": (decoy, "has decoy.safetensors, but neither"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "not JSON"),
    "another kind": (config(model_type="gpt2"), "'gpt2' model"),
    "no layers": (config(num_hidden_layers=-1), "num_hidden_layers is '-1'"),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers is '1000000'"),
    "a width in words": (config(hidden_size="64"), "hidden_size is '64'"),
    "more tokens than rows": (config(vocab_size=48), "config.json asks for [48, 32]"),
    "code": (config(text_config={"auto_map": {"AutoModel": "evil.M"}}), "asks for remote code"),
    "attention of a stranger": (config(attn_implementation="evil/kernel"), "names code to fetch"),
    "quantised otherwise": (config(quantization_config={"quant_method": "gptq"}), "quantised by gptq"),
    "quantised by a word": (config(quantization_config="x"), "quantised by an unknown method"),
    "an adapter": (lambda f: (f / ADAPTER_CONFIG).write_text("{}"), "holds an adapter, not a model"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_is_no_whole_llama_is_refused_by_name(case, base):
    change, says = BAD_MODELS[case]
    change(base)
    assert says in refused(lambda: read_model(base))


def test_all_commands_ask_the_same_judge(base, tmp_path, capsys):
    """A base with integers for weights: once `merge` took it and proved garbage, and the others loaded others."""
    from qmedtune import cli

    adapter = trained(base, tmp_path / "a")
    tensors_with(lambda t: t.update({UP: t[UP].int()}))(base)
    recipe = tmp_path / "r.yaml"
    source = "data: {notes: {path: builtin:micro/notes, kind: clinical}}\n"
    recipe.write_text(
        f"name: r\nmodel: {{base: {base}}}\n{source}stages: [{{cpt: {{mix: {{notes: 1}}, tokens: 100}}}}]\n"
    )
    (tmp_path / "q.jsonl").write_text('{"instruction": "x"}\n')
    asked = {
        "plan": ["plan", str(recipe)],
        "run": ["run", str(recipe), "--out", str(tmp_path / "run")],
        "merge": ["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "m")],
        "eval": ["eval", str(adapter), "--base", str(base), "--tasks", "facts"],
        "predict": ["predict", str(base), "--data", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "o.jsonl")],
        "chat": ["chat", str(base)],
    }
    for name, words in asked.items():
        assert cli.invoke(words) == 2, name
        assert "is stored as I32" in capsys.readouterr().err, name
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "a", "r.yaml", "q.jsonl"}


# ---- adapters --------------------------------------------------------------------------------------------------------


def trained(base: Path, out: Path, *, model=None, **settings) -> Path:
    """An adapter as PEFT writes it, with numbers in every trained tensor."""
    torch.manual_seed(5)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model or LlamaForCausalLM.from_pretrained(base), LoraConfig(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out)
    return out


def folded(base: Path, adapter: Path) -> LlamaForCausalLM:
    """The base with what is read here of the adapter, added in fp32."""
    model = LlamaForCausalLM.from_pretrained(base)
    updates = read_adapters([adapter], read_model(base).shapes)
    if "lm_head.weight" in updates.low_rank.keys() | updates.full.keys():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, full in updates.full.items():
            parameters[name].copy_(full)
        for name, parts in updates.low_rank.items():
            parameters[name].add_(sum(part.scale * part.b @ part.a for part in parts))
    return model.eval()


GOOD_ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "modules left out": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "left out by a pattern": {"exclude_modules": r".*layers\.1.*"},
    "a target left out whole": {"exclude_modules": ["up_proj"]},
    "all linears": {"target_modules": "all-linear"},
    "by a pattern": {"target_modules": r".*\.(k_proj|down_proj)"},
    "some layers": {"layers_to_transform": [1]},
    "ranks and scales of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
    "low rank for the head": {"target_modules": ["q_proj", "lm_head"]},
    "all norms by one name": {"modules_to_save": ["norm"]},
    "one module by its whole name": {"modules_to_save": ["model.norm"]},
    "a module with children": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", GOOD_ADAPTERS)
def test_adapters_that_people_have_do_what_peft_computes(case, tied, tmp_path):
    base = tmp_path / "base"
    llama(tied).save_pretrained(base)
    adapter = trained(base, tmp_path / "a", **GOOD_ADAPTERS[case])
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        expected, plain = theirs(IDS).logits, llama(tied)(IDS).logits
        assert (expected - plain).abs().max() > 1e-3, "the adapter does nothing"
        assert torch.allclose(folded(base, adapter)(IDS).logits, expected, atol=2e-5)


BAD_SETTINGS = {
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
    "dora": ({"use_dora": True}, "use_dora: 'True' cannot be used"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'"),
    "another method": ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
    "biases": ({"bias": "all"}, "bias: 'all'"),
    "a setting of the future": (
        {"use_magic": {"x": 1}},
        "use_magic: \"{'x': 1}\", a setting that peft 0.21 does not know",
    ),
    "unknown and off": ({"use_magic": False}, None),
    "rank 0": ({"r": 0}, "r: '0'"),
    "rank in words": ({"r": "4"}, "r: '4'"),
    "a rank that is not the file's": ({"r": 5}, "has the shape [4, 32], the base asks for [5, 32]"),
    "no number": ({"lora_alpha": float("nan")}, "lora_alpha: 'nan'"),
    "a target that is not there": ({"target_modules": ["q_proj", "up_proj", "wq"]}, "target wq is no linear layer"),
    "no targets": ({"target_modules": "nothing"}, "hit no module"),
    "a copy that is not there": ({"modules_to_save": ["score"]}, "no module score"),
    "a copy without its tensors": ({"modules_to_save": ["norm"]}, "trained copy of"),
    "names of another type": ({"target_modules": {"a": 1}}, "allowed: a list of names"),
    "code": ({"megatron_config": {"a": 1}}, "`megatron_config` asks for remote code"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_mean_something_else_are_refused_by_name(case, base, tmp_path):
    changes, says = BAD_SETTINGS[case]
    adapter = trained(base, tmp_path / "a")
    edit(adapter, ADAPTER_CONFIG, **changes)
    shapes = read_model(base).shapes
    if says is None:
        assert read_adapter(adapter, shapes).low_rank
    else:
        assert says in refused(lambda: read_adapter(adapter, shapes))


LORA_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(LORA_A), f"tensor {LORA_A} is missing"),
    "foreign": (lambda t: t.update({"base_model.model.evil.lora_A.weight": torch.zeros(2, 2)}), "belongs to no module"),
    "integers": (lambda t: t.update({LORA_A: t[LORA_A].int()}), f"{LORA_A} is stored as I32"),
    "another shape": (lambda t: t.update({LORA_A: t[LORA_A][:, 1:].clone()}), "has the shape [4, 31]"),
    "empty": (lambda t: t.clear(), "is missing"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(case, base, tmp_path):
    change, says = BAD_TENSORS[case]
    adapter = trained(base, tmp_path / "a")
    tensors = load_file(adapter / ADAPTER_TENSORS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_TENSORS)
    assert says in refused(lambda: read_adapter(adapter, read_model(base).shapes))


@pytest.mark.parametrize("copies", [None, ["embed_tokens", "lm_head"]])
def test_added_tokens_are_counted(copies, base, tmp_path):
    """PEFT stores the embeddings of a resized vocabulary whether they were trained or not."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(48)
    resized = copy.deepcopy(model)
    adapter = trained(base, tmp_path / "a", model=model, modules_to_save=copies)
    said = refused(lambda: read_adapter(adapter, read_model(base).shapes))
    assert "8 tokens were added in training" in said and "--base" in said
    resized.save_pretrained(tmp_path / "resized")
    assert read_adapter(adapter, read_model(tmp_path / "resized").shapes).low_rank


def test_folders_that_are_not_what_was_asked_for(base, tmp_path):
    adapter = trained(base, tmp_path / "a")
    shapes = read_model(base).shapes
    assert "holds an adapter, not a model" in refused(lambda: read_model(adapter))
    assert "holds a whole model, not an adapter" in refused(lambda: read_adapter(base, shapes))
    (adapter / ADAPTER_TENSORS).rename(adapter / "x.safetensors")
    assert f"{ADAPTER_TENSORS}: no such file" in refused(lambda: read_adapter(adapter, shapes))
    for value in (None, 5, ""):
        edit(adapter, ADAPTER_CONFIG, base_model_name_or_path=value)
        assert "does not say which base" in refused(lambda: named_base(adapter))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"base": 1, "sha256": "x", "adapters_below": []}'])
def test_a_changed_note_about_the_base_is_refused(text, base, tmp_path):
    from qmedtune.base import TRAINED_ON, check_base

    adapter = trained(base, tmp_path / "a")
    (adapter / TRAINED_ON).write_text(text)
    with pytest.raises(RecipeError):
        check_base(adapter, base)
