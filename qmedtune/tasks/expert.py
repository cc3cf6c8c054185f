"""Harder multiple choice: MedXpertQA, MMLU-Pro's health questions, MedBullets and CareQA, as published.

Formats: TsinghuaC3I/MedXpertQA (eval/data; rows of the Hub), TIGER-Lab/MMLU-Pro (rows of the Hub), HanjieChen/
ChallengeClinicalQA (medbullets/*.csv), HPAI-BSC/CareQA (CareQA_en.json). Asked and scored as the other choices are.
Deliberately absent: questions with images, open questions (CareQA_en_open).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qmedtune.data.reading.records import as_name
from qmedtune.errors import DataError
from qmedtune.tasks.choice import lettered_item
from qmedtune.tasks.items import Item, records, text_field

LISTED = "\nAnswer Choices:"  # MedXpertQA's questions list their options once more behind it


def medxpertqa(path: Path) -> list[Item]:
    """MedXpertQA Text: id, question, options (A to J), label; facet: question_type (Reasoning or Understanding)."""
    items = []
    for where, fields in records(path):
        text_field(where, fields, "question")
        if fields.get("images"):
            raise DataError(f"{where}: a question with images\ngive the Text subset: Text/test.jsonl")
        item = lettered_item(where, fields)
        items.append(replace(item, facet=as_name(fields.get("question_type")), stated=_without_list(item)))
    return items


def _without_list(item: Item) -> tuple[str, ...]:
    return tuple(text.partition(LISTED)[0].strip() for text in item.stated)


def mmlu_pro_health(path: Path) -> list[Item]:
    """MMLU-Pro's rows (question_id, question, up to ten options, answer, answer_index, category) of category health."""
    items = []
    for where, fields in records(path):
        if text_field(where, fields, "category").lower() != "health":
            continue
        item = lettered_item(where, fields)
        if fields.get("answer_index") not in (None, item.gold):
            raise DataError(f"{where}: `answer` and `answer_index` name two options\nfetch the file again")
        items.append(replace(item, id=as_name(fields.get("question_id")) or item.id))
    return items


def medbullets(path: Path) -> list[Item]:
    """medbullets_op4.csv or medbullets_op5.csv: question, opa to opd (ope), answer_idx and answer."""
    if path.name.endswith(".json"):
        raise DataError(f"{path}: a table by columns\ngive the .csv of the same name beside it")
    items = []
    for where, fields in records(path):
        text_field(where, fields, "answer_idx")
        item = lettered_item(where, fields)
        answer = fields.get("answer")
        if isinstance(answer, str) and answer.strip() != item.texts[item.gold]:
            raise DataError(f"{where}: `answer` is not the text of option {item.options[item.gold]}\nmend the row")
        items.append(item)
    return items


def careqa(path: Path) -> list[Item]:
    """CareQA_en.json or CareQA_es.json: question, op1 to op4, cop from 1, category (the facet), unique_id."""
    items = []
    for where, fields in records(path):
        text_field(where, fields, "question")
        item = lettered_item(where, fields)
        facet = as_name(fields.get("category"))
        items.append(replace(item, id=as_name(fields.get("unique_id")) or item.id, facet=facet))
    return items
