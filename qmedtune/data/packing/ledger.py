"""The token ledger of a packed stage: what was read, kept, drawn, split and left over, per source, adding up exactly.

Counts only what pack.py has laid out; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qmedtune.data.packing import mix
from qmedtune.data.packing.tokens import KEPT, LENGTH, SUPERVISED
from qmedtune.results import PackedRecords, Packing, Part, TokenLedger


@dataclass(frozen=True)
class Corpus:
    """One source as shards. `documents`: (D, 3) int64 of length, kept, supervised (see tokens.py); `draws`: (D,) int64,
    the tokens that one draw of each document takes (see draw_tokens); `shared_tokens`: what neighbouring chunks of a
    document have in common, with `chunking: overlap`."""

    name: str
    shards: list[Path]
    documents: np.ndarray
    draws: np.ndarray
    shared_tokens: int

    @property
    def kept(self) -> np.ndarray:
        return self.documents[:, KEPT]


@dataclass(frozen=True)
class Draws:
    """The training order before packing: source number and document number within it, one entry per draw."""

    corpora: list[Corpus]
    source: np.ndarray
    document: np.ndarray
    share: dict[str, float]
    capped: list[str]

    @cached_property
    def firsts(self) -> np.ndarray:
        """The number of each source's first document among all, and the end: int64."""
        sizes = [len(corpus.documents) for corpus in self.corpora]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def numbers(self) -> np.ndarray:
        """Of each draw, its document's number among all."""
        return self.firsts[self.source] + self.document

    @cached_property
    def tokens(self) -> np.ndarray:
        """Of each draw."""
        return np.concatenate([corpus.draws for corpus in self.corpora])[self.numbers]


def packing_facts(plan: Draws, rows: mix.RowLayout, pieces: np.ndarray, seq_len: int) -> Packing:
    """The ledger of a stage's packing. pieces: (P, 3) int64 of document number, start, length."""
    corpora, drawn = plan.corpora, plan.tokens
    per_source = np.searchsorted(plan.firsts, pieces[:, 0], side="right") - 1
    continued = rows.pieces[:, 1] > 0
    mixture: dict[str, Part] = {}
    split = 0
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
        mixture[corpus.name] = Part(
            share=trained / trained_total,
            asked_share=plan.share[corpus.name],
            tokens=trained,
            repeats=round(trained / max(1, int(corpus.draws.sum())), 4),
            read=read,
            kept=kept,
            dropped=read - kept,
            seen=seen,
            never_sampled=kept - seen,
            supervised=supervised,
            documents=len(corpus.documents),
            truncated_documents=int((corpus.kept < corpus.documents[:, LENGTH]).sum()),
            dropped_documents=int((corpus.kept == 0).sum()),
            draws=int(mine.sum()),
            beyond_cap=int(corpus.kept[corpus.draws == 0].sum()),
            overlapped=int((np.maximum(corpus.draws - corpus.kept, 0) * times).sum()),
        )
        split += int(pieces[here & continued, 2].sum())
    num_rows = len(rows.bounds) - 1
    leftover: dict[str, int] = {}
    for name, part in mixture.items():
        leftover[name] = part.never_sampled or 0
    return Packing(
        records=PackedRecords(
            read=_summed(mixture, "documents"),
            truncated=_summed(mixture, "truncated_documents"),
            dropped=_summed(mixture, "dropped_documents"),
        ),
        tokens=TokenLedger(
            read=_summed(mixture, "read"),
            kept=_summed(mixture, "kept"),
            split=split,
            dropped=_summed(mixture, "dropped"),
            supervised=_summed(mixture, "supervised"),
            trained=trained_total,
        ),
        mixture=mixture,
        rows=num_rows,
        seq_len=seq_len,
        documents_drawn=len(plan.source),
        row_fill=round(trained_total / (num_rows * seq_len), 4),
        pieces=len(pieces),
        leftover=leftover,
        capped=plan.capped,
    )


def _summed(mixture: dict[str, Part], name: str) -> int:
    """One number of every source, added up."""
    return sum(getattr(part, name) for part in mixture.values())
