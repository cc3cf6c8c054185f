"""Multiple-choice benchmarks: the built-in facts, PubMedQA, MedQA, MedMCQA, MMLU, ARC and plain choice files.

Questions are worded as the training data words them (data/instructions.py), so that a model meets one form. Letters
are the answers where options are listed in the prompt; the words themselves where they are not.
"""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmedtune.data import world as worlds
from qmedtune.errors import DataError
from qmedtune.tasks.extract import extract_choice
from qmedtune.tasks.items import Item, Judgement, Task, conversation, item_id, records, text_field

LETTERS = "ABCDEFGHIJ"
# The six subjects of MultiMedQA (Singhal et al. 2023); the others measure what a medical model may forget.
MEDICAL_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine",
)  # fmt: skip
DECISIONS = ("yes", "no", "maybe")


def choice_task(name: str, items: tuple[Item, ...]) -> Task:
    """Accuracy over items with options; by log-likelihood and, where asked for, by generation."""
    longest = max(len(text) for item in items for text in (*item.options, *item.texts))
    length = min(64, 8 + longest // 2)  # an English token has 4 characters, a drug name's about 2
    return Task(name, items, "accuracy", {"accuracy": "correct"}, _parse, _judge, _accuracy, max_new_tokens=length)


def _parse(answer: str, item: Item) -> int | None:
    return extract_choice(answer, item.options, item.texts)


def _judge(item: Item, prediction: int | None) -> Judgement:
    chosen = None if prediction is None else item.options[prediction]
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
    """The authors' ori_pqal.json: an object keyed by PMID with QUESTION, CONTEXTS, final_decision."""
    items = []
    for where, fields in records(path):
        text_field(where, fields, "QUESTION")
        question, answer = conversation(where, fields)
        if answer not in DECISIONS:
            raise DataError(f"{where}: `final_decision` is none of the options\nallowed: {', '.join(DECISIONS)}")
        items.append(Item(item_id(where, fields), question, DECISIONS.index(answer), DECISIONS))
    return items


def medqa(path: Path) -> list[Item]:
    """The authors' JSON lines (US split: 5 options; 4_options folder: 4): question, options, answer_idx."""
    items = []
    for where, fields in records(path):
        text_field(where, fields, "question")
        options = fields.get("options")
        if isinstance(options, list) and all(isinstance(o, dict) and {"key", "value"} <= o.keys() for o in options):
            options = {option["key"]: option["value"] for option in options}
        if not isinstance(options, dict) or len(options) < 2:
            raise DataError(f"{where}: `options` is no mapping of letters to texts and no list of key and value")
        items.append(_lettered(where, fields, options))
    return items


def medmcqa(path: Path) -> list[Item]:
    """JSON lines with opa..opd and cop, which counts from 1 in the authors' files and from 0 on the Hub."""
    rows = list(records(path))
    answers = {fields.get("cop") for _, fields in rows}
    if rows and answers <= {-1, None}:
        raise DataError(
            f"{path}: no record has an answer (`cop`)\nMedMCQA's test split is unlabelled: take the dev split"
        )
    if {0, 4} <= answers or not answers & {0, 4}:
        raise DataError(f"{path}: cannot tell whether `cop` counts from 0 or from 1\ngive the whole split")
    start = 1 if 4 in answers else 0
    items = []
    for where, fields in rows:
        text_field(where, fields, "question")
        options = {letter: text_field(where, fields, f"op{letter.lower()}") for letter in "ABCD"}
        items.append(_lettered(where, {**fields, "_cop_base": start}, options))
    return items


def mmlu(path: Path) -> list[Item]:
    """A subject's CSV as published: no header; question, four options, letter. Subjects are facets."""
    items = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if len(row) < 4:
                raise DataError(f"{where}: {len(row)} columns\nallowed: question, options, letter")
            question, *texts, letter = row
            fields = {"question": question, "options": dict(zip(LETTERS, texts, strict=False)), "answer_idx": letter}
            items.append(replace(_lettered(where, fields, fields["options"]), facet=_subject(path)))
    return items


def _subject(path: Path) -> str:
    return re.sub("_(test|dev|val)$", "", path.stem)


def mmlu_medical(path: Path) -> list[Item]:
    """MMLU's six medical subjects; a file of another subject has no item."""
    return mmlu(path) if _subject(path) in MEDICAL_SUBJECTS else []


def mmlu_general(path: Path) -> list[Item]:
    """MMLU without the medical subjects."""
    return mmlu(path) if _subject(path) not in MEDICAL_SUBJECTS else []


def arc(path: Path) -> list[Item]:
    """ARC's JSON lines: question {stem, choices [{text, label}]} (authors) or text and choices {text, label} (Hub)."""
    items = []
    for where, fields in records(path):
        asked: Any = fields.get("question")
        nested = isinstance(asked, dict)
        stem, choices = (asked.get("stem"), asked.get("choices")) if nested else (asked, fields.get("choices"))
        options = _labelled(where, choices)
        answer = text_field(where, fields, "answerKey")
        item = _lettered(where, {"question": stem, "options": options, "answer_idx": answer}, options)
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
    """Your own benchmark: {"question", "options": [texts], "answer": index or letter, "id"?, "facet"?} per line."""
    items = []
    for where, fields in records(path):
        options, answer = fields.get("options"), fields.get("answer")
        if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
            raise DataError(f"{where}: `options` is not a list of 2 to {len(LETTERS)} texts")
        listed = dict(zip(LETTERS, options, strict=False))
        letter = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < len(options) else answer
        item = _lettered(where, {"question": fields.get("question"), "options": listed, "answer_idx": letter}, listed)
        facet = text_field(where, fields, "facet") if "facet" in fields else None
        items.append(replace(item, id=item_id(where, fields), facet=facet))
    return items


def _lettered(where: str, fields: dict[str, Any], options: dict[str, str]) -> Item:
    """An item whose options are listed in the prompt and answered by letter."""
    question, answer = conversation(where, fields)
    letters = tuple(options)
    texts = tuple(text.strip() for text in options.values())
    return Item(item_id(where, fields), question, letters.index(answer.partition(".")[0]), letters, texts)
