"""How much of each stage is merged: a stage's part is what it added to the adapter, exact from two sealed adapters.

With `adapter: continue` the later adapter holds the earlier stages too: its part is its update minus the earlier one's.
Trained embeddings likewise: the base's, plus each stage's step times its weight. The merge adds up what is left of each
adapter; the proof adds every stage's two terms by themselves. Deliberately not here: weights of 1, the plain merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmedtune.errors import MergeRefused, RecipeError
from qmedtune.merging.elements import UNIT
from qmedtune.merging.lora_files import LowRank, Updates
from qmedtune.merging.tensors import open_file, row_blocks, write_safetensors

FILE = "blended.safetensors"
UNIT_64 = 2.0**-52  # of fp64 sums: a few roundings of each term


@dataclass(frozen=True)
class Share:
    """A stage's part: what `adapter` does beyond `earlier` (None: the base), times `weight`."""

    stage: str
    adapter: Path
    earlier: Path | None
    weight: float


@dataclass(frozen=True)
class Term:
    """An adapter's whole update, times a factor."""

    adapter: Path
    factor: float


def terms_of(shares: Sequence[Share]) -> list[Term]:
    """Every stage's own two terms."""
    found = []
    for share in shares:
        found.append(Term(share.adapter, share.weight))
        if share.earlier is not None:
            found.append(Term(share.earlier, -share.weight))
    return found


def summed(terms: Sequence[Term]) -> list[Term]:
    """One term for each adapter, those that nothing is left of without."""
    factors: dict[Path, float] = {}
    for term in terms:
        factors[term.adapter] = factors.get(term.adapter, 0.0) + term.factor
    return [Term(adapter, factor) for adapter, factor in factors.items() if factor]


def last_adapters(shares: Sequence[Share]) -> dict[Path, Path]:
    """For each adapter the last one that was trained on from it."""
    found: dict[Path, Path] = {}
    for share in reversed(shares):
        last = found.setdefault(share.adapter, share.adapter)
        if share.earlier is not None:
            found[share.earlier] = last
    return found


def weigh(read: Mapping[Path, Updates], terms: Sequence[Term], full: Mapping[str, Tensor]) -> Updates:
    """The sum of the terms as updates; `full` has the trained copies, blended. RecipeError where a weight has both."""
    updates = Updates(full=dict(full))
    for term in terms:
        own = read[term.adapter]
        updates.copies.update(own.copies)
        for name, parts in own.low_rank.items():
            known = updates.low_rank.setdefault(name, [])
            for part in parts:
                known.append(LowRank(part.a, part.b, part.scale * term.factor))
    if both := sorted(updates.low_rank.keys() & updates.full.keys()):
        raise RecipeError(f"merge.weights: {both[0]} has low-rank updates and a trained copy\nmerge without weights")
    return updates


# ---- trained copies --------------------------------------------------------------------------------------------------


def blend(
    read: Mapping[Path, Updates], terms: Sequence[Term], base: Callable[[str], Tensor], folder: Path
) -> dict[str, Tensor]:
    """Trained copies of embeddings by their weights, fp32, written into `folder` and mapped from there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for updates in read.values():
        for name, tensor in updates.full.items():
            shapes[name] = tuple(tensor.shape)
    if not shapes:
        return {}

    def blocks() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            for rows in row_blocks(shape):
                yield _sum(base(name), _copies(name, read, terms), rows)[0].float()

    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as hasher:
        settling = write_safetensors(
            folder / FILE, shapes, dtype=torch.float32, blocks=blocks(), disk=disk, hasher=hasher
        )
    settling.result()
    mapped = open_file(folder / FILE)
    return {name: mapped[name] for name in shapes}


def _copies(name: str, read: Mapping[Path, Updates], terms: Sequence[Term]) -> list[tuple[Tensor, float]]:
    """The trained copies of a weight, each with its factor."""
    found: list[tuple[Tensor, float]] = []
    for term in terms:
        copy = read[term.adapter].full.get(name)
        if copy is not None:
            found.append((copy, term.factor))
    return found


def _sum(base: Tensor, copies: Sequence[tuple[Tensor, float]], rows: slice) -> tuple[Tensor, Tensor]:
    """fp64, rows of base + sum of factor x (copy - base), and the sum of its terms' sizes."""
    start = base[rows].double()
    total, size = start.clone(), start.abs()
    for copy, factor in copies:
        step = (copy[rows].double() - start) * factor
        total += step
        size += step.abs()
    return total, size


def check_blend(
    blended: Mapping[str, Tensor], read: Mapping[Path, Updates], terms: Sequence[Term], base: Callable[[str], Tensor]
) -> None:
    """MergeRefused where an element of a blended copy is not what the stages' terms add up to, rounded to fp32."""
    for name, tensor in blended.items():
        for rows in row_blocks(tuple(tensor.shape)):
            exact, size = _sum(base(name), _copies(name, read, terms), rows)
            allowed = UNIT * exact.abs() + 16 * UNIT_64 * size + torch.finfo(torch.float32).tiny
            wrong = ~((tensor[rows].double() - exact).abs() <= allowed)
            if wrong.any():
                raise MergeRefused(
                    f"{name}: {int(wrong.sum()):,} elements are not the stages' trained copies by their weights",
                    {"tensor": name, "violations": int(wrong.sum())},
                )
