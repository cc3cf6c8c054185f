"""How many tokens, rows and optimiser steps a stage takes, by the rules of packing over sampled documents.

The rows are those of the packer itself (data/packing/mix.py), over so many documents of the sampled lengths.
Deliberately not here: exact counts (the sealed ledger of a packed stage has them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qmedtune.batches import batch_rows, steps_in
from qmedtune.data.packing import mix
from qmedtune.data.packing.pack import draw_tokens, shared_tokens
from qmedtune.data.synthetic import canaries
from qmedtune.planning.estimate import SampledEstimate
from qmedtune.recipe import ClassifySection, SftSection
from qmedtune.resolved import ResolvedCpt, ResolvedPretrain, ResolvedRecipe

SIMULATED_DOCUMENTS = 10_000  # laid out; more scale up
HELD_DOCUMENTS = 100_000  # lengths held per source; PubMed has 36 million


@dataclass(frozen=True)
class StageTokens:
    """Tokens trained in a stage, +- `spread` (a share; 0 when sealed), in `rows` rows and `steps` optimiser steps of
    `batch` rows."""

    trained: int
    rows: int
    batch: int
    steps: int
    spread: float
    note: str = ""


@dataclass(frozen=True)
class Drawn:
    """What a draw of each document takes, int64 tokens; each stands for `times` documents of the source."""

    lengths: np.ndarray
    times: float = 1.0

    @property
    def tokens(self) -> float:
        return float(self.lengths.sum()) * self.times


def planned(recipe: ResolvedRecipe, index: int, measured: Mapping[str, SampledEstimate]) -> StageTokens:
    """Stage `index` of a resolved recipe. Sources without an estimate are named in the note."""
    stage = recipe.stages[index]
    section = stage.section
    draws: dict[str, Drawn] = {}
    absent: list[str] = []
    spread = 0.0
    for name in stage.sources:
        found = measured[name]
        spread = max(spread, found.estimate.spread)
        if found.estimate.tokens:
            draws[name] = _draws(recipe, index, name, found)
        else:
            absent.append(name)
    if isinstance(section, SftSection | ClassifySection):
        passes = section.epochs
        if isinstance(section, ClassifySection):
            passes *= 1 - section.validation
        wanted = {name: passes * drawn.tokens for name, drawn in draws.items()}
    elif absent:
        wanted, draws, spread = {"all": float(section.budget or 0)}, {"all": Drawn(np.full(1, section.seq_len))}, 0.0
    else:
        wanted = _targets(section, draws)
        if section.budget is not None and sum(wanted.values()) > 0.99 * section.budget:
            spread = 0.02  # the budget is stated, and there is enough
    trained = round(sum(wanted.values()))
    rows = steps = 0
    if trained:
        rows = round(_rows(recipe, index, draws, wanted))
    if rows:
        steps = steps_in(section, rows)
    note = f"without {', '.join(absent)}" if absent else ""
    return StageTokens(trained, rows, batch_rows(section, rows), steps, spread, note)


def _targets(section: ResolvedCpt | ResolvedPretrain, draws: Mapping[str, Drawn]) -> dict[str, float]:
    """Tokens of each source in the mixture. By documents, a weight is one of documents `times` as long as they are."""
    lengths: dict[str, np.ndarray] = {}
    weights: dict[str, float] = {}
    for name, drawn in draws.items():
        lengths[name] = drawn.lengths * drawn.times
        weights[name] = section.mix[name] / drawn.times
    if section.unit == "documents":
        section = section.model_copy(update={"mix": weights})
    return {name: target.tokens for name, target in mix.targets(section, lengths).items()}


def _draws(recipe: ResolvedRecipe, index: int, name: str, found: SampledEstimate) -> Drawn:
    """Tokens that a draw of each document of a source takes, the canaries planted in it included."""
    source, section = recipe.data[name], recipe.stages[index].section
    records = max(found.estimate.records, 1)
    times = max(1.0, records / HELD_DOCUMENTS)
    lengths = np.resize(found.lengths, round(records / times))
    lengths = np.concatenate([lengths, _planted(recipe, name)])
    seq_len = section.seq_len
    if source.kind == "instructions" or source.chunking == "truncate" or isinstance(section, ClassifySection):
        lengths = np.minimum(lengths, seq_len)
    most = None
    if source.max_tokens is not None:
        most = max(1, int(source.max_tokens / times))
    return Drawn(draw_tokens(source, lengths, seq_len, cap=most, seed=recipe.seed), times)


def _planted(recipe: ResolvedRecipe, name: str) -> np.ndarray:
    """About the tokens of the canaries in a source: a name, a number of nine digits, and for prompts their frame."""
    if recipe.audit is None or name not in canaries.planted_sources(recipe.audit):
        return np.zeros(0, np.int64)
    tokens = 60 if recipe.data[name].kind == "instructions" else 24
    return np.full(sum(recipe.audit.repeats) * recipe.audit.canaries, tokens, np.int64)


def _rows(recipe: ResolvedRecipe, index: int, draws: Mapping[str, Drawn], wanted: Mapping[str, float]) -> float:
    """Rows that the drawn documents fill: the packer's over some of them, scaled up."""
    section, rng = recipe.stages[index].section, np.random.default_rng(0)
    seq_len = section.seq_len
    used: dict[str, np.ndarray] = {}
    wanted_documents: dict[str, float] = {}
    for name, drawn in draws.items():
        used[name] = drawn.lengths[drawn.lengths > 0]
        wanted_documents[name] = wanted[name] / max(1.0, float(used[name].mean()))
    documents = sum(wanted_documents.values())
    if isinstance(section, SftSection) and not section.packing:
        return documents
    share = min(1.0, SIMULATED_DOCUMENTS / max(documents, 1.0))
    parts: list[np.ndarray] = []
    for name, lengths in used.items():
        drawn = rng.choice(lengths, max(1, round(share * wanted_documents[name])))
        parts.append(_chunked(recipe, name, drawn, seq_len))
    mixed = rng.permutation(np.concatenate(parts))
    whole = isinstance(section, SftSection | ClassifySection)
    rows = len(mix.fill_rows(mixed, seq_len, split=not whole).bounds) - 1
    return rows * sum(wanted.values()) / float(mixed.sum())


def _chunked(recipe: ResolvedRecipe, name: str, drawn: np.ndarray, seq_len: int) -> np.ndarray:
    """Documents as they are laid into rows: with `chunking: overlap` in chunks of a row."""
    source = recipe.data.get(name)
    if source is None or source.chunking != "overlap":
        return drawn
    shared = shared_tokens(source, seq_len)
    counts = mix.chunk_counts(drawn, seq_len, shared)
    return mix.chunks(counts, drawn, seq_len, np.full(len(drawn), shared))[:, 2]
