"""`evaluate.against`: the head-to-head as the last step of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from llama_folders import llama3_folder

from qmedtune import compare
from qmedtune.errors import RecipeError
from qmedtune.evaluation.open_model import locate, open_model
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import TaskSection
from qmedtune.run import run
from qmedtune.tasks import load_task

TEXT = """name: against
model: {base: "builtin:micro"}
adapter: {r: 4, alpha: 8, train_embeddings: false}
data:
  qa: {path: "builtin:micro/instructions", kind: instructions, template: alpaca, max_records: 100}
stages:
  - sft: {data: qa, epochs: 1, seq_len: 128, batch: 8}
evaluate:
  tasks: [TASK]
  against: [MODELS]
"""
FACTS = "{task: facts, limit: 20}"


def recipe_of(folder: Path, models: str, task: str = FACTS):
    path = folder / "r.yaml"
    path.write_text(TEXT.replace("TASK", task).replace("MODELS", models))
    return load_recipe(path)


def made(folder: Path, models: str, task: str = FACTS) -> dict:
    loaded = recipe_of(folder, models, task)
    return run(loaded.recipe, loaded.text, folder / "run", offline=True).as_json()


def test_a_run_tells_its_result_against_each_model_in_report_and_run_json(tmp_path):
    other = llama3_folder(tmp_path / "other", seed=3, max_position_embeddings=512)
    found = made(tmp_path, f'"builtin:micro", "{other}"')
    against = found["against"]
    assert against["subject"] == "final" and against["precision"] == "delivered" and against["left_out"] == []
    assert [(duel["model"], duel["reference"]) for duel in against["duels"]] == [
        ("final", "base"), ("final", "builtin:micro"), ("final", str(other)),
    ]  # fmt: skip
    assert {duel["n"] for duel in against["duels"]} == {15} and len(against["claims"]) == 3
    same = [against["models"][name]["facts"] for name in ("base", "builtin:micro")]
    assert same[0]["accuracy"] == same[1]["accuracy"]  # one model under two names
    lines = [json.loads(line) for line in (tmp_path / "run/against/facts.items.jsonl").read_text().splitlines()]
    assert len(lines) == 15 and all(set(line) == {"id", "base", "final", "builtin:micro", str(other)} for line in lines)
    for name in ("report.md", "report.html"):
        page = (tmp_path / "run" / name).read_text()
        assert "Head to head" in page and "on the same items of 1 task:" in page and "Holm" in page
    steps = {step["name"]: step["key"] for step in found["steps"]}
    fewer = made(tmp_path, '"builtin:micro"')
    assert {step["name"] for step in fewer["steps"] if steps[step["name"]] != step["key"]} == {"against"}
    assert len(fewer["against"]["duels"]) == 2


def test_a_model_that_is_not_there_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        made(tmp_path, f'"{tmp_path}/nowhere"')
    assert not list((tmp_path / "run").glob("01-*"))


def test_what_cannot_be_compared_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match="none of the tasks can be compared .facts."):
        made(tmp_path, '"builtin:micro"', "{task: facts, limit: 10}")
    with pytest.raises(RecipeError, match="evaluate.against.*\n?.*there is nothing to compare on"):
        recipe_of(tmp_path, '"builtin:micro"', "")


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    """Answers are kept model by model: the second time the first model is another one, and is not asked again."""
    folders = []
    for seed in (1, 2):
        folders.append(llama3_folder(tmp_path / f"m{seed}", seed=seed, max_position_embeddings=512))
    section = TaskSection(task="facts", limit=24)
    splits = compare.splits_of([compare.Questions(load_task(section, 17, "micro"), section)], 17)
    rules = compare.SettingSearch(shots=(0, 1), kept=tmp_path / "kept")

    def opened(folder: Path):
        return lambda: open_model(locate(str(folder)), "none")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.meet([compare.Entrant("a", opened(folders[0])), compare.Entrant("b", killed)], splits, rules)
    alone = compare.meet([compare.Entrant("a", opened(folders[0]))], splits, replace(rules, kept=None))
    again = [compare.Entrant("a", opened(folders[1])), compare.Entrant("b", opened(folders[1]))]
    outcome = compare.meet(again, splits, rules)
    assert outcome.answers["facts"]["a"] == alone.answers["facts"]["a"]
    assert (
        outcome.answers["facts"]["b"]
        == compare.meet(again[1:], splits, compare.SettingSearch((0, 1))).answers["facts"]["b"]
    )
