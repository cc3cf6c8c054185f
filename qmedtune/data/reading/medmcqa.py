"""MedMCQA's `cop`, the number of the right option: it counts from 1 in the authors' files and from 0 on the Hub.

One rule for training and for evaluation: a file in which a 4 occurs and no 0 counts from 1, one in which a 0 occurs and
no 4 from 0; where neither or both occur it cannot be told, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading.document import Document, Fields
from qmedtune.errors import DataError

BASE = "_cop_base"
UNLABELLED = frozenset((-1, None))


def cop_of(fields: Fields) -> int | None:
    """The value of `cop` as a whole number (tables hold it as text), None where it is none."""
    value = fields.get("cop")
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    if isinstance(value, float) and value == value // 1:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None


def answer_base(path: Path, answers: set[int | None]) -> int:
    """0 or 1, from all values of `cop` in a file. Raises DataError where they do not tell."""
    if answers <= UNLABELLED:
        raise DataError(
            f"{path}: no record has an answer (`cop`)\nMedMCQA's test split is unlabelled: take the dev split"
        )
    if {0, 4} <= answers or not answers & {0, 4}:
        raise DataError(f"{path}: cannot tell whether `cop` counts from 0 or from 1\ngive the whole split")
    if 4 in answers:
        return 1
    return 0


def with_answer_base(path: Path, read: Callable[[], Iterator[tuple[int, Any]]]) -> Iterator[tuple[int, Any]]:
    """The rows of a file; of MedMCQA with the base of `cop` as a field. Such a file is read twice to know it."""
    stream = read()
    for found in stream:
        if _is_medmcqa(found[1]):
            break
        yield found
        if isinstance(found[1], (dict, Document)):  # else what an archive's member is, or a damaged line
            yield from stream
            return
    else:
        return
    base = answer_base(path, {cop_of(fields) for _, fields in read() if isinstance(fields, dict)})
    for number, fields in _from_first_row(read()):
        yield number, {**fields, BASE: base} if isinstance(fields, dict) else fields


def _is_medmcqa(fields: Any) -> bool:
    """By its keys; CareQA's `cop` is always from 1, and has no `opa`."""
    return isinstance(fields, dict) and {"cop", "opa"} <= fields.keys()


def _from_first_row(stream: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Without what stood before the first row: it was yielded already."""
    for found in stream:
        if isinstance(found[1], dict):
            yield found
            break
    yield from stream
