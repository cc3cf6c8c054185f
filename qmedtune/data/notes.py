"""Formats with a structure of their own around the note: MIMIC-CXR trees, emrQA, BioC.

One row of a file may hold several records here; `expand` gives them. Notes keep their lines and section headings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data import rows
from qmedtune.data.rejects import Damaged

# Passages of BioC full texts that are no running text.
BIOC_SKIPPED = frozenset({"ref", "table", "table_caption", "front_matter", "footnote", "table_footnote"})
BIOC_HEADINGS = frozenset({"front", "title", "title_1", "title_2", "title_3", "title_4", "abstract_title_1"})


def read_mimic_cxr(path: Path) -> Iterator[rows.Row]:
    """One report of the tree files/pNN/pNNNNNNNN/sNNNNNNNN.txt: the patient is the folder, the study the file."""
    for number, fields in rows.read_text(path):
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
    if isinstance(fields.get("documents"), list):
        return [document for entry in fields["documents"] for document in expand(entry, instructions)]
    if isinstance(fields.get("passages"), list):
        return [_bioc(fields)]
    return [fields]


def _emrqa(note: dict[str, Any], instructions: bool) -> Iterator[dict[str, Any] | Damaged]:
    """Clinical kinds: each note once. Instructions: the first paraphrase of each question that has an answer (the
    many others are templates); classes without an answer text (smoking, obesity) are taken as they stand."""
    for paragraph in note["paragraphs"]:
        if not isinstance(paragraph, dict):
            yield Damaged("emrQA paragraph is not an object")
            continue
        context = paragraph.get("context", paragraph.get("text"))
        text = "\n".join(str(s).rstrip("\r\n") for s in context) if isinstance(context, list) else context
        name = str(paragraph.get("note_id", note.get("title", "")))
        if not instructions:
            yield {"id": name, "text": text, "patient": name.split("_")[0]}
            continue
        for qa in paragraph.get("qas") or []:
            question, answers = qa.get("question"), _answers(qa)
            if answers:
                asked = question[0] if isinstance(question, list) and question else question
                yield {"instruction": asked, "input": text, "output": answers[0], "answers": answers, "group": name}


def _answers(qa: dict[str, Any]) -> list[str]:
    """The answers in words: any of them is right."""
    texts = [answer["text"] for answer in qa.get("answers") or [] if answer.get("text")]
    return [", ".join(map(str, text)) if isinstance(text, list) else str(text) for text in texts]


def _bioc(document: dict[str, Any]) -> dict[str, Any]:
    """Titles as headings, paragraphs in order; references and tables left out as in JATS."""
    parts = []
    pmid = None
    for passage in document["passages"]:
        infons = passage.get("infons", {})
        kind = str(infons.get("type", "")).lower()
        pmid = pmid or infons.get("article-id_pmid")
        text = passage.get("text")
        if kind in BIOC_SKIPPED or infons.get("section_type") == "REF" or not isinstance(text, str) or not text.strip():
            continue
        heading = kind in BIOC_HEADINGS
        parts.append(f"{'#' if kind in ('front', 'title') else '##'} {text.strip()}" if heading else text.strip())
    return {"id": document.get("id"), "pmid": pmid, "text": "\n\n".join(parts)}
