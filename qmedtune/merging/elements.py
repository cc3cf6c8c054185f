"""The proof of a merge, element by element: every number of the written file against base + adapters.

Bits first: the sum is computed again in fp32 (in another order than the merge's) and rounded; where bits differ, it is
computed in fp64 and the written number must be one that a right fp32 sum can give. The bound is derived, not fitted:

    sum over r products, in any order        r u s |B_i| |A_j|      u = 2^-24, half a unit of fp32 at 1
    scale rounded, and multiplied              2 u s |B_i| |A_j|
    K additions to the weight, each of a partial sum of at most |exact| + the rest    K u (|exact| + sum s |B_i| |A_j|)
    the sum stored                             u |exact|

so |fp32 sum - exact| <= u ((K + 1) |exact| + sum (r + 2 + K) s |B_i| |A_j|) =: slack, to first order in u, with the
norms of row i of B and column j of A (Cauchy-Schwarz). Nearest: |written - exact| <= half a unit + slack. Stochastic:
the written number is the one below exact + noise, or, within the slack, its neighbour. No threshold on KL separates
right merges from wrong ones; this does (docs/merging.md has the table).
Deliberately no forward pass: a model's output hides what an element shows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qmedtune.merging.lora_files import LowRank
from qmedtune.merging.methods import Source
from qmedtune.merging.rounding import Rounding, dropped_bits, unit

UNIT = 2.0**-24
# Elements of a block whose bits differ, above which the whole block is computed in fp64: below it picking rows and
# columns is cheaper (right bf16 merges: 1e-5 of the elements, fp32: 7 to 27 %).
FEW = 2048


@dataclass(frozen=True)
class Expected:
    """What a tensor of the published model must be: a weight (the base's, or the full copy that was trained, of any
    float dtype) plus these low-rank updates. base: of a full copy, what stood there before training."""

    name: str
    low_rank: tuple[LowRank, ...] = ()
    base: Source | None = None

    @property
    def changed_by_training(self) -> bool:
        return bool(self.low_rank) or self.base is not None

    def rounding(self, asked: Rounding) -> Rounding:
        """Noise is for what training changed; what it left alone is rounded to the nearest number."""
        return asked if self.changed_by_training else Rounding(asked.dtype)

    def forget(self) -> None:
        """Give the memory of what was derived back: in fp64 twice that of the adapters."""
        for name in ("factors", "factors64", "norms", "rows_changed"):
            self.__dict__.pop(name, None)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """All updates as one product, fp32: scaled B [out, sum of r] and A [sum of r, in]."""
        scaled = [update.b * update.scale for update in self.low_rank]
        return torch.cat(scaled, 1), torch.cat([update.a for update in self.low_rank])

    @cached_property
    def factors64(self) -> tuple[Tensor, Tensor]:
        """The same in fp64, where a product of fp32 numbers is exact."""
        scaled = [update.b.double() * update.scale for update in self.low_rank]
        return torch.cat(scaled, 1), torch.cat([update.a for update in self.low_rank]).double()

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """fp64: (r + 2 + K) s |B_i| as [out, K] and |A_j| as [K, in]."""
        count = len(self.low_rank)
        rows = [(len(u.a) + 2 + count) * abs(u.scale) * u.b.double().norm(dim=1) for u in self.low_rank]
        return torch.stack(rows, 1), torch.stack([u.a.double().norm(dim=0) for u in self.low_rank])

    @cached_property
    def rows_changed(self) -> Tensor:
        """bool [out]: rows that an update moves; generically each element of them is."""
        return torch.stack([update.b.ne(0).any(1) for update in self.low_rank]).any(0)

    def exact(self, weight: Source, rows: slice | Tensor) -> Tensor:
        """The sum of some rows in fp64."""
        total = weight[rows].double()
        if self.low_rank:
            b, a = self.factors64
            total = total.addmm(b[rows], a)
        return total

    def exact_at(self, weight: Source, rows: Tensor, columns: Tensor) -> Tensor:
        """The sum of single elements in fp64. rows, columns: int64 [n]."""
        b, a = self.factors64
        return weight[rows, columns].double() + (b[rows] * a[:, columns].T).sum(1)

    def slack(self, exact: Tensor, rows: slice | Tensor, columns: Tensor | None = None) -> Tensor:
        """How far a right fp32 sum may be from `exact`, fp64; 0 where nothing is summed."""
        if not self.low_rank:
            return torch.zeros_like(exact)
        of_rows, of_columns = self.norms
        sizes = of_rows[rows] @ of_columns if columns is None else (of_rows[rows] * of_columns[:, columns].T).sum(1)
        return UNIT * ((len(self.low_rank) + 1) * exact.abs() + sizes)


@dataclass(frozen=True)
class _Sums:
    """Elements of the tensor `name`. exact: fp64; slack: how far a right fp32 sum may be from it, fp64; index: where
    each stands in the flat tensor, int64. All of one shape."""

    name: str
    exact: Tensor
    slack: Tensor
    index: Tensor


@dataclass
class ElementCounts:
    """Result of the element-by-element check.

    Counts over elements. `changed`: moved by training; `swallowed`: of those, written as the base has them.
    """

    elements: int = 0
    violations: int = 0
    changed: int = 0
    swallowed: int = 0

    def add(self, other: ElementCounts) -> None:
        self.elements += other.elements
        self.violations += other.violations
        self.changed += other.changed
        self.swallowed += other.swallowed


@dataclass
class ElementCheck:
    """The proof in progress: blocks come from several threads, in any order."""

    rounding: Rounding
    expected: Mapping[str, Expected]
    written: Mapping[str, Tensor]
    tallies: dict[str, ElementCounts] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def block(self, name: str, rows: slice, weight: Source, block: Tensor) -> None:
        """Check some rows. block: those of `weight` in fp32; overwritten."""
        expected, written = self.expected[name], self.written[name][rows]
        bad = self.faulty(name, rows, weight, block)
        changed, swallowed = _swallowed(expected, rows, weight, written)
        tally = ElementCounts(written.numel(), 0 if bad is None else int(bad.sum()), changed, swallowed)
        with self._lock:
            so_far = self.tallies.setdefault(name, ElementCounts())
            so_far.add(tally)
            if so_far.elements == self.written[name].numel():
                expected.forget()

    def faulty(self, name: str, rows: slice, weight: Source, block: Tensor) -> Tensor | None:
        """bool, as the written rows: elements that no right sum gives; None where all bits are as computed here."""
        expected, written = self.expected[name], self.written[name][rows]
        if expected.low_rank:
            b, a = expected.factors
            block.addmm_(b[rows], a)
        first = rows.start * (written.numel() // max(1, len(written)))
        rounded = expected.rounding(self.rounding)(block, name, first)
        if np.array_equal(_bits(rounded), _bits(written)):
            return None
        differs = ~(rounded == written)  # also where one is NaN; 0 and -0 are the same number
        if not expected.low_rank or written.dim() < 2:
            return differs
        places = differs.nonzero()
        if len(places) > FEW:
            exact = expected.exact(weight, rows)
            first = rows.start * written.shape[1]
            index = torch.arange(first, first + written.numel()).view(written.shape)
            return differs & ~self._within(_Sums(name, exact, expected.slack(exact, rows), index), written)
        row, column = places[:, 0] + rows.start, places[:, 1]
        exact = expected.exact_at(weight, row, column)
        index = row * written.shape[1] + column
        sums = _Sums(name, exact, expected.slack(exact, row, column), index)
        possible = self._within(sums, written[places[:, 0], column])
        differs[places[:, 0], column] = ~possible
        return differs

    def _within(self, sums: _Sums, written: Tensor) -> Tensor:
        """bool: whether a right fp32 sum, rounded, gives `written`."""
        if not self.rounding.stochastic:
            half = unit(sums.exact.abs() + sums.slack, self.rounding.dtype) / 2
            return (written.double() - sums.exact).abs() <= half + sums.slack
        return self._within_stochastic(sums, written)

    def _within_stochastic(self, sums: _Sums, written: Tensor) -> Tensor:
        """Written is the multiple of the unit below |exact| + noise. Beside a power of two, where the unit changes,
        either will do; a sum on the other side of 0 takes its noise the other way."""
        exact, slack = sums.exact, sums.slack
        noise = self._noise_at(sums.name, sums.index)
        if self.rounding.dtype == torch.float16:  # half a unit of the sum with 2^-14, below which fp16 has fewer places
            slack = slack + 2.0**-38
        found = torch.zeros(exact.shape, dtype=torch.bool)
        for sign in (1.0, -1.0):
            size, target = sign * exact, sign * written.double()
            for shifted in (size - slack, size + slack):
                step = unit(shifted.clamp(min=0), self.rounding.dtype)
                distance = (size - target) / step + noise
                tolerance = slack / step
                found |= (size + slack >= 0) & (distance >= -tolerance) & (distance < 1 + tolerance)
        return found

    def _noise_at(self, name: str, index: Tensor) -> Tensor:
        """Noise of elements, in units of the last place."""
        flat = index.flatten()
        if not len(flat):
            return flat.double().view(index.shape)
        low, high = int(flat.min()), int(flat.max())
        fractions = self.rounding.noise(name, low, high + 1 - low)[flat - low]
        return (fractions.double() / 2 ** dropped_bits(self.rounding.dtype)).view(index.shape)

    def rest(self) -> list[str]:
        """Tensors that no one has checked yet."""
        return [name for name in self.expected if name not in self.tallies]

    def total(self) -> ElementCounts:
        total = ElementCounts()
        for tally in self.tallies.values():
            total.add(tally)
        return total


def _bits(values: Tensor) -> np.ndarray:
    """The same memory as integers. numpy compares them in a tenth of the time that torch takes for 16-bit numbers,
    which was a tenth of the whole merge (1.1B, Zen 4: .5 and .9 s of CPU time for the two comparisons of a proof)."""
    return values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()


def _swallowed(expected: Expected, rows: slice, weight: Source, written: Tensor) -> tuple[int, int]:
    """Elements of these rows that training changed, and those of them that are written as the base has them."""
    if expected.low_rank:
        moved = expected.rows_changed[rows].numpy()
        same = _same(written, weight[rows])
        if not moved.all():
            same = same[moved]
        return int(np.count_nonzero(moved)) * written.shape[-1], int(np.count_nonzero(same))
    if expected.base is None:
        return 0, 0
    moved = (weight[rows].float() != expected.base[rows].float()).numpy()
    return int(np.count_nonzero(moved)), int(np.count_nonzero(moved & _same(written, expected.base[rows])))


def _same(written: Tensor, base: Tensor) -> np.ndarray:
    """Where the written number is, bit for bit, the base's rounded to the written dtype."""
    return _bits(written) == _bits(base.to(written.dtype))
