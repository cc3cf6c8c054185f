"""Questions with options in the shapes that their authors and the Hub give them, worded alike for training and scoring.

PubMedQA, MedQA, MedMCQA (with `cop` or as a table of A to D), MMLU and MMLU-Pro, MedXpertQA, MedBullets, CareQA, and
plain lists of choices. An option may be empty: it is listed as it stands; a right answer may not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.medmcqa import BASE, cop_of
from qmedtune.data.reading.records import checked
from qmedtune.data.reading.rejects import Unusable

LETTERS = "ABCDEFGHIJ"
Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """The two messages of a question and its answer. letter: of the right option, options: letter -> text (both empty
    for PubMedQA, whose options are words)."""

    schema: str
    messages: tuple[Message, Message]
    read: frozenset[str]
    options: tuple[tuple[str, str], ...] = ()
    letter: str = ""


def question(fields: Fields) -> Question | None:
    """The question in a row, None where the row is none of these shapes. Raises `Unusable`."""
    for holds, shape in SHAPES:
        if holds(fields):
            return shape(fields)
    return None


def lettered(schema: str, asked: Any, options: dict[str, object], letter: str, *, read: set[str]) -> Question:
    """A question whose options are listed under their letters. Raises `Unusable`."""
    if letter not in options:
        raise Unusable("the answer is none of the options")
    texts = {}
    for key, text in options.items():
        texts[key] = _option(text)
    if len(texts) < 2 or not any(texts.values()):
        raise Unusable("fewer than two options")
    listed = "\n".join(f"{key}. {text}".rstrip() for key, text in texts.items())
    user = {"role": "user", "content": f"{checked(asked, 'question').strip()}\n{listed}"}
    answer = {"role": "assistant", "content": f"{letter}. {texts[letter]}".rstrip()}
    return Question(schema, (user, answer), frozenset(read), tuple(texts.items()), letter)


def _option(value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    return checked(value, "option").strip()


# ---- PubMedQA --------------------------------------------------------------------------------------------------------


def _is_pubmedqa(fields: Fields) -> bool:
    return "QUESTION" in fields or ("final_decision" in fields and isinstance(fields.get("context"), dict))


def _pubmedqa(fields: Fields) -> Question:
    """The authors' QUESTION and CONTEXTS, or the Hub's question and context.contexts."""
    if "QUESTION" in fields:
        asked, contexts, read = fields["QUESTION"], fields.get("CONTEXTS"), {"QUESTION", "CONTEXTS", "final_decision"}
    else:
        asked, contexts = fields.get("question"), fields["context"].get("contexts")
        read = {"question", "context", "final_decision", "pubid"}
    if not isinstance(contexts, list):
        raise Unusable("PubMedQA record without CONTEXTS")
    abstract = "\n".join(checked(context, "context").strip() for context in contexts)
    user = f"Abstract: {abstract}\nQuestion: {checked(asked, 'question').strip()}\nAnswer yes, no or maybe."
    answer = checked(fields.get("final_decision"), "answer").strip()
    said = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return Question("PubMedQA", said, frozenset(read & fields.keys()))


# ---- options by letter -----------------------------------------------------------------------------------------------


def _is_medmcqa(fields: Fields) -> bool:
    return "opa" in fields


def _medmcqa(fields: Fields) -> Question:
    """The reader puts the base of `cop` into `_cop_base`."""
    names = {}
    for letter in "ABCD":
        names[letter] = f"op{letter.lower()}"
    cop, base = cop_of(fields), fields.get(BASE, 0)
    if cop is None or not 0 <= cop - base < 4:
        raise Unusable("MedMCQA record without an answer")
    options = {}
    for letter, name in names.items():
        options[letter] = fields.get(name)
    return lettered(
        "MedMCQA", fields.get("question"), options, LETTERS[cop - base], read={"question", "cop", *names.values()}
    )


def _is_medqa(fields: Fields) -> bool:
    return "question" in fields and isinstance(fields.get("options"), (dict, list))


def _medqa(fields: Fields) -> Question:
    """Options as a mapping, as [{key, value}] or as a list of texts; the answer as a letter, a text or an index."""
    options = _options(fields["options"])
    given = fields.get("answer_idx", fields.get("answer"))
    used = {"question", "options", "answer_idx", "answer"} & fields.keys()
    if "answer_idx" in fields:
        text = None
    else:
        text = fields.get("answer")
    return lettered("MedQA", fields["question"], options, _letter(given, options, text), read=used)


def _options(options: Any) -> dict[str, object]:
    if isinstance(options, dict):  # a Parquet file has every letter in every row: those of others are null
        found: dict[str, object] = {}
        for key, text in options.items():
            if text is not None:
                found[key] = text
        return found
    if all(isinstance(option, dict) for option in options):
        try:
            result: dict[str, object] = {}
            for option in options:
                named = "letter" in option  # as MedXpertQA's own script prepares them
                result[option["letter" if named else "key"]] = option["content" if named else "value"]
            return result
        except KeyError as error:
            raise Unusable("options are not {key, value} pairs") from error
    return dict(zip(LETTERS, options, strict=False))


def _letter(given: Any, options: dict[str, object], text: Any = None) -> str:
    """The letter of an answer: itself, the one at its index, or that of the only option with its text."""
    letters = list(options)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(letters):
        return letters[given]
    said = str(given).strip()
    if said in options:
        return said
    if text is None:
        return said
    same = []
    for key, option in options.items():
        if isinstance(option, str) and option.strip() == str(text).strip():
            same.append(key)
    if len(same) == 1:
        return same[0]
    return said


def _is_mmlu(fields: Fields) -> bool:
    return "question" in fields and isinstance(fields.get("choices"), list) and "answer" in fields


def _mmlu(fields: Fields) -> Question:
    options = dict(zip(LETTERS, fields["choices"], strict=False))
    letter = _letter(fields["answer"], options, fields["answer"])
    return lettered("MMLU", fields["question"], options, letter, read={"question", "choices", "answer"})


def _is_wide(fields: Fields) -> bool:
    return {"A", "B", "C", "D"} <= fields.keys() and bool({"question", "Question"} & fields.keys())


def _wide(fields: Fields) -> Question:
    """A table with a column for each letter, and the answer as letter or index."""
    asked = next(name for name in ("question", "Question") if name in fields)
    answer = next((name for name in ("answer", "Answer", "target") if name in fields), "answer")
    options = {}
    for letter in LETTERS[:5]:
        if letter in fields:
            options[letter] = fields[letter]
    given = fields.get(answer)
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    return lettered("options A to D", fields[asked], options, _letter(given, options), read={asked, answer, *options})


def _is_medxpertqa(fields: Fields) -> bool:
    return "question" in fields and "label" in fields and isinstance(fields.get("options"), (dict, list))


def _medxpertqa(fields: Fields) -> Question:
    """Options by letter, `label` the right letter (or a list of it); the question lists the options once more."""
    if fields.get("images"):
        raise Unusable("MedXpertQA record with images")
    options, label = _options(fields["options"]), fields["label"]
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    asked = checked(fields["question"], "question").partition("\nAnswer Choices:")[0]
    return lettered("MedXpertQA", asked, options, str(label).strip(), read={"question", "options", "label"})


def _is_careqa(fields: Fields) -> bool:
    return {"op1", "op2", "op3", "op4", "cop"} <= fields.keys()


def _careqa(fields: Fields) -> Question:
    """op1 to op4, and cop, which counts from 1."""
    names = ("op1", "op2", "op3", "op4")
    cop = cop_of(fields)
    if cop is None or not 1 <= cop <= len(names):
        raise Unusable("CareQA record without an answer from 1 to 4")
    options = dict(zip(LETTERS, [fields[name] for name in names], strict=False))
    return lettered("CareQA", fields.get("question"), options, LETTERS[cop - 1], read={"question", "cop", *names})


def _is_medbullets(fields: Fields) -> bool:
    return {"opa", "opb", "answer_idx"} <= fields.keys()


def _medbullets(fields: Fields) -> Question:
    """opa to opd or ope, and answer_idx, the right letter."""
    options, read = {}, {"question", "answer_idx"}
    for letter in LETTERS[:5]:
        name = f"op{letter.lower()}"
        if fields.get(name) not in (None, ""):
            options[letter] = fields[name]
            read.add(name)
    return lettered("MedBullets", fields.get("question"), options, str(fields["answer_idx"]).strip(), read=read)


SHAPES: tuple[tuple[Callable[[Fields], bool], Callable[[Fields], Question]], ...] = (
    (_is_pubmedqa, _pubmedqa), (_is_medbullets, _medbullets), (_is_medmcqa, _medmcqa), (_is_careqa, _careqa),
    (_is_medxpertqa, _medxpertqa), (_is_medqa, _medqa), (_is_mmlu, _mmlu), (_is_wide, _wide),
)  # fmt: skip
