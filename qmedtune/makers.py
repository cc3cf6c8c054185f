"""Who makes a built-in base that is not there: handed in from the top (process.py), asked below (base.py).

Making one is a run, which stands floors above what asks for it. Deliberately imports nothing: `--help` passes here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Maker = Callable[[str, Path], None]  # makes the base of a name in a folder
_makers: list[Maker] = []


def made_by(maker: Maker) -> None:
    """Say who makes a built-in base; `process.prepare` does at every start of this program."""
    _makers[:] = [maker]


def maker() -> Maker | None:
    """Who was handed in; None in a process that only imported the package."""
    return _makers[0] if _makers else None
