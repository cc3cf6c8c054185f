"""Splits of folders as published, and the examples before a question: which, from where, never the item itself."""

import json
from collections import Counter
from pathlib import Path

import pytest

from qmedtune.data.packing.templates import TEMPLATES
from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation import statistics, summary
from qmedtune.recipe import TaskSection
from qmedtune.tasks import load_task, shots

LETTERS = "ABCD"


def question(number: int, word: str = "test") -> dict:
    options = {letter: f"{word}{number}{letter.lower()}" for letter in LETTERS}
    return {"question": f"Which {word} {number}?", "options": options, "answer_idx": LETTERS[number % 4]}


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def medqa(tmp_path) -> Path:
    """MedQA's US folder: three splits with five options, and the same below 4_options."""
    for split, count in (("train", 9), ("dev", 4), ("test", 6)):
        write(tmp_path / "US" / f"{split}.jsonl", [question(n, split) for n in range(count)])
        name = f"phrases_no_exclude_{split}.jsonl"
        write(tmp_path / "US" / "4_options" / name, [question(n, f"{split}four") for n in range(count)])
    return tmp_path / "US"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mli_test_v1.jsonl", "test"), ("dev.json", "dev"), ("anatomy_val.csv", "dev"), ("train_balanced.csv", "train"),
        ("Test for DDI Extraction task", "test"), ("test_set.json", "test"), ("latest.jsonl", None), ("a.xml", None),
        ("validation", "dev"), ("trained.csv", None),
    ],
)  # fmt: skip
def test_the_split_is_a_word_of_the_name(name, split):
    assert shots.split_of(name) == split


def test_a_folder_gives_its_test_split_of_the_upper_level(medqa):
    assert shots.split_files(str(medqa), None) == [medqa / "test.jsonl"]
    assert shots.split_files(str(medqa), "train") == [medqa / "train.jsonl"]
    assert [f.name for f in shots.split_files(str(medqa / "4_options"), "dev")] == ["phrases_no_exclude_dev.jsonl"]
    task = load_task(TaskSection(task="medqa", path=str(medqa)), seed=0)
    assert [item.id for item in task.items] == [f"line-{n}" for n in range(1, 7)]


def test_files_below_a_folder_named_after_the_split(tmp_path):
    for name in ("Train/DrugBank/1.xml", "Test/DrugBank/2.xml", "Test/MedLine/3.xml"):
        write(tmp_path / name, [{}])
    assert [f.name for f in shots.split_files(str(tmp_path), None)] == ["2.xml", "3.xml"]
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "a.xml", [{}])
    assert [f.name for f in shots.split_files(str(tmp_path / "plain"), None)] == ["a.xml"]


def test_a_variable_in_the_path_changes_nothing(medqa, monkeypatch):
    monkeypatch.setenv("BENCHMARKS", str(medqa.parent))
    assert shots.split_files("${BENCHMARKS}/US", None) == [medqa / "test.jsonl"]
    task = load_task(TaskSection(task="medqa", path="${BENCHMARKS}/US", shots=1), seed=0)
    assert task.shots_from == "train.jsonl"


def test_an_absent_split_is_said_with_those_that_are_there(medqa):
    (medqa / "dev.jsonl").unlink()
    (medqa / "4_options" / "phrases_no_exclude_dev.jsonl").unlink()
    with pytest.raises(DataError, match="no file of the split `dev`\nsplits there: test, train"):
        load_task(TaskSection(task="medqa", path=str(medqa), split="dev"), seed=0)


def test_examples_come_from_the_training_split_and_are_the_same_for_all_items_of_a_draw(medqa):
    task = load_task(TaskSection(task="medqa", path=str(medqa), shots=3), seed=0)
    assert (task.name, task.shots_from) == ("medqa-3shot", "train.jsonl")
    assert len(task.draws) == 3 and len(task.asked) == 18
    assert [len({item.shots for item in draw}) for draw in task.draws] == [1, 1, 1]
    assert len({draw[0].shots for draw in task.draws}) == 3  # three draws, three sets
    example, answer = task.draws[0][0].messages[:2]
    assert "Which train" in example["content"]
    number = int(task.draws[0][0].shots[0].removeprefix("line-")) - 1
    assert answer == {
        "role": "assistant",
        "content": f"{LETTERS[number % 4]}. train{number}{LETTERS[number % 4].lower()}",
    }
    assert task.draws[0][0].messages[-1] == task.items[0].messages[-1]
    assert [item.gold for item in task.draws[1]] == [item.gold for item in task.items]


def test_without_another_split_examples_are_other_items_never_the_item_itself(tmp_path):
    records = [question(n) for n in range(5)]
    records.append(dict(records[0]))  # the same question under another id
    path = write(tmp_path / "q.jsonl", records)
    task = load_task(TaskSection(task="medqa", path=str(path), shots=4, shot_seeds=5), seed=0)
    assert task.shots_from == "the task's own items, never the item itself"
    for item in task.asked:
        asked, examples = item.messages[-1], item.messages[:-1:2]
        assert asked not in examples and item.id not in item.shots and len(set(item.shots)) == 4
    with pytest.raises(DataError, match="5 examples asked, 4 there"):
        load_task(TaskSection(task="medqa", path=str(path), shots=5), seed=0)


def test_examples_of_a_subject_are_of_that_subject(tmp_path):
    for split in ("dev", "test"):
        for subject in ("anatomy", "virology"):
            rows = "".join(f'"{subject} {split} {n}?",a{n},b{n},c{n},d{n},{LETTERS[n % 4]}\n' for n in range(6))
            path = tmp_path / split / f"{subject}_{split}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text(rows)
    (tmp_path / "auxiliary_train").mkdir()  # of the published archive: other subjects, no examples of these
    (tmp_path / "auxiliary_train" / "arc_easy.csv").write_text("q?,a,b,c,d,A\n")
    task = load_task(TaskSection(task="mmlu", path=str(tmp_path), shots=2), seed=0)
    assert Counter(item.facet for item in task.items) == {"anatomy": 6, "virology": 6}
    for item in task.asked:
        assert all(m["content"].startswith(f"{item.facet} dev") for m in item.messages[:-1:2])


def test_the_draw_repeats_with_the_seed(medqa):
    section = TaskSection(task="medqa", path=str(medqa), shots=2)
    assert load_task(section, seed=4).draws == load_task(section, seed=4).draws
    assert load_task(section, seed=4).draws != load_task(section, seed=5).draws


def test_examples_are_earlier_turns_of_the_template(medqa):
    """What a tuned model is asked few-shot is a conversation in its own template, each answer closed by its end."""
    task = load_task(TaskSection(task="medqa", path=str(medqa), shots=1), seed=0)
    prompt = TEMPLATES["alpaca"].prompt(task.draws[0][0].messages, "</s>")
    first, second = prompt.split("</s>")
    assert first.count("### Response:\n") == 1 and second.startswith("\n\n### Instruction:\nWhich test 0?")
    assert prompt.endswith("### Response:\n")


def test_few_seeds_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        TaskSection(task="facts", shots=1, shot_seeds=1)


# ---- scores over draws -----------------------------------------------------------------------------------------------


def judged(correct: list[int]) -> list[dict]:
    return [
        {"correct": bool(c), "truncated": False, "normalised": {"correct": bool(c)}, "confidence": 0.5, "tie": False}
        for c in correct
    ]


def test_scores_are_means_over_draws_with_their_spread(tmp_path):
    """Draws .5, 1, .75 of four items: mean .75, sd .25; items are right in 2, 3, 2 and 2 of 3 draws."""
    path = write(tmp_path / "q.jsonl", [question(n) for n in range(4)])
    task = load_task(TaskSection(task="medqa", path=str(path), shots=1), seed=0)
    rows = judged([1, 1, 0, 0]) + judged([1, 1, 1, 1]) + judged([0, 1, 1, 1])
    found = summary.task_result(task, {"model": rows}, seed=0).model
    assert found is not None
    assert (found.value, found.draws, found.sd_of_draws) == (0.75, [0.5, 1.0, 0.75], 0.25)
    assert (found.n, found.shots, found.per_character) == (4, 1, 0.75)
    assert found.ci95 == statistics.wilson(3, 4)
    nothing = summary.task_result(task, {"model": judged([0] * 12)}, seed=0).model
    assert nothing is not None and nothing.ci95 is not None
    assert nothing.ci95 == statistics.wilson(0, 4) and nothing.ci95[1] > 0.4


def test_paired_over_draws_uses_the_items_means(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(n) for n in range(4)])
    task = load_task(TaskSection(task="medqa", path=str(path), shots=1), seed=0)
    base, final = judged([0, 0, 0, 0] * 3), judged([1, 1, 1, 0] * 3)
    found = summary.task_result(task, {"base": base, "final": final}, seed=0)
    assert found.difference is not None and found.difference.ci95 is not None
    assert found.difference.value == 0.75 and found.difference.ci95[0] > 0
    assert "paired" not in found.as_json()  # three answers per item are not three items


def test_pairs_of_one_premise_are_no_examples_and_no_independent_evidence(tmp_path):
    """MedNLI asks three hypotheses of every premise: an example of the same premise would leave two labels to guess."""
    names = ("entailment", "contradiction", "neutral")
    pairs = [{"premise": f"P{n}", "hypothesis": label, "label": label} for n in range(4) for label in names]
    path = write(tmp_path / "q.jsonl", pairs)
    task = load_task(TaskSection(task="mednli", path=str(path), shots=2), seed=0)
    for item in task.asked:
        assert all(item.messages[-1]["input"].split()[1] not in m.get("input", "") for m in item.messages[:-1])
    with pytest.raises(DataError, match="10 examples asked, 9 there"):
        load_task(TaskSection(task="mednli", path=str(path), shots=10), seed=0)
    task = load_task(TaskSection(task="mednli", path=str(path)), seed=0)
    right = [n < 6 for n in range(12)]  # of two premises all, of two none
    rows = [
        {**row, **task.judge(item, item.gold if r else 1 - min(item.gold, 1)), "normalised": task.judge(item, 0)}
        for row, item, r in zip(judged([0] * 12), task.items, right, strict=True)
    ]
    found = summary.task_result(task, {"base": rows, "final": rows}, seed=0)
    assert found.final is not None
    assert (found.final.value, found.final.groups, found.final.n) == (0.5, 4, 12)
    assert (found.final.chance, found.final.majority) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found.final.ci95 == (0, 1) and "paired" not in found.as_json()
    none = [row | task.judge(item, None) for row, item in zip(rows, task.items, strict=True)]
    nothing = summary.task_result(task, {"model": none}, seed=0).model
    assert nothing is not None and nothing.ci95 == statistics.wilson(0, 4)


# ---- other metrics ---------------------------------------------------------------------------------------------------


def test_another_metric_of_the_task_leads(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"premise": "P", "hypothesis": "H", "label": "entailment"}])
    task = load_task(TaskSection(task="bionli", path=str(path), metric="accuracy"), seed=0)
    assert task.metric == "accuracy" and task.metrics["accuracy"] == "correct"
    with pytest.raises(RecipeError, match="did you mean 'macro_f1'"):
        load_task(TaskSection(task="bionli", path=str(path), metric="marco_f1"), seed=0)
    with pytest.raises(RecipeError, match="allowed: accuracy$"):
        load_task(TaskSection(task="facts", metric="bleu"), seed=0)
