"""SIGKILL at random moments of a whole run; the same command then gives the same weights. 200 by tests/kill.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).with_name("kill.py")


def kills(count: int, seed: int, *options: str) -> dict:
    # A process of its own: it forks, which a process with torch's threads running must not.
    command = [sys.executable, str(KILL), "--kills", str(count), "--seed", str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(tally: dict, count: int) -> None:
    assert tally["different"] == []
    assert tally["half_artefacts"] == []
    assert tally["same"] == tally["kills"] == count
    assert tally["polls"] > count


def test_four_kills():
    check(kills(4, seed=1), 4)


@pytest.mark.slow
def test_two_hundred_kills():
    check(kills(200, seed=2), 200)


@pytest.mark.slow
def test_kills_with_dropout_and_the_best_weights_kept():
    hard = ["adapter.dropout=0.1", "validate.keep_best=true", "validate.every=2", "save.every=3"]
    check(kills(30, 3, *(word for setting in hard for word in ("--set", setting))), 30)
