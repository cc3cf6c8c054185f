"""Stop at the n-th system call that changes a folder: what SIGKILL leaves, at every place and not at random ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

CALLS = ("replace", "fsync", "unlink", "rmdir", "link", "mkdir")


class Crash(BaseException):
    """No handler of errors sees it."""


@contextmanager
def at_call(number: int) -> Iterator[list[str]]:
    """Raise Crash instead of call `number` (from 0) of CALLS; yields the names of those that were let through."""
    done: list[str] = []

    def counted(name: str, call: Callable) -> Callable:
        def function(*given, **named):
            if len(done) == number:
                raise Crash
            done.append(name)
            return call(*given, **named)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield done


def everywhere(work: Callable[[], object], after: Callable[[], object], again: Callable[[], object]) -> int:
    """Crash in `work` at its first call, its second ..., until it is through; each time `after` looks at what is left,
    and `again` puts things back to the beginning. Returns how many crashes there were."""
    number = 0
    while True:
        try:
            with at_call(number):
                work()
        except Crash:
            after()
            again()
            number += 1
        else:
            return number
