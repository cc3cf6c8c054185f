"""From the fields of a row to {"id", "messages": [{"role", "content"}]}: the instruction schemas of the field.

Conversations (ShareGPT, `messages`, prompt and completion lists), pairs (Alpaca, Dolly, question sets, summaries),
choices (PubMedQA, MedQA, MedMCQA, MMLU). All parts of a row that a model shall see are read: system, earlier turns,
context; what is no instruction (preference pairs, answers marked as bad, images, tools) is refused by its name. An
Alpaca `input` stays apart as the user message's `input`, because the two-form templates print it under its own heading.
Only the schema is decided here: no template, no tokens.
"""

from __future__ import annotations

from typing import Any

from qmedtune.data.reading import choices
from qmedtune.data.reading.document import Document, Fields, Record
from qmedtune.data.reading.records import Shaped, as_name, checked, content_id, find_columns
from qmedtune.data.reading.rejects import RefusedRecord, Unusable
from qmedtune.data.reading.tally import shown_names

Messages = list[dict[str, str]]

ROLES = {
    "system": "system",
    "user": "user", "human": "user", "patient": "user", "question": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "doctor": "assistant", "answer": "assistant", "agent": "assistant",
}  # fmt: skip
CONVERSATIONS = (
    ("messages", "role", "content"),
    ("conversations", "from", "value"),
    ("conversation", "role", "content"),
)
# (schema, question, answer) in lower case, first match wins.
PAIRS = (
    ("alpaca", "instruction", "output"), ("dolly", "instruction", "response"), ("alpaca", "instruction", "answer"),
    ("prompt and completion", "prompt", "completion"), ("prompt and completion", "prompt", "response"),
    ("prompt and completion", "prompt", "gold"), ("question and answer", "question", "answer"),
    ("question and answer", "question", "response"), ("question and answer", "question", "output"),
    ("question and answer", "question", "free_form_answer"), ("question and answer", "question", "answers"),
    ("question and answer", "query", "answer"), ("question and answer", "query", "response"),
    ("MeQSum", "chq", "summary"), ("ACI-Bench", "dialogue", "note"), ("MTS-Dialog", "dialogue", "section_text"),
    ("BioASQ", "body", "ideal_answer"), ("BioASQ", "body", "exact_answer"),
    ("alpaca", "input", "output"), ("iCliniq", "input", "answer_icliniq"),
)  # fmt: skip
TASKS_OF = {"MeQSum": "Summarise this question in one sentence.", "ACI-Bench": "Write the clinical note of this visit."}
TASKS_OF |= {"MTS-Dialog": "Write this section of the clinical note"}
CONTEXTS = ("context", "contexts", "passage", "snippets")
SYSTEMS = ("system", "system_prompt")
NO_INPUT = ("", "<noinput>", "nan")
UNSUPPORTED = ("images", "image", "videos", "audios", "tools")
PREFERENCE = (("chosen", "rejected"), ("chosen", "rejected_response"), ("preferred", "dispreferred"))
BAD_MARKS = ("label", "kto_tag")


def instruction_record(fields: Fields, columns: dict[str, str]) -> Record:
    """The conversation of one row. Raises `Unusable`, also for one that must not be used."""
    shaped = instruction_shape(fields, columns)
    if isinstance(shaped, RefusedRecord):
        raise Unusable(shaped.reason)
    return shaped.record


def instruction_shape(fields: Fields | Document, columns: dict[str, str]) -> Shaped | RefusedRecord:
    """The conversation of one row and what it was made of. Raises `Unusable`."""
    if isinstance(fields, Document):
        raise Unusable("a document and no instruction: read it as kind literature, clinical or general")
    row = _Row(fields, columns)
    if row.refused():
        return RefusedRecord("marked as a bad answer (label: false)")
    schema, messages = _messages(row)
    messages = _until_answered(messages)
    known = find_columns(fields, columns)
    name = as_name(fields.get(known.get("id", ""))) or as_name(fields.get("pubid"))
    name = name or content_id(*(m["content"] for m in messages))
    pmid = as_name(fields.get(known.get("pmid", ""))) or (name if schema == "PubMedQA" else None)
    for role in ("id", "pmid"):
        if role in known:
            row.read.add(known[role])
    record: Record = {"id": name, "messages": messages}
    if pmid:
        record["pmid"] = pmid
    if group := as_name(row.peek("group")):
        row.take("group")
        record["group"] = group
    return Shaped(record, frozenset(row.read), schema)


class _Row:
    """A row whose keys are found in any case, and which remembers what was taken of it."""

    def __init__(self, fields: Fields, columns: dict[str, str]):
        self.fields, self.columns = fields, columns
        self.names = {}
        for name in reversed(fields):
            self.names[name.lower()] = name
        self.read: set[str] = set()

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def peek(self, name: str) -> Any:
        return self.fields.get(self.names.get(name, ""))

    def take(self, name: str) -> Any:
        if name in self.names:
            self.read.add(self.names[name])
        return self.peek(name)

    def refused(self) -> bool:
        """Whether the row is marked as an answer that is not to be learnt (KTO)."""
        return any(self.take(name) is False for name in BAD_MARKS if isinstance(self.peek(name), bool))


def _messages(row: _Row) -> tuple[str, Messages]:
    """(schema, conversation). Raises `Unusable`."""
    mapped = []
    for role in ("instruction", "input", "output"):
        mapped.append(row.columns.get(role))
    if mapped[0] or mapped[2]:
        return "columns", _mapped(row, mapped[0] or "instruction", mapped[1] or "input", mapped[2] or "output")
    for name in UNSUPPORTED:
        if row.peek(name):
            raise Unusable(f"a record with `{name}`, which are not supported")
    if any(row.has(*pair) for pair in PREFERENCE):
        raise Unusable("a preference pair (chosen and rejected), which is not supported: give one answer per question")
    for key, role, content in CONVERSATIONS:
        if row.has(key):
            return _conversation_name(key), _with_system(row, _turns(row.take(key), role, content))
    if isinstance(row.peek("prompt"), list) and isinstance(row.peek("completion"), list):
        turns = [*row.take("prompt"), *row.take("completion")]
        return "prompt and completion", _with_system(row, _turns(turns, "role", "content"))
    if found := choices.question(row.fields):
        row.read |= found.read
        return found.schema, list(found.messages)
    for schema, question, answer in PAIRS:
        if row.has(question, answer):
            return schema, _pair(row, schema, question, answer)
    if set(row.names) <= {"id", "text"}:
        raise Unusable("a finished text (`text`) and no question with answer: read it as kind literature or general")
    raise Unusable(
        f"no known instruction schema among {shown_names(row.fields)}; "
        "name its columns with `columns: {instruction, input, output}`"
    )


def _conversation_name(key: str) -> str:
    if key == "conversations":
        return "ShareGPT"
    return "messages"


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _mapped(row: _Row, question: str, extra: str, answer: str) -> Messages:
    """A pair whose columns the recipe names."""
    for name in (question, answer):
        if name not in row.fields:
            raise Unusable("the column named for the question or the answer is missing")
    row.read |= {question, answer} | ({extra} & row.fields.keys())
    user = _said("user", checked(row.fields[question], "question").strip())
    if given := _given(row.fields.get(extra)):
        user["input"] = given
    return _with_system(row, [user, _said("assistant", _answer(row.fields[answer]))])


def _pair(row: _Row, schema: str, question: str, answer: str) -> Messages:
    """Question and answer with all that belongs to them: input and context, earlier turns, system."""
    asked = row.take(question)
    given = []
    for name in ("input", *CONTEXTS):
        if name != question and row.has(name):
            given.append(_given(row.take(name)))
    extra = "\n\n".join(part for part in given if part)
    if schema in TASKS_OF:
        if row.has("section_header"):
            header = row.take("section_header")
        else:
            header = None
        asked, extra = _task(schema, header), checked(asked, "question").strip()
    elif isinstance(asked, str) and not asked.strip() and extra:
        asked, extra = extra, ""  # an empty instruction, and the question in its input
    user = _said("user", checked(asked, "question").strip())
    if extra:
        user["input"] = extra
    if row.has("answers"):
        row.take("answers")  # of emrQA and SQuAD: the reader has put the first into its own field
    messages = [*_history(row.take("history")), user, _said("assistant", _answer(row.take(answer)))]
    return _with_system(row, messages)


def _task(schema: str, header: Any) -> str:
    task = TASKS_OF[schema]
    if schema != "MTS-Dialog":
        return task
    if isinstance(header, str) and header.strip():
        return f"{task}: {header.strip()}."
    return f"{task}."


def is_task(content: str) -> bool:
    """Whether a user's words are the task that this module states (summarise ...), and no text of the data."""
    return content.startswith(tuple(TASKS_OF.values()))


def _answer(value: Any) -> str:
    """An answer in words; of several (SQuAD, BioASQ, K-QA) the first."""
    if isinstance(value, dict):
        value = value.get("text")
    while isinstance(value, list):
        if not value:
            raise Unusable("answer is empty")
        value = value[0]
        if isinstance(value, dict):
            value = value.get("text")
    return checked(value, "answer").strip()


def _given(value: Any) -> str:
    """What a question is asked about: a text, or a list of texts or of {text}; "" where there is none."""
    if isinstance(value, dict):
        value = value.get("contexts")
    if isinstance(value, list):
        texts: list[str] = []
        for entry in value:
            text = entry.get("text") if isinstance(entry, dict) else entry
            texts.append(checked(text, "context").strip())
        return "\n".join(texts)
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_INPUT):
        return ""
    if isinstance(value, float):  # NaN: an empty cell of a Parquet file
        return ""
    return checked(value, "input").strip()


def _until_answered(messages: Messages) -> Messages:
    """The conversation without what nobody has answered."""
    for count in range(len(messages), 0, -1):
        if messages[count - 1]["role"] == "assistant":
            return messages[:count]
    raise Unusable("no assistant message")


def _history(turns: Any) -> Messages:
    """Alpaca's earlier turns: a list of [question, answer]."""
    if turns in (None, "", []):
        return []
    if not isinstance(turns, list):
        raise Unusable("history is not a list of [question, answer]")
    messages: Messages = []
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("history is not a list of [question, answer]")
        asked, answered = turn
        messages += [_said("user", checked(asked, "history").strip()), _said("assistant", _answer(answered))]
    return messages


def _with_system(row: _Row, messages: Messages) -> Messages:
    """The conversation after the system message that stands beside it, where it has none of its own."""
    name = next((name for name in SYSTEMS if row.has(name)), None)
    if name:
        system = row.take(name)
    else:
        system = None
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"] != system.strip():
            raise Unusable("two system messages, one beside the conversation and one in it")
        return messages
    return [_said("system", checked(system, "system").strip()), *messages]


def _turns(turns: Any, role_key: str, content_key: str) -> Messages:
    if not isinstance(turns, list) or not turns:
        raise Unusable("conversation is not a list of messages")
    messages: Messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable("a message is not an object")
        role = ROLES.get(str(turn.get(role_key, turn.get("role", turn.get("from")))).lower())
        if role is None:
            raise Unusable("a message has an unknown role")
        if turn.get("tool_calls"):
            raise Unusable("a message with tool calls, which are not supported")
        content = _content(turn.get(content_key, turn.get("content", turn.get("value"))))
        if messages and role == messages[-1]["role"]:
            raise Unusable(f"two {role} messages follow each other")
        messages.append(_said(role, content))
        if role == "user" and (given := _given(turn.get("input"))):
            messages[-1]["input"] = given  # as a shard of ours has it (data/shards/)
    if any(m["role"] == "system" for m in messages[1:]):
        raise Unusable("a system message that is not the first")
    if next((m["role"] for m in messages if m["role"] != "system"), None) != "user":
        raise Unusable("the conversation does not start with the user")
    return messages


def _content(value: Any) -> str:
    """The text of a message; of OpenAI's content parts those of type text, which must be all."""
    if not isinstance(value, list):
        return checked(value, "message").strip()
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Unusable("a message holds a part that is no text")
        texts.append(checked(part.get("text"), "message"))
    return checked("\n".join(texts), "message").strip()
