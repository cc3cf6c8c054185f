"""What more GPUs are planned to bring, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qmedtune import group, pulse
from qmedtune.errors import DoesNotFit, RecipeError
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning import exchange, memory, precision
from qmedtune.planning.machine import this_machine
from qmedtune.planning.resolve import resolve
from qmedtune.planning.view import render_plan

MIB = 2**20
ROOT = Path(__file__).parent.parent


def test_a_ring_by_hand():
    # 1 s a step; 60 MB of gradients; 2 GPUs move 60 MB each at .6 x 1.25 GB/s: 80 ms beside half a second.
    step = exchange.StepTime(1.0, 60_000_000)
    assert exchange.times_as_fast(step, 2, "10 GbE") == pytest.approx(1 / 0.58)
    assert exchange.times_as_fast(step, 1, "10 GbE") == 1.0
    assert exchange.times_as_fast(step, 4, "NVLink") == pytest.approx(4, rel=0.01)


def test_the_bucket_that_is_planned_is_the_one_that_is_sent():
    assert memory.BUCKET_BYTES == group.BUCKET_BYTES


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


def test_a_sharded_base_is_gathered_twice_for_each_micro_batch_by_hand():
    # 36 GB of linear weights on 4 GPUs: each receives 27 GB of it, forward and backward, for each of 2 micro-batches.
    assert exchange.gathered_bytes(36e9, 4, 2) == 108_000_000_000
    step = exchange.StepTime(8.0, 0, 36_000_000_000)
    assert exchange.times_as_fast(step, 2, "NVLink") == pytest.approx(8 / (4 + 36 / 270))


def planned(base: str, gib: float, cards: int, *settings: str):
    lines = [f"model.base={base}", f"memory={gib}", "evaluate={tasks: [], perplexity: []}", *settings]
    return make_plan(load_recipe(ROOT / "recipes" / "micro.yaml", lines).recipe, cards=cards)


@pytest.mark.parametrize(("gib", "cards"), [(40, 2), (32, 2), (24, 4)])
def test_70b_fits_several_cards_that_hold_it_together(gib: float, cards: int):
    plan = planned("meta-llama/Llama-3.1-70B", gib, cards)
    for stage in plan["stages"]:
        assert stage["sharded"] and stage["peak_bytes"] <= stage["budget_bytes"]
        assert stage["memory"][f"weights (1 of {cards} parts)"] == pytest.approx(68.5e9 / 2 / cards, rel=0.01)
        assert stage["memory"]["exchange of gradients"] > 64 * MIB
    assert any(decision["key"] == "shard" for decision in plan["decisions"])
    assert any("not measured on cards" in note for note in plan["notes"])


def test_a_base_that_fits_one_card_is_not_sharded_but_where_it_is_asked_for():
    whole, sharded = planned("meta-llama/Llama-3.1-8B", 24, 2), planned("meta-llama/Llama-3.1-8B", 24, 2, "shard=true")
    for one, other in zip(whole["stages"], sharded["stages"], strict=True):
        assert not one["sharded"] and one["gathered_bytes"] == 0
        assert other["sharded"] and other["gathered_bytes"] > 0
    with pytest.raises(DoesNotFit, match=r"--gpus 2 with shard: auto"):
        planned("meta-llama/Llama-3.1-70B", 40, 1)
    with pytest.raises(DoesNotFit, match=r"--gpus 4 with shard: auto"):
        planned("meta-llama/Llama-3.1-70B", 24, 2)
    with pytest.raises(DoesNotFit) as caught:
        planned("meta-llama/Llama-3.1-70B", 40, 2, "shard=false")
    assert "shard: auto" not in str(caught.value)  # which the recipe has ruled out


def test_a_sharded_base_is_not_scored_where_it_does_not_fit_one_card():
    with pytest.raises(DoesNotFit, match="evaluate: scores are taken on one GPU"):
        planned("meta-llama/Llama-3.1-70B", 24, 4, "evaluate={perplexity: [literature]}")
    with pytest.raises(DoesNotFit, match="audit: scores are taken on one GPU"):
        planned("meta-llama/Llama-3.1-70B", 24, 4, "audit={source: notes}")


def test_a_stage_that_cannot_be_sharded_is_named():
    stages = "stages=[{pretrain: {mix: {literature: 1}, tokens: 100}}, {cpt: {mix: {literature: 1}, tokens: 100}}]"
    with pytest.raises(RecipeError, match="shard: true given, but 01-pretrain trains all parameters"):
        planned("builtin:micro", 24, 2, "shard=true", stages)


def test_what_was_judged_is_not_judged_again():
    """Rank 0 makes `shard: true` of auto where one stage needs it; the others get that, and a stage that cannot be."""
    stages = "stages=[{pretrain: {mix: {literature: 1}, tokens: 100}}, {cpt: {mix: {literature: 1}, tokens: 100}}]"
    recipe = load_recipe(ROOT / "recipes" / "micro.yaml", ["shard=true", stages]).recipe
    resolved, _ = resolve(recipe, replace(this_machine(), cards=2), judged=True)
    assert [stage.cards.sharded for stage in resolved.stages] == [False, True]


def test_parts_of_other_precisions_lie_apart():
    folders = {precision.Precision("delivered", "bfloat16", "bfloat16").folder}
    folders.add(precision.Precision("delivered", "bfloat16", "float32").folder)
    folders.add(precision.Precision("nf4", "nf4", "bfloat16").folder)
    assert len(folders) == 3


def test_a_process_that_gives_no_sign_is_noticed_and_one_that_is_not_there_yet_is_not(tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    watch = pulse.Pulse(store, 0, [1])
    for _ in range(2 * pulse.SILENT_LOOKS):
        assert watch.beat() == []
    other = pulse.Pulse(store, 1, [0])
    assert other.beat() == []
    looks = [watch.beat() for _ in range(pulse.SILENT_LOOKS + 1)]
    assert looks[-2] == [] and looks[-1] == [1]
    other.beat()
    assert watch.beat() == []


def test_scores_are_planned_for_as_many_processes_as_there_are_parts(capsys):
    from qmedtune.evaluation import measure
    from qmedtune.planning import evaluation_time

    assert evaluation_time.PART_QUESTIONS == measure.PART
    recipe = load_recipe(ROOT / "recipes" / "micro.yaml", ["evaluate={tasks: [{task: facts, limit: 20}]}"]).recipe
    one, two = make_plan(recipe), make_plan(recipe, cards=2)
    assert one["evaluation"] is not None and two["evaluation"] is not None
    assert two["evaluation"]["processes"] == 1 and two["evaluation"]["seconds"] == one["evaluation"]["seconds"]
    assert "scores are of too few parts for 2 processes: 1 of them score" in two["notes"]
    texts = load_recipe(ROOT / "recipes" / "micro.yaml").recipe
    one, two = make_plan(texts), make_plan(texts, cards=2)  # a task of one part, two texts
    assert one["evaluation"] is not None and two["evaluation"] is not None
    assert two["evaluation"]["processes"] == 2 and two["evaluation"]["seconds"] < one["evaluation"]["seconds"]


def test_the_page_tells_what_the_plan_computes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/tmp")
    page = (ROOT / "examples" / "cluster.md").read_text(encoding="utf-8")
    for memory_gib, name in ((24, "24 GiB, 60 TFLOP/s"), (80, "80 GiB, 260 TFLOP/s")):
        settings = ["adapter.r=16", f"memory={memory_gib}"]
        plan = make_plan(load_recipe(ROOT / "recipes" / "llama3_8b_24gb.yaml", settings).recipe)
        (table,) = [table for table in render_plan(plan)[0] if table.title.startswith("Times as fast")]
        assert f"| {name} | {' | '.join(table.rows[0][2:])} |" in page
    told = []
    for gib, cards in ((32, 2), (40, 2), (24, 4)):
        plan = planned_70b(gib, cards)
        told.append(f"{plan['stages'][0]['peak_bytes'] / 2**30:.1f}")
        if cards == 2:
            assert f"{plan['host']['needed_bytes'] / 2**30:.0f} GiB for two" in page
    first, second, third = told
    assert (
        f"{first} GiB of each of two cards\nof 32 GiB, {second} of 40, and {third} of each of four cards of 24" in page
    )


def planned_70b(gib: int, cards: int):
    settings = ["model.base=meta-llama/Llama-3.1-70B", "adapter.r=16", f"memory={gib}"]
    settings.append("evaluate={tasks: [], perplexity: []}")
    return make_plan(load_recipe(ROOT / "recipes" / "llama3_8b_24gb.yaml", settings).recipe, cards=cards)
