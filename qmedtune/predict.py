"""Answers for a file of records, with the template that the model was trained with.

Records stream in windows: one is read, answered in batches of similar length, written and flushed to `<out>.part`. A
killed prediction goes on behind the last whole line; `out` itself appears in one rename when every record has its row,
in the order of the input. Neither questions nor answers go anywhere else: no log, no progress line, no error message.
Deliberately absent: sampling, extraction of labels (tasks/ does that for benchmarks).
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TextIO, TypedDict

from qmedtune import store, ui
from qmedtune.allowed import Quantization
from qmedtune.data.packing.framing import Frame, Prompt, codec_of, frame_in, frame_of
from qmedtune.data.reading.records import checked
from qmedtune.data.reading.rejects import Damaged, Unusable
from qmedtune.data.reading.sources import READERS, format_of, source_files
from qmedtune.disk import owner_only
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.generation import generate
from qmedtune.evaluation.open_model import OpenModel, check_template, fingerprint, locate, open_model
from qmedtune.evaluation.scoring import BATCH_TOKENS, max_positions
from qmedtune.evaluation.shorten import Fitted, fitted
from qmedtune.interrupt import stop
from qmedtune.model_files import JsonObject, read_json
from qmedtune.recipe import SourceSection
from qmedtune.record import code_versions
from qmedtune.results import Facts
from qmedtune.tasks.items import Fields, field_names, item_id

WINDOW = 128  # records between two writes: what a kill can cost
SEAL = ".seal"
NO_ROOM = "system message and instruction leave no room for the question"
NOT_WRITTEN = (".xlsx", ".xls", ".parquet", ".tsv", ".docx", ".pdf")
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
QUESTION_COLUMNS = ("instruction", "question", "prompt", "query", "text", "transcription")
COLUMNS: tuple[str, ...] = ("id", "answer", "ended", "tokens", "error")

Record = tuple[str, list[dict[str, str]] | Damaged]


class Row(TypedDict):
    """One line of the answers' file. ended: eos, stop or length; truncated: the question was cut."""

    id: str
    answer: str | None
    error: NotRequired[str]
    ended: NotRequired[str]
    tokens: NotRequired[int]
    truncated: NotRequired[bool]


class Predicted(Facts):
    """How many records were read, answered, damaged, had their question truncated or their answer cut; tokens: of all
    answers."""

    records: int
    answered: int
    damaged: int
    truncated: int
    cut: int
    tokens: int
    out: str
    template: str
    max_new_tokens: int


class PromptRecord(Facts):
    """A record as the model would be asked it. end: ids, stop: strings that end an answer. error: why it is not."""

    id: str
    error: str | None = None
    ids: list[int] = []
    end: list[int] = []
    stop: list[str] = []
    truncated: bool = False


class DryRun(Facts):
    """What `predict` would ask."""

    records: list[PromptRecord]
    template: str


def predict(
    name: str,
    data: Path,
    out: Path,
    *,
    column: str | None = None,
    instruction: str | None = None,
    base: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    quantization: Quantization | None = None,
    offline: bool = False,
) -> Predicted:
    """Answer every record of a CSV, TSV, JSON, JSON-lines or Parquet file; `out` is CSV by its name, else JSON lines.

    column: the field that holds the question, a text or a conversation (default: `messages`, or the first of
        QUESTION_COLUMNS)
    instruction: asked about every record; the column's text is then its input ("Summarise this note.")
    A damaged record has an error and no answer; one that is too long for the model loses its middle (shorten.py) and
    counts as truncated. Given again when `out` is made, it does nothing. RecipeError where `out` is something else.
    """
    file = _one_file(data)
    _check_name(out)
    location = locate(name, base=base, template=template, offline=offline)
    check_template(location)
    part = out.with_name(out.name + ".part")
    paths = [fingerprint(path) for path in (location.base, *location.adapters, file)]
    asked = [repr(location.template), column, instruction, max_new_tokens, quantization]
    key = store.sha256_json([paths, asked, code_versions()])
    if (facts := _made_before(out, key)) is not None:
        ui.note(f"{out}: these answers are there already, nothing is left to do")
        return facts
    _check_new(out)
    with owner_only(), store.lock_file(part, "wait for it, or give another --out") as rows:
        _check_new(out)  # by a process that was first, between the look above and the lock
        done = _continue(part, rows, key)
        questions = _records(file, column, instruction)
        opened = open_model(location, quantization)
        length = min(max_new_tokens, max_positions(opened.model) // 2)

        def answer(records: list[Record]) -> list[Row]:
            return _answers(opened, records, length, batch_tokens)

        _write_rows(rows, islice(questions, done, None), answer, done)
        made = PredictionFile(out, key, location.template.name, length)
        return _publish(part, rows, made, (name for name, _ in _records(file, column, instruction)))


@dataclass(frozen=True)
class PredictionFile:
    """The file that is made, the key of what makes it, and what is told of it besides its counts."""

    out: Path
    key: str
    template: str = ""
    max_new_tokens: int = 0

    @property
    def seal(self) -> Path:
        """Beside it: key, hash and counts, so that the same command given again has nothing to do."""
        return self.out.with_name(self.out.name + SEAL)


def _made_before(out: Path, key: str) -> Predicted | None:
    """The counts of answers that the same command made and nobody changed since; None where there are none."""
    seal = PredictionFile(out, key).seal
    if not out.is_file() or not seal.is_file():
        return None
    try:
        found = json.loads(seal.read_text(encoding="utf-8"))
        if found["key"] != key or found["sha256"] != store.sha256_file(out):
            return None
        return Predicted.model_validate(found["facts"])
    except (ValueError, LookupError, TypeError):  # not what was written: then it says nothing
        return None


def _check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise RecipeError(
            f"--out: {out} is there already, and not as this command makes it\nmove it away, or give another name"
        )


def _check_name(out: Path) -> None:
    """RecipeError for a name that promises another format than the one that would be written, or a folder that is not
    there."""
    if out.suffix.lower() in NOT_WRITTEN:
        raise RecipeError(f"--out: {out}: answers are not written as {out.suffix}\nallowed: .csv, .jsonl")
    if not out.parent.is_dir():
        raise RecipeError(f"--out: there is no folder {out.parent}\nmake it: mkdir -p {out.parent}")


@dataclass(frozen=True)
class QuestionFile:
    """What is asked of whom: a file of records, the column of the question, and an instruction about it."""

    data: Path
    column: str | None = None
    instruction: str | None = None


def dry_run(
    name: str,
    asked: QuestionFile,
    *,
    base: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 256,
    offline: bool = False,
) -> DryRun:
    """What `predict` would ask, token for token; no weights are read."""
    file = _one_file(asked.data)
    location = locate(name, base=base, template=template, offline=offline)
    check_template(location)
    frame = frame_in(location.template, location.base)
    positions = read_json(location.base / "config.json")["max_position_embeddings"]
    room = positions - min(max_new_tokens, positions // 2)
    records = [_would_ask(frame, room, record) for record in _records(file, asked.column, asked.instruction)]
    return DryRun(records=records, template=location.template.name)


def _would_ask(frame: Frame, room: int, record: Record) -> PromptRecord:
    name, messages = record
    if isinstance(messages, Damaged):
        return PromptRecord(id=name, error=messages.reason)
    [found] = _fitted(frame, [messages], room)
    if found is None:
        return PromptRecord(id=name, error=NO_ROOM)
    asked = found.asked
    ends, stop = sorted(asked.ends), list(asked.stop)
    return PromptRecord(id=name, ids=asked.ids, end=ends, stop=stop, truncated=not found.whole)


def _one_file(data: Path) -> Path:
    files = source_files(SourceSection(path=str(data), kind="instructions"))
    if len(files) != 1 or format_of(files[0], "auto") not in FORMATS:
        raise RecipeError(f"--data: {data} is not one file of records\nallowed: {', '.join(FORMATS)}")
    return files[0]


# ---- questions -------------------------------------------------------------------------------------------------------


def _records(file: Path, column: str | None, instruction: str | None) -> Iterator[Record]:
    """(id, messages) of every record in order, `Damaged` in place of the messages where there is no question."""
    seen_question = False
    for line, fields in READERS[format_of(file, "auto")](file):
        where = f"{file}:{line}"
        if isinstance(fields, Damaged):
            yield f"line-{line}", fields
            continue
        if not seen_question:
            _check_columns(fields, column, where)
            seen_question = True
        try:
            yield item_id(where, fields), _messages(fields, column, instruction)
        except Unusable as error:
            yield item_id(where, fields), Damaged(str(error))


def _check_columns(fields: Fields, column: str | None, where: str) -> None:
    if column is not None and column not in fields:
        raise RecipeError(f"--column: {where} has no column {column!r}\ncolumns there: {field_names(fields)}")
    if column is None and "messages" not in fields and not _question_column(fields):
        raise RecipeError(
            f"{where}: which column holds the question?\ncolumns there: {field_names(fields)}\n"
            f"name it with --column (without: {', '.join(QUESTION_COLUMNS)} or messages)"
        )


def _question_column(fields: Fields) -> str | None:
    for name in QUESTION_COLUMNS:
        if name in fields:
            return name
    return None


def _messages(fields: Fields, column: str | None, instruction: str | None) -> list[dict[str, str]]:
    """The conversation to continue. Raises `Unusable` with a reason that quotes nothing."""
    if column is None and isinstance(fields.get("messages"), list):
        return _turns(fields["messages"])
    name = column or _question_column(fields)
    asked = fields.get(str(name))
    if isinstance(asked, list):  # a conversation under another name, as `prompt` in HealthBench's files
        return _turns(asked)
    text = checked(asked, "question").strip()
    if instruction:
        return [{"role": "user", "content": instruction, "input": text}]
    message = {"role": "user", "content": text}
    given = fields.get("input")
    if name == "instruction" and isinstance(given, str) and given.strip():
        message["input"] = given.strip()
    return [message]


def _turns(messages: list[Any]) -> list[dict[str, str]]:
    return [_message(message) for message in _until_question(messages)]


def _until_question(messages: list[Any]) -> list[Any]:
    """The conversation without what follows the user's last message."""
    for count in range(len(messages), 0, -1):
        message = messages[count - 1]
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[:count]
    raise Unusable("no user message")


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise Unusable("a message without a role")
    return {"role": message["role"], "content": checked(message.get("content"), "message")}


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answers(opened: OpenModel, records: list[Record], max_new_tokens: int, batch_tokens: int) -> list[Row]:
    rows: list[Row] = []
    asked: list[Row] = []  # those of the rows that have a question
    conversations = []
    for name, messages in records:
        row: Row = {"id": name, "answer": None}
        rows.append(row)
        if isinstance(messages, Damaged):
            row["error"] = messages.reason
        else:
            asked.append(row)
            conversations.append(messages)
    room = max_positions(opened.model) - max_new_tokens
    frame = frame_of(opened.template, codec_of(opened.tokenizer))
    prompts: list[Prompt] = []
    whose: list[Row] = []
    for row, one in zip(asked, _fitted(frame, conversations, room), strict=True):
        if one is None:
            row["error"] = NO_ROOM
            continue
        row["truncated"] = not one.whole
        prompts.append(one.asked)
        whose.append(row)
    answers = generate(opened.model, opened.tokenizer, prompts, max_new_tokens, batch_tokens=batch_tokens)
    for row, answer in zip(whose, answers, strict=True):
        row["answer"], row["ended"], row["tokens"] = answer.text, answer.ended, answer.tokens
    return rows


def _fitted(frame: Frame, conversations: Sequence[list[dict[str, str]]], room: int) -> list[Fitted | None]:
    """Each as it is asked: those that are too long for the model's positions without their middle, and None where what
    stands around the question leaves no room for it."""
    found: list[Fitted | None] = []
    for messages, asked in zip(conversations, frame.ask(conversations), strict=True):
        if len(asked.ids) <= room:
            found.append(Fitted(asked, messages))
            continue
        try:
            found.append(fitted(frame, messages, room))
        except RecipeError:
            found.append(None)
    return found


def _write_rows(
    file: BinaryIO, questions: Iterable[Record], answer: Callable[[list[Record]], list[Row]], done: int
) -> None:
    questions = iter(questions)
    file.seek(0, os.SEEK_END)
    with (
        ui.progress_bar("predict", unit="records", completed=done) as bar,
        stop.graceful(),
    ):
        while window := list(islice(questions, WINDOW)):
            for row in answer(window):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(bar.completed + len(window))
            stop.raise_if_requested()


def _continue(part: Path, file: BinaryIO, key: str) -> int:
    """Rows that an interrupted attempt left in `part`, whose first line is the key; a line cut by a kill is removed."""
    first = file.readline()
    if not first.endswith(b"\n"):  # new, or killed within the first write
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"key": key}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return 0
    if _whole(first, "key", part, 1)["key"] != key:
        raise RecipeError(
            f"{part}: begun with another model, file or option, or by another version\n"
            "give the same command again, remove that file, or give another --out"
        )
    done, end = 0, file.tell()
    for line in file:
        if line.endswith(b"\n"):
            done, end = done + 1, end + len(line)
            _whole(line, "id", part, done + 1)
    file.truncate(end)
    if done:
        ui.note(f"{done} records were answered before; going on from there")
    return done


def _whole(line: bytes, key: str, part: Path, number: int) -> JsonObject:
    """A line of `part`. RunError where it is not what was written."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or key not in row:
        raise RunError(
            f"{part}:{number}: damaged since it was written\n"
            "remove that line and all after it, or the file, and give the same command again"
        )
    return row


def _publish(part: Path, rows: BinaryIO, made: PredictionFile, ids: Iterable[str]) -> Predicted:
    """Give the rows their final form and name; counts of what they hold.

    ids: of the records of the input, in order. RunError where the rows are not theirs, one for one.
    """
    out = made.out
    counts: Counter[str] = Counter(records=0, answered=0, damaged=0, truncated=0, cut=0, tokens=0)
    temporary = out.with_name(out.name + ".tmp")
    rows.seek(0)
    rows.readline()
    with _new_file(temporary) as file:
        writer = None
        if out.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
        for line, name in zip_longest(rows, ids):
            row: Row | None = json.loads(line) if line else None
            if row is None or row.get("id") != name:
                raise RunError(
                    f"{part}: row {counts['records'] + 1} is not of the record that stands there in the input\n"
                    "the input changed, or the file was edited; remove it and give the same command again"
                )
            counts.update(records=1, answered=row["answer"] is not None, damaged="error" in row)
            counts.update(
                truncated=row.get("truncated", False), cut=row.get("ended") == "length", tokens=row.get("tokens", 0)
            )
            if writer:
                writer.writerow(row)
            else:
                file.write(line.decode())
        file.flush()
        os.fsync(file.fileno())
    facts = Predicted(**counts, out=str(out), template=made.template, max_new_tokens=made.max_new_tokens)
    sealed = {"key": made.key, "sha256": store.sha256_file(temporary), "facts": facts.model_dump(mode="json")}
    store.write_json(made.seal, sealed)
    store.rename(temporary, out)
    part.unlink()
    return facts


def _new_file(path: Path) -> TextIO:
    """For writing, of a name that a link cannot hold: what a killed attempt left of it goes first."""
    path.unlink(missing_ok=True)
    return path.open("x", encoding="utf-8", newline="")
