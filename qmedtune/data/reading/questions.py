"""Consumer questions with answers in XML: MedQuAD's documents and the TREC 2017 LiveQA medical task.

Each gives rows of {id, question, answer, group}; of several reference answers the first is the answer, and `answers`
holds all. A question whose answer was taken out (copyright) is refused, not damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading import xml_files
from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.rejects import Damaged, RefusedRecord

LIVEQA_ROOTS = (
    "LiveQA2017-Medical-Test-Set-Full", "LiveQA2017-Medical-Training-Data", "NLM-QUESTIONS", "NLM-QUESTION",
    "NLM-QA-DATASET",
)  # fmt: skip
NO_ANSWER = RefusedRecord("no answer")


def read_medquad(path: Path) -> Iterator[xml_files.Numbered]:
    """The pairs of one document about a disease, drug or test."""
    found = xml_files.read_file(path, _medquad)
    if not isinstance(found, list):
        yield 1, found
        return
    yield from enumerate(found, start=1)


def _medquad(root: Any) -> list[Any] | Damaged:
    if xml_files.local(root) != "Document":
        return Damaged(f"XML is not of MedQuAD: its root is `{xml_files.local(root)[:40]}`")
    pairs = root.findall("QAPairs/QAPair")
    if not pairs:
        return Damaged("MedQuAD document without QAPair")
    found = []
    for pair in pairs:
        found.append(_pair(root, pair))
    return found


def _pair(root: Any, pair: Any) -> Fields | Damaged | RefusedRecord:
    question, answer = pair.find("Question"), pair.findtext("Answer")
    if question is None or not (question.text or "").strip():
        return Damaged("MedQuAD pair without a question")
    if not (answer or "").strip():
        return NO_ANSWER
    name = question.get("qid") or f"{root.get('id')}-{pair.get('pid')}"
    return {
        "id": name, "question": _flowing(question.text), "answer": _flowing(answer), "group": root.get("id") or None,
        "qtype": question.get("qtype"), "focus": root.findtext("Focus"),
    }  # fmt: skip


def read_liveqa(path: Path) -> Iterator[xml_files.Numbered]:
    """The questions of a training or test file, each with its reference answers."""
    for number, found in xml_files.read_each(path, ("NLM-QUESTION",), _liveqa):
        if isinstance(found, list):
            for row in found:
                yield (number, row)
        else:
            yield number, found


def _liveqa(element: Any) -> list[Any] | Damaged:
    name = element.get("qid") or element.get("questionid") or ""
    asked = []
    for names in (("Subject", "SUBJECT"), ("Message", "MESSAGE")):
        asked.append(_first(element, names))
    question = "\n".join(part for part in asked if part)
    if not question:
        return Damaged("LiveQA question without subject and message")
    parts = list(element.iter("SUB-QUESTION")) or [element]
    found = []
    for part in parts:
        found.append(_answered(part, question, name))
    return found


def _answered(part: Any, question: str, name: str) -> Fields | RefusedRecord:
    answers = []
    for answer in part.iter("Answer", "ANSWER"):
        answers.append(_flowing("".join(answer.itertext())))
    answers = [answer for answer in answers if answer]
    if not answers:
        return NO_ANSWER
    sub = part.get("subqid")
    return {
        "id": f"{name}-{sub}" if sub else name, "question": question, "answer": answers[0], "answers": answers,
        "group": name or None,
    }  # fmt: skip


def _first(element: Any, names: tuple[str, str]) -> str:
    found = next(element.iter(*names), None)
    if found is None:
        return ""
    return _flowing("".join(found.itertext()))


def _flowing(text: str | None) -> str:
    """Lines kept, spaces in them collapsed."""
    lines = (" ".join(line.split()) for line in (text or "").splitlines())
    return "\n".join(line for line in lines if line)
