"""Multiple-choice benchmarks: the built-in facts, PubMedQA, MedQA, MedMCQA, MMLU, ARC and plain choice files.

Questions are worded as the training data words them (data/reading/instructions.py): a model meets one form. Letters
are the answers where options are listed in the prompt; the words themselves where they are not.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.data.reading.choices import Question, question
from qmedtune.data.reading.files import open_bytes, plain_suffix
from qmedtune.data.reading.medmcqa import BASE, answer_base, cop_of
from qmedtune.data.reading.rejects import Unusable
from qmedtune.data.synthetic import world as worlds
from qmedtune.errors import DataError
from qmedtune.tasks.extract import extract_choice
from qmedtune.tasks.items import Fields, Item, Judgement, Task, field_names, item_id, records, text_field

LETTERS = "ABCDEFGHIJ"
# The six subjects of MultiMedQA (Singhal et al. 2023); the others measure what a medical model may forget.
MEDICAL_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine",
)  # fmt: skip
# Meditron's nine (evaluation/evaluate.py of epfLLM/meditron, line 310; 1,862 questions).
MEDITRON_SUBJECTS = (
    "anatomy", "college_biology", "college_medicine", "professional_medicine", "medical_genetics", "virology",
    "clinical_knowledge", "high_school_biology", "nutrition",
)  # fmt: skip
PUBMEDQA_TEST = Path(__file__).with_name("pubmedqa_test.json")  # PMIDs of test_ground_truth.json, pubmedqa/pubmedqa
GROUND_TRUTH = "test_ground_truth.json"  # answers by PMID: no benchmark of its own
EMPTY = "(empty)"  # stands for the text of an option that has none
DECISIONS = ("yes", "no", "maybe")


def choice_task(name: str, items: tuple[Item, ...]) -> Task:
    """Accuracy over items with options; by log-likelihood and, where asked for, by generation."""
    longest = 0
    for item in items:
        for text in (*item.options, *item.texts):
            longest = max(longest, len(text))
    length = min(64, 8 + longest // 2)  # an English token has 4 characters, a drug name's about 2
    return Task(name, items, "accuracy", {"accuracy": "correct"}, _parse, _judge, _accuracy, max_new_tokens=length)


def _parse(answer: str, item: Item) -> int | None:
    return extract_choice(answer, item.options, item.texts)


def _judge(item: Item, prediction: int | None) -> Judgement:
    chosen = None
    if prediction is not None:
        chosen = item.options[prediction]
    return {"prediction": chosen, "correct": prediction == item.gold}


def _accuracy(judgements: list[Judgement]) -> dict[str, float]:
    return {"accuracy": sum(j["correct"] for j in judgements) / len(judgements)}


# ---- readers ---------------------------------------------------------------------------------------------------------


def facts(world: str = "tiny") -> list[Item]:
    """Held-out drugs of the built-in world: what each treats and which side effect it has, 20 options each."""
    found = []
    for fact in worlds.facts_items(worlds.make_world(world)):
        question = ({"role": "user", "content": fact["question"]},)
        found.append(Item(fact["id"], question, fact["answer"], tuple(fact["options"]), facet=fact["facet"]))
    return found


def pubmedqa(path: Path) -> list[Item]:
    """The authors' ori_pqal.json (an object keyed by PMID with QUESTION, CONTEXTS, final_decision), or the Hub's rows
    of pubid, question, context and final_decision. Of a file with all 1,000 questions the 500 of the test set."""
    items = []
    for where, fields in records(path):
        column = "QUESTION"
        if "pubid" in fields:
            column = "question"
        text_field(where, fields, column)
        asked = _question(where, fields)
        answer = asked.messages[1]["content"]
        if answer not in DECISIONS:
            raise DataError(f"{where}: `final_decision` is none of the options\nallowed: {', '.join(DECISIONS)}")
        name, said = item_id(where, fields), fields.get("CONTEXTS") or fields["context"]["contexts"]
        stated = (fields.get("QUESTION") or fields["question"], *said)
        pmid = None
        if name.isdecimal():
            pmid = name
        items.append(
            Item(name, asked.messages[:1], DECISIONS.index(answer), DECISIONS, stated=tuple(stated), pmid=pmid)
        )
    return _test_set(path, items)


def _test_set(path: Path, items: list[Item]) -> list[Item]:
    """The items of the test set where a file holds all of it and others: by the authors' `test_ground_truth.json`
    beside it, else by the published list of the 500."""
    beside = path.parent / GROUND_TRUTH
    published = PUBMEDQA_TEST
    if beside.is_file():
        published = beside
    wanted = {str(name) for name in json.loads(published.read_text(encoding="utf-8"))}
    found = [item for item in items if item.id in wanted]
    if len(found) < len(wanted) or len(found) == len(items):
        return items
    ui.note(f"{path.name}: the {len(found)} questions of PubMedQA's test set, of {len(items)}")
    return found


def medqa(path: Path) -> list[Item]:
    """The authors' JSON lines (US split: 5 options; 4_options folder: 4) or the Hub's rows: question, options,
    answer_idx or the answer's text."""
    items = []
    for where, fields in records(path):
        text_field(where, fields, "question")
        options = fields.get("options")
        if not isinstance(options, (dict, list)) or len(options) < 2:
            raise DataError(f"{where}: `options` is no mapping of letters to texts and no list of key and value")
        items.append(lettered_item(where, fields))
    return items


def medmcqa(path: Path) -> list[Item]:
    """Records with opa..opd and cop, which counts from 1 in the authors' files and from 0 on the Hub."""
    rows = list(records(path))
    if not rows:
        return []
    base = answer_base(path, {cop_of(fields) for _, fields in rows})
    items = []
    for where, fields in rows:
        text_field(where, fields, "question")
        for name in ("opa", "opb", "opc", "opd"):
            if fields.get(name) is None:
                text_field(where, fields, name)
        items.append(lettered_item(where, {**fields, BASE: base}))
    return items


def mmlu(path: Path) -> list[Item]:
    """A subject's CSV as published (no header; question, four options, letter), one with a header or with indices, or
    the Hub's rows of question, choices, answer, subject. Subjects are facets."""
    items = []
    rows = records(path)
    if plain_suffix(path) == ".csv":
        rows = _mmlu_table(path)
    for where, fields in rows:
        facet = fields.get("subject")
        if not isinstance(facet, str) or not facet:
            facet = _subject(path)
        items.append(replace(lettered_item(where, fields), facet=facet))
    return items


def _mmlu_table(path: Path) -> Iterator[tuple[str, Fields]]:
    """Rows of a subject's table as question, choices and answer (an index)."""
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        for number, row in enumerate(reader):
            where = f"{path}:{reader.line_num}"
            if len(row) < 4:
                raise DataError(f"{where}: {len(row)} columns\nallowed: question, options, letter")
            if number == 0 and row[0].strip().lower() == "question":
                continue
            asked, *texts, answer = row
            answer = answer.strip()
            index = LETTERS.find(answer or "?")
            if answer.isdecimal():
                index = int(answer)
            if not 0 <= index < len(texts):
                raise DataError(f"{where}: the answer is none of the options\nallowed: a letter, or an index from 0")
            yield where, {"question": asked, "choices": texts, "answer": index}


def _subject(path: Path) -> str:
    return re.sub("_(test|dev|val)$", "", path.name.partition(".")[0])


def mmlu_medical(path: Path) -> list[Item]:
    """MMLU's six medical subjects; a file of another subject has no item."""
    return [item for item in mmlu(path) if item.facet in MEDICAL_SUBJECTS]


def mmlu_meditron(path: Path) -> list[Item]:
    """The nine subjects that Meditron calls MMLU-Medical."""
    return [item for item in mmlu(path) if item.facet in MEDITRON_SUBJECTS]


def mmlu_general(path: Path) -> list[Item]:
    """MMLU without the medical subjects."""
    return [item for item in mmlu(path) if item.facet not in MEDICAL_SUBJECTS]


def arc(path: Path) -> list[Item]:
    """ARC's JSON lines: question {stem, choices [{text, label}]} (authors) or text and choices {text, label} (Hub)."""
    items = []
    for where, fields in records(path):
        stem, choices = fields.get("question"), fields.get("choices")
        if isinstance(stem, dict):
            stem, choices = stem.get("stem"), stem.get("choices")
        options = _labelled(where, choices)
        answer = text_field(where, fields, "answerKey")
        item = lettered_item(where, {"question": stem, "options": options, "answer_idx": answer})
        items.append(replace(item, id=item_id(where, fields)))
    return items


def _labelled(where: str, choices: Any) -> dict[str, str]:
    try:
        if isinstance(choices, list):
            return {choice["label"]: choice["text"] for choice in choices}
        return dict(zip(choices["label"], choices["text"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: `choices` has no labels and texts\ntake ARC's JSON lines as published") from error


def choice(path: Path) -> list[Item]:
    """Your own benchmark: {"question", "options" or "choices": [texts], "answer": index or letter, "id"?, "facet"?} per
    line."""
    items = []
    for where, fields in records(path):
        options = fields.get("options", fields.get("choices"))
        if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
            raise DataError(f"{where}: `options` is not a list of 2 to {len(LETTERS)} texts")
        listed = dict(zip(LETTERS, options, strict=False))
        answer = fields.get("answer")
        item = lettered_item(where, {"question": fields.get("question"), "options": listed, "answer_idx": answer})
        item = replace(item, id=item_id(where, fields))
        if "facet" in fields:
            item = replace(item, facet=text_field(where, fields, "facet"))
        items.append(item)
    return items


def _question(where: str, fields: Fields) -> Question:
    try:
        asked = question(fields)
    except Unusable as error:
        raise DataError(f"{where}: {error}") from error
    if asked is None:
        raise DataError(f"{where}: no question with options and answer\nfields here: {field_names(fields)}")
    return asked


def lettered_item(where: str, fields: Fields) -> Item:
    """An item whose options are listed in the prompt and answered by letter."""
    asked = _question(where, fields)
    if not asked.options:
        raise DataError(f"{where}: no question with options and answer\nfields here: {field_names(fields)}")
    letters, texts = [], []
    for letter, text in asked.options:
        letters.append(letter)
        texts.append(text or EMPTY)
    stated = str(fields.get("question", fields.get("Question"))).strip()
    gold = letters.index(asked.letter)
    return Item(item_id(where, fields), asked.messages[:1], gold, tuple(letters), tuple(texts), stated=(stated,))
