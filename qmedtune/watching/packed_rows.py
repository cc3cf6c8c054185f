"""Packed rows as a picture: where documents begin, which source they are of, what of them is learnt.

The picture has no text. Text is shown where it was asked for, and of clinical sources only where the watcher was
started for that (`--clinical-text`); it is never kept.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from qmedtune import base, store
from qmedtune.data.packing.pack import IGNORED, PackedRows
from qmedtune.data.packing.tokens import load_codec
from qmedtune.recipe import ModelSection
from qmedtune.reporting.blocks import card
from qmedtune.reporting.charts import Html, esc, legend
from qmedtune.results import Run
from qmedtune.terminal import printable
from qmedtune.watching.parts import source_colors
from qmedtune.watching.runs import Seen

SHOWN = 8


@dataclass(frozen=True)
class RequestedRows:
    """What is to be shown: rows of `stage` from `first` on, with their text, with that of clinical sources."""

    stage: str
    first: int = 0
    text: bool = False
    clinical: bool = False


def is_clinical(run: Run, name: str) -> bool:
    """Whether its text can name patients. A source that nobody described counts as one that can."""
    source = run.data.get(name)
    if source is None or source.kind is None:
        return True
    return run.may_identify(name)


def packed_stages(seen: Seen) -> list[str]:
    """The stages whose rows are packed, in order."""
    return [stage.name for stage in seen.run.stages if store.read_seal(seen.folder / "data" / stage.name)]


def rows_html(seen: Seen, requested: RequestedRows) -> Html:
    rows = PackedRows(seen.folder / "data" / requested.stage)
    colors = source_colors(seen)
    numbers = range(requested.first, min(requested.first + SHOWN, len(rows)))
    texts = _ShownTexts(seen.run, requested) if requested.text else None
    keys = [(source, colors.get(source, 1)) for source in rows.sources]
    body = "".join(_row(rows, number, colors, texts) for number in numbers)
    told = f"Rows {requested.first + 1:,} to {numbers.stop:,} of {len(rows):,}, in the order of training."
    note = (
        "A gap is a border: nothing attends across it, and its first token is not learnt. Strong colour is learnt, "
        "faint colour is read and not learnt, the empty end is padding."
    )
    hint = f'<p class="note">{esc(told)} {esc(note)}</p>'
    return card("", Html(hint + legend(keys) + f'<div class="rows">{body}</div>'))


def _row(rows: PackedRows, number: int, colors: dict[str, int], texts: _ShownTexts | None) -> str:
    labels = rows[number]["labels"]
    learnt = int((labels != IGNORED).sum())
    at, pieces, told = 0, "", ""
    for document, start, length in rows.pieces(number).tolist():
        source = rows.source_of(document)
        mask = labels[at : at + length] != IGNORED
        title = f"{source} document {document}, tokens {start:,} to {start + length:,}, {int(mask.sum()):,} learnt"
        share = 100 * length / rows.seq_len
        pieces += (
            f'<span class="piece s{colors.get(source, 1)}" style="width:{share:.3f}%" title="{esc(title)}">'
            f"{_mask(mask, colors.get(source, 1))}</span>"
        )
        if texts is not None:
            told += f"<h4>{esc(title)}</h4>{texts.of(source, rows[number]['input_ids'][at : at + length], mask)}"
        at += length
    said = f"row {number + 1:,}: {at:,} of {rows.seq_len:,} tokens, {learnt:,} learnt"
    return (
        f'<div class="row"><div class="note">{esc(said)}</div><div class="strip" role="img" aria-label="{esc(said)}">'
        f"{pieces}</div>{told}</div>"
    )


def _mask(mask: np.ndarray, color: int) -> str:
    """Stretches of learnt tokens; the first token of a document alone is no stretch to see."""
    cells, at = "", 0
    for learnt, group in itertools.groupby(mask.tolist()):
        length = len(list(group))
        if learnt:
            left, width = 100 * at / len(mask), 100 * length / len(mask)
            cells += f'<i class="c{color}" style="left:{left:.2f}%;width:{width:.2f}%"></i>'
        at += length
    return cells


class _ShownTexts:
    """The text of pieces, as far as it may be shown."""

    def __init__(self, run: Run, requested: RequestedRows) -> None:
        self._run, self._requested = run, requested
        section = ModelSection.model_validate(run.recipe["model"])
        self._decoder: Any = load_codec(base.identify(section, offline=True).make()).backend

    def of(self, source: str, ids: np.ndarray, mask: np.ndarray) -> str:
        if is_clinical(self._run, source) and not self._requested.clinical:
            return '<p class="note">Clinical text: not shown. (qmedtune watch --clinical-text shows it.)</p>'
        shown, at = "", 0
        for learnt, group in itertools.groupby(mask.tolist()):
            length = len(list(group))
            text = self._decoder.decode(ids[at : at + length].tolist(), skip_special_tokens=False)
            tag = "mark" if learnt else "span"
            shown += f"<{tag}>{esc(printable(text))}</{tag}>"
            at += length
        return f"<pre>{shown}</pre>"
