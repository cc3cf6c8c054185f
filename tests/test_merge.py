"""The merge against PEFT's own, on real adapters over Llama-3.2- and Llama-2-shaped folders, and its refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from llama_folders import llama2_folder, llama3_folder, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmedtune.errors import MergeRefused, RecipeError, RunError
from qmedtune.merge import MergeJob, merge, validation_ids
from qmedtune.merging import proof as merge_proof
from qmedtune.merging.disk_llama import open_llama
from qmedtune.merging.lora_files import read_adapters
from qmedtune.merging.streamed import Streamed, logits_of, streamed_model
from qmedtune.merging.tensors import open_weights
from qmedtune.model_stack import ModelStack
from qmedtune.recipe import MergeSection, ModelSection, VerifySection
from qmedtune.store import sha256_file, sha256_json

MODEL = ModelSection(base="here", compute_dtype="bfloat16")
IDS = np.random.default_rng(3).integers(0, 400, (3, 40))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory) -> Path:
    return llama3_folder(tmp_path_factory.mktemp("folders") / "llama3")


@pytest.fixture(scope="session")
def llama2(tmp_path_factory) -> Path:
    return llama2_folder(tmp_path_factory.mktemp("folders") / "llama2")


@pytest.fixture(scope="session")
def adapter3(llama3, tmp_path_factory) -> Path:
    return write_adapter(llama3, tmp_path_factory.mktemp("adapters") / "all-linear", seed=1)


def run(folder: Path, adapters: list[Path], out: Path, model: ModelSection = MODEL, **section) -> dict:
    out.mkdir()
    job = MergeJob(ModelStack(folder, tuple(adapters)), MergeSection(**section), model, probe_ids=IDS)
    return merge(job, out).as_json()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(IDS)).logits.float()


def plain(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_model(base: Path, adapters: list[Path]):
    """PEFT's own composition in fp32: all adapters applied at once."""
    model = peft.PeftModel.from_pretrained(plain(base), str(adapters[0]), adapter_name="a0")
    for number, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    model.base_model.set_adapter([f"a{n}" for n in range(len(adapters))])
    return model.eval()


CASES = {
    "all-linear": [{}],
    "rslora": [{"use_rslora": True, "lora_alpha": 8}],
    "patterns": [
        {"target_modules": [*ATTENTION, "down_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.*": 3}}
    ],
    "regex, one layer": [{"target_modules": r".*\.(q|gate)_proj", "exclude_modules": ["model.layers.0.mlp.gate_proj"]}],
    "stacked": [{}, {"r": 4, "target_modules": ["q_proj", "up_proj"]}],
    "saved": [{"modules_to_save": ["embed_tokens", "lm_head"]}],
    "saved head": [{"modules_to_save": ["lm_head"]}],
}


@pytest.mark.parametrize("shape", ["llama3", "llama2"])
@pytest.mark.parametrize("case", CASES)
def test_equals_peft_and_reloads_plainly(case, shape, request, tmp_path):
    base = request.getfixturevalue(shape)
    adapters = [write_adapter(base, tmp_path / f"a{n}", seed=n, **s) for n, s in enumerate(CASES[case])]
    facts = run(base, adapters, tmp_path / "merged", dtype="float32")
    expected = logits(peft_model(base, adapters))
    assert (logits(plain(tmp_path / "merged")) - expected).abs().max() < 2e-4
    assert (expected - logits(plain(base))).abs().max() > 0.5, "the adapters must matter"
    assert facts["kl"] < 1e-9 and facts["top1"] == 1.0 and facts["max_abs_logit_diff"] < 2e-4


def test_weights_are_the_fp32_sum_rounded_once(llama3, adapter3, tmp_path):
    run(llama3, [adapter3], tmp_path / "merged")
    merged, base = open_weights(tmp_path / "merged"), open_weights(llama3)
    lora = load_file(adapter3 / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    exact = base[f"{name}.weight"].double() + 2.0 * b.double() @ a.double()
    error = (merged[f"{name}.weight"].double() - exact).abs() / exact.abs().clamp(min=1e-6)
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert error.max() < 2**-8 * 1.001, "half a unit in the last of bf16's 8 bits"
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_bf16_is_reported(llama3, adapter3, tmp_path):
    facts = run(llama3, [adapter3], tmp_path / "merged")
    assert 1e-9 < facts["kl"] <= 1e-4 and facts["kl"] <= facts["kl_max"] and facts["top1"] > 0.95
    assert facts["lost"] == facts["kl"] / facts["kl_of_base"] < 0.01 and facts["kl_of_base"] > 0.01
    weights = open_weights(tmp_path / "merged")
    assert facts["elements"] == sum(weights[name].numel() for name in weights.files) and facts["violations"] == 0
    assert 0 < facts["swallowed"] < 0.2
    assert facts["shift_from_nf4"]["kl"] > 10 * facts["kl"], "NF4 moves the model far more than bf16 does"
    assert facts["probe"] == {"tokens": IDS.size, "from": "held-out text"}
    assert (facts["base"], facts["dtype"], facts["modules"], facts["adapters"]) == ("full16", "bfloat16", 14, 1)


def test_folder_is_complete(llama3, adapter3, tmp_path):
    facts = run(llama3, [adapter3], tmp_path / "merged")
    merged = tmp_path / "merged"
    before, after = (json.loads((f / "config.json").read_text()) for f in (llama3, merged))
    assert after == before | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert (merged / "generation_config.json").read_bytes() == (llama3 / "generation_config.json").read_bytes()
    text = "Metformin 500 mg, naïve"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer(text) == AutoTokenizer.from_pretrained(llama3)(text)
    assert "<|start_header_id|>" in tokenizer.chat_template
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index == json.loads((llama3 / "model.safetensors.index.json").read_text())
    hashes = {p.name: sha256_file(p) for p in sorted(merged.glob("*.safetensors"))}
    assert facts["sha256"] == sha256_json(hashes)
    with safe_open(next(merged.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_type"] == "llama3"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_result_does_not_depend_on_the_number_of_threads(llama2, tmp_path):
    adapter = write_adapter(llama2, tmp_path / "a")
    facts = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        facts.append(run(llama2, [adapter], tmp_path / str(threads), dtype="float16"))
        assert torch.get_num_threads() == threads
    for each in facts:
        del each["seconds"]
    assert facts[0] == facts[1]
    assert facts[0]["sha256"] == sha256_file(tmp_path / "1" / "model.safetensors")


@pytest.mark.parametrize("modules, tied", [(["embed_tokens", "lm_head"], False), (["embed_tokens"], False)])
def test_trained_tied_embeddings_are_untied(llama3, modules, tied, tmp_path):
    adapter = write_adapter(llama3, tmp_path / "a", modules_to_save=modules)
    facts = run(llama3, [adapter], tmp_path / "merged", dtype="float32")
    saved = load_file(adapter / "adapter_model.safetensors")
    reloaded = plain(tmp_path / "merged")
    assert facts["tied"] is tied is reloaded.config.tie_word_embeddings
    assert torch.equal(reloaded.model.embed_tokens.weight, saved["base_model.model.model.embed_tokens.weight"])
    head = saved.get("base_model.model.lm_head.weight", open_weights(llama3)["model.embed_tokens.weight"].float())
    assert torch.equal(reloaded.lm_head.weight, head)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] == index["model.embed_tokens.weight"]


def test_embeddings_trained_as_one_stay_tied(llama3, tmp_path):
    adapter = write_adapter(llama3, tmp_path / "a", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    facts = run(llama3, [adapter], tmp_path / "merged", dtype="float32")
    assert facts["tied"] is True
    assert (logits(plain(tmp_path / "merged")) - logits(peft_model(llama3, [adapter]))).abs().max() < 2e-4


def test_onto_nf4_equals_what_bitsandbytes_holds(llama3, adapter3, tmp_path):
    import bitsandbytes.functional as bnb

    facts = run(llama3, [adapter3], tmp_path / "merged", base="nf4", dtype="float32")
    weight = open_weights(llama3)["model.layers.0.self_attn.o_proj.weight"]
    packed = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    values = bnb.dequantize_4bit(*packed)
    lora = load_file(adapter3 / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.model.layers.0.self_attn.o_proj.lora_{part}.weight"] for part in "AB")
    merged = open_weights(tmp_path / "merged")["model.layers.0.self_attn.o_proj.weight"]
    assert torch.allclose(merged, values.float() + 2.0 * b @ a, atol=1e-6)
    assert facts["shift_from_nf4"] == {k: facts[k] for k in ("kl", "kl_max", "top1", "max_abs_logit_diff")}
    assert facts["kl"] < 1e-9


@pytest.mark.parametrize("shape", ["llama3", "llama2"])
def test_nf4_values_are_those_of_training(shape, request):
    from qmedtune.model import load_base

    folder = request.getfixturevalue(shape)
    base = open_llama(folder)
    trained = dict(load_base(folder, MODEL).named_parameters(remove_duplicate=False))
    if torch.cuda.is_available():
        pytest.skip("on a GPU training holds packed weights")
    assert trained.keys() == base.shapes.keys()
    for name, parameter in trained.items():
        assert torch.equal(base.nf4(name, MODEL), parameter), name


def test_no_shift_without_quantised_training(llama2, tmp_path):
    adapter = write_adapter(llama2, tmp_path / "a")
    facts = run(
        llama2, [adapter], tmp_path / "merged", MODEL.model_copy(update={"quantization": "none"}), dtype="float16"
    )
    assert facts["shift_from_nf4"] is None


@pytest.mark.parametrize("shape", ["llama3", "llama2"])
def test_streamed_model_equals_transformers(shape, request, tmp_path):
    """Bare, and beside it with adapters and trained copies: one batch, two models."""
    folder = request.getfixturevalue(shape)
    base = open_llama(folder)
    adapter = write_adapter(folder, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    updates = read_adapters([adapter], base.shapes)
    source = Streamed(base.source, updates, with_bare=True)
    adapted, bare = logits_of(streamed_model(base.model, source), torch.from_numpy(IDS), source)
    assert torch.allclose(bare, logits(plain(folder)), atol=2e-5)
    assert torch.allclose(adapted, logits(peft_model(folder, [adapter])), atol=2e-4)
    alone = Streamed(base.source)
    assert torch.allclose(
        logits_of(streamed_model(base.model, alone), torch.from_numpy(IDS), alone)[0], bare, atol=2e-5
    )


def test_divergence_is_kl_of_the_two_distributions():
    p, q = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 20, 50)
    figures = merge_proof.divergence(p, q)
    each = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    assert figures.kl == pytest.approx(each.mean().item()) and figures.kl_max == pytest.approx(each.max().item())
    assert figures.max_abs_logit_diff == pytest.approx(p.abs().max().item())
    assert figures.top1 == pytest.approx((p.argmax(-1) == 0).float().mean().item())


@pytest.mark.parametrize("embeddings, continued", [(True, True), (False, False)])
def test_adapters_as_training_leaves_them(embeddings, continued, llama3, tmp_path):
    """Two stages: the second continues the first's adapter, or stacks a new one on it."""
    from qmedtune.model import attach_adapter, load_adapters, load_base, save_adapter, trainable
    from qmedtune.recipe import AdapterSection

    section = AdapterSection(r=4, alpha=8, train_embeddings=embeddings)
    exact = MODEL.model_copy(update={"compute_dtype": "float32", "quantization": "none"})
    folders: list[Path] = []
    for stage in ("01-cpt", "02-sft"):
        torch.manual_seed(len(folders))
        model = attach_adapter(load_base(llama3, exact), section, folders, continued=continued)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter += 0.02 * torch.randn_like(parameter)
        folder = tmp_path / stage / "adapter"
        save_adapter(model, folder, "builtin:tiny")
        folders = [folder] if continued else [*folders, folder]
    facts = run(llama3, folders, tmp_path / "merged", exact, dtype="float32")
    expected = logits(load_adapters(load_base(llama3, exact), folders).eval())
    assert (logits(plain(tmp_path / "merged")) - expected).abs().max() < 2e-4
    assert facts["adapters"] == len(folders) and facts["tied"] is not embeddings


# ------------------------------------------------------------------------------------------------------ what is refused


def edited(folder: Path, out: Path, file: str, change) -> Path:
    """A copy of a folder in which `change` edits one JSON file or one safetensors file (as a dict)."""
    shutil.copytree(folder, out)
    path = out / file
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
BROKEN_TENSORS = {
    "a tensor is missing": (lambda t: t.pop(Q0), Q0),
    "a stray tensor": (lambda t: t.update({"base_model.model.vision.weight": torch.ones(2)}), "vision.weight"),
    "a module of a deeper base": (
        lambda t: t.update({Q0.replace("layers.0", "layers.9"): torch.ones(128, 8)}),
        "layers.9.self_attn.q_proj",
    ),
    "a shape of another base": (lambda t: t.update({Q0: torch.ones(256, 8)}), Q0),
    "a full copy nobody asked for": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(512, 128)}),
        "embed_tokens",
    ),
    "DoRA's magnitudes": (
        lambda t: t.update({Q0.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(128)}),
        "lora_magnitude_vector",
    ),
}


@pytest.mark.parametrize("damage", BROKEN_TENSORS)
def test_adapter_that_does_not_fit_is_refused_by_name(damage, llama3, adapter3, tmp_path):
    change, named = BROKEN_TENSORS[damage]
    broken = edited(adapter3, tmp_path / "a", "adapter_model.safetensors", change)
    with pytest.raises(RecipeError, match=named) as caught:
        run(llama3, [broken], tmp_path / "merged")
    assert str(broken) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


BROKEN_CONFIGS = {
    "use_dora": {"use_dora": True},
    "peft_type": {"peft_type": "IA3"},
    "bias": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "r": {"r": 16},
    "router": {"target_modules": ["q_proj", "router"]},
    "no module": {"target_modules": "vision.*"},
    "lm_head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("named", BROKEN_CONFIGS)
def test_adapter_configuration_that_cannot_be_folded_is_refused(named, llama3, adapter3, tmp_path):
    broken = edited(adapter3, tmp_path / "a", "adapter_config.json", lambda c: c.update(BROKEN_CONFIGS[named]))
    with pytest.raises(RecipeError, match="shape" if named == "r" else named):
        run(llama3, [broken], tmp_path / "merged")


def test_adapter_of_another_base_is_refused(llama2, adapter3, tmp_path):
    with pytest.raises(RecipeError, match="another|base"):
        run(llama2, [adapter3], tmp_path / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value, llama3, adapter3, tmp_path):
    broken = edited(adapter3, tmp_path / "a", "adapter_model.safetensors", lambda t: t[Q0].fill_(value))
    with pytest.raises(RunError, match="layers.0.self_attn.q_proj.*not finite"):
        run(llama3, [broken], tmp_path / "merged")


def test_overflow_of_fp16_is_named(llama2, tmp_path):
    adapter = write_adapter(llama2, tmp_path / "a", target_modules=["down_proj"], lora_alpha=1e8)
    with pytest.raises(RunError, match="down_proj.weight.*not finite in float16"):
        run(llama2, [adapter], tmp_path / "merged", dtype="float16")


def test_a_stated_limit_stops_the_merge(llama3, adapter3, tmp_path):
    with pytest.raises(MergeRefused, match="merge.verify.max_kl") as caught:
        run(llama3, [adapter3], tmp_path / "merged", verify=VerifySection(max_kl=1e-12))
    assert len(str(caught.value).splitlines()) <= 6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip_header])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_damaged_safetensors_are_named(damage, where, llama3, adapter3, tmp_path):
    base, adapter = Path(shutil.copytree(llama3, tmp_path / "b")), Path(shutil.copytree(adapter3, tmp_path / "a"))
    victim = sorted((base if where == "base" else adapter).glob("*.safetensors"))[-1]
    damage(victim)
    with pytest.raises(RecipeError, match="damaged safetensors") as caught:
        run(base, [adapter], tmp_path / "merged")
    assert str(victim) in str(caught.value)


def test_missing_shard_and_missing_tensor_are_named(llama3, adapter3, tmp_path):
    base = Path(shutil.copytree(llama3, tmp_path / "b"))
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RecipeError, match="model-00002-of-00003"):
        run(base, [adapter3], tmp_path / "m1")
    short = edited(llama3, tmp_path / "c", "model-00003-of-00003.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(RecipeError, match="model.norm.weight"):
        run(short, [adapter3], tmp_path / "m2")


def test_folders_that_are_no_plain_llama_are_refused(llama3, adapter3, tmp_path):
    other = edited(llama3, tmp_path / "b1", "config.json", lambda c: c.update(model_type="mamba"))
    packed = edited(llama3, tmp_path / "b2", "config.json", lambda c: c.update(quantization_config={"bits": 4}))
    wider = edited(llama3, tmp_path / "b3", "config.json", lambda c: c.update(intermediate_size=640))
    outside = edited(
        llama3, tmp_path / "b4", "model.safetensors.index.json", lambda i: i["weight_map"].update(x="../x")
    )
    for base, named in ((other, "mamba"), (packed, "quantised"), (wider, "shape"), (outside, "outside")):
        with pytest.raises(RecipeError, match=named):
            run(base, [adapter3], tmp_path / f"{base.name}-merged")


def test_no_adapter_folder(llama3, tmp_path):
    with pytest.raises(RecipeError, match="adapter_config.json"):
        run(llama3, [tmp_path], tmp_path / "merged")


def test_pickled_adapter_and_links_out_of_the_folder_are_refused(llama3, adapter3, tmp_path):
    pickled, linked = Path(shutil.copytree(adapter3, tmp_path / "a")), tmp_path / "b" / "x" / "y"
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(RecipeError, match="pickled"):
        run(llama3, [pickled], tmp_path / "m1")
    shutil.copytree(adapter3, linked)
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(adapter3 / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="link out of"):
        run(llama3, [linked], tmp_path / "m2")


def test_random_probe_where_there_is_no_text(llama3, adapter3, tmp_path):
    (tmp_path / "merged").mkdir()
    found = merge(
        MergeJob(ModelStack(llama3, (adapter3,)), MergeSection(), MODEL, card="# card\n"), tmp_path / "merged"
    )
    assert found.as_json()["probe"] == {"tokens": 512, "from": "random token ids"}
    assert (tmp_path / "merged" / "README.md").read_text() == "# card\n"


def test_trained_template_becomes_the_chat_template(llama3, adapter3, tmp_path):
    from qmedtune.data.packing import templates

    stage, merged = tmp_path / "02-sft", tmp_path / "merged"
    stage.mkdir()
    merged.mkdir()
    templates.save(templates.load("alpaca"), stage)
    merge(MergeJob(ModelStack(llama3, (adapter3,), stage), MergeSection(), MODEL, probe_ids=IDS), merged)
    assert templates.load(merged) == templates.load("alpaca")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin_of_text|>" + templates.load("alpaca").prompt([{"role": "user", "content": "Why?"}])


def test_probe_comes_equally_from_the_held_out_sources(llama3, tmp_path):
    from qmedtune.data.packing.pack import pack_validation
    from qmedtune.recipe import Recipe

    letters = {"notes": "b", "papers": "a"}
    recipe = Recipe.model_validate(
        {
            "name": "probe",
            "model": {"base": "here"},
            "data": {name: {"path": "x.jsonl", "kind": "literature"} for name in letters},
            "stages": [{"cpt": {"mix": dict.fromkeys(letters, 1), "seq_len": 64}}],
            "validate": {"on": list(letters)},
        }
    )
    for name, letter in letters.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"id": f"{name}:{n}", "text": f"{letter} " * 60}) for n in range(9)]
        (tmp_path / name / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "packed").mkdir()
    pack_validation(recipe, llama3, {name: tmp_path / name for name in letters}, tmp_path / "packed")
    ids = validation_ids(tmp_path / "packed")
    assert ids is not None
    text = AutoTokenizer.from_pretrained(llama3).decode(ids.flatten())
    assert ids.shape == (2, 256) and ids.dtype == np.int64
    counts = text.count(" b"), text.count(" a")
    assert min(counts) > 200 and abs(counts[0] - counts[1]) < 10


def test_no_probe_without_sources(tmp_path):
    assert validation_ids(tmp_path) is None


def test_large_models_are_proved_on_fewer_tokens():
    ids = np.arange(4 * 100).reshape(4, 100)
    assert torch.equal(merge_proof.probe(ids, 10**6, 500), torch.from_numpy(ids))
    assert torch.equal(merge_proof.probe(ids, 10**9, 500), torch.from_numpy(ids[:, :8]))
    assert merge_proof.probe(None, 10**9, 500).numel() == 32
