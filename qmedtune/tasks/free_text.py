"""Free answers: questions about notes (emrQA) and summaries (PubMed articles, radiology reports).

Judged against a reference: exact match and token F1 after SQuAD's normalisation (Rajpurkar et al. 2016), or ROUGE
F-measures by the rouge-score package (extra `metrics`). Only the scores are kept, never an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from qmedtune.data.rejects import Rejects
from qmedtune.data.sources import read_records
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection
from qmedtune.tasks.items import Item, Judgement, Task, item_id, records, require, text_field

SUMMARY_COLUMNS = (("article", "abstract"), ("findings", "impression"), ("document", "summary"), ("text", "summary"))
ROUGE = ("rouge1", "rouge2", "rougeL")


def _said(answer: str, item: Item) -> str | None:
    return answer or None


# ---- questions about notes -------------------------------------------------------------------------------------------


def emrqa(path: Path) -> list[Item]:
    """emrQA's data.json: the first paraphrase of every question with an answer in words, asked with its note."""
    rejects = Rejects("emrqa")
    source = SourceSection(path=str(path), kind="instructions", format="emrqa")
    items = []
    for number, record in enumerate(read_records("emrqa", source, rejects)):
        *question, answer = record["messages"]
        items.append(Item(f"question-{number}", tuple(question), answer["content"]))
    if rejects.counts["rejected"]:
        reason, count = rejects.reasons.most_common(1)[0]
        raise DataError(f"{path}: {count} damaged questions ({reason})\na benchmark is read whole or not at all")
    return items


def question_task(name: str, items: tuple[Item, ...]) -> Task:
    """Token F1 first, exact match beside it; both means over items."""
    metrics: dict[str, str | None] = {"token_f1": "token_f1", "exact_match": "exact_match"}
    return Task(name, items, "token_f1", metrics, _said, _judge_answer, _means, max_new_tokens=64)


def normalised(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _judge_answer(item: Item, prediction: str | None) -> Judgement:
    gold, said = normalised(item.gold), normalised(prediction or "")
    common = (Counter(gold) & Counter(said)).total()
    f1 = 2 * common / (len(gold) + len(said)) if gold or said else 1.0
    return {"exact_match": float(gold == said), "token_f1": f1}


# ---- summaries -------------------------------------------------------------------------------------------------------


def summaries(path: Path) -> list[Item]:
    """article and abstract (PubMed), findings and impression (radiology), document or text and summary."""
    items = []
    for where, fields in records(path):
        columns = next((pair for pair in SUMMARY_COLUMNS if set(pair) <= fields.keys()), None)
        if columns is None:
            allowed = "; ".join(" and ".join(pair) for pair in SUMMARY_COLUMNS)
            raise DataError(f"{where}: no known pair of text and summary\nallowed fields: {allowed}")
        text, summary = (text_field(where, fields, column) for column in columns)
        content = f"Write the {columns[1]} of this text." if columns[1] != "summary" else "Summarise this text."
        message = {"role": "user", "content": content, "input": text}
        items.append(Item(item_id(where, fields), (message,), summary))
    return items


def summary_task(name: str, items: tuple[Item, ...]) -> Task:
    """ROUGE-L first, ROUGE-1 and ROUGE-2 beside it; means over items of the F-measure, with stemming."""
    require("rouge_score")
    metrics: dict[str, str | None] = {name: name for name in ("rougeL", "rouge1", "rouge2")}
    return Task(name, items, "rougeL", metrics, _said, _judge_summary, _means, max_new_tokens=256)


def _judge_summary(item: Item, prediction: str | None) -> Judgement:
    scores = _rouge().score(item.gold, prediction or "")
    return {name: round(scores[name].fmeasure, 6) for name in ROUGE}


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE, use_stemmer=True)


def _means(judgements: list[Judgement]) -> dict[str, float]:
    names = [name for name in judgements[0] if name in ("exact_match", "token_f1", *ROUGE)]
    return {name: sum(j[name] for j in judgements) / len(judgements) for name in names}
