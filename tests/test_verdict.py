"""What the verdict says of real models that are known to be better, worse or equal.

In CI the truth is planted: a model's own answers become the right ones on most questions. `pytest -m slow
tests/test_verdict.py -s` makes models of the built-in world that know more or less of it (recipes/ablation.yaml's arms
on the tiny base, about 20 minutes on two cores; with QMEDTUNE_VERDICT_RUN=FOLDER they are kept there) and prints the
table that docs/evaluation.md shows. Each duel is drawn 200 times from the models' answers, item by item.
"""

from __future__ import annotations

import json
import os
from itertools import permutations
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from conftest import ROOT
from llama_folders import llama3_folder

from qmedtune.ablate import ablate
from qmedtune.api import evaluate_model
from qmedtune.compare import ComparisonJob, compare_models
from qmedtune.evaluation import verdict
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import TaskSection

DRAWS = 200
FOUND = 190  # of 200, where the computed power is .97 or more
FALSE = 17  # of 200: the 99th percentile where 5 % are false
Answers = dict[str, np.ndarray]
"""By model, bool [items]."""


def smallest(answers: Answers, model: str, reference: str, tests: int) -> tuple[int, float]:
    """So many drawn items give a power of .97, and which."""
    gained = float((answers[model] & ~answers[reference]).mean())
    lost = float((~answers[model] & answers[reference]).mean())
    for n in range(8, 601, 4):
        if (power := verdict.power(gained, lost, n, tests)) >= 0.97:
            return n, power
    raise AssertionError(f"{model} and {reference} are too alike: {gained:.3f} gained, {lost:.3f} lost")


def verdicts(answers: Answers, pairs: list[tuple[str, str]], n: int, seed: int) -> list[list[str]]:
    """Per draw of n items, with repeats, the verdict of every pair."""
    generator = np.random.default_rng(seed)
    items = len(next(iter(answers.values())))
    made = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, items, n)
        part = {name: right[drawn].tolist() for name, right in answers.items()}
        made.append([duel.verdict for duel in verdict.paired_duels({"facts": part}, pairs)])
    return made


def check_known(answers: Answers, order: list[str]) -> list[str]:
    """Every pair of `order` (the worst model first), both ways round; the lines of a table."""
    lines = []
    for low, high in permutations(order, 2):
        expected = "win" if order.index(high) > order.index(low) else "lose"
        n, power = smallest(answers, high, low, tests=2)
        others = [name for name in answers if name != low and name != high]
        pairs = [(high, low), (others[0] if others else high, low)]
        found = sum(each[0] == expected for each in verdicts(answers, pairs, n, seed=len(lines)))
        lines.append(f"| {high} against {low} | {n} | {power:.3f} | {expected} | {found} of {DRAWS} |")
        assert found >= FOUND, lines[-1]
    return lines


def check_equal(name: str, one: np.ndarray, other: np.ndarray) -> str:
    """Two models that are equal because for every item it is drawn which is which: whatever they answer, no difference
    is there to be found. On three sets of items at once, as Holm's correction is for."""
    generator = np.random.default_rng(5)
    false, items = 0, len(one)
    for _ in range(DRAWS):
        answers = {}
        for task in ("a", "b", "c"):
            drawn, swap = generator.integers(0, items, 120), generator.random(120) < 0.5
            first, second = np.where(swap, other[drawn], one[drawn]), np.where(swap, one[drawn], other[drawn])
            answers[task] = {"first": first.tolist(), "second": second.tolist()}
        false += any(duel.verdict != "tie" for duel in verdict.duels(answers, "first"))
    assert false <= FALSE
    differ = f"{name}, the {(one != other).mean():.0%} of answers that differ exchanged at random"
    return f"| {differ} | 3 × 120 | – | tie | {DRAWS - false} of {DRAWS} |"


def test_planted_models_are_told_from_their_answers(tmp_path):
    """`planted` answers four of five questions rightly because its answers were made the right ones; `other` is random
    weights too, `same` a copy of it."""
    folders = []
    for seed in (1, 2):
        folders.append(llama3_folder(tmp_path / f"m{seed}", seed=seed, max_position_embeddings=512))
    same = copytree(folders[1], tmp_path / "same")
    rows = []
    for number in range(120):
        texts = [f"{word} {number}" for word in ("red", "blue", "green", "grey")]
        rows.append({"id": f"q{number}", "question": f"Which is {number}?", "options": texts, "answer": 0})
    path = tmp_path / "q.jsonl"

    def write() -> TaskSection:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TaskSection(task="choice", path=str(path))

    evaluate_model(str(folders[0]), [write()], out=tmp_path / "asked", generate=False, quantization="none")
    lines = (tmp_path / "asked/evaluation/choice.items.jsonl").read_text().splitlines()
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        chosen = json.loads(line)["model"]["prediction"]
        row["answer"] = chosen if number % 5 else "ABCD"[("ABCD".index(chosen) + 1) % 4]
    names = (str(folders[1]), str(folders[0]), str(same))
    found = compare_models(ComparisonJob(names, (write(),)), tmp_path / "out")
    told = {duel.model: duel.verdict for duel in found.duels}
    assert told == {names[1]: "win", names[2]: "tie"}
    kept = [json.loads(line) for line in (tmp_path / "out/choice.items.jsonl").read_text().splitlines()]
    answers = {}
    for short, name in zip(("other", "planted", "same"), names, strict=True):
        answers[short] = np.array([line[name] for line in kept])
    assert len(kept) == 90 and 0.7 < answers["planted"].mean() < 0.9
    check_known({name: answers[name] for name in ("other", "planted")}, ["other", "planted"])
    check_equal("other and planted", answers["other"], answers["planted"])
    for each in verdicts(answers, [("same", "other")], 90, seed=9):
        assert each == ["tie"]  # identical weights give identical answers


@pytest.mark.slow
def test_models_of_the_built_in_world(tmp_path):
    """Who read both corpora knows both facets, who read the literature one, the base none."""
    out = Path(os.environ.get("QMEDTUNE_VERDICT_RUN", tmp_path / "ablation"))
    change = ["ablate.arms=[cpt+sft]", "ablate.corpora=[literature, both]", "ablate.replay=[]", "ablate.seeds=2"]
    loaded = load_recipe(ROOT / "recipes" / "ablation.yaml", [*change, "evaluate.perplexity=[]"])
    ablate(loaded, out, offline=True)
    answers: Answers = {"base": read(out, "literature", 17, "base")}
    for arm in ("literature", "both"):
        answers[arm] = read(out, arm, 17, "final")
    lines = check_known(answers, ["base", "literature", "both"])
    assert (read(out, "both", 18, "base") == answers["base"]).all()  # identical weights, scored in another run
    lines.append(check_equal("literature and both", answers["literature"], answers["both"]))
    another_seed = read(out, "literature", 18, "final")
    lines.append(check_equal("literature of two seeds", answers["literature"], another_seed))
    print("\n".join(["", "| duel | items | power | truth | found |", "| --- | --- | --- | --- | --- |", *lines]))


def read(out: Path, arm: str, seed: int, label: str) -> np.ndarray:
    path = out / "arms" / f"cpt-{arm}+sft" / f"seed-{seed}" / "evaluation" / "facts.items.jsonl"
    return np.array([json.loads(line)[label]["correct"] for line in path.read_text().splitlines()])
