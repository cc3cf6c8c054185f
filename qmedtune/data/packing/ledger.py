"""The token ledger of a packed stage: what was read, kept, drawn, split and left over, per source, adding up exactly.

Counts only what pack.py has laid out; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qmedtune.data.packing import mix
from qmedtune.data.packing.tokens import KEPT, LENGTH, SUPERVISED


@dataclass(frozen=True)
class Corpus:
    """One source as shards. `documents`: (D, 3) int64 of length, kept, supervised (see tokens.py); `draws`: (D,) int64,
    the tokens that one draw of each document takes (see draw_tokens)."""

    name: str
    shards: list[Path]
    documents: np.ndarray
    draws: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        return self.documents[:, KEPT]


@dataclass(frozen=True)
class Draws:
    """The training order before packing: source number and document number within it, one entry per draw."""

    source: np.ndarray
    document: np.ndarray
    share: dict[str, float]
    capped: list[str]


def packing_facts(
    corpora: list[Corpus], plan: Draws, rows: mix.Rows, pieces: np.ndarray, drawn: np.ndarray, base: np.ndarray,
    seq_len: int,
) -> dict[str, Any]:  # fmt: skip
    """Facts of a stage's packing. drawn: tokens of each draw; base: first document of each source, and the end."""
    per_source = np.searchsorted(base, pieces[:, 0], side="right") - 1
    continued = rows.pieces[:, 1] > 0
    mixture, tokens = {}, dict.fromkeys(("read", "kept", "split", "dropped", "supervised", "trained"), 0)
    trained_total = int(pieces[:, 2].sum())
    for number, corpus in enumerate(corpora):
        mine = plan.source == number
        times = np.bincount(plan.document[mine], minlength=len(corpus.documents))
        read, kept = int(corpus.documents[:, LENGTH].sum()), int(corpus.kept.sum())
        seen = int(corpus.kept[times > 0].sum())
        here = per_source == number
        trained = int(pieces[here, 2].sum())
        masked = bool(corpus.documents[:, SUPERVISED].any())
        if masked:
            supervised = int((corpus.documents[:, SUPERVISED] * times).sum())
        else:
            supervised = trained - int(here.sum())
        assert trained == int(drawn[mine].sum())
        mixture[corpus.name] = {
            "share": trained / trained_total, "asked_share": plan.share[corpus.name], "tokens": trained,
            "repeats": round(trained / max(1, int(corpus.draws.sum())), 4), "read": read, "kept": kept,
            "dropped": read - kept, "seen": seen,
            "never_sampled": kept - seen, "supervised": supervised, "documents": len(corpus.documents),
            "truncated_documents": int((corpus.kept < corpus.documents[:, LENGTH]).sum()),
            "dropped_documents": int((corpus.kept == 0).sum()), "draws": int(mine.sum()),
            "beyond_cap": int(corpus.kept[corpus.draws == 0].sum()),
            "overlapped": int((np.maximum(corpus.draws - corpus.kept, 0) * times).sum()),
        }  # fmt: skip
        split = int(pieces[here & continued, 2].sum())
        for key, value in zip(tokens, (read, kept, split, read - kept, supervised, trained), strict=True):
            tokens[key] += value
    num_rows = len(rows.bounds) - 1
    counts = {"read": "documents", "truncated": "truncated_documents", "dropped": "dropped_documents"}
    return {
        "records": {key: _summed(mixture, name) for key, name in counts.items()},
        "tokens": tokens, "mixture": mixture, "rows": num_rows, "seq_len": seq_len, "documents_drawn": len(plan.source),
        "row_fill": round(trained_total / (num_rows * seq_len), 4), "pieces": len(pieces),
        "leftover": {name: entry["never_sampled"] for name, entry in mixture.items()}, "capped": plan.capped,
    }  # fmt: skip


def _summed(mixture: dict[str, dict[str, Any]], name: str) -> int:
    """One number of every source, added up."""
    return sum(entry[name] for entry in mixture.values())
