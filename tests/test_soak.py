"""2,000 steps, a checkpoint every 20: memory, file handles and disk stay as they are (tests/soak.py, a few minutes)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_grows_over_two_thousand_steps():
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--steps", "2000", "--every", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["steps"] >= 2000 and found["checkpoints"] >= 100
    assert found["bytes_per_100_steps"] < 1_000_000
    assert len(found["handles"]) == 1
    smallest, largest = found["disk_bytes"]
    assert largest - smallest < 0.5 * smallest and len(found["files"]) <= 2
