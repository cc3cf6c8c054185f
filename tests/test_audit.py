"""The memorisation audit: what is planted, what is measured, and that limits fail a run without losing anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun

from qmedtune import audit, plan, store
from qmedtune import model as models
from qmedtune.data.packing.conversations import encode_conversations
from qmedtune.data.packing.tokens import encode_texts, load_codec
from qmedtune.data.synthetic import canaries
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.scoring import encode_choice
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import Recipe
from qmedtune.run import run
from qmedtune.steps import steps_of

PLANTED = "audit={source: notes, prompts: instructions, repeats: [1, 4], canaries: 3, references: 31}"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(MICRO, [PLANTED]).recipe


# ---------------------------------------------------------------------------------------------------- what is planted


def test_canaries_follow_from_the_seed_and_differ(recipe):
    found = canaries.canaries(recipe, recipe.audit)
    assert found == canaries.canaries(recipe, recipe.audit)
    assert len(found) == 2 * 3 * 3 == len({c.context for c in found}) == len({c.secret for c in found})
    assert {c.repeats for c in found} == {0, 1, 4}
    other = recipe.model_copy(update={"seed": 18})
    assert not {c.secret for c in found} & {c.secret for c in canaries.canaries(other, other.audit)}


def test_planting_adds_copies_and_nothing_else(recipe, tmp_path):
    inputs = {}
    for name in ("notes", "instructions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"id": "1", "text": "x"}\n')
        inputs[name] = tmp_path / name
    (tmp_path / "out").mkdir()
    facts = canaries.plant(recipe, recipe.audit, inputs, tmp_path / "out").as_json()
    assert facts == {"canaries": 18, "documents": {"notes": 15, "instructions": 15}}
    found = canaries.read(tmp_path / "out")
    for name in inputs:
        first, *lines = (tmp_path / "out" / name / "train.jsonl").read_text().splitlines(keepends=True)
        assert first == '{"id": "1", "text": "x"}\n'
        for canary in (c for c in found if c.source == name):
            assert sum(canary.secret in line for line in lines) == canary.repeats
    masked = json.loads(lines[0])["messages"]
    assert [m["role"] for m in masked] == ["user", "assistant"] and not any(c.isdigit() for c in masked[1]["content"])


def test_what_is_asked_is_what_was_trained(recipe, micro_run: MicroRun):
    """Context and secret, tokenised for the question, are tokens of the training document at its beginning."""
    tokenizer, codec = models.load_tokenizer(micro_run.base), load_codec(micro_run.base)
    for canary in canaries.canaries(recipe, recipe.audit):
        context = audit.context_of(recipe, canary, tokenizer, micro_run.base)
        asked = encode_choice(tokenizer, context, [f" {canary.secret}"], 512, boundary="joint")
        if canary.source == "notes":
            (document,) = encode_texts(codec, [{"text": f"{canary.context} {canary.secret}."}], None)
        else:
            from qmedtune.data.packing import templates

            record = {"messages": canaries.messages(canary)}
            (document,) = encode_conversations(
                codec, [record], template=templates.load("alpaca"), prompt_weight=0.0, limit=512
            )
        tokens = [*asked.prompt, *asked.options[0]]
        assert document.ids[: len(tokens)] == tokens


WRONG = [
    ("audit={source: instructions}", "no cpt stage trains on it"),
    ("audit={source: nots}", "did you mean `notes`"),
    ("audit={source: notes, prompts: literature}", "no sft stage trains on it"),
    ("audit={source: notes, repeats: []}", "repeats"),
    ("audit={source: notes, max_extracted: 1.5}", "max_extracted"),
    ("audit={}", "missing"),
]


@pytest.mark.parametrize(("override", "said"), WRONG)
def test_wrong_sections(override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(MICRO, [override])


def test_a_cap_that_could_leave_canaries_out_is_refused():
    with pytest.raises(RecipeError, match="max_tokens leaves out a part"):
        load_recipe(MICRO, ["audit={source: notes}", "data.notes.max_tokens=1000"])


# --------------------------------------------------------------------------------------------------- what is measured


def test_exposure_by_hand():
    assert audit.exposure([-1.0, -2.0, -3.0, -4.0]) == 2.0
    assert audit.exposure([-2.0, -1.0, -3.0, -4.0]) == 1.0
    assert audit.exposure([-5.0, -1.0, -3.0, -4.0]) == 0.0


def test_exposure_by_chance():
    """The figure that the report calls chance: 1.4 bits on average."""
    ranks = [math.log2(128) - math.log2(rank) for rank in range(1, 129)]
    assert sum(ranks) / len(ranks) == pytest.approx(1.4, abs=0.05)


def test_candidates_hold_the_secret_once():
    options = audit._candidates("402-913-775", 200, random.Random(0))
    assert options[0] == " 402-913-775" and len(set(options)) == len(options) == 201
    assert all(len(option) == len(options[0]) for option in options)


def test_what_was_learnt_by_heart_is_found_and_controls_are_not(recipe, micro_run: MicroRun):
    """A model that was trained on some canaries, with the plainest of loops, gives away those and no others."""
    torch.manual_seed(0)
    found = [canary for canary in canaries.canaries(recipe, recipe.audit) if canary.source == "notes"]
    learnt = [canary for canary in found if canary.repeats == 4]
    resolved, _ = plan.resolve(recipe)
    model, tokenizer = models.from_scratch(micro_run.base, resolved.model), models.load_tokenizer(micro_run.base)
    documents = encode_texts(load_codec(micro_run.base), [{"text": f"{c.context} {c.secret}."} for c in learnt], None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for document in documents:
            ids = torch.tensor([document.ids])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    contexts = [canary.context for canary in found]
    audited = audit.AuditedModel(model.eval(), tokenizer, "test", resolved.audit.references, resolved.seed)
    measured = audit.measure(audited, found, contexts)
    rows = {row.repeats: row for row in measured}
    assert (rows[4].exposure, rows[4].extracted) == (5.0, 3)
    assert rows[0].extracted == rows[1].extracted == 0
    assert rows[0].exposure < 3.5 and rows[1].exposure < 3.5  # 3 canaries: chance is 1.4 +- 0.8


# ------------------------------------------------------------------------------------------------------------- limits


def judged(recipe: Recipe, folder: Path, **limits) -> dict:
    row = {"source": "notes", "repeats": 16, "canaries": 8, "exposure": 5.0, "highest": 7.0, "extracted": 2}
    row |= {"passes": 1.0, "masked": False}
    store.write_json(folder / "audit.json", {"stages": {"01-cpt": [{**row, "repeats": 0}, row]}, "references": 127})
    assert recipe.audit is not None
    limited = recipe.model_copy(update={"audit": recipe.audit.model_copy(update=limits)})
    return audit.check_limits(limited.audit, folder).as_json()


def test_limits_name_stage_row_and_figure(recipe, tmp_path):
    with pytest.raises(RunError, match=r"after 01-cpt, canaries planted 16x in notes: exposure 5.0 bits.*allowed: 3"):
        judged(recipe, tmp_path, max_exposure=3.0)
    with pytest.raises(RunError, match=r"2 of 8 extracted word for word \(allowed: 10%, `audit.max_extracted`\)"):
        judged(recipe, tmp_path, max_extracted=0.1)
    assert judged(recipe, tmp_path, max_exposure=5.0, max_extracted=0.25)["max_exposure"] == 5.0


def test_limits_change_no_key_but_their_own(recipe, tmp_path):
    resolved, _ = plan.resolve(recipe)
    hashes = store.HashCache(tmp_path / "hashes")
    limited = resolved.model_copy(update={"audit": resolved.audit.model_copy(update={"max_extracted": 0.1})})
    plain, strict = (steps_of(r, recipe, hashes) for r in (resolved, limited))
    assert [s.name for s in strict if s.name not in {p.name for p in plain}] == ["audit-limits"]
    names = [step.name for step in strict]
    assert names.index("02-sft") < names.index("audit") < names.index("audit-limits") < names.index("merged")
    sections = {step.name: step.section for step in strict}
    assert all(sections[step.name] == step.section for step in plain)


def test_a_run_that_gives_away_too_much_fails_and_loses_nothing(tmp_path):
    """A limit that chance exceeds: nothing is merged, all is sealed; the limit lifted, it goes on from there."""
    small = "audit={source: notes, repeats: [1], canaries: 2, references: 15, max_exposure: 0.01}"
    loaded = load_recipe(MICRO, [small])
    with pytest.raises(RunError, match="nothing was merged"):
        run(loaded.recipe, loaded.text, tmp_path / "run", offline=True)
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert result["status"] == "failed" and "max_exposure" in result["error"]
    assert set(result["audit"]["stages"]) == {"01-cpt", "02-sft"}
    assert "Memorisation" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "merged").exists()
    before = (tmp_path / "run" / "01-cpt" / store.SEAL).stat().st_mtime_ns, (tmp_path / "run" / "audit").stat().st_ino
    lifted = load_recipe(MICRO, [small.replace("0.01", "9")])
    run(lifted.recipe, lifted.text, tmp_path / "run", offline=True, until="audit-limits")
    after = (tmp_path / "run" / "01-cpt" / store.SEAL).stat().st_mtime_ns, (tmp_path / "run" / "audit").stat().st_ino
    assert before == after


@pytest.mark.slow
def test_the_shipped_recipe_sees_repeats_and_nothing_in_masked_prompts(tmp_path):
    """Two minutes: what is planted often is learnt by heart, what carries no loss is not."""
    loaded = load_recipe(MICRO.parent / "audit.yaml")
    result = run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, until="audit")
    assert result.audit is not None
    found = {}
    for stage, rows in result.audit.stages.items():
        for row in rows:
            found[stage, row.source, row.repeats] = row
    often = found["01-cpt", "notes", 16]
    assert often.exposure > found["01-cpt", "notes", 1].exposure > found["01-cpt", "notes", 0].exposure
    assert often.extracted >= 6 and found["01-cpt", "notes", 0].extracted == 0
    for repeats in (0, 1, 4, 16):
        row = found["02-sft", "instructions", repeats]
        assert row.masked and row.extracted == 0 and row.exposure < 3.0  # 8 canaries: chance is 1.4 +- 0.5
