"""What more GPUs are planned to bring, by hand."""

from __future__ import annotations

import pytest

from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning import exchange
from qmedtune.planning.view import render_plan

MIB = 2**20


def test_a_ring_by_hand():
    # 1 s a step; 60 MB of gradients; 2 GPUs move 60 MB each at .6 x 1.25 GB/s: 80 ms beside half a second.
    step = exchange.StepTime(1.0, 60_000_000)
    assert exchange.times_as_fast(step, 2, "10 GbE") == pytest.approx(1 / 0.58)
    assert exchange.times_as_fast(step, 1, "10 GbE") == 1.0
    assert exchange.times_as_fast(step, 4, "NVLink") == pytest.approx(4, rel=0.01)


def test_an_8b_model_exchanges_its_adapters_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", str(tmp_path))
    loaded = load_recipe("recipes/llama3_8b_24gb.yaml")
    plan = make_plan(loaded.recipe)
    for stage in plan["stages"]:
        assert stage["exchange_bytes"] == 4 * stage["trained_parameters"]
        assert 10 * MIB < stage["exchange_bytes"] < 8e9 / 10
    assert plan["machine"]["kind"] == "cuda"
    titles = [table.title for table in render_plan(plan)[0]]
    stage_known = any(stage["seconds"] for stage in plan["stages"])
    assert ("Times as fast with --gpus (computed, not measured)" in titles) == stage_known
