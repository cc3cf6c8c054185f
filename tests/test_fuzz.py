"""The fuzz targets (tests/fuzz) on their seeds and some mutations of them; `pytest -m slow` gives each target a minute,
guided by coverage where atheris is installed. Ten minutes each: `python tests/fuzz/fuzz.py --seconds 600`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "fuzz"))

import fuzz
from targets import TARGETS, run, seeds

ROUNDS = 20


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name):
    for seed in seeds(name):
        run(TARGETS[name], seed)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_raise_only_errors_with_words(name):
    _, found = fuzz.mutate(name, seconds=5, most=ROUNDS)
    assert not found, found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_minute_of_fuzzing_finds_nothing(name, tmp_path):
    if find_spec("atheris"):
        code = fuzz.guided(name, 60, tmp_path)
        log = next(tmp_path.glob("*.log")).read_text()
        assert code == 0, log[-3000:]
    else:
        _, found = fuzz.mutate(name, seconds=60, seed=2)
        assert not found, found[0][1]
