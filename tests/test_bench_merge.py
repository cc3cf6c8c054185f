"""The merge benchmark on a tiny shape: the harness itself, and that its contenders write the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qmedtune.bench import merge as bench
from qmedtune.bench import random_bases, rounds
from qmedtune.errors import RecipeError, RunError


def test_result_has_the_form_of_all_benchmarks(tmp_path):
    result = bench.bench_merge("tiny", rounds=1, contenders=("cp", "qmedtune-nf4"), scratch=tmp_path)
    assert result.keys() == {"bench", "device", "versions", "job", "rows"} and result["bench"] == "merge"
    assert json.loads(json.dumps(result)) == result
    cp, ours = result["rows"]
    assert (cp["contender"], cp["ratio"], cp["unit"], ours["contender"]) == ("cp", 1.0, "s", "qmedtune-nf4")
    assert 0 < ours["spread"][0] <= ours["value"] <= ours["spread"][1] and ours["cpu_s"] > 0
    assert 0 <= ours["kl"] < 1e-4 and ours["violations"] == 0 and ours["elements"] > 2e6 and "kl" not in cp
    assert 5e7 < ours["peak_anonymous_bytes"] < 2e9
    assert result["job"]["weight_bytes"] > 5_000_000
    columns, rows = bench.render(result)
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def write(base, adapter):
    weight_bytes = random_bases.write_model(random_bases.SHAPES["tiny"], base)
    bench._write_adapter(random_bases.tensors_of(random_bases.SHAPES["tiny"]), adapter)
    return weight_bytes


def test_contenders_write_the_same_weights(tmp_path):
    """PEFT rounds the update to bf16 before it adds it, so it may be a unit or two of bf16 (2^-8) away."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write(base, adapter)
    bench.merge_with_qmedtune(base, adapter, tmp_path / "ours")
    bench.merge_with_peft(base, adapter, tmp_path / "peft")
    ours, theirs, before = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "peft", "base"))
    assert ours.keys() == theirs.keys() == before.keys()
    for name, tensor in ours.items():
        size = tensor.float().abs().max()
        assert (tensor.float() - theirs[name].float()).abs().max() <= 2**-7 * size, name
        assert ("_proj" in name) != torch.equal(tensor, before[name]), name


def test_shards_are_written_like_a_real_model(tmp_path, monkeypatch):
    monkeypatch.setattr(random_bases, "SHARD_BYTES", 2_000_000)
    weight_bytes = write(tmp_path / "base", tmp_path / "adapter")
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2 and weight_bytes > 5_000_000
    facts = bench.merge_with_qmedtune(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    assert facts["kl"] < 1e-4
    assert [f.name for f in sorted((tmp_path / "ours").glob("*.safetensors"))] == [f.name for f in files]


def test_anonymous_peak_sees_what_is_held_for_a_moment():
    with rounds.anonymous_peak() as peak:
        before = peak[0]
        held = torch.ones(50_000_000)
        held += 1
        del held
    assert 150e6 < peak[0] - before < 400e6


def test_refusals(tmp_path):
    with pytest.raises(RecipeError, match="1.1b"):
        bench.bench_merge("3b", scratch=tmp_path)
    with pytest.raises(RecipeError, match="peft"):
        bench.bench_merge("tiny", contenders=("unsloth",), scratch=tmp_path)
    with pytest.raises(RunError, match="cp failed"):
        rounds.measure_one(bench.BENCH, "cp", [tmp_path / "absent", tmp_path, tmp_path / "out"])


@pytest.mark.slow
@pytest.mark.parametrize("shape, limit_bytes", [("1.1b", 0.8e9), ("8b", 3e9)])
def test_anonymous_memory_of_real_shapes(shape, limit_bytes, tmp_path):
    """Needs 5 and 36 GB of disk for a while; half a minute and ten minutes on 2 cores."""
    row = bench.bench_merge(shape, ("qmedtune-nf4",), rounds=1, scratch=tmp_path)["rows"][0]
    assert row["peak_anonymous_bytes"] < limit_bytes
    assert row["violations"] == 0 and row["lost"] < 0.01
