"""How long the data steps take: reading and cleaning each source, then laying out its tokens in rows.

Assumed speeds of one core, by what is done to a text. Deliberately not here: what is cached (plan.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qmedtune.planning import capacity
from qmedtune.planning.estimate import Estimate
from qmedtune.recipe import Recipe

# Bytes of prepared text per second of one core (2026-11-30, abstracts, notes and questions of 1 to 3 MB): cleaned,
# compared and searched for benchmarks; where identifiers of patients are looked for as well.
CLEANED_BYTES_PER_S, SEARCHED_BYTES_PER_S = 5e6, 0.9e6
SOURCE_SECONDS = 0.1  # opening, splitting, the ledger: a micro run took 0.05 to 0.2 s a source
PACKED_TOKENS_PER_S = 0.5e6  # tokenising and rows; assumed


def data_seconds(recipe: Recipe, estimates: Mapping[str, Estimate], cores: int, *, done: Collection[str]) -> float:
    """Seconds of a recipe's data steps. done: names of sources, and of stages that have their rows. A source that is
    not here takes none."""
    seconds = 0.0
    for name, found in estimates.items():
        if name not in done and not found.missing:
            seconds += _source_seconds(recipe, name, found, cores)
    for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True):
        if name not in done:
            seconds += sum(estimates[source].tokens for source in stage.sources) / PACKED_TOKENS_PER_S
    return round(seconds, 1)


def _source_seconds(recipe: Recipe, name: str, found: Estimate, cores: int) -> float:
    from qmedtune.data.hygiene.per_record import WORKER_BYTES, phi_mode

    size = capacity.text_bytes(recipe.data[name]) or capacity.BUILTIN_BYTES * found.tokens
    speed = CLEANED_BYTES_PER_S
    if phi_mode(recipe, name) != "off":
        speed = SEARCHED_BYTES_PER_S
    workers = size // WORKER_BYTES
    if recipe.workers != "auto":
        workers = recipe.workers
    return SOURCE_SECONDS + size / speed / max(1, min(cores, workers))
