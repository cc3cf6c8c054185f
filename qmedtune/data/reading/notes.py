"""Formats with a structure of their own around the note: MIMIC-CXR trees, emrQA, BioC.

One row of a file may hold several records here; `expand` gives them. Notes keep their lines and section headings.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qmedtune.data.reading import bioc, row_formats
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.rejects import Damaged, Unusable


def read_mimic_cxr(path: Path) -> Iterator[row_formats.Row]:
    """One report of the tree files/pNN/pNNNNNNNN/sNNNNNNNN.txt: the patient is the folder, the study the file."""
    for number, fields in row_formats.read_text(path):
        if isinstance(fields, Damaged):
            yield number, fields
        else:
            text = "\n".join(line.strip() for line in fields["text"].splitlines()).strip()
            yield number, {"id": path.stem, "patient": path.parent.name, "text": text}


def expand(fields: Any, instructions: bool) -> list[Any]:
    """The rows that one element of a JSON file stands for: emrQA notes, BioC documents; else itself."""
    if not isinstance(fields, dict):
        return [fields]
    if isinstance(fields.get("paragraphs"), list):
        return list(_emrqa(fields, instructions))
    entries = fields.get("documents")
    if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries):
        return list(chain.from_iterable(expand(entry, instructions) for entry in entries))
    if isinstance(fields.get("passages"), list):
        return [_bioc(fields)]
    return [fields]


def _emrqa(note: Fields, instructions: bool) -> Iterator[Fields | Damaged]:
    """Clinical kinds: each note once. Instructions: the first paraphrase of each question that has an answer (the
    many others are templates); classes without an answer text (smoking, obesity) are taken as they stand."""
    for paragraph in note["paragraphs"]:
        if not isinstance(paragraph, dict):
            yield Damaged("emrQA paragraph is not an object")
            continue
        context = paragraph.get("context", paragraph.get("text"))
        if isinstance(context, list):
            text = "\n".join(str(s).rstrip("\r\n") for s in context)
        else:
            text = context
        name = str(paragraph.get("note_id", note.get("title", "")))
        if not instructions:
            yield {"id": name, "text": text, "patient": name.split("_")[0]}
            continue
        for qa in paragraph.get("qas") or []:
            if not isinstance(qa, dict):
                yield Damaged("emrQA question is not an object")
                continue
            question, answers = qa.get("question"), _answers(qa)
            if answers:
                if isinstance(question, list) and question:
                    asked = question[0]
                else:
                    asked = question
                yield {"instruction": asked, "input": text, "output": answers[0], "answers": answers, "group": name}


def _answers(qa: Fields) -> list[str]:
    """The answers in words: any of them is right."""
    said = []
    for answer in qa.get("answers") or []:
        if isinstance(answer, dict):
            said.append(answer)
    texts = []
    for answer in said:
        if answer.get("text"):
            texts.append(answer["text"])
    found: list[str] = []
    for text in texts:
        found.append(", ".join(map(str, text)) if isinstance(text, list) else str(text))
    return found


def _bioc(entry: Fields) -> Document | Damaged:
    try:
        return bioc.of_json(entry)
    except Unusable as error:
        return Damaged(str(error))
