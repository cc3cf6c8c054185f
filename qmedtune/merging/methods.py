"""What is trained, mixed with another model of the same shape: formulas, and tensors that are mixed as they are read.

With the base B, the trained model T = B + adapters (or T = a trained copy), the other model W, and a share `lambda`:

    linear            (1 - lambda) T + lambda W
    slerp             sin((1 - lambda) angle) / sin(angle) T + sin(lambda angle) / sin(angle) W   (Shoemake 1985)
    task_arithmetic   T + lambda (W - B): both changes of the base added up               (Ilharco et al., 2212.04089)

0 is the plain merge, 1 is W (task_arithmetic: the adapters folded onto W), both without a rounding. The angle is that
between two whole tensors. Nearly parallel ones are mixed linearly, from the cosine on that mergekit takes.
Each is numbers in front of T, W and B; T is never written, since its adapters are added to the mix with a factor.
Deliberately not here: whether the two models fit together (sibling.py), summing and rounding (merge.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qmedtune.allowed import MergeMethod
from qmedtune.errors import MergeRefused, RunError
from qmedtune.merging.lora_files import LowRank, Updates
from qmedtune.merging.parallel import Apply, in_fp32
from qmedtune.merging.tensors import row_blocks

# mergekit's DOT_THRESHOLD and eps: above it sin(angle) is small, and the formula of the sphere is the line's.
NEARLY_PARALLEL, NO_LENGTH = 0.9995, 1e-8
# Two readings sum the same numbers in another order: 1e-8 apart at most (1e8 elements, sums in fp64 of fp32 products).
SAME_COSINE = 1e-6


@dataclass(frozen=True)
class Mix:
    """The numbers in front of T, W and B."""

    trained: float
    other: float
    base: float = 0.0


def linear(share: float) -> Mix:
    return Mix(1 - share, share)


def slerp(share: float, cosine: float) -> Mix:
    """Spherical linear interpolation.

    cosine: of the angle between T and W.
    """
    if share in (0.0, 1.0) or abs(cosine) > NEARLY_PARALLEL:
        return linear(share)
    angle = math.acos(cosine)
    return Mix(math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle))


def task_arithmetic(share: float) -> Mix:
    return Mix(1.0, share, -share)


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedSum:
    """A sum of tensors of one shape by factors, made where it is indexed: in fp64, rounded once to fp32. So a number of
    it does not depend on which others it is read with."""

    parts: tuple[tuple[float, Tensor], ...]

    @property
    def shape(self) -> torch.Size:
        return self.parts[0][1].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def numel(self) -> int:
        return self.parts[0][1].numel()

    def float(self) -> Tensor:
        return self[...]

    def __getitem__(self, index: object) -> Tensor:
        (factor, tensor), *others = self.parts
        total = tensor[index].double() * factor  # pyright: ignore[reportArgumentType]
        for factor, tensor in others:
            total.add_(tensor[index].double() * factor)  # pyright: ignore[reportArgumentType]
        return total.float()


Source = Tensor | WeightedSum
"""What low-rank updates are added to: stored, or mixed as it is read."""


def mixed(parts: Iterable[tuple[float, Tensor]]) -> Source:
    """Their sum; the tensor itself where one is left, whole."""
    left = tuple(part for part in parts if part[0])
    if len(left) == 1 and left[0][0] == 1.0:
        return left[0][1]
    return WeightedSum(left)


def same(one: Source, two: Source) -> bool:
    """Whether both are the same numbers made in the same way."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)
    if len(one.parts) != len(two.parts):
        return False
    for (factor, tensor), (other_factor, other) in zip(one.parts, two.parts, strict=True):
        if factor != other_factor or not torch.equal(tensor, other):
            return False
    return True


Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Mixture:
    """All weights of a merge with another model. base, other: read B and W by name; updates: what the adapters do to B;
    cosines: of T and W by name, where the method asks for them."""

    method: MergeMethod
    share: float
    base: Read
    other: Read
    updates: Updates
    cosines: Mapping[str, float] = field(default_factory=dict)

    def mix(self, name: str) -> Mix:
        if self.method == "slerp" and name in self.cosines:
            return slerp(self.share, self.cosines[name])
        if self.method == "task_arithmetic":
            return task_arithmetic(self.share)
        return linear(self.share)

    @property
    def keeps_base(self) -> bool:
        """Whether nothing of the other model comes in."""
        return self.share == 0

    def source(self, name: str) -> Source:
        """What the low-rank updates of a weight are added to: the mix without them, of a trained copy too."""
        mix = self.mix(name)
        return mixed([(mix.trained + mix.base, self.base(name)), (mix.other, self.other(name))])

    def scaled(self) -> Updates:
        """The updates as they are added to the mix; none where nothing of the trained model is left."""
        found = Updates(copies=dict(self.updates.copies))
        for name, parts in self.updates.low_rank.items():
            factor = self.mix(name).trained
            if factor:
                found.low_rank[name] = [LowRank(part.a, part.b, part.scale * factor) for part in parts]
        for name, copy in self.updates.full.items():
            mix = self.mix(name)
            if mix.trained:
                parts = [(mix.trained, copy), (mix.other, self.other(name)), (mix.base, self.base(name))]
                found.full[name] = mixed(parts)  # pyright: ignore[reportArgumentType]
        return found

    def on_sphere(self) -> int:
        """Tensors that are not mixed along the line."""
        return len([cosine for cosine in self.cosines.values() if abs(cosine) <= NEARLY_PARALLEL])


# ---- angles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Products:
    """fp64: T with W, T with itself, W with itself."""

    both: float
    trained: float
    other: float


@dataclass(frozen=True)
class MixedModels:
    """What is mixed, as one reading gives it: the base's tensors and the other model's by name, and the updates."""

    base: Read
    other: Read
    updates: Updates


def cosines_of(names: Iterable[str], models: MixedModels, apply: Apply) -> dict[str, float]:
    """The cosine between T and W for each tensor. RunError where one is not finite."""
    found: dict[str, float] = {}
    for name in names:
        start = models.updates.full.get(name)
        if start is None:
            start = models.base(name)
        low_rank = models.updates.low_rank.get(name, ())
        work = partial(_products, start, models.other(name), low_rank)
        found[name] = _cosine(name, list(apply(work, row_blocks(tuple(start.shape)))))
    return found


def _products(start: Tensor, other: Tensor, low_rank: Sequence[LowRank], rows: slice) -> _Products:
    block = in_fp32(start[rows])
    for update in low_rank:
        block.addmm_(update.b[rows], update.a, alpha=update.scale)
    trained, there = block.flatten().double(), other[rows].flatten().double()
    return _Products(float(trained @ there), float(trained @ trained), float(there @ there))


def _cosine(name: str, parts: Sequence[_Products]) -> float:
    both = math.fsum(part.both for part in parts)
    lengths = math.sqrt(math.fsum(part.trained for part in parts)), math.sqrt(math.fsum(part.other for part in parts))
    if not math.isfinite(both):
        raise RunError(f"{name}: not finite in what is merged\nnothing was published")
    for length in lengths:
        if length > NO_LENGTH:
            both /= length
    return max(-1.0, min(1.0, both))


def check_cosines(merged_with: Mapping[str, float], read_again: Mapping[str, float]) -> None:
    """MergeRefused where the second reading finds other angles than the merge has used."""
    for name, cosine in read_again.items():
        if not abs(cosine - merged_with.get(name, math.nan)) <= SAME_COSINE:
            raise MergeRefused(f"{name}: the angle between the two models was read in two ways", {"tensor": name})
