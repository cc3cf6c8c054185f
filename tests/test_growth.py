"""No regular expression of the package takes time that grows with the square of one record."""

import importlib
import pkgutil
import re
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

import qmedtune

UNITS = (
    "a", "0", " ", "\n", "A ", "a.", "0 ", "0-", "/", ": ", "Aa ", "A0", "[", "(", "<a ", "&", "_", "|", "-\n",
    " \n", "a\n",
    "'", '"', "{", "#", "\\", "%", "=", "http://a ", "(Fig. ", "[1,", "Answer: ", "(A) ", "**", "$", "\\boxed{", "No, ",
    "1. ", "<|", "|>", "\u00a0", ", ", ";", "a@", "::",
)  # fmt: skip
ANCHORED = {"HUB_ID"}  # only ever matched at the start of a name of one line


def patterns() -> list[tuple[str, re.Pattern]]:
    """Every pattern that a module holds, by itself, in a collection or in a field."""
    found: dict[int, tuple[str, re.Pattern]] = {}
    for module in pkgutil.walk_packages(qmedtune.__path__, "qmedtune."):
        if module.name.startswith("qmedtune.bench") or module.name.endswith("__main__"):
            continue
        for name, value in list(vars(importlib.import_module(module.name)).items()):
            for pattern in _inside(value, 0):
                found.setdefault(id(pattern), (f"{module.name}.{name}", pattern))
    return [entry for entry in found.values() if entry[0].rpartition(".")[2] not in ANCHORED]


def _inside(value: Any, depth: int) -> Iterator[re.Pattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif depth < 3 and isinstance(value, (list, tuple, set, frozenset, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _inside(part, depth + 1)
    elif depth < 3 and is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _inside(getattr(value, field.name), depth + 1)


def slow_ones(units: tuple[str, ...], size: int) -> list[tuple[str, str]]:
    """Patterns that take over a second per 100,000 characters: a quadratic one takes ten times that."""
    slow = []
    for name, pattern in patterns():
        for unit in units:
            text: Any = unit * (size // len(unit))
            text = text.encode() if isinstance(pattern.pattern, bytes) else text
            started = time.process_time()
            for _ in pattern.finditer(text):
                pass
            if time.process_time() - started > size * 1e-5:
                slow.append((name, unit))
    return slow


@pytest.mark.slow
def test_all_repeats_take_linear_time():
    """180 patterns by 44 repeats: minutes. Those for identifiers are tested quickly in test_phi_hard.py."""
    assert len(patterns()) > 100
    assert slow_ones(UNITS, 40_000) == []
