"""Free answers: questions about notes (emrQA) and summaries (PubMed articles, MIMIC-CXR reports).

Judged against a reference: exact match and token F1 after SQuAD's normalisation (Rajpurkar et al. 2016), or ROUGE
F-measures by the rouge-score package (extra `metrics`) and, where a local encoder is named, BERTScore by the authors'
package (extra `bertscore`; it needs no network then). Only the scores are kept, never an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from qmedtune.data.reading.files import plain_suffix, text_of
from qmedtune.data.reading.instructions import is_task
from qmedtune.data.reading.notes import expand
from qmedtune.data.reading.records import as_name
from qmedtune.data.reading.rejects import Damaged
from qmedtune.data.reading.row_formats import read_jsonl
from qmedtune.errors import DataError, RecipeError
from qmedtune.tasks.items import (
    NO_YES,
    Fields,
    Item,
    Judgement,
    Task,
    checked_rows,
    conversation,
    item_id,
    label_field,
    records,
    require,
    text_field,
)

SUMMARY_COLUMNS = (("article", "abstract"), ("findings", "impression"), ("document", "summary"), ("text", "summary"))
ROUGE = ("rouge1", "rouge2", "rougeL")
UNSTEMMED = {"rouge1_unstemmed": "rouge1", "rouge2_unstemmed": "rouge2", "rouge_unstemmed": "rougeL"}
ANSWER_METRICS = ("token_f1", "exact_match", "me_llama", "me_llama_exact")
SENTENCE_MARK = re.compile(r"</?S>\s*")
SECTION = re.compile(r"^[ \t]*([A-Z][A-Z /,()-]+):", re.MULTILINE)  # "newline, space, CAPITALS, colon"


def _said(answer: str, item: Item) -> str | None:
    return answer or None


# ---- questions about notes -------------------------------------------------------------------------------------------


def emrqa(path: Path) -> list[Item]:
    """emrQA's data.json: the first paraphrase of every question with answers in words, asked with its note."""
    items: list[Item] = []
    for where, note in records(path):
        if not isinstance(note.get("paragraphs"), list):
            raise DataError(f"{where}: field `paragraphs` is missing or no list\ntake emrQA's data.json as published")
        for asked in expand(note, instructions=True):
            if isinstance(asked, Damaged):
                raise DataError(f"{where}: {asked.reason}\na benchmark is read whole or not at all: mend the file")
            question, _ = conversation(where, asked)
            gold = tuple(asked["answers"])
            items.append(Item(f"question-{len(items)}", question, gold, group=asked["group"]))
    return items


def question_task(name: str, items: tuple[Item, ...]) -> Task:
    """Token F1 first, exact match and both as Me-LLaMA counts them beside it; all means over items."""
    metrics: dict[str, str | None] = dict(zip(ANSWER_METRICS, ANSWER_METRICS, strict=True))
    return Task(name, items, "token_f1", metrics, _said, _judge_answer, _means, 64, _write_answer)


def _write_answer(item: Item) -> str:
    return item.gold[0]


def normalised(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _judge_answer(item: Item, prediction: str | None) -> Judgement:
    """Each score against the answer that it is best with, as SQuAD's script does."""
    said = normalised(prediction or "")
    golds = [normalised(gold) for gold in item.gold]
    return {
        "exact_match": float(said in golds),
        "token_f1": max(_token_f1(gold, said) for gold in golds),
        **_as_me_llama(item.gold[0], prediction or ""),
    }


def _as_me_llama(gold: str, said: str) -> Judgement:
    """See definitions.ME_LLAMA. Spaces do not count: what the script splits at them are single characters."""
    right, answer = _characters(gold), _characters(said)
    if not right or not answer:
        return {"me_llama_exact": float(right == answer), "me_llama": float(right == answer)}
    common = len(set(right) & set(answer))
    precision, recall = common / len(answer), common / len(right)
    f1 = 0.0
    if common:
        f1 = 2 * precision * recall / (precision + recall)
    return {"me_llama_exact": float(right == answer), "me_llama": f1}


def _characters(text: str) -> list[str]:
    return [char for char in text.lower() if char not in string.punctuation and not char.isspace()]


def _token_f1(gold: list[str], said: list[str]) -> float:
    if not gold and not said:
        return 1.0
    common = (Counter(gold) & Counter(said)).total()
    return 2 * common / (len(gold) + len(said))


# ---- summaries -------------------------------------------------------------------------------------------------------


def summaries(path: Path) -> list[Item]:
    """article and abstract (PubMed), findings and impression (radiology), document or text and summary."""
    return [_summary_item(where, fields, SUMMARY_COLUMNS) for where, fields in records(path)]


def answers(path: Path) -> list[Item]:
    """Questions with an answer in words, or texts with their note or summary, in a shape that instructions.py knows:
    MedQuAD, LiveQA, MedicationQA, BioASQ (ideal answers), MeQSum, ACI-Bench, MTS-Dialog."""
    items = []
    for where, fields in records(path):
        asked, answer = conversation(where, fields)
        group = as_name(fields.get("group") or fields.get("encounter_id"))
        stated = []
        for message in asked:
            if message["role"] == "user":
                stated.append(message.get("input") or message["content"])
        if asked[-1].get("input") and not is_task(asked[-1]["content"]):
            stated.append(asked[-1]["content"])
        items.append(Item(item_id(where, fields), asked, answer, group=group, stated=tuple(stated)))
    return items


def bioasq_yesno(path: Path) -> list[Item]:
    """BioASQ's yes/no questions, with their snippets; a file's other questions are no items."""
    items = []
    for where, fields in records(path):
        if fields.get("type") != "yesno":
            continue
        asked, _ = conversation(where, fields)
        value = fields.get("exact_answer")
        if isinstance(value, list) and value:
            value = value[0]
        gold = label_field(where, {"exact_answer": value}, "exact_answer", NO_YES)
        question = {**asked[-1], "content": f"{asked[-1]['content']} Answer yes or no."}
        stated = [asked[-1]["content"]]
        if snippets := asked[-1].get("input"):
            stated.append(snippets)
        items.append(Item(item_id(where, fields), (question,), gold, NO_YES, stated=tuple(stated)))
    return items


def pubmed_summaries(path: Path) -> list[Item]:
    """article and abstract, or the authors' lines of article_text and abstract_text (sentences, in <S> marks)."""
    rows = records(path)
    if path.suffix == ".txt":
        rows = checked_rows(path, read_jsonl(path))
    items = []
    for where, fields in rows:
        if isinstance(fields.get("article_text"), list) and isinstance(fields.get("abstract_text"), list):
            article = " ".join(map(str, fields["article_text"]))
            abstract = SENTENCE_MARK.sub("", " ".join(map(str, fields["abstract_text"])))
            fields = {"id": fields.get("article_id"), "article": article, "abstract": abstract}
        items.append(_summary_item(where, fields, SUMMARY_COLUMNS[:1]))
    return items


def radiology_summaries(path: Path) -> list[Item]:
    """MIMIC-CXR: a report's .txt with FINDINGS and IMPRESSION sections, or records with findings and impression.

    A report without both sections has nothing to be asked: no item.
    """
    if plain_suffix(path) != ".txt":
        return [_summary_item(where, fields, SUMMARY_COLUMNS[1:2]) for where, fields in records(path)]
    text = text_of(path.read_bytes())
    if isinstance(text, Damaged):
        raise DataError(f"{path}: {text.reason}\nfetch the file again")
    found = {}
    heads = list(SECTION.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=False):
        found[head[1].strip().lower()] = text[head.end() : end].strip()
    if not found.get("findings") or not found.get("impression"):
        return []
    return [_summary_item(f"{path}:1", {"id": path.stem, **found}, SUMMARY_COLUMNS[1:2])]


def _summary_item(where: str, fields: Fields, known: tuple[tuple[str, str], ...]) -> Item:
    for source, target in known:
        if source in fields and target in fields:
            text, summary = text_field(where, fields, source), text_field(where, fields, target)
            content = f"Write the {target} of this text."
            if target == "summary":
                content = "Summarise this text."
            return Item(item_id(where, fields), ({"role": "user", "content": content, "input": text},), summary)
    pairs = "; ".join(" and ".join(pair) for pair in known)
    raise DataError(f"{where}: no known pair of text and summary\nallowed fields: {pairs}")


def summary_task(name: str, items: tuple[Item, ...]) -> Task:
    """ROUGE-L first, ROUGE-1 and ROUGE-2 beside it, all also without stemming; means over items of the F-measure."""
    require("rouge_score")
    names = ("rougeL", "rouge1", "rouge2", *UNSTEMMED)
    metrics: dict[str, str | None] = dict(zip(names, names, strict=True))
    return Task(name, items, "rougeL", metrics, _said, _judge_summary, _means, max_new_tokens=256)


def _judge_summary(item: Item, prediction: str | None) -> Judgement:
    said = prediction or ""
    stemmed, plain = _rouge(True).score(item.gold, said), _rouge(False).score(item.gold, said)
    scores = {}
    for name in ROUGE:
        scores[name] = round(stemmed[name].fmeasure, 6)
    for name, kind in UNSTEMMED.items():
        scores[name] = round(plain[kind].fmeasure, 6)
    return scores


@lru_cache(maxsize=2)
def _rouge(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE, use_stemmer=stem)


def with_bertscore(task: Task, encoder: str) -> Task:
    """The summary task with BERTScore's F1 (Zhang et al. 2020) beside ROUGE. RecipeError.

    encoder: a local folder, or FOLDER:LAYER; without a layer that of the package's own table counts, by the folder's
    name. An empty answer scores 0.
    """
    require("bert_score", extra="bertscore")
    folder, _, layer = encoder.rpartition(":")
    if not layer.isdigit():
        folder, layer = encoder, ""
    if "rougeL" not in task.metrics:
        raise RecipeError(f"evaluate.tasks: {task.name} has no summaries\nbertscore is for summaries")
    if not any(Path(folder).glob("*.safetensors")):
        raise RecipeError(f"bertscore: {folder} is no local folder with safetensors\ngive one, fetched before")
    if layer:
        depth = int(layer)
    else:
        depth = _known_layer(Path(folder).name)

    def judge(item: Item, prediction: str | None) -> Judgement:
        return {**task.judge(item, prediction), "bertscore": _bertscore(folder, depth, prediction, item.gold)}

    return replace(task, judge=judge, metrics={**task.metrics, "bertscore": "bertscore"})


def _known_layer(name: str) -> int:
    table: dict[str, int] = import_module("bert_score.utils").model2layers
    for model, layer in table.items():
        if model.rpartition("/")[2] == name:
            return layer
    raise RecipeError(f"bertscore: no layer is known for {name}\nadd it: FOLDER:LAYER")


def _bertscore(folder: str, layer: int, prediction: str | None, gold: str) -> float:
    if not prediction:  # the package fails on an empty text with transformers 5
        return 0.0
    _, _, f1 = _bert_scorer(folder, layer).score([prediction], [gold])
    return round(float(f1[0]), 6)


@lru_cache(maxsize=1)
def _bert_scorer(folder: str, layer: int) -> Any:
    return import_module("bert_score").BERTScorer(model_type=folder, num_layers=layer)


def _means(judgements: list[Judgement]) -> dict[str, float]:
    known = (*ANSWER_METRICS, *ROUGE, *UNSTEMMED, "bertscore")
    means = {}
    for name in judgements[0]:
        if name in known:
            means[name] = sum(judgement[name] for judgement in judgements) / len(judgements)
    return means
