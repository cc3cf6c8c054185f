"""From the fields of a row to {"id", "messages": [{"role", "content"}]}: the instruction schemas of the field.

Alpaca keys, ShareGPT `conversations`, `messages`, prompt/completion pairs, query-answer-choices-gold (Me-LLaMA),
PubMedQA, MedQA and MedMCQA (emrQA comes as Alpaca keys from notes.py). An Alpaca `input` stays apart as the user
message's `input`, because the two-form templates print it under its own heading. Only the schema is decided here: no
template, no tokens.
"""

from __future__ import annotations

from typing import Any

from qmedtune.data.records import as_name, checked, content_id, find_columns
from qmedtune.data.rejects import Unusable

ROLES = {
    "system": "system",
    "user": "user", "human": "user", "patient": "user", "question": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "doctor": "assistant", "answer": "assistant", "agent": "assistant",
}  # fmt: skip
# (question, answer) columns, first match wins.
PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("prompt", "gold"), ("question", "answer"), ("query", "answer"), ("query", "response"), ("input", "output"),
)  # fmt: skip
NO_INPUT = ("", "<noinput>", "nan")
LETTERS = "ABCDEFGHIJ"


def instruction_record(fields: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The conversation of one row. Raises `Unusable`."""
    messages = _messages(fields, columns)
    if not any(m["role"] == "assistant" for m in messages):
        raise Unusable("no assistant message")
    if messages[-1]["role"] != "assistant":
        messages = messages[: 1 + max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
    known = find_columns(fields, columns)
    name = as_name(fields.get(known.get("id", ""))) or content_id(*(m["content"] for m in messages))
    pmid = as_name(fields.get(known.get("pmid", ""))) or (name if "QUESTION" in fields else None)
    extra = {"group": as_name(fields["group"])} if fields.get("group") else {}
    return {"id": name, "messages": messages, **({"pmid": pmid} if pmid else {}), **extra}


def _messages(fields: dict[str, Any], columns: dict[str, str]) -> list[dict[str, str]]:
    mapped = [columns.get(role) for role in ("instruction", "input", "output")]
    if mapped[0] or mapped[2]:
        return _pair(fields, mapped[0] or "instruction", mapped[2] or "output", mapped[1] or "input")
    for key, role, content in (
        ("messages", "role", "content"),
        ("conversations", "from", "value"),
        ("conversation", "role", "content"),
    ):
        if key in fields:
            return _turns(fields[key], role, content)
    if "QUESTION" in fields:
        return _pubmedqa(fields)
    if "opa" in fields:
        return _medmcqa(fields)
    if "question" in fields and isinstance(fields.get("options"), (dict, list)):
        return _medqa(fields)
    for question, answer in PAIRS:
        if question in fields and answer in fields:
            return _pair(fields, question, answer, "input" if question != "input" else None)
    raise Unusable("no known instruction schema; name its columns with `columns: {instruction, input, output}`")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pair(fields: dict[str, Any], question: str, answer: str, extra: str | None) -> list[dict[str, str]]:
    for name in (question, answer):
        if name not in fields:
            raise Unusable("the column named for the question or the answer is missing")
    user = _said("user", checked(fields[question], "question").strip())
    given = fields.get(extra) if extra else None
    if isinstance(given, str) and given.strip().lower() not in NO_INPUT:
        user["input"] = checked(given, "input").strip()
    system = fields.get("system")
    start = [_said("system", system.strip())] if isinstance(system, str) and system.strip() else []
    return [*start, user, _said("assistant", checked(fields[answer], "answer").strip())]


def _turns(turns: Any, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise Unusable("conversation is not a list of messages")
    messages: list[dict[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable("a message is not an object")
        role = ROLES.get(str(turn.get(role_key, turn.get("role", turn.get("from")))).lower())
        if role is None:
            raise Unusable("a message has an unknown role")
        content = checked(turn.get(content_key, turn.get("content", turn.get("value"))), "message").strip()
        if messages and role == messages[-1]["role"]:
            raise Unusable(f"two {role} messages follow each other")
        messages.append(_said(role, content))
    if any(m["role"] == "system" for m in messages[1:]):
        raise Unusable("a system message that is not the first")
    if next(m["role"] for m in messages if m["role"] != "system") != "user":
        raise Unusable("the conversation does not start with the user")
    return messages


def _pubmedqa(fields: dict[str, Any]) -> list[dict[str, str]]:
    contexts = fields.get("CONTEXTS")
    if not isinstance(contexts, list):
        raise Unusable("PubMedQA record without CONTEXTS")
    abstract = "\n".join(checked(context, "context").strip() for context in contexts)
    question = checked(fields["QUESTION"], "question").strip()
    user = f"Abstract: {abstract}\nQuestion: {question}\nAnswer yes, no or maybe."
    return [_said("user", user), _said("assistant", checked(fields.get("final_decision"), "answer").strip())]


def _choice(question: str, options: dict[str, str], letter: str) -> list[dict[str, str]]:
    if letter not in options:
        raise Unusable("the answer is none of the options")
    listed = "\n".join(f"{key}. {checked(text, 'option').strip()}" for key, text in options.items())
    user = _said("user", f"{checked(question, 'question').strip()}\n{listed}")
    return [user, _said("assistant", f"{letter}. {options[letter].strip()}")]


def _medqa(fields: dict[str, Any]) -> list[dict[str, str]]:
    """Options as a mapping or as [{key, value}]; the answer as a letter in `answer_idx`."""
    options = fields["options"]
    if isinstance(options, list):
        try:
            options = {option["key"]: option["value"] for option in options}
        except (KeyError, TypeError) as error:
            raise Unusable("options are not {key, value} pairs") from error
    return _choice(fields["question"], options, str(fields.get("answer_idx", fields.get("answer"))))


def _medmcqa(fields: dict[str, Any]) -> list[dict[str, str]]:
    """`cop` counts from 1 in the authors' files and from 0 on the Hub; the reader puts the base into `_cop_base`."""
    options = {letter: fields.get(f"op{letter.lower()}") for letter in "ABCD"}
    cop, base = fields.get("cop"), fields.get("_cop_base", 0)
    if not isinstance(cop, int) or not 0 <= cop - base < 4:
        raise Unusable("MedMCQA record without an answer")
    return _choice(fields["question"], options, LETTERS[cop - base])  # type: ignore[arg-type]
