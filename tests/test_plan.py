"""What `auto` becomes, for which machine, and what `plan` says before anything is paid for."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_recipe

from qmedtune import plan, store, tiny
from qmedtune.base import builtin_folder
from qmedtune.errors import DoesNotFit, RecipeError
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import base_facts, make_plan, resolve
from qmedtune.planning import capacity, fit, machine, shapes, speed
from qmedtune.planning.estimate import Estimate, count_with, estimate_source
from qmedtune.planning.machine import GIB, Machine, card_of
from qmedtune.planning.sample import sample_source
from qmedtune.planning.view import render_plan
from qmedtune.recipe import LayersSection, ModelSection, Recipe, SourceSection, WarmupSection

ROOT = Path(__file__).parent.parent
CPU = Machine("cpu", "a CPU", 24 * GIB, 24 * GIB, 2, True)
OLD_CPU = replace(CPU, bf16=False)
T4 = card_of(15, bf16=False)
KNOWN = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "unsloth/Llama-3.2-3B-Instruct": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
}


def recipe(base="meta-llama/Llama-3.1-8B", cpt=None, sft=None, **keys):
    where = "builtin:" if base.startswith("builtin:") else "/nowhere/"
    data = {
        "literature": {"path": f"{where}literature", "kind": "literature"},
        "questions": {"path": f"{where}instructions", "kind": "instructions"},
    }
    stages = [{"cpt": {"mix": {"literature": 1.0}, **(cpt or {})}}, {"sft": {"data": "questions", **(sft or {})}}]
    return make_recipe(data, stages, base, **keys)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: CPU)
    for module in (plan, sys.modules["qmedtune.planning.resolve"]):
        monkeypatch.setattr(module, "this_machine", lambda: CPU)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # read when it is imported
    return tmp_path


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", KNOWN)
def test_shipped_shapes_have_the_published_number_of_parameters(base, cache):
    assert base_facts(ModelSection(base=base)).parameters == KNOWN[base]


def test_every_shipped_id_has_a_shape():
    table = json.loads((ROOT / "qmedtune" / "planning" / "shapes.json").read_text())
    assert set(table["ids"].values()) == set(table["shapes"])
    for base in table["ids"]:
        facts = base_facts(ModelSection(base=base))
        assert facts.heads % facts.kv_heads == 0 and facts.heads * facts.head_dim == facts.hidden


def config(**changes):
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return {**shape, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 256, **changes}


def model_folder(path, **changes):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config(**changes)))
    return path


def write_shard(path, tensors):
    header = {name: {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]} for name, n in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(10))


def test_a_local_folder_is_read_without_its_weights(tmp_path):
    folder = model_folder(tmp_path / "m", num_key_value_heads=2, tie_word_embeddings=True)
    write_shard(folder / "model.safetensors", {"a": 5})
    facts = base_facts(ModelSection(base=str(folder)))
    assert (facts.kv_heads, facts.tied, facts.stored_dtype) == (2, True, "BF16")
    assert facts.file_bytes == (folder / "model.safetensors").stat().st_size
    assert facts.folder == str(folder)


def test_rope_is_read_in_both_spellings(tmp_path):
    old = model_folder(tmp_path / "old", rope_theta=5e5, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    new = model_folder(tmp_path / "new", rope_parameters={"rope_theta": 5e5, "rope_type": "llama3"})
    for folder in (old, new):
        facts = base_facts(ModelSection(base=str(folder)))
        assert (facts.rope_theta, facts.rope_type) == (5e5, "llama3")


def test_a_hub_snapshot_in_the_cache_comes_before_the_table(cache):
    commit = "a" * 40
    repository = cache / "hub" / "models--meta-llama--Llama-3.1-8B"
    model_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert base_facts(ModelSection(base="meta-llama/Llama-3.1-8B")).hidden == 64


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": json.dumps(config(model_type="gpt2"))}, "gpt2"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": json.dumps({"model_type": "llama", "num_attention_heads": 4})}, "hidden_size"),
        ({"readme.md": ""}, "no config.json"),
        ({"config.json": json.dumps(config()), "model.safetensors": "\x01" * 40}, "damaged safetensors file"),
    ],
)
def test_a_folder_that_is_no_llama_says_so(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=says):
        base_facts(ModelSection(base=str(tmp_path)))


def test_a_missing_shard_is_named(tmp_path):
    folder = model_folder(tmp_path / "m")
    write_shard(folder / "model-00001-of-00002.safetensors", {"a": 5})
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(RecipeError, match="model-00002-of-00002"):
        base_facts(ModelSection(base=str(folder)))


def test_an_unknown_base_says_how_to_fetch_its_shape(cache):
    with pytest.raises(RecipeError, match="hf download some/thing config.json"):
        base_facts(ModelSection(base="some/thing"))
    with pytest.raises(RecipeError, match="builtin:tiny"):
        base_facts(ModelSection(base="builtin:huge"))


@pytest.mark.parametrize("base", shapes.BUILTIN_VOCAB)
def test_the_tiny_bases_have_about_the_vocabulary_that_is_planned_for(base, cache):
    tokenizer = tiny.build_tokenizer(tiny.world_of(base))
    rows = tiny.vocab_size(tokenizer)
    assert shapes.BUILTIN_VOCAB[base] == pytest.approx(rows, rel=0.15)
    made = builtin_folder(base) / "blank"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(tiny.config_dict(rows)))
    assert base_facts(ModelSection(base=base)).vocab == rows


# ---- resolve ---------------------------------------------------------------------------------------------------------

LEFT = {"memory", "tokens", "every", "kernels", "attention", "format", "workers", "rounding"}


def autos(value, key=""):
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in autos(inner, name)]
    if isinstance(value, list):
        return [found for inner in value for found in autos(inner, key)]
    return [key] if value == "auto" else []


@pytest.mark.parametrize(
    ("base", "where"),
    [
        ("builtin:tiny", CPU),
        ("HuggingFaceTB/SmolLM2-135M", OLD_CPU),
        ("meta-llama/Llama-3.2-1B", T4),
        ("meta-llama/Llama-3.2-1B", card_of(8)),
        ("meta-llama/Llama-3.1-8B", card_of(8)),
        ("meta-llama/Llama-3.1-8B", card_of(24)),
        ("meta-llama/Llama-3.1-8B", card_of(80)),
        ("meta-llama/Llama-2-13b-hf", card_of(16)),
        ("meta-llama/Llama-3.1-70B", card_of(48)),
        ("meta-llama/Llama-3.1-70B", card_of(80)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_auto_becomes_a_sane_value_with_a_reason(base, where, cache):
    resolved, decisions = resolve(recipe(base), where)
    assert set(autos(resolved.model_dump())) <= LEFT
    assert all(decision["why"] and "\n" not in decision["why"] for decision in decisions)
    again = Recipe.model_validate_json(resolved.model_dump_json(by_alias=True, exclude_none=True))
    assert again.model_dump() == resolved.model_dump()
    facts = base_facts(resolved.model)
    for index, stage in enumerate(resolved.stages):
        section = stage.section
        assert section.seq_len <= facts.max_positions
        assert 1 <= section.micro_batch <= section.batch
        assert 1_000 <= section.seq_len * section.batch <= 65_536
        assert isinstance(section.warmup, WarmupSection)
        choice = fit.choose(facts, fit.draft_of(resolved, index), where)
        assert choice.peak_bytes <= choice.budget_bytes
        if not facts.builtin:
            assert 5e-5 <= section.lr <= 3e-4


def test_what_changes_results_does_not_depend_on_the_machine():
    machines = [CPU, OLD_CPU, T4, card_of(8), card_of(24), card_of(80)]
    own = {"micro_batch", "gradient_checkpointing", "optimizer"}
    seen = set()
    for where in machines:
        resolved, _ = resolve(recipe("meta-llama/Llama-3.2-1B"), where)
        plain = resolved.model_dump(mode="json", exclude={"model": {"compute_dtype"}})
        for stage in plain["stages"]:
            for section in filter(None, stage.values()):
                for key in own:
                    del section[key]
        seen.add(json.dumps(plain, sort_keys=True))
    assert len(seen) == 1


def test_what_the_user_wrote_stays():
    asked = recipe(
        cpt={"lr": 3e-4, "seq_len": 512, "batch": 6, "micro_batch": 3, "optimizer": "paged_adamw_8bit"},
        sft={"epochs": 1.0, "warmup": {"steps": 7}, "gradient_checkpointing": True},
        model={"compute_dtype": "float16"},
    )
    resolved, decisions = resolve(asked, card_of(80))
    cpt, sft = (stage.section for stage in resolved.stages)
    assert (cpt.lr, cpt.seq_len, cpt.batch, cpt.micro_batch, cpt.optimizer) == (3e-4, 512, 6, 3, "paged_adamw_8bit")
    assert (sft.epochs, sft.warmup.steps, sft.gradient_checkpointing) == (1.0, 7, True)
    assert resolved.model.compute_dtype == "float16"
    named = {decision["key"] for decision in decisions}
    assert not named & {"stages[0].cpt.lr", "stages[1].sft.epochs", "model.compute_dtype"}


@pytest.mark.parametrize(
    ("where", "dtype"), [(CPU, "bfloat16"), (OLD_CPU, "float32"), (T4, "float16"), (card_of(24), "bfloat16")]
)
def test_compute_dtype_follows_the_instructions_there_are(where, dtype):
    resolved, _ = resolve(recipe("meta-llama/Llama-3.2-1B"), where)
    assert resolved.model.compute_dtype == dtype


def test_a_large_card_keeps_activations_and_smaller_ones_mix():
    small, middle, large = (
        resolve(recipe(cpt={"micro_batch": 2}), card_of(n))[0].stages[0].section for n in (12, 24, 80)
    )
    assert (large.gradient_checkpointing, large.optimizer) == (False, "adamw")
    for section in (small, middle):
        layers = section.gradient_checkpointing
        assert isinstance(layers, LayersSection) and sum(layers.model_dump().values()) == 32
    assert middle.gradient_checkpointing.offload < small.gradient_checkpointing.offload


def test_stated_layers_must_be_those_of_the_base():
    stated = {"keep": 20, "recompute": 12}
    resolved, _ = resolve(recipe(cpt={"gradient_checkpointing": stated}), card_of(40))
    assert fit.setup_of(resolved, 0).ways == (20, 0, 12, 0)
    with pytest.raises(RecipeError, match="counts 33 layers, .* has 32"):
        resolve(recipe(cpt={"gradient_checkpointing": {**stated, "offload": 1}}), card_of(40))


def test_between_keeping_and_recomputing_lies_a_faster_mix():
    asked = recipe(cpt={"micro_batch": 2})
    draft = fit.draft_of(resolve(asked, card_of(24))[0], 0)
    mixed = fit.choose(base_facts(asked.model), draft, card_of(24)).setup
    all_of_them = replace(mixed, ways=None, checkpointing=True)
    facts = base_facts(asked.model)
    assert fit.relative_time(facts, mixed, card_of(24)) < fit.relative_time(facts, all_of_them, card_of(24))
    tight = resolve(recipe(), card_of(8))[0].stages[0].section
    assert (tight.micro_batch, tight.optimizer) == (1, "paged_adamw_8bit")


def test_a_stated_memory_is_the_budget():
    free, stated = resolve(recipe(), card_of(80))[0], resolve(recipe(memory=12.0), card_of(80))[0]
    assert stated.stages[0].section.micro_batch < free.stages[0].section.micro_batch
    assert fit.choose(base_facts(stated.model), fit.draft_of(stated, 0), card_of(80)).peak_bytes <= 12 * GIB
    assert fit.budget_bytes(card_of(8), recipe(memory=12.0)) == 8 * GIB


def test_large_bases_and_continued_adapters_learn_slower():
    def rates(base):
        return [stage.section.lr for stage in resolve(recipe(base), card_of(80))[0].stages]

    assert rates("meta-llama/Llama-3.1-8B") == [2e-4, 1e-4]
    assert rates("meta-llama/Llama-3.1-70B") == [1e-4, 1e-4]
    alone = resolve(recipe(sft={"adapter": "new"}), card_of(24))[0]
    assert alone.stages[1].section.lr == 2e-4


def test_the_tiny_base_on_real_text_gets_longer_rows():
    keys = recipe("builtin:tiny").model_dump(mode="json", by_alias=True, exclude_none=True)
    keys["data"]["literature"]["path"] = "/nowhere/abstracts.jsonl"
    resolved, _ = resolve(Recipe.model_validate(keys), CPU)
    cpt, sft = (stage.section for stage in resolved.stages)
    tuned = tiny.DEFAULTS["builtin:tiny"]
    assert cpt.seq_len == tiny.MAX_POSITIONS and cpt.tokens == "auto"
    assert cpt.batch * cpt.seq_len == tuned.cpt.batch_rows * tuned.cpt.seq_len
    assert (sft.seq_len, sft.batch) == (tuned.sft.seq_len, tuned.sft.batch_rows)


def test_embeddings_that_a_stage_trains_by_an_adapter_of_its_own_are_planned_for():
    shared, own = (resolve(recipe(cpt=keys), card_of(80))[0] for keys in ({}, {"lora": {"train_embeddings": True}}))
    assert not fit.setup_of(shared, 0).train_embeddings
    assert fit.setup_of(own, 0).train_embeddings


def test_what_cannot_fit_names_three_remedies_and_what_they_free():
    with pytest.raises(DoesNotFit) as raised:
        resolve(recipe(cpt={"micro_batch": 8, "gradient_checkpointing": False}), card_of(24))
    lines = str(raised.value).splitlines()
    assert raised.value.exit_code == 4 and len(lines) <= 6
    remedies = [line for line in lines if " frees " in line]
    assert len(remedies) == 3 and "gradient_checkpointing: true" in remedies[0]


def test_a_hopeless_base_names_the_card_it_needs():
    with pytest.raises(DoesNotFit, match="a card of 48 GiB"):
        resolve(recipe("meta-llama/Llama-3.1-70B"), card_of(24))


def test_remedies_free_what_they_say():
    facts = base_facts(ModelSection(base="meta-llama/Llama-3.1-8B"))
    resolved, _ = resolve(recipe(), card_of(24))
    setup = fit.setup_of(resolved, 0)
    before = fit.memory.peak_bytes(facts, setup, gpu=True)
    freed = dict(fit.remedies(facts, setup, gpu=True))
    halved = fit.memory.peak_bytes(facts, replace(setup, seq_len=setup.seq_len // 2), gpu=True)
    assert freed[f"seq_len: {setup.seq_len // 2}"] == before - halved


# ---- estimates -------------------------------------------------------------------------------------------------------


def source(path, **keys):
    return SourceSection.model_validate({"path": str(path), "kind": "literature", "holdout": 0.0, **keys})


def estimated(section: SourceSection) -> Estimate:
    """Counted by words and marks, as in the built-in world: exactly."""
    counting = count_with(None, 1536, section, builtin_base=True, builtin_text=True)
    return estimate_source(sample_source(section), section, replace(counting, spread=0.0)).estimate


def test_small_files_are_counted_in_full(tmp_path):
    lines = [json.dumps({"text": "word " * n}) for n in range(1, 41)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found = estimated(source(tmp_path / "a.jsonl"))
    assert (found.records, found.tokens, found.spread) == (40, sum(range(1, 41)) + 80, 0.0)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_large_files_are_sampled_within_their_spread(tmp_path, suffix):
    import gzip

    text = "".join(json.dumps({"text": f"abc{n} " * (10 + n % 50)}) + "\n" for n in range(60_000)).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(text, 1) if suffix.endswith("gz") else text)
    found = estimated(source(path))
    truth = sum(12 + n % 50 for n in range(60_000))
    assert 0 < found.spread <= 0.25
    assert found.tokens == pytest.approx(truth, rel=found.spread)


def test_limits_and_hold_out_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n' * 100)
    found = estimated(source(tmp_path / "a.jsonl", holdout=0.1, max_records=50))
    assert (found.records, found.tokens) == (45, 45 * 5)


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(name, overrides=(), run_dir=None):
    return make_plan(load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides).recipe, run_dir)


def test_the_flagship_is_planned_before_anything_exists(cache, without_gpu):
    facts = planned("cpt_then_sft", run_dir=cache / "run")
    assert [step["status"] for step in facts["steps"]] == ["to do"] * len(facts["steps"])
    assert facts["steps"][0]["name"].startswith("data/") and facts["steps"][-1]["name"] == "evaluation"
    for stage in facts["stages"]:
        assert stage["trained"] > 10_000 and stage["steps"] > 5 and stage["seconds"] > 0
        assert stage["peak_bytes"] == sum(stage["memory"].values()) < 2 * GIB
    assert any("pretrained first" in note for note in facts["notes"])
    assert not (cache / "run").exists()


def test_a_24_gib_recipe_plans_without_gpu_data_or_network(cache, without_gpu, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    facts = planned("llama3_8b_24gb")
    assert facts["machine"]["memory_bytes"] == 24 * GIB and not facts["machine"]["present"]
    assert all(source["missing"] for source in facts["data"])
    cpt, sft = facts["stages"]
    assert cpt["trained"] == 50_000_000 and cpt["seconds"] > 3600
    assert sft["seconds"] is None
    assert 8 * GIB < cpt["peak_bytes"] <= 24 * GIB
    assert facts["disk"]["parts"]["merged model"] == 2 * KNOWN["meta-llama/Llama-3.1-8B-Instruct"]
    named = [note for note in facts["notes"] if "not found here" in note]
    assert len(named) == len(facts["data"]) + 1 and named[-1].startswith("pubmedqa: ")


def test_the_t4_recipe_plans_in_fp16(cache, without_gpu):
    facts = planned("llama3_1b_colab_t4")
    assert all(stage["peak_bytes"] < 15 * GIB for stage in facts["stages"])
    assert facts["host"]["needed_bytes"] < 12 * GIB


def test_two_changed_lines_make_the_flagship_a_real_recipe(cache, without_gpu, tmp_path):
    (tmp_path / "abstracts.jsonl").write_text('{"text": "Aspirin was given."}\n' * 100)
    overrides = ["model.base=meta-llama/Llama-3.1-8B", f"data.literature.path={tmp_path}/abstracts.jsonl"]
    facts = planned("cpt_then_sft", overrides)
    cpt, sft = facts["stages"]
    assert (cpt["lr"], sft["lr"]) == (2e-4, 1e-4)
    assert cpt["seq_len"] == sft["seq_len"] == 2048
    largest = next(d["value"] for d in facts["decisions"] if d["key"] == "stages[0].cpt.batch")
    assert 16_384 <= largest * 2048 <= 65_536
    assert cpt["batch"] == 1 and any("only 1 optimiser steps" in note for note in facts["notes"])  # 100 short texts
    assert facts["machine"]["memory_bytes"] in [gib * GIB for gib in (8, 12, 16)]
    assert cpt["trained_parameters"] < 100e6


def test_without_a_stated_card_the_smallest_that_fits_is_planned_for(without_gpu, cache):
    cards = {}
    for base in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"):
        cards[base] = make_plan(recipe(base))["machine"]["memory_bytes"] // GIB
    assert cards["meta-llama/Llama-3.2-1B"] == 8
    assert cards["meta-llama/Llama-3.1-8B"] in (8, 12) and cards["meta-llama/Llama-3.1-70B"] in (48, 80)


def test_a_stated_card_that_is_too_small_does_not_fit(without_gpu, cache):
    with pytest.raises(DoesNotFit):
        make_plan(recipe("meta-llama/Llama-3.1-70B", memory=24.0))


def test_sealed_tokens_and_measured_speed_are_taken(cache, without_gpu, monkeypatch):
    run_dir = cache / "run"
    packed = run_dir / "data" / "01-cpt"
    packed.mkdir(parents=True)
    store.seal(packed, "key", {"rows": 100, "tokens": {"trained": 6400}})
    (run_dir / "01-cpt").mkdir()
    lines = [json.dumps({"stage": "01-cpt", "step": step, "tokens_per_s": 100.0 + step}) for step in range(5)]
    (run_dir / "01-cpt" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows = [{"name": "data/01-cpt", "status": "cached", "why": ""}, {"name": "01-cpt", "status": "to do", "why": ""}]
    monkeypatch.setattr("qmedtune.step_status.status", lambda recipe, out, **_: rows)
    first = planned("cpt_then_sft", ["stages[0].cpt.batch=32"], run_dir)["stages"][0]
    assert (first["trained"], first["spread"], first["steps"]) == (6400, 0.0, 4)
    assert first["measured"] and first["tokens_per_s"] == 102.0
    assert first["seconds"] == pytest.approx(6400 / 102, abs=0.1)


def test_too_little_disk_or_memory_is_told_before_the_run(cache, without_gpu, monkeypatch):
    monkeypatch.setattr(capacity, "free_bytes", lambda place: 1000)
    with pytest.raises(DoesNotFit, match="of disk"):
        planned("micro")
    monkeypatch.setattr(plan, "this_machine", lambda: replace(CPU, host_bytes=GIB // 4))
    with pytest.raises(DoesNotFit, match="host memory"):
        planned("micro")


def test_rows_beyond_the_bases_positions_are_pointed_out(cache, without_gpu):
    facts = planned("micro", ["stages[0].cpt.seq_len=1024"])
    assert any("beyond the 512 positions" in note for note in facts["notes"])


def test_the_view_shows_every_step_stage_and_decision(cache, without_gpu):
    facts = planned("micro")
    tables, closing = render_plan(facts)
    shown = "\n".join(" ".join(row) for table in tables for row in table.rows)
    for name in [*(step["name"] for step in facts["steps"]), *(d["key"] for d in facts["decisions"])]:
        assert name in shown
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert closing[0].startswith("builtin:micro")


def test_planning_needs_no_torch_and_less_than_three_seconds(cache):
    code = (
        "import sys, time\n"
        "from qmedtune.parsing.loader import load_recipe\nfrom qmedtune.plan import make_plan\n"
        f"make_plan(load_recipe({str(ROOT / 'recipes' / 'cpt_then_sft.yaml')!r}).recipe)\n"
        "print(time.process_time(), [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds, _, heavy = answer.stdout.strip().partition(" ")
    assert heavy == "[]"
    assert float(seconds) < 3


# ---- speed and machine -----------------------------------------------------------------------------------------------


def test_recomputation_costs_half_as_much_again():
    facts = base_facts(ModelSection(base="meta-llama/Llama-3.1-8B"))
    kept, recomputed = (fit.Setup(2048, 1, checkpointing, "adamw", "bfloat16") for checkpointing in (False, True))
    ratio = speed.flops_per_token(facts, recomputed) / speed.flops_per_token(facts, kept)
    assert ratio == pytest.approx(1.5, abs=0.05)
    assert speed.flops_per_token(facts, kept) == pytest.approx(4 * facts.parameters, rel=0.1)


def test_this_machine_is_described():
    here = machine.this_machine()
    assert here.present and here.memory_bytes > GIB and here.cores >= 1 and here.name


def test_the_driver_is_asked_for_the_first_visible_card(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\n[ "$1" = "--id=3" ] && echo "NVIDIA A100-SXM4-40GB, 40960, 5, 8.0"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = machine.this_machine.__wrapped__()
    assert (found.kind, found.name, found.memory_bytes, found.bf16) == ("cuda", "NVIDIA A100-SXM4-40GB", 40 * GIB, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.this_machine.__wrapped__().kind == "cpu"
