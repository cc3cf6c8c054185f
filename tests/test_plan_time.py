"""How long a plan says the scores take: what it counts, what it adds up, what it says where it cannot know."""

import sys
from pathlib import Path

import pytest
from conftest import MICRO

from qmedtune import plan, preflight
from qmedtune.data.packing.framing import frame_in
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import base_facts, make_plan
from qmedtune.planning import evaluation_time, machine, speed
from qmedtune.planning.machine import GIB, Machine, card_of
from qmedtune.planning.view import render_plan
from qmedtune.tasks import load_task

ROOT = Path(__file__).parent.parent
CPU = Machine("cpu", "a CPU", 24 * GIB, 24 * GIB, 2, True)
ONCE, TWICE = ([f"evaluate.tasks=[{{task: facts, limit: {limit}}}]"] for limit in (10, 20))


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: CPU)
    for module in (plan, sys.modules["qmedtune.planning.resolve"]):
        monkeypatch.setattr(module, "this_machine", lambda: CPU)


def planned(settings=(), run_dir=None, recipe=MICRO):
    return make_plan(load_recipe(recipe, settings).recipe, run_dir)


def test_the_times_are_a_sum_and_stand_in_the_table(micro_run, without_gpu, tmp_path):
    found = planned(run_dir=tmp_path / "run")
    assert list(found["times"]) == ["data", "loading", "training", "merging", "evaluation"]
    assert found["seconds"] == pytest.approx(sum(found["times"].values())) and min(found["times"].values()) > 0
    scored = found["evaluation"]
    parts = [task["seconds"] for task in scored["tasks"]]
    assert scored["seconds"] == pytest.approx(sum(parts) + scored["text_seconds"] + scored["load_seconds"], abs=0.2)
    assert found["times"]["evaluation"] == scored["seconds"] and scored["models_loaded"] == 4  # texts in NF4 beside
    tables, closing = render_plan(found)
    titles = [table.title for table in tables]
    assert "Evaluation (delivered, weights in bfloat16; base and result)" in titles
    assert "scoring" in closing[1]


def test_what_is_read_and_written_is_that_of_the_questions(micro_run, without_gpu, tmp_path):
    [task] = planned(run_dir=tmp_path / "run")["evaluation"]["tasks"]
    recipe = load_recipe(MICRO).recipe
    asked = load_task(recipe.evaluate.tasks[0], recipe.seed, "micro")
    frame = frame_in(preflight.asked_with(recipe, micro_run.base), micro_run.base)
    prompts = sum(len(frame.ask([item.messages])[0].ids) for item in asked.asked)
    assert task["questions"] == 20 and task["written"] == 20 * asked.max_new_tokens
    assert 2 * prompts <= task["read"] <= 2 * prompts + 20 * 20 * 3  # and 20 options of a few words behind each


def test_more_questions_take_longer_and_no_written_answers_less(micro_run, without_gpu, tmp_path):
    once, twice = planned(ONCE), planned(TWICE)
    chosen = planned([*TWICE, "evaluate.generate=false"])
    [[first], [second], [third]] = [found["evaluation"]["tasks"] for found in (once, twice, chosen)]
    assert second["read"] == pytest.approx(2 * first["read"], rel=0.1) and third["written"] == 0
    assert third["seconds"] < second["seconds"]


def test_examples_before_questions_are_read_once(micro_run, tmp_path):
    recipe = load_recipe(MICRO, ["evaluate.tasks=[{task: facts, limit: 20, shots: 3, shot_seeds: 3}]"]).recipe
    task = load_task(recipe.evaluate.tasks[0], recipe.seed, "micro")
    frame = frame_in(preflight.asked_with(recipe, micro_run.base), micro_run.base)
    found = evaluation_time.reading(task, lambda item: frame.ask([item.messages])[0].ids, generate=True)
    every = sum(len(frame.ask([item.messages])[0].ids) for item in task.asked)
    assert found.questions == 60 and found.answer_read < 0.6 * every


def test_what_is_cached_takes_no_time(micro_run, without_gpu, monkeypatch):
    sources = ["literature", "notes", "general", "instructions"]
    names = ["01-cpt", "02-sft", "merged", "evaluation"]
    names += [f"data/{name}" for name in [*sources, "01-cpt", "02-sft"]]
    rows = [{"name": name, "status": "cached", "why": ""} for name in names]
    monkeypatch.setattr("qmedtune.step_status.status", lambda recipe, out, **_: rows)
    assert planned(run_dir=micro_run.folder)["seconds"] == 0
    rows[3]["status"] = "to do"
    left = planned(run_dir=micro_run.folder)
    assert left["times"]["training"] == left["times"]["merging"] == 0 < left["times"]["evaluation"]
    assert left["times"]["data"] == 0
    rows[5]["status"] = "to do"  # one of four sources
    one = planned(run_dir=micro_run.folder)["times"]["data"]
    for row in rows:
        row["status"] = "to do"
    assert 0 < 2 * one < planned(run_dir=micro_run.folder)["times"]["data"]


def test_a_benchmark_that_is_not_here_makes_it_at_least(without_gpu, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    found = planned(recipe=ROOT / "recipes" / "llama3_8b_24gb.yaml")
    assert found["evaluation"]["unknown"] == ["pubmedqa"] and found["evaluation"]["tasks"] == []
    assert any(line.startswith("for a card") and "at least" in line for line in render_plan(found)[1])


def test_sixteen_bit_that_does_not_fit_is_timed_in_nf4_and_said(without_gpu, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    found = planned(["memory=12"], recipe=ROOT / "recipes" / "llama3_8b_24gb.yaml")
    assert found["evaluation"]["precision"] == "nf4" and "of 12" in found["evaluation"]["why"]
    assert any(note.startswith("scores will be those of the NF4 model") for note in found["notes"])


def test_the_head_to_head_and_the_audit_are_said_to_be_untimed(micro_run, without_gpu):
    audited = "audit={source: notes, prompts: instructions, repeats: [1, 4], canaries: 4}"
    found = planned(["evaluate.against=[builtin:micro]", audited])
    assert "not timed: evaluate.against, audit" in found["notes"]


def test_writing_on_a_card_waits_for_its_memory(without_gpu):
    facts = base_facts(load_recipe(ROOT / "recipes" / "llama3_8b_24gb.yaml").recipe.model)
    small, large = (speed.scoring_pace(facts, card_of(gib), "bfloat16", "bfloat16") for gib in (24, 80))
    assert small.step(1) > large.step(1)
    assert small.step(1) == pytest.approx(small.step(8), rel=1e-6)  # 8 answers at once cost no more than one
    assert small.step(1) > 16e9 / small.bytes_per_s > 0
    in_nf4 = speed.scoring_pace(facts, card_of(24), "bfloat16", "nf4")
    assert in_nf4.weight_bytes < 0.4 * small.weight_bytes
