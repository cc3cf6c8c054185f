"""Packed rows as a person can check them: what is trained on, where documents begin, what was cut.

This prints training text on purpose, at the request of its owner, and is the only place that does. Nothing here is
called by a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from qmedtune.data.packing.pack import IGNORED, PackedRows

SUPERVISED, QUIET, BORDER, PLAIN = "\033[32m", "\033[2m", "\033[1;36m", "\033[0m"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


Shown = TypedDict("Shown", {"source": str, "id": str | None, "from": int, "ids": list[int], "supervised": list[int]})


class ShownRow(TypedDict):
    documents: list[Shown]


def documents(packed: PackedRows, folders: Mapping[str, Path], n: int) -> list[ShownRow]:
    """The first `n` rows as {"documents": [{"source", "id", "from", "ids", "supervised"}]}, for machines.

    ids: of the piece of the document that lies in the row, from its token `from` on; supervised: 1 where a token is
    learnt. folders: source -> folder with the train.jsonl that was packed, which tells the records' ids.
    """
    rows = range(min(n, len(packed)))
    wanted: dict[str, set[int]] = {source: set() for source in packed.sources}
    for row in rows:
        for document in set(packed.pieces(row)[:, 0].tolist()):
            source, number = packed.record_of(document)
            wanted[source].add(number)
    names = {}
    for source, numbers in wanted.items():
        names[source] = _record_ids(folders[source], numbers)
    found: list[ShownRow] = []
    for row in rows:
        found.append({"documents": list(_documents(packed, names, row))})
    return found


def _record_ids(folder: Path, numbers: set[int]) -> dict[int, str | None]:
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        lines = islice(enumerate(file), max(numbers, default=-1) + 1)
        found: dict[int, str | None] = {}
        for number, line in lines:
            if number in numbers:
                found[number] = json.loads(line).get("id")
        return found


def _documents(packed: PackedRows, names: dict[str, dict[int, str | None]], row: int) -> Iterator[Shown]:
    item, at = packed[row], 0
    for document, start, length in packed.pieces(row).tolist():
        source, number = packed.record_of(document)
        ids, labels = (item[key][at : at + length] for key in ("input_ids", "labels"))
        yield {
            "source": source,
            "id": names[source][number],
            "from": start,
            "ids": ids.tolist(),
            "supervised": (labels != IGNORED).astype(int).tolist(),
        }
        at += length


class Decoder(Protocol):
    """A tokenizers.Tokenizer or a transformers tokenizer."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = ...) -> str: ...


def show(packed: PackedRows, tokenizer: Any, n: int, color: bool = True) -> str:
    """The first `n` rows: supervised text green (or in guillemets without `color`), the rest dim.

    Each piece opens with a line of its source, document, tokens and whether it starts or ends inside the document. A
    piece's first token shows as unsupervised: it is never a label. Control characters are shown as a middle dot.
    """
    return "\n".join(_row(packed, tokenizer, row, color) for row in range(min(n, len(packed))))


def _row(packed: PackedRows, tokenizer: Decoder, row: int, color: bool) -> str:
    item = packed[row]
    trained = int((item["labels"] != IGNORED).sum())
    size = len(item["input_ids"])
    lines = [f"row {row}: {size:,} of {packed.seq_len:,} tokens, {trained:,} supervised"]
    at, lengths = 0, packed.document_lengths()
    for document, start, length in packed.pieces(row).tolist():
        cut = [f"from token {start:,}"] * bool(start) + ["goes on"] * (start + length < int(lengths[document]))
        title = f"── {packed.source_of(document)} #{document}, {length:,} tokens{''.join(f', {c}' for c in cut)} "
        lines.append(_paint(title.ljust(78, "─"), BORDER, color))
        piece = slice(at, at + length)
        lines.append(_text(item["input_ids"][piece], item["labels"][piece] != IGNORED, tokenizer, color))
        at += length
    return "\n".join(lines) + "\n"


def _text(ids: np.ndarray, supervised: np.ndarray, tokenizer: Decoder, color: bool) -> str:
    parts = []
    for loud, group in groupby(zip(supervised.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        text = CONTROLS.sub("·", tokenizer.decode([token for _, token in group], skip_special_tokens=False))
        parts.append(_paint(text, SUPERVISED if loud else QUIET, True) if color else f"«{text}»" if loud else text)
    return "".join(parts)


def _paint(text: str, style: str, color: bool) -> str:
    if color:
        return f"{style}{text}{PLAIN}"
    return text
