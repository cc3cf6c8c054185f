"""`qmedtune data show`: packed rows as the trainer will see them, with document borders and the label mask.

Text that is trained on is green, text that is only read is dim; without colours it stands between « and ». This is the
one place that prints training text, and only on stdout and on demand: never into a log or a report.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qmedtune.data.pack import IGNORED, PackedRows
from qmedtune.data.tokens import load_codec
from qmedtune.errors import RecipeError

GREEN, DIM, BOLD, OFF = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def show_rows(packed: Path, tokenizer_dir: Path, first: int = 0, count: int = 3, colour: bool | None = None) -> str:
    """Rows `first` to `first + count - 1` of a packed folder as text. RecipeError where there is no such row."""
    if not (packed / "packed.json").is_file():
        raise RecipeError(f"{packed}: nothing is packed here\nmake it with: qmedtune data RECIPE")
    rows = PackedRows(packed)
    if not 0 <= first < len(rows):
        raise RecipeError(f"--row: got {first}; allowed: 0 to {len(rows) - 1} in {packed}")
    backend = load_codec(tokenizer_dir).backend
    coloured = _wants_colour() if colour is None else colour
    shown = range(first, min(first + count, len(rows)))
    return "\n".join(line for row in shown for line in _row(rows, row, backend, coloured))


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _row(rows: PackedRows, row: int, backend: Tokenizer, coloured: bool) -> Iterator[str]:
    item = rows[row]
    ids, trained = item["input_ids"], item["labels"] != IGNORED
    total = f"{len(ids)} of {rows.seq_len} tokens, {int(trained.sum())} trained on"
    yield _paint(f"row {row} of {len(rows)}: {total}", BOLD, coloured)
    end = 0
    for document, start, length in rows.pieces(row):
        begin, end = end, end + int(length)
        border = f"-- {rows.source_of(int(document))}, document {document}, from its token {start}"
        yield _paint(border, DIM, coloured)
        yield "".join(_spans(ids[begin:end], trained[begin:end], backend, coloured))


def _spans(ids: np.ndarray, trained: np.ndarray, backend: Tokenizer, coloured: bool) -> Iterator[str]:
    """Runs of tokens with the same mask, decoded."""
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    for begin, end in zip(borders, borders[1:], strict=False):
        text = backend.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        if coloured:
            yield _paint(text, GREEN if trained[begin] else DIM, True)
        else:
            yield f"«{text}»" if trained[begin] else text


def _paint(text: str, style: str, coloured: bool) -> str:
    return f"{style}{text}{OFF}" if coloured else text
