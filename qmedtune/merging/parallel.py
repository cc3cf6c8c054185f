"""All cores for work over blocks of rows, without barriers.

torch splits every operation over its threads and waits for the slowest; on a machine that is also doing something else
that wait is most of the time (a merge took 20 times as long beside two busy neighbours on 2 cores). Here an operation
runs on one thread and blocks run side by side. Block borders, and so results, do not depend on the number of cores.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Apply = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""What `map` does; `pool.map` does it on all cores."""

# Blocks in work or waiting to be taken: enough for 6 cores, and 6 x 3 MB of results.
AHEAD = 6

_own = threading.local()


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, while torch operations use one each.

    Collections of garbage leave out what was there before: walking all that torch and transformers import stops every
    thread for .3 s, a twelfth of the merge of a 1.1B model.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        gc.unfreeze()
        torch.set_num_threads(count)


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `jobs` in their order, computed in `pool`, never more than AHEAD of what was taken."""
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_fp32(block: Tensor) -> Tensor:
    """A copy of `block` in fp32, in memory that this thread's next call takes again.

    Fresh memory for each block costs more than the conversion: the kernel clears every page of it.
    """
    buffer = getattr(_own, "buffer", None)
    if buffer is None or buffer.numel() < block.numel():
        buffer = _own.buffer = torch.empty(block.numel(), dtype=torch.float32)
    return buffer[: block.numel()].view(block.shape).copy_(block)
