"""Planned tokens, rows and steps are those of packing; `batch: auto` leaves enough steps; a peak is a step's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MICRO
from plan_against_runs import AUDIT, CLASSIFY

from qmedtune import peak, store
from qmedtune.batches import FEWEST_STEPS, MIN_STEPS, batch_rows, steps_in, too_few_steps
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning.estimate import Estimate, SampledEstimate
from qmedtune.planning.resolve import resolve
from qmedtune.planning.rows import planned
from qmedtune.recipe import SftSection
from qmedtune.run import run

WINDOWS = ("data.literature.chunking=window", "data.notes.max_tokens=1500", "stages[0].cpt.seq_len=24")


@pytest.mark.parametrize(
    "settings", [(), CLASSIFY, AUDIT, WINDOWS, ("stages[1].sft.packing=false",)],
    ids=["micro", "classify cuts", "canaries", "windows and caps", "no packing"],
)  # fmt: skip
def test_what_is_planned_is_what_is_packed(tmp_path: Path, settings: tuple[str, ...]):
    loaded = load_recipe(MICRO, settings)
    planned = make_plan(loaded.recipe)["stages"]
    run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, until="data")
    recipe, _ = resolve(loaded.recipe)
    for index, stage in enumerate(planned):
        sealed = store.read_seal(tmp_path / "run/data" / stage["name"])
        assert sealed is not None
        assert stage["trained"] == pytest.approx(sealed.facts["tokens"]["trained"], rel=0.15)
        steps = steps_in(recipe.stages[index].section, sealed.facts["rows"])
        assert abs(stage["steps"] - steps) <= max(1, 0.15 * steps)


def test_millions_of_records_are_planned_by_a_hundred_thousand():
    """PubMed's 36 million abstracts: tokens and rows as if each had been held, without holding them."""
    recipe, _ = resolve(load_recipe(MICRO, ["stages[0].cpt.tokens=auto", "stages[0].cpt.epochs=1"]).recipe)
    lengths = np.arange(30, 71)
    found = SampledEstimate(Estimate(36_000_000, 36_000_000 * 50, 0.1), lengths)
    few = SampledEstimate(Estimate(1_000, 50_000, 0.1), lengths)
    tokens = planned(recipe, 0, {"literature": found, "notes": few, "general": few})
    assert tokens.trained == pytest.approx(36_002_000 * 50, rel=0.001)
    assert 1.0 <= tokens.rows * 64 / tokens.trained < 1.3


def section(**keys: object) -> SftSection:
    return SftSection.model_validate({"data": "questions", "seq_len": 512, **keys})


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(10_000, 64, 157), (6_400, 64, 100), (640, 6, 107), (117, 1, 117), (12, 1, 12)]
)
def test_auto_leaves_enough_steps(rows: int, batch: int, steps: int):
    auto = section(batch=64, min_steps=MIN_STEPS)
    assert (batch_rows(auto, rows), steps_in(auto, rows)) == (batch, steps)


def test_a_batch_that_is_given_is_taken():
    recipe, _ = resolve(load_recipe(MICRO, ["stages[1].sft.batch=64"]).recipe)
    assert batch_rows(recipe.stages[1].section, 100) == 64
    assert (too_few_steps("02-sft", 2) or "").startswith("02-sft: only 2 optimiser steps")
    assert too_few_steps("02-sft", FEWEST_STEPS) is None


def test_the_run_takes_the_steps_that_the_plan_says(tmp_path: Path):
    """A user's own text in a tiny base: `auto`, and too little of it for a hundred steps of one row."""
    notes = [{"text": f"The patient took drug {n} for {n % 9} weeks and felt better."} for n in range(300)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nmodel: {base: builtin:micro}\nadapter: {r: 2, alpha: 4}\n"
        f"data: {{notes: {{path: {tmp_path}/notes.jsonl, kind: clinical}}}}\n"
        "hygiene: {dedup: {near: false}}\nstages: [{cpt: {mix: {notes: 1}, tokens: 9000, seq_len: 64}}]\n"
    )
    loaded = load_recipe(tmp_path / "mine.yaml")
    planned = make_plan(loaded.recipe)["stages"][0]
    result = run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, until="01-cpt")
    stage = result.stages[0]
    assert stage.batch == planned["batch"] == 1 and stage.steps >= MIN_STEPS
    assert stage.steps == pytest.approx(planned["steps"], rel=0.15)


def test_a_peak_is_what_came_after_the_reset():
    held = np.ones(300 << 17)  # 300 MiB, touched
    high = peak.resident_bytes()
    del held
    peak.reset()
    assert peak.resident_bytes() < high - (200 << 20)
