"""What a wrong tensor looks like: which fault would have written just this, said beside the tensor's name.

Each suspicion is a tensor that a known fault would have written; the first that the written rows agree with is named.
It only words a refusal: whether a merge is right is decided element by element (elements.py), before this runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmedtune.merging.elements import ElementCheck, Expected
from qmedtune.merging.methods import Source
from qmedtune.merging.parallel import in_fp32
from qmedtune.merging.rounding import Rounding, unit
from qmedtune.merging.tensors import row_blocks

MAX_ROWS = 256  # wrong rows that are looked at
# Share of the wrong elements, and of all in their rows, that a suspicion must give: sums in another order, and a scale
# that is estimated, leave some.
EXPLAINED, AGREES = 0.98, 0.995
FEW_ELEMENTS = 16
PLACES = {
    "model.embed_tokens.weight": "the embedding",
    "lm_head.weight": "the output layer",
    "model.norm.weight": "the last norm",
}


@dataclass(frozen=True)
class Wrong:
    """Rows of a tensor that hold wrong elements. rows: int64 [n]; bad: bool [n, in]; weight, written: [n, in]; delta:
    the exact update, fp64; violations: in the whole tensor, of `elements`."""

    expected: Expected
    rows: Tensor
    bad: Tensor
    all_rows: int
    weight: Tensor
    written: Tensor
    delta: Tensor
    violations: int
    elements: int
    rounding: Rounding

    def agrees(self, value: Tensor) -> bool:
        """Whether the written rows are `value` [n, in] fp64, rounded, above all where they are wrong."""
        right = (self.written.double() - value).abs() <= self.tolerance(value)
        return self.mostly(right)

    def mostly(self, right: Tensor) -> bool:
        """Of bool [n, in]: nearly everywhere, and where elements are wrong."""
        return bool(right[self.bad].double().mean() >= EXPLAINED and right.double().mean() >= AGREES)

    def tolerance(self, value: Tensor) -> Tensor:
        """How far rounding may take a number: half a unit, stochastically a whole one; fp32 sums differ by some."""
        units = 0.505
        if self.rounding.dtype == torch.float32:
            units = 4.0
        elif self.rounding.stochastic:
            units = 1.0
        return unit(value.abs(), self.rounding.dtype) * units


Others = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
"""Other tensors of this shape: name, weight, exact update."""


def place_of(name: str) -> str:
    """`q_proj of layer 3` for `model.layers.3.self_attn.q_proj.weight`."""
    if name in PLACES:
        return PLACES[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(?:\w+\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, module, part = found.groups()
    if part == "bias":
        module = f"the bias of {module}"
    return f"{module} of layer {layer}"


def diagnose(check: ElementCheck, name: str, load: Callable[[str], Source]) -> str:
    """The likely reason, as the end of a sentence. load: the weight that updates of a name are added to."""
    wrong = _wrong_rows(check, name, load(name))

    def others() -> Iterator[tuple[str, Tensor, Tensor]]:
        for other, expected in check.expected.items():
            if other != name and check.written[other].shape == check.written[name].shape:
                weight = load(other)[wrong.rows]
                yield other, weight, _delta(expected, wrong.rows, weight)

    for suspicion in (_damaged, _left_out, _scaled, _turned, _from_elsewhere, _rounded_otherwise):
        if found := suspicion(wrong, others, load):
            return f"{found}{_where(wrong)}"
    return f"in a way that no usual fault explains: other base weights, perhaps{_where(wrong)}"


def _wrong_rows(check: ElementCheck, name: str, weight: Source) -> Wrong:
    found: list[Tensor] = []
    masks: list[Tensor] = []
    kept = 0
    for rows in row_blocks(tuple(weight.shape)):
        bad = check.faulty(name, rows, weight, in_fp32(weight[rows]))
        if bad is not None:
            bad = _matrix(bad)
            there = bad.any(1).nonzero()[:, 0]
            if kept < MAX_ROWS:
                masks.append(bad[there])
                kept += len(there)
            found.append(there + rows.start)
    all_rows = torch.cat(found)
    rows, bad = all_rows[:MAX_ROWS], torch.cat(masks)[:MAX_ROWS]
    expected, tally = check.expected[name], check.tallies[name]
    of_weight, written = _matrix(weight[rows]), _matrix(check.written[name][rows])
    delta = _delta(expected, rows, of_weight)
    expected.forget()
    return Wrong(
        expected, rows, bad, len(all_rows), of_weight, written, delta, tally.violations, tally.elements, check.rounding
    )


def _matrix(values: Tensor) -> Tensor:
    if values.dim() > 1:
        return values
    return values[:, None]


def _delta(expected: Expected, rows: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for update in expected.low_rank:
        total += update.scale * (update.b[rows].double() @ update.a.double())
    return total


def _where(wrong: Wrong) -> str:
    """Which rows, where it is one run of them that is not the whole tensor."""
    first, last = int(wrong.rows[0]), int(wrong.rows[-1])
    width = max(1, wrong.written.shape[1])
    total = wrong.elements // width
    if wrong.violations <= FEW_ELEMENTS or wrong.all_rows > min(MAX_ROWS, total // 2) or total <= 1:
        return ""
    together = last - first + 1 == wrong.all_rows
    if together and last > first:
        return f", in rows {first} to {last}"
    return f", in {wrong.all_rows} of {total} rows"


def _damaged(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    if not bool(torch.isfinite(wrong.written.float()).all()):
        return "with values that are not finite"
    if not bool(wrong.written.any()):
        return "as if it was set to zero"
    if wrong.violations <= FEW_ELEMENTS:
        return "single elements, as a bad disk or bad memory leaves them"
    return None


def _left_out(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    """Updates that are missing, or there twice."""
    updates, base = wrong.expected.low_rank, wrong.weight.double()
    if wrong.expected.base is not None and wrong.agrees(_matrix(wrong.expected.base[wrong.rows]).double()):
        return "as if its trained copy was not taken"
    if not updates:
        return None
    if wrong.agrees(base):
        if len(updates) == 1:
            return "as if its adapter was skipped"
        return "as if its adapters were skipped"
    for number, update in enumerate(updates, start=1):
        own = update.scale * (update.b[wrong.rows].double() @ update.a.double())
        if len(updates) > 1 and wrong.agrees(base + wrong.delta - own):
            return f"as if adapter {number} of {len(updates)} was left out"
    if wrong.agrees(base + 2 * wrong.delta):
        return "as if it was merged twice"
    return None


def _scaled(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    """All of the update, or of the weight, times one number."""
    base = wrong.weight.double()
    start, moved = torch.zeros_like(base), base
    if wrong.expected.low_rank:
        start, moved = base, wrong.delta
    middle = _factor(wrong, start, moved)
    if middle is None:
        return None
    factor = 1.0
    for candidate in (round(middle, 2), middle):  # the exact one, where both agree
        if wrong.agrees(start + candidate * moved):
            factor = candidate
    if abs(factor - 1) < 1e-3:
        return None
    if not wrong.expected.low_rank:
        return f"as if it was multiplied by {factor:.4g}"
    rank = len(wrong.expected.low_rank[0].a)
    for told, value in (("sqrt(r), not r", math.sqrt(rank)), ("r, not sqrt(r)", 1 / math.sqrt(rank))):
        if abs(factor / value - 1) < 0.02:
            return f"as if its scale was alpha over {told}"
    return f"as if its scale was {factor:.3g} times what it is"


def _factor(wrong: Wrong, start: Tensor, moved: Tensor) -> float | None:
    """The c for which start + c * moved is what was written: each element allows an interval of them; None where these
    have no c in common."""
    there = moved != 0
    away, half = (wrong.written.double() - start)[there], wrong.tolerance(wrong.written.double())[there]
    ends = torch.stack([(away - half) / moved[there], (away + half) / moved[there]])
    if not ends.numel():
        return None
    low = float(ends.amin(0).sort().values[int(0.998 * (ends.shape[1] - 1))])
    high = float(ends.amax(0).sort().values[math.ceil(0.002 * (ends.shape[1] - 1))])
    if low > high + 1e-3 * abs(high):
        return None
    return (low + high) / 2


def _turned(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    size = wrong.written.shape[1]
    if wrong.elements != size * size or not wrong.expected.low_rank:
        return None
    turned = torch.zeros_like(wrong.delta)
    for update in wrong.expected.low_rank:
        turned += update.scale * (update.b.double() @ update.a[:, wrong.rows].double()).T
    if wrong.agrees(wrong.weight.double() + turned):
        return "as if its update was transposed"
    whole = load(wrong.expected.name)
    if wrong.agrees(whole[:, wrong.rows].T.double() + wrong.delta):
        return "as if its base was transposed"
    return None


def _from_elsewhere(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    """Another tensor, another one's update, or another one's base."""
    for name, weight, delta in others():
        weight, delta, place = _matrix(weight).double(), _matrix(delta), place_of(name)
        if wrong.agrees(weight + delta):
            return f"as if it was {place}"
        if wrong.expected.low_rank and wrong.agrees(wrong.weight.double() + delta):
            return f"as if it had the adapter of {place}"
        if wrong.agrees(weight + wrong.delta):
            return f"as if it had the base weights of {place}"
    return None


def _rounded_otherwise(wrong: Wrong, others: Others, load: Callable[[str], Source]) -> str | None:
    """Right but for the last places: all within some units of what it must be, and not to one side."""
    exact = wrong.weight.double() + wrong.delta
    off = (wrong.written.double() - exact) / unit(exact.abs(), wrong.rounding.dtype)
    sum_of_rounded = wrong.weight.double() + wrong.delta.to(wrong.rounding.dtype).double()
    if wrong.expected.low_rank and not wrong.rounding.stochastic and wrong.agrees(sum_of_rounded):
        return "as if its update was rounded before it was added"
    if not wrong.mostly(off.abs() <= 1.001):
        return None
    if wrong.mostly(off * exact.sign() <= 0):
        return "as if it was rounded toward zero"
    return "as if it was rounded in another way or twice, or added to slightly other weights"
