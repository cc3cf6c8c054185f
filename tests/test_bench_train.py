"""The training benchmark: its jobs, its search for the longest context, and its NF4 models, which keep their bits."""

import functools
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from qmedtune import model as models
from qmedtune.bench import context, load, random_bases, train, train_worker
from qmedtune.bench.job import job_of
from qmedtune.bench.result import Measurement
from qmedtune.errors import RecipeError
from qmedtune.recipe import ModelSection


def test_jobs_take_what_is_chosen():
    tiny, large = job_of("tiny", {"steps": 3}), job_of("8b", {"seq_len": 8192})
    assert (tiny.shape, tiny.steps, tiny.checkpointing) == ("tiny", 3, False)
    assert (large.seq_len, large.rows, large.warmup_steps, large.checkpointing) == (8192, 4, 20, True)
    assert large.document <= large.seq_len and not large.train_embeddings
    with pytest.raises(RecipeError, match="3 steps, of which 5 warm up"):
        train.bench_train(tiny, ["qmedtune"])
    with pytest.raises(RecipeError, match="no shape '3b'\nallowed: tiny, .*builtin:smollm2, 1b"):
        job_of("3b", {})


@given(st.integers(0, 70), st.integers(1, 64), st.integers(1, 80))
def test_the_longest_that_works_is_found(last, limit, guess):
    asked = []
    found = context.longest_that(lambda n: asked.append(n) or n <= last, limit, guess, 10**9)
    assert found == min(last, limit)
    assert len(asked) == len(set(asked)) <= 30 and all(1 <= n <= limit for n in asked)


def test_a_good_guess_saves_steps():
    asked = []
    found = context.longest_that(lambda n: asked.append(n) or n <= 100, 1024, 97)
    assert 97 <= found <= 100 and len(asked) <= 5


def test_context_without_a_card_tells_predictions_alone():
    """The plan's lengths for 8B at r=32: beyond 78k tokens in 24 GiB, what Unsloth publishes for it."""
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    result = context.bench_context(job_of("8b", {"r": 32}), [8.0, 24.0])
    small, large = result["rows"]
    assert small["value"] is large["value"] is None and not large["settled"]
    assert 0 < small["predicted"] < 8192 and 78_000 < large["predicted"] < 131_072
    assert context.render(result)[1][1][:2] == ["24 GiB", "not measured"]


@given(st.integers(0, 50), st.sampled_from([(64, 16), (64, 64), (97, 10), (16, 1)]))
def test_rows_are_documents_laid_end_to_end(number, sizes):
    job = job_of("tiny", {"seq_len": sizes[0], "document": sizes[1]})
    row = train_worker.packed_row(job, 100, number)
    starts = np.flatnonzero(row["position_ids"] == 0)
    lengths = np.diff([*starts, job.seq_len])
    assert starts[0] == 0 and all(row["labels"][starts] == -100)
    assert all((row["position_ids"][s : s + n] == np.arange(n)).all() for s, n in zip(starts, lengths, strict=True))
    assert max(lengths) <= max(3 * job.document // 2, 1) or job.document == job.seq_len
    again = train_worker.packed_row(job, 100, number)
    assert all((row[name] == again[name]).all() for name in row)


def test_rows_differ_in_their_documents():
    job = job_of("8b", {})
    counts = {int((train_worker.packed_row(job, 1000, n)["position_ids"] == 0).sum()) for n in range(8)}
    assert len(counts) > 1 and min(counts) > 2 and max(counts) < 9


def test_rounds_turn_around():
    assert train._turns(["a", "b"], 3) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_results_are_told_with_losses_and_absences():
    measured = Measurement(
        tokens_per_s=50.0, all_tokens_per_s=60.0, cpu_s=1.0, first_step_s=1.0, peak_memory_bytes=2**30,
        host_bytes=2**30, losses=[2.0, 1.0], gradient_cosine=0.9999, loss_gap=0.001,
    )  # fmt: skip
    slower = measured.model_copy(update={"tokens_per_s": 25.0, "cpu_s": 1.5})
    job = job_of("tiny", {})
    rows = [
        train._row(job, "trl", [measured] * 3, [measured] * 3),
        train._row(job, "qmedtune", [slower, measured, slower], [measured] * 3),
        train._row(job, "unsloth", [Measurement(absent="not installed")], [measured]),
    ]
    columns, cells = train.render({"bench": "train", "device": "", "versions": {}, "rows": rows})
    assert [len(row) for row in cells] == [len(columns)] * 3
    assert cells[0][1:3] == ["50", "1.00 (1.00 to 1.00)"] and cells[1][2] == "0.50 (0.50 to 1.00)"
    assert rows[1]["cpu_ratio"] == pytest.approx(0.667, abs=1e-3) and cells[2][-1] == "not installed"


def test_utilisation_counts_each_weight_four_times(monkeypatch):
    """8B: 7.5 G weights are multiplied (the embedding is looked up)."""
    monkeypatch.setattr(train, "this_machine", lambda: SimpleNamespace(name="NVIDIA H200"))
    found = train.utilisation(job_of("8b", {}), 10_000)
    assert found["tflops"] == pytest.approx(4 * (32 * 218_103_808 + 128_256 * 4096) * 1e4 / 1e12, abs=1e-3)
    assert found["utilisation"] == pytest.approx(found["tflops"] / 989, abs=1e-4)


def test_adapters_are_named_alike_by_everybody():
    peft = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight"
    assert (
        train_worker.adapter_key(peft) == train_worker.adapter_key("model.layers.3.self_attn.q_proj.a") == "3.q_proj.A"
    )
    assert train_worker.adapter_key(peft.replace("lora_A.default", "base_layer")) == ""
    assert train_worker.adapter_key("base_model.model.lm_head.modules_to_save.default.weight") == ""


def test_what_is_left_out_takes_its_reference():
    """The functions exist under these names where fused.py calls them, and each has a `path`."""
    from qmedtune.modeling import fused

    for names in train_worker.ABLATED.values():
        for dotted in names:
            operation = functools.reduce(getattr, dotted.split("."), fused)
            assert "path" in inspect.signature(operation).parameters
    seen = []
    call = train_worker.by_reference(lambda x, eps, path="auto": seen.append((x, eps, path)))
    call(1, 2, "triton")
    call(1, eps=3)
    assert seen == [(1, 2, "reference"), (1, 3, "reference")]


def test_what_lacked_time_is_measured_by_the_next_call(tmp_path, monkeypatch):
    calls = []
    found = {
        "tokens_per_s": 50.0, "all_tokens_per_s": 60.0, "cpu_s": 1.0, "first_step_s": 1.0, "peak_memory_bytes": 1,
        "host_bytes": 1, "losses": [2.0],
    }  # fmt: skip
    monkeypatch.setattr(train, "_run", lambda job, name, *rest: calls.append(name) or Measurement(**found))
    job, results = job_of("1b", {}), tmp_path / "deep" / "raw.json"
    first = train.bench_train(job, ["trl", "qmedtune"], rounds=2, results=results, time_limit_s=1.0)
    assert calls == [] and all("no time was left" in row["absent"] for row in first["rows"])
    second = train.bench_train(job, ["trl", "qmedtune"], rounds=2, results=results)
    assert calls == ["trl", "qmedtune", "qmedtune", "trl"] and second["rows"][1]["ratio"] == 1.0
    train.bench_train(job, ["trl", "qmedtune"], rounds=2, results=results)
    assert len(calls) == 4


OTHER_CODE = """
import json, sys
from pathlib import Path
def main():
    contender, job, models, target = sys.argv[1:5]
    told = {"tokens_per_s": 50.0, "all_tokens_per_s": 60.0, "cpu_s": 2.0, "first_step_s": 1.0, "load_s": 1.0}
    told |= {"peak_memory_bytes": 1, "losses": [2.0]}
    told["asked"] = [contender, json.loads(job)["rows"], Path(models).is_absolute()]
    Path(target).write_text(json.dumps(told))
"""


def test_the_code_of_another_checkout_is_a_contender(tmp_path):
    """Of whatever it contains: here a program that only says what it was asked."""
    other = tmp_path / "before"
    (other / "qmedtune" / "bench").mkdir(parents=True)
    for folder in (other / "qmedtune", other / "qmedtune" / "bench"):
        (folder / "__init__.py").write_text("")
    (other / "qmedtune" / "bench" / "train_process.py").write_text(OTHER_CODE)
    name = f"qmedtune@{other}"
    found = train.measure(job_of("1b", {"rows": 3}), name, train.Folders(tmp_path, tmp_path), 60.0)
    assert found.as_json()["asked"] == ["qmedtune", 3, True] and found.tokens_per_s == 50.0
    result = train.bench_train(job_of("1b", {}), [name], rounds=2, models=tmp_path)
    [row] = result["rows"]
    assert (row["contender"], row["ratio"], row["rounds"]) == (name, 1.0, 2) and "another checkout" in row["what"]
    for wrong in (f"trl@{other}", f"qmedtune@{tmp_path}", f"mine@{other}"):
        with pytest.raises(RecipeError, match=f"{wrong.partition('@')[0]}@"):
            train.bench_train(job_of("1b", {}), [wrong])


FIGURES = {"all_tokens_per_s": 60.0, "cpu_s": 1.0, "first_step_s": 1.0, "peak_memory_bytes": 1, "host_bytes": 1}
FIGURES |= {"losses": [2.0]}


def test_each_contender_runs_at_the_setting_it_is_fastest_with(tmp_path, monkeypatch):
    """Up to 4 rows: kept layers fit one row of trl-tuned and are fastest; qmedtune is fastest with two, recomputed."""
    speeds = {
        ("trl-tuned", 1, True): 10.0, ("trl-tuned", 2, True): 12.0, ("trl-tuned", 4, True): 11.0,
        ("trl-tuned", 1, False): 13.0,
        ("qmedtune", 1, True): 20.0, ("qmedtune", 2, True): 25.0, ("qmedtune", 4, True): 24.0,
    }  # fmt: skip
    calls = []

    def run(job, name, *rest):
        calls.append((name, job.micro_batch, job.checkpointing, job.steps))
        speed = speeds.get(calls[-1][:3])
        return Measurement(tokens_per_s=speed, **FIGURES) if speed else Measurement(absent="failed: CUDA out of memory")

    monkeypatch.setattr(train, "_run", run)
    job, results = job_of("1b", {"rows": 4}), tmp_path / "raw.json"
    found = train.bench_train(job, ["trl-tuned", "qmedtune"], rounds=2, results=results, best=True)
    slow, fast = found["rows"]
    assert slow["setting"] == {"micro_batch": 1, "checkpointing": False} and slow["value"] == 13.0
    assert fast["setting"] == {"micro_batch": 2, "checkpointing": True}
    assert fast["ratio"] == pytest.approx(25 / 13, 0.01)
    assert [each["tokens_per_s"] for each in slow["tried"]] == [10.0, 12.0, 11.0, 13.0, None]
    assert ("qmedtune", 2, False, 5) not in calls  # one row did not fit
    assert [call for call in calls if call[3] == job.steps] == [
        ("trl-tuned", 1, False, 40), ("qmedtune", 2, True, 40), ("qmedtune", 2, True, 40), ("trl-tuned", 1, False, 40),
    ]  # fmt: skip
    assert "1 rows at a time, layers all kept" in train.render(found)[1][0][-1]
    before = len(calls)
    assert (
        train.bench_train(job, ["trl-tuned", "qmedtune"], rounds=2, results=results, best=True)["rows"] == found["rows"]
    )
    assert len(calls) == before


def test_a_search_that_lacked_time_goes_on_in_the_next_call(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "_run", lambda *_: calls.append(1) or Measurement(tokens_per_s=1.0, **FIGURES))
    job, results = job_of("1b", {"rows": 6}), tmp_path / "raw.json"
    first = train.bench_train(job, ["qmedtune"], rounds=1, results=results, time_limit_s=1.0, best=True)
    assert not calls and first["rows"][0]["setting"] is None and "no time was left" in first["rows"][0]["absent"]
    second = train.bench_train(job, ["qmedtune"], rounds=1, results=results, best=True)
    assert len(calls) == 7 and [each["micro_batch"] for each in second["rows"][0]["tried"]] == [1, 2, 6, 1, 2, 6]


def test_within_a_budget_the_plan_decides_and_rows_that_were_made_fewer_do_not_count(tmp_path, monkeypatch):
    """qmedtune halves its micro-batch where memory runs out: that is the speed of another setting."""

    def run(job, name, *rest):
        if name == "unsloth":
            return Measurement(absent="failed: the first call after a driver update")
        found = {"tokens_per_s": float(job.micro_batch), "micro_batch": min(job.micro_batch, 2), **FIGURES}
        return Measurement(**found, layers={"cheap": 4, "recompute": 12})

    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "_absent", lambda name: "")
    job = job_of("1b", {"rows": 8, "memory_gib": 8.0})
    ours, theirs = train.bench_train(job, ["qmedtune", "unsloth"], rounds=1, best=True)["rows"]
    assert [(each["micro_batch"], each["tokens_per_s"]) for each in ours["tried"]] == [(1, 1.0), (2, 2.0), (4, None)]
    assert ours["setting"]["micro_batch"] == 2 and train.setting_words(ours).endswith("layers 4 cheap, 12 recompute")
    assert len(theirs["tried"]) == 8 and theirs["value"] is None  # not for want of memory: all are tried


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "nf4"
    random_bases.write_nf4_model({**random_bases.SHAPES["tiny"], "layers": 1, "vocab": 64}, folder)
    return folder


def test_a_checkpoint_quantised_by_bitsandbytes_loads_with_its_bits(nf4_folder):
    """Through our loader, against bitsandbytes' own dequantise of the stored tensors."""
    import bitsandbytes.functional as bnb

    loaded = models.load_base(nf4_folder, ModelSection(base=str(nf4_folder), compute_dtype="bfloat16"))
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(nf4_folder / "model-layer-000.safetensors", "pt") as file:
        stored = {
            key.removeprefix(name + "."): file.get_tensor(key) for key in sorted(file.keys()) if key.startswith(name)
        }
    packed = stored.pop(name)
    state = bnb.QuantState.from_dict(stored, device=torch.device("cpu"))
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(loaded.get_parameter(name), expected) and expected.dtype == torch.bfloat16
    assert 0.015 < float(expected.float().std()) < 0.025


def test_what_bitsandbytes_saves_is_what_is_written(nf4_folder, tmp_path):
    """The same names, dtypes and shapes as transformers saves of a model that bitsandbytes quantised."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tmp_path / "plain"
    random_bases.write_model({**random_bases.SHAPES["tiny"], "layers": 1, "vocab": 64}, plain)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four_bit, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")

    def described(folder):
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {
                    key: (file.get_tensor(key).dtype, tuple(file.get_slice(key).get_shape()))
                    for key in sorted(file.keys())
                }
        return {key: value for key, value in found.items() if "quant_state" not in key}

    assert described(nf4_folder) == described(tmp_path / "saved")
    ours = json.loads((nf4_folder / "config.json").read_text())["quantization_config"]
    theirs = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert {key: theirs[key] for key in ours if key in theirs and "compute" not in key} == {
        key: ours[key] for key in ours if key in theirs and "compute" not in key
    }


def test_a_base_is_loaded_and_weighed():
    rows = load.bench_load("tiny", ("nf4",), 1)["rows"]
    assert rows[0]["value"] > 0 and rows[0]["host_bytes"] > 0
    assert 0 < rows[0]["next_stage_s"] < rows[0]["value"] and rows[0]["checkpoint_s"] > 0
    assert rows[0]["checkpoint_bytes"] > 1e6  # weights and two states of each, fp32
    assert 0 < rows[0]["largest_shard_bytes"] < rows[0]["weight_bytes"] < 5e6
    with pytest.raises(RecipeError, match="no case 'gguf'\nallowed: 16-bit, nf4"):
        load.bench_load("tiny", ("gguf",))


@pytest.mark.slow
def test_a_small_comparison_runs(tmp_path):
    """About two minutes: the fp32 loop and three contenders, one round of seven steps each."""
    job = job_of("tiny", {"steps": 7, "rows": 4, "micro_batch": 2})
    itself = f"qmedtune@{ROOT}"
    names = ["torch-loop", "qmedtune", itself, "sft-trainer", "unsloth", "without-rope"]
    result = train.bench_train(job, names, rounds=1, results=tmp_path / "results.json")
    found = {row["contender"]: row for row in result["rows"]}
    assert found[itself]["loss_gap"] == found["qmedtune"]["loss_gap"], "the same code"
    for name in ("torch-loop", "qmedtune", "sft-trainer"):
        assert found[name]["value"] > 0 and found[name]["gradient_cosine"] > 0.999 and found[name]["loss_gap"] < 0.01
    assert 0 < found["qmedtune"]["data_share"] < 0.05
    assert found["unsloth"]["value"] is not None or "not installed" in found["unsloth"]["absent"]
    assert found["without-rope"]["value"] is not None or found["without-rope"]["absent"] == "it needs a GPU"
