"""How a run stops before its end: Ctrl-C, SIGTERM (Slurm, Colab), SIGHUP (a lost ssh session), `--time-limit`.

Inside `graceful()` (the training loop) the first signal only raises a flag, so that the step in hand is finished and
a checkpoint sealed; everywhere else it ends the step at once, which is safe because steps publish atomically. The time
limit does the same (SIGALRM, inside `limited()`). A second signal leaves immediately.

What is raised is no `Exception`: a handler may run inside any statement, and a reader that takes each ValueError for a
damaged record would count the signal as one and go on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A run that ends before its end, and goes on when it is asked to again."""

    exit_code: int


class Interrupted(Stopped):
    """Stopped by a signal. Exit code 128 + signal number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""

    def __init__(self, number: int):
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command continues from here")


class TimeLimit(Stopped):
    """`--time-limit` was reached; everything so far is sealed."""

    exit_code = 0

    def __init__(self) -> None:
        super().__init__("time limit reached; the same command continues from here")


class Stop:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deadline: float | None = None
        self._graceful = False
        self._watching = False

    @contextmanager
    def watching(self, time_limit_s: float | None) -> Iterator[None]:
        """Handle the SIGNALS from the outermost `watching` on; keep the deadline of the one that gives it. A signal
        that is ignored (SIGHUP under nohup) stays so."""
        outer_deadline = self.deadline
        if time_limit_s is not None:
            self.deadline = time.monotonic() + time_limit_s
        before = {}
        if not self._watching:
            self.signal, self._watching = None, True
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            self.deadline = outer_deadline
            for number, handler in before.items():
                self._watching = False
                signal.signal(number, handler)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """The code inside asks `requested` after every unit of work and then calls `raise_if_requested`."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    @contextmanager
    def limited(self) -> Iterator[None]:
        """The code inside is ended at the deadline, unless it is `graceful` then."""
        if self.deadline is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._on_deadline)
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.deadline - time.monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _on_deadline(self, number: int, frame: FrameType | None) -> None:
        if not self._graceful:
            raise TimeLimit

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if number == signal.SIGHUP:  # the terminal is gone: writing to it would fail before anything is sealed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        if not self._graceful:
            raise Interrupted(number)

    @property
    def requested(self) -> bool:
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return self.signal is not None or late

    def raise_if_requested(self) -> None:
        if self.signal is not None:
            raise Interrupted(self.signal)
        if self.requested:
            raise TimeLimit


stop = Stop()
