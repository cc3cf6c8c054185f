"""A run that is killed, or whose disk is full, at a call that changes its folder. Every call: python tests/calls.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("calls.py")


def check(kind: str, every: int) -> None:
    # A process of its own: it forks, which a process with torch's threads running must not.
    command = [sys.executable, str(SCRIPT), kind, "--every", str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    tally = json.loads(done.stdout)
    assert tally["odd"] == tally["half_artefacts"] == tally["different"] == []
    assert tally["stops"] >= sum(tally["calls"].values()) // every > 2


def test_a_kill_at_one_call_in_two_hundred():
    check("kill", 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_one_call_in_ten(kind: str):
    check(kind, 9)
