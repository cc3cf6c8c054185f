"""Verdicts on planted models, and the head-to-head on real model folders."""

import json

import numpy as np
import pytest
import torch
from llama_folders import llama3_folder
from statsmodels.stats import contingency_tables, multitest

from qmedtune.compare import ComparisonJob, PromptSetting, Questions, compare_models, splits_of, with_shots
from qmedtune.data.packing import templates
from qmedtune.errors import RecipeError
from qmedtune.evaluation import statistics, verdict
from qmedtune.recipe import TaskSection
from qmedtune.tasks import load_task

DRAWS, N = 200, 400
TASKS = ("a", "b", "c")


def planted(generator, gained: float, lost: float, n: int = N) -> dict[str, list[bool]]:
    """Answers of two models to the same n items: a share is gained, one lost, of the others 45 % are right in both."""
    kind = generator.choice(3, size=n, p=[gained, lost, 1 - gained - lost])
    both = generator.random(n) < 0.45
    base = np.where(kind == 0, False, np.where(kind == 1, True, both))
    other = np.where(kind == 0, True, np.where(kind == 1, False, both))
    return {"base": base.tolist(), "other": other.tolist()}


@pytest.mark.parametrize(("gained", "lost", "expected"), [(0.15, 0.05, "win"), (0.05, 0.15, "lose")])
def test_planted_effects_of_known_power_are_found(gained, lost, expected):
    """400 items a task, three tasks, a true difference of .10 in each: power .97 at Holm's strictest level."""
    assert verdict.power(gained, lost, N, len(TASKS)) >= 0.97
    generator = np.random.default_rng(11)
    found = 0
    for _ in range(DRAWS):
        made = verdict.duels({"a": planted(generator, gained, lost), "b": planted(generator, 0.1, 0.1)}, "base")
        found += made[0].verdict == expected
    assert found >= 0.95 * DRAWS


def test_equal_models_are_rarely_called_different():
    """The same share gained as lost, as of two seeds: at most 17 of 200 draws claim anything on any of three tasks
    (the 99th percentile of a chance of 5 %); identical answers never."""
    generator = np.random.default_rng(12)
    false = 0
    for _ in range(DRAWS):
        made = verdict.duels({task: planted(generator, 0.1, 0.1) for task in TASKS}, "base")
        false += any(duel.verdict != "tie" for duel in made)
    assert false <= 17
    same = {task: {"base": [True, False] * 50, "other": [True, False] * 50} for task in TASKS}
    assert [duel.verdict for duel in verdict.duels(same, "base")] == ["tie"] * 3


def test_tests_and_correction_are_statsmodels():
    generator = np.random.default_rng(13)
    answers = {task: planted(generator, 0.12, 0.06, 120) for task in TASKS}
    made = verdict.duels(answers, "base")
    p_values = []
    for task, duel in zip(TASKS, made, strict=True):
        base, other = np.array(answers[task]["base"]), np.array(answers[task]["other"])
        table = [[(base & other).sum(), (base & ~other).sum()], [(~base & other).sum(), (~base & ~other).sum()]]
        p_values.append(float(contingency_tables.mcnemar(table, exact=True).pvalue))
        assert duel.difference == pytest.approx(other.mean() - base.mean())
        assert duel.ci95[0] < duel.difference < duel.ci95[1]
    assert [duel.p_value for duel in made] == pytest.approx(p_values)
    assert [duel.p_holm for duel in made] == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())


def test_the_detectable_difference_is_found_in_four_of_five_draws():
    n, changed = 500, 0.2
    difference = verdict.detectable(changed, n, 1)
    generator = np.random.default_rng(14)
    gained, lost = (changed + difference) / 2, (changed - difference) / 2
    found = [verdict.duels({"a": planted(generator, gained, lost, n)}, "base")[0].verdict for _ in range(400)]
    assert found.count("win") / 400 == pytest.approx(0.8, abs=0.08)


def test_items_of_one_premise_are_no_independent_evidence():
    """60 premises of four hypotheses, which a model gains or loses together: no difference is there, and McNemar's test
    of the 240 items claims one in a third of the draws."""
    generator = np.random.default_rng(16)
    groups = [f"premise {number // 4}" for number in range(240)]
    alone = together = 0
    for _ in range(DRAWS):
        kind = np.repeat(generator.choice(3, size=60, p=[0.2, 0.2, 0.6]), 4)
        answers = {"a": {"base": (kind == 1).tolist(), "other": (kind == 0).tolist()}}
        alone += verdict.duels(answers, "base")[0].verdict != "tie"
        [duel] = verdict.duels(answers, "base", {"a": groups})
        together += duel.verdict != "tie"
        assert duel.groups == 60 and duel.ci95[0] <= duel.difference <= duel.ci95[1]
    assert together <= 17 and alone >= 50
    entry = duel.entry()
    assert "groups" in entry.test and "groups" in entry.ci95_method and entry.groups == 60
    assert "sign flips" in verdict.claim([duel], "bfloat16")
    same = {"a": {"base": [True, False] * 8, "other": [True, False] * 8}}
    [duel] = verdict.duels(same, "base", {"a": [number // 2 for number in range(16)]})
    assert duel.verdict == "tie" and duel.ci95 == statistics.tango(0, 0, 8)


def test_the_claim_tells_wins_losses_and_what_a_tie_could_have_shown():
    generator = np.random.default_rng(15)
    answers = {"won": planted(generator, 0.3, 0.05), "lost": planted(generator, 0.05, 0.3)}
    answers["even"] = {"base": [True] * 20 + [False] * 80, "other": [False] * 10 + [True] * 20 + [False] * 70}
    said = verdict.claim(verdict.duels(answers, "base"), "bfloat16")
    assert "better on won (+" in said and "worse on lost (-" in said
    assert "no difference shown on even" in said and "could show" in said and "Holm" in said
    assert said.startswith("other against base, in bfloat16, prompts chosen per model")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("compare")
    for seed in (1, 2):
        llama3_folder(root / f"m{seed}", seed=seed, max_position_embeddings=512)
    path = root / "q.jsonl"
    lines = [
        {"id": f"q{n}", "question": f"Which is {n}?", "options": [f"x{n}", f"y{n}", f"z{n}"], "answer": n % 3}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_models_are_asked_the_same_items_and_development_items_are_never_scored(models, tmp_path):
    section = TaskSection(task="choice", path=str(models / "q.jsonl"))
    names = (str(models / "m1"), str(models / "m2"))
    asked = ComparisonJob(names, (section,), shots=(0, 2), templates=("alpaca",), offline=True)
    found = compare_models(asked, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "choice.items.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and all(set(line) == {"id", *names} for line in lines)
    for name in names:
        facts = found.models[name]["choice"]
        assert facts.n == 30 and facts.dev.items == 10 and len(facts.dev.accuracy) >= 2
        assert facts.accuracy == pytest.approx(sum(line[name] for line in lines) / 30)
        best = facts.dev.accuracy[f"{facts.template}, {facts.shots} shots"]
        assert best == max(facts.dev.accuracy.values())
    assert json.loads((tmp_path / "compare.json").read_text()) == found.as_json()
    assert len(found.claims) == 1 and len(found.duels) == 1


def test_what_chooses_prompts_in_one_task_is_scored_in_none(models):
    """Tasks may share questions (MMLU and its medical part, two limits): here the second is the half of the first."""
    path = models / "q.jsonl"
    half = models / "half.jsonl"
    half.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    questions = []
    for file in (path, half):
        section = TaskSection(task="choice", path=str(file))
        questions.append(Questions(load_task(section, 17), section))
    whole, part = splits_of(questions, 17)
    chosen_by = {item.id for item in (*whole.dev, *part.dev)}
    assert len(whole.dev) == 10 and len(part.dev) == 6
    assert {item.id for item in whole.scored} == {f"q{n}" for n in range(40)} - chosen_by
    assert {item.id for item in part.scored} == {f"q{n}" for n in range(24)} - chosen_by
    alone = splits_of(questions[:1], 17)[0]
    assert alone.dev == whole.dev and len(alone.scored) == 30


def test_examples_come_from_the_published_split(tmp_path):
    """MMLU's five per subject: of 100 development items over 57 subjects few subjects would have so many."""
    for subject in ("anatomy", "virology"):
        for split, count in (("dev", 5), ("test", 12)):
            lines = [f"{subject} {split} {n}?,a,b,c,d,{'ABCD'[n % 4]}" for n in range(count)]
            path = tmp_path / split / f"{subject}_{split}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    section = TaskSection(task="mmlu", path=str(tmp_path))
    [part] = splits_of([Questions(load_task(section, 17), section)], 17)
    assert len(part.published) == 10 and len(part.dev) == 6 and len(part.scored) == 18
    for item in with_shots(part, part.scored, PromptSetting(templates.load("alpaca"), 5), 17):
        examples = [message["content"] for message in item.messages[:-1] if message["role"] == "user"]
        assert len(examples) == 5 and all(text.startswith(f"{item.facet} dev ") for text in examples)


def test_what_cannot_be_compared_is_refused(models):
    section = TaskSection(task="choice", path=str(models / "q.jsonl"))
    with pytest.raises(RecipeError, match="name two or more"):
        compare_models(ComparisonJob((str(models / "m1"),), (section,), offline=True))
    with pytest.raises(RecipeError, match="16 are needed"):
        small = section.model_copy(update={"limit": 8})
        compare_models(ComparisonJob((str(models / "m1"), str(models / "m2")), (small,), offline=True))
