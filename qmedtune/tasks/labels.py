"""Classification as choice: MedNLI, BioNLI, DDI-2013, MTSamples and yes/no outcomes, with macro F1 or AUROC.

The labels are the options, so they are scored by log-likelihood and read out of generated answers like any choice.
An answer without a label counts as an error of every kind of score: it lowers recall and is no label of its own.
Metrics are scikit-learn's.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from qmedtune import ui
from qmedtune.data.reading.files import plain_suffix
from qmedtune.data.reading.records import as_name
from qmedtune.errors import DataError
from qmedtune.tasks.extract import extract_choice
from qmedtune.tasks.items import (
    NO_YES,
    Fields,
    Item,
    Judgement,
    Message,
    Task,
    item_id,
    label_field,
    records,
    sklearn_metrics,
    text_field,
)

NLI = ("entailment", "contradiction", "neutral")
DDI = ("DDI-false", "DDI-advise", "DDI-effect", "DDI-int", "DDI-mechanism")
HUB_NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}  # as SNLI, MultiNLI and MedNLI have it on the Hub
NLI_COLUMNS = (("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"))
NLI_COLUMNS += (("supp_set", "conclusion", "label"),)  # BioNLI as its authors have it
OUTCOMES = {"1": "yes", "0": "no", "true": "yes", "false": "no"}
BIONLI = {"pos": "entailment", "neg": "contradiction"}


# ---- metrics ---------------------------------------------------------------------------------------------------------


def accuracy_task(name: str, items: tuple[Item, ...]) -> Task:
    """Accuracy first, macro F1 beside it."""
    return _task(name, items, "accuracy")


def macro_f1_task(name: str, items: tuple[Item, ...]) -> Task:
    """F1 averaged over the labels that occur, whatever their share; accuracy beside it. DataError for one label."""
    _check_labels(name, items)
    return _task(name, items, "macro_f1")


def ddi_task(name: str, items: tuple[Item, ...]) -> Task:
    """Macro F1 over all five labels, and the shared task's micro F1 over the four kinds of interaction. DataError for
    one label only."""
    _check_labels(name, items)
    return _task(name, items, "macro_f1", positive=DDI[1:])


def _check_labels(name: str, items: tuple[Item, ...]) -> None:
    if len(items) > 1 and _same_gold(items):
        raise DataError(
            f"task {name}: all {len(items)} items have the same label, so an F1 says nothing\ngive the whole split"
        )


def _same_gold(items: tuple[Item, ...]) -> bool:
    golds = [item.gold for item in items]
    return golds.count(golds[0]) == len(golds)


def auroc_task(name: str, items: tuple[Item, ...]) -> Task:
    """Area under the ROC curve of log p(yes) - log p(no); of the answers themselves where they are generated."""
    if _same_gold(items):
        raise DataError(f"task {name}: all items have the same outcome, so there is no ROC curve\ngive the whole split")
    return Task(name, items, "auroc", {"auroc": None, "accuracy": "correct"}, _parse, _judge, _auroc)


def _task(name: str, items: tuple[Item, ...], metric: str, positive: tuple[str, ...] = ()) -> Task:
    longest = len(max(items[0].options, key=len))
    metrics: dict[str, str | None] = {"accuracy": "correct", "macro_f1": None}
    if positive:
        metrics["positive_f1"] = None
    scores = partial(_scores, items[0].options, positive)
    return Task(name, items, metric, metrics, _parse, _judge, scores, max_new_tokens=8 + longest // 2)


def _parse(answer: str, item: Item) -> int | None:
    return extract_choice(answer, item.options)


def _judge(item: Item, prediction: int | None) -> Judgement:
    chosen = None
    if prediction is not None:
        chosen = item.options[prediction]
    return {"prediction": chosen, "gold": item.options[item.gold], "correct": prediction == item.gold}


def _scores(labels: tuple[str, ...], positive: tuple[str, ...], judgements: list[Judgement]) -> dict[str, float]:
    """A label that no item has does not count: of 200 drawn notes of 40 specialties all right would not be 1."""
    number = {label: index for index, label in enumerate(labels)}
    gold, predicted = [], []
    for judgement in judgements:
        gold.append(number[judgement["gold"]])
        predicted.append(number.get(judgement["prediction"], -1))  # -1, a missing answer, is no label
    f1 = partial(sklearn_metrics().f1_score, gold, predicted, zero_division=0)
    scores = {"accuracy": _accuracy(judgements), "macro_f1": float(f1(labels=sorted(set(gold)), average="macro"))}
    if positive:
        counted = [number[label] for label in positive]
        scores["positive_f1"] = float(f1(labels=counted, average="micro"))
    return scores


def _accuracy(judgements: list[Judgement]) -> float:
    return sum(judgement["correct"] for judgement in judgements) / len(judgements)


def _auroc(judgements: list[Judgement]) -> dict[str, float]:
    """nan for a resample in which only one outcome occurs."""
    gold, scores = [], []
    for judgement in judgements:
        gold.append(judgement["gold"] == "yes")
        scores.append(_score(judgement))
    area = float("nan")
    if 0 < sum(gold) < len(gold):
        area = float(sklearn_metrics().roc_auc_score(gold, scores))
    return {"auroc": area, "accuracy": _accuracy(judgements)}


def _score(judgement: Judgement) -> float:
    if "logprobs" in judgement:
        no, yes = judgement["logprobs"]
        return yes - no
    return {"yes": 1.0, "no": 0.0}.get(judgement["prediction"], 0.5)


# ---- readers ---------------------------------------------------------------------------------------------------------


def nli(path: Path) -> list[Item]:
    """MedNLI's JSON lines (sentence1, sentence2, gold_label), or premise, hypothesis and label (BioNLI: two labels; the
    Hub's 0, 1, 2 for entailment, neutral and contradiction)."""
    rows = _by_name(list(records(path)))
    labels = NLI[:2]
    for _, fields in rows:
        if str(fields.get("gold_label", fields.get("label"))).casefold() == "neutral":
            labels = NLI
    items = []
    for where, fields in rows:
        first, second, label = _nli_columns(fields)
        premise, hypothesis = text_field(where, fields, first), text_field(where, fields, second)
        content = f"Does the premise entail the hypothesis? Answer {_listed(labels)}."
        question = _question(content, f"Premise: {premise}\nHypothesis: {hypothesis}")
        gold = label_field(where, fields, label, labels)
        name = item_id(where, fields)
        items.append(Item(name, question, gold, labels, group=premise, stated=(premise, hypothesis)))
    return items


def _nli_columns(fields: Fields) -> tuple[str, str, str]:
    for columns in NLI_COLUMNS:
        if columns[0] in fields:
            return columns
    return NLI_COLUMNS[0]


def _by_name(rows: list[tuple[str, Fields]]) -> list[tuple[str, Fields]]:
    """Rows with labels by name, where the file has the Hub's numbers."""
    used = {str(fields.get("label")) for _, fields in rows}
    if used <= BIONLI.keys():
        names = BIONLI
    elif used <= HUB_NLI.keys():
        ui.note("labels 0, 1, 2 are read as entailment, neutral, contradiction, the order of the Hub's NLI sets")
        names = HUB_NLI
    else:
        return rows
    named = []
    for where, fields in rows:
        named.append((where, {**fields, "label": names[str(fields["label"])]}))
    return named


def ddi2013(path: Path) -> list[Item]:
    """DDI-2013's XML (every pair of drugs of every sentence), or a table of masked sentences: sentence, label.

    The authors' `Test for DrugNER task` holds pairs without their interactions: such files have no item.
    """
    for part in path.parts:
        if "drugner" in part.lower():
            return []
    if plain_suffix(path) == ".xml":
        return _ddi_xml(path)
    items = []
    for where, fields in records(path):
        question = _ddi_question(text_field(where, fields, "sentence"))
        gold = label_field(where, fields, "label", DDI)
        items.append(Item(item_id(where, fields), question, gold, DDI))
    return items


def _ddi_question(sentence: str) -> tuple[Message, ...]:
    return _question(f"How do the two drugs marked @DRUG$ interact? Answer {_listed(DDI)}.", sentence)


def _ddi_xml(path: Path) -> list[Item]:
    try:
        root = etree.parse(path, etree.XMLParser(resolve_entities=False, no_network=True)).getroot()
    except etree.XMLSyntaxError as error:
        raise DataError(f"{path}:{error.lineno}: broken XML\nfetch the file again") from error
    items = []
    for sentence in root.iter("sentence"):
        text = sentence.get("text") or ""
        spans = {}
        for entity in sentence.iter("entity"):
            spans[entity.get("id")] = _span(entity.get("charOffset"))
        for pair in sentence.iter("pair"):
            where = f"{path}:{pair.sourceline}"
            first, second = pair.get("e1"), pair.get("e2")
            label = DDI[0]
            if pair.get("ddi") == "true":
                label = f"DDI-{pair.get('type')}"
            if label == "DDI-None":
                ui.note(f"{path.name}: an interaction without its type (one of the training set has none) is left out")
                continue
            if first not in spans or second not in spans or label not in DDI:
                raise DataError(f"{where}: a pair names an unknown drug or type\nallowed types: {', '.join(DDI)}")
            question = _ddi_question(_masked(text, [spans[first], spans[second]]))
            name = str(pair.get("id"))
            items.append(Item(name, question, DDI.index(label), DDI, group=path.stem, stated=(text,)))
    return items


def _span(offsets: str | None) -> tuple[int, int]:
    """`3-9` or `3-9;14-20` (a drug in two parts): first and last character, both included."""
    numbers = re.findall(r"\d+", offsets or "")
    if not numbers:
        return -1, -1
    return int(numbers[0]), int(numbers[-1])


def _masked(text: str, spans: list[tuple[int, int]]) -> str:
    """The sentence with both drugs as @DRUG$; spans that overlap (a drug within a drug) become one mark."""
    (start, end), (later, last) = sorted(spans)
    if later <= end:
        return f"{text[:start]}@DRUG${text[max(end, last) + 1 :]}"
    return f"{text[:start]}@DRUG${text[end + 1 : later]}@DRUG${text[last + 1 :]}"


def mtsamples(path: Path) -> list[Item]:
    """A CSV of notes with medical_specialty (or label) and transcription (or text). The labels are those in the file.

    The published file has 33 notes without text: such rows are left out and counted on screen.
    """
    rows = list(records(path))
    label, text = "label", "text"
    if rows and "medical_specialty" in rows[0][1]:
        label, text = "medical_specialty", "transcription"
    full: list[tuple[str, Fields]] = []
    specialties = set[str]()
    for where, fields in rows:
        if str(fields.get(text) or "").strip():
            full.append((where, fields))
            specialties.add(text_field(where, fields, label))
    if rows and not full:
        text_field(*rows[0], text)
    if len(full) < len(rows):
        ui.note(f"{path.name}: {len(rows) - len(full)} notes without text are left out")
    labels = tuple(sorted(specialties))
    if len(labels) < 2:
        raise DataError(f"{path}: fewer than two labels in `{label}`\ngive the whole table of notes")
    content = f"Which medical specialty is this note from? Answer {_listed(labels)}."
    items = []
    for where, fields in full:
        question = _question(content, text_field(where, fields, text))
        gold = label_field(where, fields, label, labels)
        items.append(Item(f"line-{where.rpartition(':')[2]}", question, gold, labels))
    return items


def outcome(path: Path) -> list[Item]:
    """A yes/no outcome per text: {"text", "label": yes | no | 1 | 0, "question"?, "patient"?} (mortality ...)."""
    items = []
    for where, fields in records(path):
        asked = "Does the outcome occur?"
        if "question" in fields:
            asked = text_field(where, fields, "question")
        value = OUTCOMES.get(str(fields.get("label")).strip().lower(), fields.get("label"))
        gold = label_field(where, {**fields, "label": value}, "label", NO_YES)
        question = _question(f"{asked} Answer yes or no.", text_field(where, fields, "text"))
        patient = as_name(fields.get("patient"))
        items.append(Item(item_id(where, fields), question, gold, NO_YES, group=patient))
    return items


def _question(content: str, given: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content, "input": given},)


def _listed(labels: tuple[str, ...]) -> str:
    return f"{', '.join(labels[:-1])} or {labels[-1]}"
