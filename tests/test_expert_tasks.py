"""MedXpertQA, MMLU-Pro health, MedBullets and CareQA: hand-made rows as published, as task and as source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import read_records
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection, TaskSection
from qmedtune.tasks import load_task

TEN = {letter: f"drug {letter}" for letter in "ABCDEFGHIJ"}
LISTED = " ".join(f"({letter}) {text}" for letter, text in TEN.items())
MEDXPERTQA = {
    "id": "Text-7", "question": f"Which drug helps?\nAnswer Choices: {LISTED}", "options": TEN, "label": "J",
    "medical_task": "Treatment", "body_system": "Cardiovascular", "question_type": "Reasoning",
}  # fmt: skip
MMLU_PRO = {
    "question_id": 5987, "question": "Which organ makes insulin?", "options": ["Liver", "Spleen", "Pancreas"],
    "answer": "C", "answer_index": 2, "cot_content": "", "category": "health", "src": "ori_mmlu-nutrition",
}  # fmt: skip
CAREQA = {
    "exam_id": 1, "question": "Which vitamin?", "op1": "A", "op2": "B12", "op3": "C", "op4": "D", "cop": 2,
    "year": 2024, "category": "Medicine", "unique_id": "ab-1",
}  # fmt: skip
MEDBULLETS = (
    "link,question,opa,opb,opc,opd,ope,answer_idx,answer,explanation\n"
    'https://x.y/1,"A man, 42, faints. Why?",Stroke,"Syncope, vasovagal",Seizure,Sepsis,,B,"Syncope, vasovagal",so\n'
)


def put(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return path


def only(task: str, path: Path):
    [item] = load_task(TaskSection(task=task, path=str(path)), seed=0).items
    return item


def trained(path: Path) -> list[dict]:
    """The messages of the file's one record as a source."""
    rejects = Rejects("source")
    [record] = read_records("source", SourceSection(path=str(path), kind="instructions"), rejects)
    assert not any(rejects.counts.values())
    return record["messages"]


CASES = [
    ("medxpertqa", "test.jsonl", MEDXPERTQA, "Text-7", "J", "drug J", "Reasoning"),
    ("mmlu_pro_health", "test.jsonl", MMLU_PRO, "5987", "C", "Pancreas", None),
    ("careqa", "CareQA_en.json", [CAREQA], "ab-1", "B", "B12", "Medicine"),
    ("medbullets", "medbullets_op5.csv", MEDBULLETS, "line-2", "B", "Syncope, vasovagal", None),
]


@pytest.mark.parametrize(("task", "name", "content", "label", "letter", "text", "facet"), CASES)
def test_a_row_as_published(tmp_path, task, name, content, label, letter, text, facet):
    path = put(tmp_path, name, content)
    item = only(task, path)
    assert (item.id, item.options[item.gold], item.texts[item.gold], item.facet) == (label, letter, text, facet)
    asked = item.messages[0]["content"]
    assert asked.count(text) == 1 and f"\n{letter}. {text}" in asked and "Answer Choices" not in asked
    assert item.leaks == (asked.partition("\nA. ")[0],)
    question, answer = trained(path)
    assert (question["content"], answer["content"]) == (asked, f"{letter}. {text}")


def test_the_prepared_form_of_medxpertqa(tmp_path):
    options = [{"letter": letter, "content": text} for letter, text in TEN.items()]
    item = only("medxpertqa", put(tmp_path, "q.jsonl", {**MEDXPERTQA, "options": options, "label": ["C"]}))
    assert (item.options[item.gold], len(item.options)) == ("C", 10)


def test_other_categories_are_no_health_questions(tmp_path):
    rows = [MMLU_PRO, {**MMLU_PRO, "question_id": 1, "category": "law"}]
    assert only("mmlu_pro_health", put(tmp_path, "q.json", rows)).id == "5987"
    with pytest.raises(DataError, match="no item for task mmlu_pro_health"):
        only("mmlu_pro_health", put(tmp_path, "law.json", rows[1:]))


@pytest.mark.parametrize(
    ("task", "name", "content", "said"),
    [
        ("medxpertqa", "q.jsonl", {**MEDXPERTQA, "images": ["MM-1-a.jpeg"]}, "images"),
        ("medxpertqa", "q.jsonl", {**MEDXPERTQA, "label": "K"}, "none of the options"),
        ("mmlu_pro_health", "q.jsonl", {**MMLU_PRO, "answer_index": 1}, "two options"),
        ("careqa", "q.json", [{**CAREQA, "cop": 0}], "from 1 to 4"),
        ("medbullets", "q.csv", MEDBULLETS.replace(",B,", ",C,"), "not the text of option C"),
        ("medbullets", "medbullets_op4.json", {"question": {"0": "Why?"}}, "give the .csv"),
    ],
)
def test_a_wrong_row_is_told(tmp_path, task: str, name: str, content: object, said: str):
    with pytest.raises(DataError, match=said):
        only(task, put(tmp_path, name, content))
