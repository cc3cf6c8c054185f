"""Answers that list something: hallmarks of cancer (several labels per abstract) and entities of clinical notes.

Both are generated only. A list that is empty must be said ("none"); an answer that names nothing is unparsed, and
everything it should have named is missed. Entities are counted here, not by seqeval (last release 2020, a source
archive only): it compares tag sequences, and an answer is a list. A test holds both equal where both apply.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from qmedtune.errors import DataError
from qmedtune.tasks.items import Fields, Item, Judgement, Task, item_id, records, sklearn_metrics, text_field

HALLMARKS = (
    "sustaining proliferative signaling",
    "evading growth suppressors",
    "resisting cell death",
    "enabling replicative immortality",
    "inducing angiogenesis",
    "activating invasion and metastasis",
    "genomic instability and mutation",
    "tumor promoting inflammation",
    "cellular energetics",
    "avoiding immune destruction",
)
ASKED_TYPES = ("problem", "treatment", "test")
ENTITY_TYPES = (*ASKED_TYPES, "drug")  # Me-LLaMA counts drugs too, where a file marks them
NONE = re.compile(r"\b(none|no (hallmarks?|entit(y|ies)|problems?))\b", re.IGNORECASE)

ENTITY_QUESTION = (
    "List the medical problems, treatments and tests in the sentence, one per line as `problem: words of the "
    "sentence`, `treatment: ...` or `test: ...`. Answer none if there are none."
)
DRUG_QUESTION = (
    "List the medical problems, treatments, tests and drugs in the sentence, one per line as `problem: words of the "
    "sentence`, `treatment: ...`, `test: ...` or `drug: ...`. Answer none if there are none."
)

BARE_AMPERSAND = re.compile(rb"(<!\[CDATA\[.*?\]\]>)|&(?!#?\w+;)", re.DOTALL)


# ---- hallmarks of cancer ---------------------------------------------------------------------------------------------


def hoc(path: Path) -> list[Item]:
    """Abstracts with `text` and `labels` (a list, or joined by `;` or `,`; empty for none of the ten hallmarks).

    BLURB's sentences (index, sentence1, labels) are put together to the abstracts that are scored.
    """
    rows = list(records(path))
    if rows and "sentence1" in rows[0][1]:
        rows = _abstracts(rows)
    question = f"Which hallmarks of cancer does the abstract describe? Name them, or none: {', '.join(HALLMARKS)}."
    items = []
    for where, fields in rows:
        message = {"role": "user", "content": question, "input": text_field(where, fields, "text")}
        items.append(Item(item_id(where, fields), (message,), frozenset(_hallmarks(where, fields.get("labels")))))
    return items


def _hallmarks(where: str, labels: Any) -> set[str]:
    if not isinstance(labels, (list, str)):
        raise DataError(f"{where}: field `labels` is no list and no text\nallowed: {'; '.join(HALLMARKS)}")
    names = labels
    if isinstance(labels, str):
        names = re.split("[;,]", labels)
    gold = {str(name).strip().lower() for name in names} - {"", "none", "nan"}
    if not gold <= set(HALLMARKS):
        raise DataError(f"{where}: a label of `labels` is no hallmark\nallowed: {'; '.join(HALLMARKS)}")
    return gold


def _abstracts(rows: list[tuple[str, Fields]]) -> list[tuple[str, Fields]]:
    """Sentences `123_s4` as one row per abstract 123: their texts in order, and the labels of any of them."""
    found: dict[str, tuple[str, list[str], set[str]]] = {}
    for where, fields in rows:
        name = text_field(where, fields, "index").rpartition("_")[0] or text_field(where, fields, "index")
        _, sentences, labels = found.setdefault(name, (where, [], set()))
        sentences.append(text_field(where, fields, "sentence1"))
        labels |= _hallmarks(where, fields.get("labels") or "")
    abstracts = []
    for name, (where, sentences, labels) in found.items():
        abstracts.append((where, {"id": name, "text": " ".join(sentences), "labels": sorted(labels)}))
    return abstracts


def hoc_task(name: str, items: tuple[Item, ...]) -> Task:
    """F1 per hallmark and their mean, over the hallmarks that occur."""
    if not any(item.gold for item in items):
        raise DataError(f"task {name}: no item has a hallmark, so there is no F1\ngive the whole split")
    metrics: dict[str, str | None] = {"macro_f1": None, "macro_f1_all": None, "micro_f1": None}
    metrics["exact_match"] = "correct"
    return Task(
        name, items, "macro_f1", metrics, _parse_hallmarks, _judge_hallmarks, _hallmark_scores, 96, _write_hallmarks
    )


def _write_hallmarks(item: Item) -> str:
    return ", ".join(label for label in HALLMARKS if label in item.gold) or "none"


def _parse_hallmarks(answer: str, item: Item) -> frozenset[str] | None:
    said = " ".join(answer.lower().replace("signalling", "signaling").replace("tumour", "tumor").split())
    found = [hallmark for hallmark in HALLMARKS if hallmark in said]
    if not found and not NONE.search(said):
        return None
    return frozenset(found)


def _judge_hallmarks(item: Item, prediction: frozenset[str] | None) -> Judgement:
    return {"prediction": sorted(prediction or ()), "gold": sorted(item.gold), "correct": prediction == item.gold}


def _hallmark_scores(judgements: list[Judgement]) -> dict[str, float]:
    """Hallmarks that no abstract has do not count, but in `macro_f1_all`; nan where none has any (a resample)."""
    gold, predicted = _indicators(judgements, "gold"), _indicators(judgements, "prediction")
    # A bootstrap comes here 4,000 times: one table of counts takes 1 ms, f1_score on lists took 15.
    table = sklearn_metrics().multilabel_confusion_matrix(gold, predicted)
    right, wrong = table[:, 1, 1], table[:, 0, 1] + table[:, 1, 0]
    each = _f1(right, wrong)
    there = gold.any(0)
    mean = float("nan")
    if there.any():
        mean = float(each[there].mean())
    scores = {
        "macro_f1": mean,
        "macro_f1_all": float(each.mean()),
        "micro_f1": float(_f1(right.sum(), wrong.sum())),
        "exact_match": sum(judgement["correct"] for judgement in judgements) / len(judgements),
    }
    for place in np.flatnonzero(there):
        scores[f"f1 {HALLMARKS[place]}"] = float(each[place])
    return scores


def _indicators(judgements: list[Judgement], side: str) -> np.ndarray:
    """Which hallmarks each judgement has on one side: bool [judgements, hallmarks]."""
    table = np.zeros((len(judgements), len(HALLMARKS)), bool)
    for row, judgement in enumerate(judgements):
        for label in judgement[side]:
            table[row, HALLMARKS.index(label)] = True
    return table


def _f1(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """F1 from counts of true positives and of false ones (positives and negatives); 0 where there is neither."""
    return 2 * right / np.maximum(2 * right + wrong, 1)


# ---- entities --------------------------------------------------------------------------------------------------------


def i2b2_2012(path: Path) -> list[Item]:
    """One discharge summary as XML (TEXT, TAGS/EVENT with start, end, text, type); one item per line of text.

    Offsets count from 1 in the text without the newline that follows CDATA; both that and its absence are accepted.
    Unescaped `&`, which several of the published files have, is mended.
    """
    raw = BARE_AMPERSAND.sub(lambda match: match[1] or b"&amp;", path.read_bytes())
    try:
        root = etree.fromstring(raw, etree.XMLParser(resolve_entities=False, no_network=True))
    except etree.XMLSyntaxError as error:
        raise DataError(f"{path}:{error.lineno}: broken XML\nfetch the file again") from error
    text = root.findtext("TEXT") or ""
    gold: dict[int, list[tuple[str, str]]] = {}
    for event in root.iter("EVENT"):
        kind = str(event.get("type")).lower()
        if kind in ENTITY_TYPES:
            start = _start(text, event, f"{path}:{event.sourceline}")
            gold.setdefault(text.count("\n", 0, start), []).append((kind, plain_words(str(event.get("text")))))
    items = []
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            items.append(_entity_item(path.stem, number, line.strip(), gold.get(number, [])))
    return items


def _start(text: str, event: Any, where: str) -> int:
    """0-based start of an event, checked against its text."""
    try:
        start, said = int(event.get("start")), plain_words(event.get("text"))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: an EVENT without start or text\nthe file is not in the i2b2-2012 format") from error
    for begin in (start - 1, start):
        if begin >= 0 and plain_words(text[begin : begin + len(event.get("text"))]) == said:
            return begin
    raise DataError(f"{where}: an EVENT's offsets do not lead to its text\ntake the merged XML files as published")


def _entity_item(note: str, number: int, line: str, gold: list[tuple[str, str]]) -> Item:
    message = {"role": "user", "content": ENTITY_QUESTION, "input": line}
    return Item(f"{note}-{number}", (message,), tuple(gold), group=note)


def marks_drugs(items: Sequence[Item]) -> bool:
    """Whether the files have drugs as a type of their own; i2b2-2012 as published has none."""
    for item in items:
        for kind, _ in item.gold:
            if kind == "drug":
                return True
    return False


def with_drugs_asked(items: list[Item]) -> list[Item]:
    """The items, asked for drugs too where the files mark some."""
    if not marks_drugs(items):
        return items
    return [replace(item, messages=({**item.messages[0], "content": DRUG_QUESTION},)) for item in items]


def entity_task(name: str, items: tuple[Item, ...]) -> Task:
    """Micro precision, recall and F1 of (type, words), each entity matched once; words as in the sentence."""
    metrics: dict[str, str | None] = dict.fromkeys(("entity_f1", "precision", "recall"))
    return Task(
        name, items, "entity_f1", metrics, _parse_entities, _judge_entities, _entity_scores, 192, _write_entities
    )


def _write_entities(item: Item) -> str:
    return "\n".join(f"{kind}: {words}" for kind, words in item.gold) or "none"


def _parse_entities(answer: str, item: Item) -> tuple[tuple[str, str], ...] | None:
    pairs = re.findall(rf"^[\s*\-]*({'|'.join(ENTITY_TYPES)})\s*:\s*(.+?)\s*$", answer, re.IGNORECASE | re.MULTILINE)
    if not pairs and not NONE.search(answer):
        return None
    return tuple((kind.lower(), plain_words(words)) for kind, words in pairs)


def plain_words(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,;:`\"'")


def _judge_entities(item: Item, prediction: tuple[tuple[str, str], ...] | None) -> Judgement:
    gold, predicted = Counter(item.gold), Counter(prediction or ())
    hits = (gold & predicted).total()
    return {"true_positives": hits, "false_positives": predicted.total() - hits, "misses": gold.total() - hits}


def _entity_scores(judgements: list[Judgement]) -> dict[str, float]:
    hits = extra = missed = 0
    for judgement in judgements:
        hits += judgement["true_positives"]
        extra += judgement["false_positives"]
        missed += judgement["misses"]
    precision, recall = hits / max(1, hits + extra), hits / max(1, hits + missed)
    f1 = 2 * hits / max(1, 2 * hits + extra + missed)
    return {"entity_f1": f1, "precision": precision, "recall": recall}
