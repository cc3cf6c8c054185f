"""The training benchmark: its jobs, its search for the longest context, and its NF4 models, which keep their bits."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from qmedtune import model as models
from qmedtune.bench import shapes, train
from qmedtune.errors import RecipeError, RunError
from qmedtune.recipe import ModelSection


def test_jobs_take_what_is_chosen():
    tiny, large = train.job_of("tiny", {"steps": 3}), train.job_of("8b", {"seq_len": 8192})
    assert (tiny.shape, tiny.steps, tiny.checkpointing) == ("tiny", 3, False)
    assert (large.seq_len, large.rows, large.warmup_steps, large.checkpointing) == (8192, 4, 20, True)
    assert large.document <= large.seq_len and not large.train_embeddings
    with pytest.raises(RecipeError, match="3 steps, of which 5 warm up"):
        train.bench_train(tiny, ["qmedtune"])
    with pytest.raises(RecipeError, match="no shape '3b'\nallowed: tiny, 1b"):
        train.job_of("3b", {})


@given(st.integers(0, 70), st.integers(1, 64))
def test_the_longest_that_works_is_found(last, limit):
    asked = []
    found = train.longest_that(lambda n: asked.append(n) or n <= last, limit)
    assert found == min(last, limit)
    assert len(asked) == len(set(asked)) <= 16 and all(1 <= n <= limit for n in asked)


def test_context_needs_a_card():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(RunError, match="no CUDA device"):
        train.bench_context(train.job_of("8b", {}), [8.0])


def test_results_are_told_with_losses_and_absences():
    measured = {
        "tokens_per_s": 50.0,
        "first_step_s": 1.0,
        "peak_memory_bytes": 2**30,
        "loss": {"first": 2.0, "last": 1.0},
    }
    rows = [train._row("trl", [measured] * 3, [measured] * 3), train._row("unsloth", [{"absent": "not installed"}], [])]
    columns, cells = train.render({"bench": "train", "rows": rows})
    assert [len(row) for row in cells] == [len(columns)] * 2
    assert cells[0][1:3] == ["50", "1.00"] and cells[1][-1] == "not installed"


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "nf4"
    shapes.write_nf4_model({**shapes.SHAPES["tiny"], "layers": 1, "vocab": 64}, folder)
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
    shapes.write_model({**shapes.SHAPES["tiny"], "layers": 1, "vocab": 64}, plain)
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


@pytest.mark.slow
def test_a_small_comparison_runs(tmp_path):
    """About a minute: three contenders, one round of seven steps each."""
    job = train.job_of("tiny", {"steps": 7, "rows": 4, "micro_batch": 2})
    result = train.bench_train(job, ["torch-loop", "qmedtune", "sft-trainer", "unsloth"], 1, tmp_path / "results.json")
    found = {row["contender"]: row for row in result["rows"]}
    assert all(found[name]["value"] > 0 for name in ("torch-loop", "qmedtune", "sft-trainer"))
    assert found["qmedtune"]["loss"]["first"] == pytest.approx(found["torch-loop"]["loss"]["first"], abs=0.02)
    assert found["unsloth"]["value"] is not None or "not installed" in found["unsloth"]["absent"]
