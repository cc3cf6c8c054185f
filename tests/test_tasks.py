"""Benchmarks: what their readers accept and refuse, and how choices are read out of answers."""

import json
import os
from pathlib import Path

import pytest

from qmedtune.errors import DataError, RecipeError
from qmedtune.recipe import TaskSection
from qmedtune.tasks import FILE_TASKS, load_task
from qmedtune.tasks.extract import extract_choice

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
LETTERS = ("A", "B", "C", "D")
DRUGS = ("Insulin", "Insulin glargine", "Metformin", "Aspirin")
DECISIONS = ("yes", "no", "maybe")

PUBMEDQA = {"1": {"QUESTION": "Does it work?", "CONTEXTS": ["We tried.", "It did."], "final_decision": "maybe"}}
MEDQA = {
    "question": "Which?",
    "options": dict(zip(LETTERS, DRUGS, strict=True)),
    "answer_idx": "C",
    "answer": "Metformin",
}
MEDMCQA = {"id": "x", "question": "Which?", "opa": "a1", "opb": "b1", "opc": "c1", "opd": "d1", "cop": 4}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1), ("b.", 1), ("(C)", 2), ("**D**", 3), ("B. Insulin glargine", 1), ("C) because of ...", 2),
        ("A\n\n### Instruction: next", 0), ("D - Aspirin", 3), ("C Metformin", 2),
        ("Answer: B", 1), ("The correct answer is (D).", 3), ("The answer is option C.", 2), ("Option A, clearly", 0),
        ("First I thought so. The answer is A. No: the answer is B.", 1),
        ("Insulin", 0), ("insulin glargine.", 1), ("Give metformin 500 mg twice a day", 2),
        ("The best choice is insulin glargine at night", 1),
        ("Answer", None), ("Although the patient improved", None), ("A patient with fever", None),
        ("A 45-year-old man", None), ("Neither metformin nor aspirin", None), ("", None), ("E", None),
        ("I do not know", None),
        ("A, B", None), ("(A) or (B)", None), ("A, C, D are correct", None), ("B, A drug of choice", 1),
        ("It is not metformin", None), ("Metformin is not the answer", None), ("Metformin, not aspirin", 2),
        ("The answer is not A", None), ("Because", None), ("Dear colleague", None), ("Cannot say", None),
    ],
)  # fmt: skip
def test_letters_and_texts_are_read_where_they_are_the_answer(answer, expected):
    assert extract_choice(answer, LETTERS, DRUGS) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", 0), ("No.", 1), ("Maybe", 2), ("Yes, tailored calls help.", 0), ("The answer is no", 1),
        ("Answer: maybe", 2), ("Nothing was found", None), ("There was no difference", None), ("Not clear", None),
        ("It is not clear; maybe yes, maybe no", None), ("yesterday", None), ("unknown", None),
    ],
)  # fmt: skip
def test_short_words_count_only_where_they_are_stated(answer, expected):
    assert extract_choice(answer, DECISIONS) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("This is a contradiction", 1), ("This is not a contradiction", None), ("not entailment", None),
        ("There is no contradiction here", None), ("It isn't neutral", None), ("Neutral, not entailment", 2),
    ],
)  # fmt: skip
def test_a_label_that_is_denied_is_not_chosen(answer, expected):
    assert extract_choice(answer, ("entailment", "contradiction", "neutral")) == expected


def test_sentences_as_options():
    options = ("It treats asthma.", "It treats gout.", "It treats gouty arthritis.")
    assert extract_choice("It treats gout.", options) == 1
    assert extract_choice("It treats gouty arthritis", options) == 2
    assert extract_choice("I believe it treats asthma.", options) == 0
    assert extract_choice("It treats", options) is None
    assert extract_choice("It treats asthma. It treats gout.", options) is None  # two are stated


def test_facts_come_from_the_built_in_world():
    task = load_task(TaskSection(task="facts"), seed=0)
    assert {item.facet for item in task.items} == {"treats", "adverse"}
    assert min(len(set(item.options)) for item in task.items) >= 16
    assert len(task.items) >= 100
    for item in task.items:
        assert task.judge(item, item.gold)["correct"]
        assert task.parse(item.options[item.gold], item) == item.gold


def write(path: Path, content) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
    path.write_text(text, encoding="utf-8")
    return path


def load(name: str, path: Path, limit: int | None = None):
    return load_task(TaskSection(task=name, path=str(path), limit=limit), seed=0)


def test_pubmedqa(tmp_path):
    [item] = load("pubmedqa", write(tmp_path / "q.json", json.dumps(PUBMEDQA))).items
    assert (item.id, item.options, item.gold) == ("1", DECISIONS, 2)
    assert "We tried." in item.messages[0]["content"] and "Does it work?" in item.messages[0]["content"]


def test_medqa_options_as_mapping_and_as_list(tmp_path):
    as_list = {**MEDQA, "options": [{"key": k, "value": v} for k, v in MEDQA["options"].items()]}
    for record in (MEDQA, as_list):
        [item] = load("medqa", write(tmp_path / "q.jsonl", [record])).items
        assert (item.options, item.texts, item.gold) == (LETTERS, DRUGS, 2)
        assert "C. Metformin" in item.messages[0]["content"]
    five = {**MEDQA, "options": {**MEDQA["options"], "E": "Other"}, "answer_idx": "E"}
    assert load("medqa", write(tmp_path / "q.jsonl", [five])).items[0].gold == 4


def test_medmcqa_counts_from_one_in_the_authors_files_and_from_zero_on_the_hub(tmp_path):
    authors = [{**MEDMCQA, "id": str(cop), "cop": cop} for cop in (1, 2, 3, 4)]
    hub = [{**MEDMCQA, "id": str(cop), "cop": cop} for cop in (0, 1, 2, 3)]
    for records in (authors, hub):
        items = load("medmcqa", write(tmp_path / "q.jsonl", records)).items
        assert [item.gold for item in items] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="counts from 0 or from 1"):
        load("medmcqa", write(tmp_path / "q.jsonl", authors[1:3]))
    with pytest.raises(DataError, match="test split is unlabelled"):
        load("medmcqa", write(tmp_path / "q.jsonl", [{**MEDMCQA, "cop": -1}]))


def test_mmlu_without_header(tmp_path):
    [item] = load("mmlu", write(tmp_path / "q.csv", '"Which, then?",a1,b1,c1,d1,B\n')).items
    assert (item.gold, item.texts) == (1, ("a1", "b1", "c1", "d1"))
    with pytest.raises(DataError, match=r"q.csv:2: .*none of the options"):
        load("mmlu", write(tmp_path / "q.csv", "Q,a1,b1,c1,d1,B\nQ2,a,b,c,d,F\n"))


def test_own_choice_files(tmp_path):
    records = [
        {"id": "p", "question": "Which?", "options": ["x1", "y1"], "answer": 1, "facet": "left"},
        {"id": "q", "question": "Which?", "options": ["x1", "y1", "z1"], "answer": "C"},
    ]
    items = load("choice", write(tmp_path / "q.jsonl", records)).items
    assert [(item.gold, item.facet) for item in items] == [(1, "left"), (2, None)]


@pytest.mark.parametrize(
    ("task", "suffix", "records", "message"),
    [
        ("pubmedqa", "json", {"1": {**PUBMEDQA["1"], "final_decision": "perhaps"}}, "none of the options"),
        ("pubmedqa", "json", {"1": {"QUESTION": "Q?", "final_decision": "yes"}}, "CONTEXTS"),
        ("pubmedqa", "json", {"1": {"CONTEXTS": ["c"], "final_decision": "yes"}}, "`QUESTION` is missing"),
        ("medqa", "jsonl", {**MEDQA, "answer_idx": "E"}, "none of the options"),
        ("medqa", "jsonl", {**MEDQA, "question": ""}, "`question` is empty"),
        ("medqa", "jsonl", {**MEDQA, "options": "A B C"}, "`options`"),
        ("medqa", "jsonl", {**MEDQA, "answer_idx": "none"}, "none of the options"),
        ("medmcqa", "jsonl", {**MEDMCQA, "opb": None}, "`opb`"),
        ("choice", "jsonl", {"question": "Q", "options": ["a"], "answer": 0}, "2 to 10"),
        ("choice", "jsonl", {"question": "Q", "options": ["a", "b"], "answer": 2}, "none of the options"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_with_file_and_line(tmp_path, task, suffix, records, message):
    path = tmp_path / f"q.{suffix}"
    write(path, json.dumps(records) if suffix == "json" else [records])
    with pytest.raises(DataError, match=message) as error:
        load(task, path)
    assert f"q.{suffix}:1" in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n", "no item"), ("", "file is empty"), ('{"question": \n', "broken JSON"), ("[1, 2]", "not a JSON object")],
)
def test_empty_and_broken_files(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load("medqa", write(tmp_path / "q.jsonl", content))


def test_missing_file_unknown_task_and_double_ids(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load("medqa", tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="unknown kind of file"):
        load("medqa", write(tmp_path / "q.docx", "x"))
    with pytest.raises(RecipeError, match="did you mean 'pubmedqa'"):
        load("pubmed_qa", tmp_path / "q.json")
    with pytest.raises(RecipeError, match="is read from a file"):
        load_task(TaskSection(task="medqa"), seed=0)
    with pytest.raises(DataError, match="two items"):
        load("medmcqa", write(tmp_path / "q.jsonl", [MEDMCQA, MEDMCQA]))


def test_limit_draws_the_same_items_everywhere_in_order(tmp_path):
    records = [{**MEDQA, "id": str(number)} for number in range(50)]
    path = write(tmp_path / "q.jsonl", records)
    drawn = [item.id for item in load("medqa", path, limit=10).items]
    assert drawn == [item.id for item in load("medqa", path, limit=10).items]
    assert drawn == sorted(drawn, key=int) and drawn != [str(n) for n in range(10)]
    assert len(load("medqa", path, limit=500).items) == 50


def test_every_file_task_says_what_is_missing(tmp_path):
    """A record of another benchmark is refused by each reader, never half-read."""
    path = write(tmp_path / "q.jsonl", [{"foreign": "text of a patient"}])
    for name in FILE_TASKS.keys() - {"mmlu"}:
        with pytest.raises(DataError) as error:
            load(name, path)
        assert "text of a patient" not in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="real data absent")
def test_real_pubmedqa():
    task = load("pubmedqa", REAL / "eval" / "pubmedqa_train.json")
    assert len(task.items) == 500
    assert sum(item.gold == 0 for item in task.items) == 276  # the published share of "yes" is 55.2 %
