"""What a benchmark is: items with prompts and gold answers, and how an answer is read, judged and summed up.

Files are read whole and strictly: a benchmark with a missing field, an unknown answer or an empty split is refused
with file and line, because a score over "most of" a test set is not that test set's score.
Deliberately absent: models and tokens (evaluation/), which file is which split and examples (shots.py), downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from qmedtune.data.reading.formats import READERS, format_of
from qmedtune.data.reading.instructions import instruction_record
from qmedtune.data.reading.records import as_name
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unusable
from qmedtune.data.reading.row_formats import Row
from qmedtune.data.reading.tally import shown_names
from qmedtune.errors import DataError, RecipeError

Message = dict[str, str]
Fields = dict[str, Any]
"""One record of a benchmark as its file has it: column or key -> value, unchecked."""
Judgement = dict[str, Any]
"""What is kept of one answer: numbers and labels, JSON-safe, never text of a source."""

NO_YES = ("no", "yes")
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "xlsx", "medquad", "liveqa")


@dataclass(frozen=True)
class Item:
    """One question. `gold` indexes `options` where there are any, else it is what the task's `judge` compares with.

    options: the answers whose log-likelihood is compared, as the model would write them ("A", "yes", a sentence)
    texts: what the options say where they are letters; a generated answer may give either
    group: what several items were taken from (a note, a patient, a premise): drawn together when scores are resampled,
        and none is an example for another
    shots: ids of the examples that stand in `messages` before the question
    stated: question and passages apart and without options, as training text may hold them; empty: the user's messages
    pmid: the PubMed abstract that the item was made from
    identity: what is the same of the item in every task, under every limit and in other words (item_parts.py)
    """

    id: str
    messages: tuple[Message, ...]
    gold: Any
    options: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    facet: str | None = None
    group: str | None = None
    shots: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    pmid: str | None = None
    identity: str = ""

    @property
    def leaks(self) -> tuple[str, ...]:
        """The texts of the item that training text must not hold."""
        if self.stated:
            return self.stated
        asked = []
        for message in self.messages:
            if message["role"] == "user":
                asked.append(message.get("input") or message["content"])
        return tuple(asked)


@dataclass(frozen=True)
class Task:
    """Items and their metric. `metric` names the main one in what `aggregate` returns (higher is better).

    metrics: every metric of the task; with it the judgement's number whose mean it is, where it is a mean (it is then
        resampled without `aggregate`)
    parse: a generated answer -> prediction, None when it cannot be read (counted, and judged as wrong)
    judge: item and prediction -> what is kept of it
    aggregate: all judgements -> scores
    write: the right answer as an example shows it; its beginning is the option where there are options
    draws: the items once more per draw of examples, with the examples in their messages; empty without examples
    prompts, extraction: the named set that words the questions, and the named way in which answers are read
    """

    name: str
    items: tuple[Item, ...]
    metric: str
    metrics: dict[str, str | None]
    parse: Callable[[str, Item], Any]
    judge: Callable[[Item, Any], Judgement]
    aggregate: Callable[[list[Judgement]], dict[str, float]]
    max_new_tokens: int = 16
    write: Callable[[Item], str] = field(default_factory=lambda: written)
    draws: tuple[tuple[Item, ...], ...] = ()
    shots_from: str | None = None
    prompts: str = "own"
    extraction: str = "stated"

    @property
    def asked(self) -> list[Item]:
        """What the model is asked, draw after draw."""
        asked: list[Item] = []
        for draw in self.draws:
            asked += draw
        return asked or list(self.items)


def written(item: Item) -> str:
    """The right answer as the training data writes it: "C. Metformin", "yes", the reference text."""
    if item.texts:
        return f"{item.options[item.gold]}. {item.texts[item.gold]}"
    if item.options:
        return item.options[item.gold]
    return item.gold


def with_metric(task: Task, name: str) -> Task:
    """The task with another of its metrics as the main one."""
    if name not in task.metrics:
        raise RecipeError(f"evaluate.tasks: {task.name} has no metric {name!r}\n{allowed(name, list(task.metrics))}")
    return replace(task, metric=name)


def allowed(name: str, known: Sequence[str]) -> str:
    """For a message about an unknown name: the one that may be meant, and all there are."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


def records(path: Path) -> Iterator[tuple[str, Fields]]:
    """("file:line", fields) of every record of a file of records (JSON, tables, Parquet ...), read as sources are.
    DataError at the first bad one."""
    format = format_of(path, "auto")
    if format not in FORMATS:
        raise DataError(f"{path}: unknown kind of file\nallowed: {', '.join(FORMATS)} (also with .gz)")
    yield from checked_rows(path, READERS[format](path))


def checked_rows(path: Path, rows: Iterator[Row]) -> Iterator[tuple[str, Fields]]:
    """Rows of a reader with their "file:line"; DataError at the first damaged one."""
    for line, fields in rows:
        if isinstance(fields, RefusedRecord):
            continue
        if isinstance(fields, Damaged):
            raise DataError(f"{path}:{line}: {fields.reason}\na benchmark is read whole or not at all: mend the file")
        yield f"{path}:{line}", fields


def text_field(where: str, fields: Fields, name: str) -> str:
    """A field that must be text. The error names the field and never quotes the record."""
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        state = "not text"
        if name not in fields:
            state = "missing"
        elif value in ("", None):
            state = "empty"
        raise DataError(f"{where}: field `{name}` is {state}\nfields here: {field_names(fields)}")
    return value.strip()


def field_names(fields: Fields) -> str:
    """Column names for a message. The first line of a file without header is data: only known names are shown."""
    known = shown_names(fields)
    if known[0].isdigit() or known == "no column":
        return f"none with a name that is known ({len(fields)})"
    return known


def label_field(where: str, fields: Fields, name: str, labels: tuple[str, ...]) -> int:
    """Index of a field's value among `labels`, compared without case."""
    value = text_field(where, fields, name).casefold()
    for index, label in enumerate(labels):
        if label.casefold() == value:
            return index
    raise DataError(f"{where}: `{name}` is none of the labels\nallowed: {', '.join(labels)}")


def require(module: str, extra: str = "metrics") -> None:
    """A metric library that is an extra must be there before anything is scored."""
    if find_spec(module) is None:
        raise RecipeError(f"evaluate.tasks: this metric needs {module}\npip install 'qmedtune[{extra}]'")


def sklearn_metrics() -> Any:
    """scikit-learn's metrics, imported when scores are summed up and not before."""
    return import_module("sklearn.metrics")


def conversation(where: str, fields: Fields) -> tuple[tuple[Message, ...], str]:
    """The question as the training data words it, and its answer: both sides of a record in a known schema."""
    try:
        *question, answer = instruction_record(fields, {})["messages"]
    except Unusable as error:
        raise DataError(f"{where}: {error}") from error
    return tuple(question), answer["content"]


def item_id(where: str, fields: Fields) -> str:
    """The record's own name, else its line."""
    for key in ("id", "_key", "pmid", "pubid", "pairID", "realid", "prompt_id"):
        if name := as_name(fields.get(key)):
            return name
    return f"line-{where.rpartition(':')[2]}"


def checked_items(name: str, path: Path, items: list[Item], *, limit: int | None, seed: int) -> tuple[Item, ...]:
    """Refuse an empty benchmark or one that names two items alike; draw `limit` items (files are often sorted)."""
    if not items:
        raise DataError(f"{path}: no item for task {name}\ngive the split that holds the questions and answers")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"{path}: two items of task {name} are called {item.id!r}\neach needs an id of its own")
        seen.add(item.id)
    if limit is None or limit >= len(items):
        return tuple(items)
    drawn = Random(seed).sample(range(len(items)), limit)
    return tuple(items[place] for place in sorted(drawn))
