"""The processes that train one stage together: who takes which rows, and what they agree on.

Every process walks the same rows in the same order and knows the whole batch, so the denominator of the loss, the token
ledger and the schedule need no exchange. What crosses between them: after each batch the gradients of what is trained
and the loss, as sums, and flags (out of memory, stop). Then all make the same update from the same numbers. The frozen
base is never sent. One process is a group of one, and exchanges nothing.

Deliberately not here: how the processes find each other (peers.py), and what they do with their rows (trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qmedtune.errors import RunError

# Sent at once: large enough that latency does not count, small beside a model's memory (planning/memory.py counts it).
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this one is `rank`; the one of rank 0 leads: it alone writes. sharded: they hold the
    base together (modeling/sharding.py), so that each pass over a model is one of all of them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of a batch: each array's rows `rank`, `rank + size`, ... It may be none.

        Where the base is sharded all get as many rows: one that would have fewer reads two tokens that do not count.
        """
        if self.size == 1:
            return arrays
        ours = {name: array[self.rank :: self.size] for name, array in arrays.items()}
        rows = len(arrays["lengths"])
        if self.sharded and len(ours["lengths"]) < -(-rows // self.size):
            return _with_empty_row(ours, arrays)
        return ours

    def turns(self, count: int) -> range:
        """Which of `count` things this process does. Where the base is sharded all do as many: what is beyond `count`
        is done once more, by all that have nothing else, and does not count."""
        if self.sharded:
            return range(self.rank, -(-count // self.size) * self.size, self.size)
        return range(self.rank, count, self.size)

    def sums(self, here: Sequence[float]) -> list[float]:
        """Sums over all processes, in double precision."""
        if self.size == 1:
            return list(here)
        summed = torch.tensor(here, dtype=torch.float64, device=_device())
        _exchange(summed, dist.ReduceOp.SUM)
        return summed.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; the same answer in all."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here), device=_device())
        _exchange(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def same(self, here: int) -> bool:
        """Whether a number is the same in all processes."""
        if self.size == 1:
            return True
        least_and_most = torch.tensor([-here, here], device=_device())
        _exchange(least_and_most, dist.ReduceOp.MAX)
        return -int(least_and_most[0]) == int(least_and_most[1])

    def add_up(self, loss: Tensor, parameters: Iterable[torch.nn.Parameter]) -> Tensor:
        """The sum of all processes' losses; the gradients become the sums of theirs. The same bits in all."""
        if self.size == 1:
            return loss
        tensors = [loss]
        for parameter in parameters:
            if parameter.grad is None:  # no row of this batch was ours
                parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        for bucket in _buckets(tensors):
            _add_up(bucket)
        return loss


def _with_empty_row(ours: dict[str, Tensor], arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row more: the first of the batch, of which nothing is supervised and two tokens are read."""
    padded: dict[str, Tensor] = {}
    for name, array in arrays.items():
        row = array[:1].clone()
        if name == "labels":
            row.fill_(-100)
        elif name == "lengths":
            row.clamp_(max=2)
        padded[name] = torch.cat([ours[name], row])
    return padded


def _exchange(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """All-reduce in place. Raises RunError where another process is gone: its connection is closed."""
    try:
        dist.all_reduce(tensor, op=op)
        if tensor.is_cuda:  # there it has only been asked for
            torch.cuda.synchronize(tensor.device)
    except RuntimeError as error:
        raise RunError(
            "another process of this run ended in the middle of a step, and so do all\n"
            "what is sealed stays; the same command goes on from the last checkpoint, with any number of processes"
        ) from error


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, of about BUCKET_BYTES each; one that is larger is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    yield bucket


def _add_up(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():  # of an embedding 2 GB, which are not copied
        _exchange(bucket[0], dist.ReduceOp.SUM)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    _exchange(flat, dist.ReduceOp.SUM)
    start = 0
    for tensor in bucket:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


ALONE = Group()
