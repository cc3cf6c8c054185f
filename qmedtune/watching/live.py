"""The live parts of a page: HTML by name, made again when there is something new, and never so often that it costs.

A browser asks every two seconds. Rendering takes milliseconds at first, more with 100,000 steps; parts are kept for a
hundred times as long as they took, so that being watched costs a run at most one per cent of a core.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SHARE = 100
LEAST_S, MOST_S = 0.5, 4.0  # a status may be shown for so long after it changed
Parts = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A rendered page fragment with its cache tag.

    `body`: the parts as JSON; `tag` names the content.
    """

    body: bytes
    tag: str


class Live:
    """The parts of one page."""

    def __init__(self, render: Callable[[], Parts]) -> None:
        self._render = render
        self._lock = threading.Lock()
        self._kept: Rendered | None = None
        self._fresh_until = 0.0

    def parts(self) -> Rendered:
        with self._lock:
            if self._kept and time.monotonic() < self._fresh_until:
                return self._kept
            began = time.thread_time()
            body = json.dumps(self._render(), ensure_ascii=False).encode(errors="replace")
            took = time.thread_time() - began
            self._kept = Rendered(body, hashlib.sha256(body).hexdigest()[:16])
            self._fresh_until = time.monotonic() + min(MOST_S, max(LEAST_S, SHARE * took))
            return self._kept
