"""Commands that write, disturbed: killed, started twice at once, without room from one call on.

Few of each here; all of them: python tests/kill_commands.py --kills 100 --doubles 20, python tests/full_commands.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def tally(script: str, *words: str) -> dict:
    # A process of its own: it forks, which a process with torch's threads running must not.
    done = subprocess.run([sys.executable, str(HERE / script), *words], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["odd"] == found["different"] == []
    return found


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.mark.slow
@needs_compiler
def test_a_full_disk_at_one_call_in_twenty_of_eval_and_report():
    found = tally("full_commands.py", "eval", "report", "--every", "20")
    assert found["trials"] >= sum(found["calls"].values()) // 20 >= 2 and found["failed_clearly"] >= 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("how", [[], ["--once"]])
def test_a_full_disk_at_every_call(how: list[str]):
    found = tally("full_commands.py", *how)
    assert found["trials"] == sum(found["calls"].values())


@pytest.mark.slow
@needs_compiler
def test_a_full_disk_at_one_call_in_hundred_of_an_ablation():
    """Of about 1,300; its runs are tried call by call in test_calls.py."""
    found = tally("full_commands.py", "ablate", "--every", "100")
    assert found["trials"] >= 10 and found["failed_clearly"] >= 5


def test_a_killed_command_comes_to_the_same():
    found = tally("kill_commands.py", "predict", "eval", "merge", "export", "--kills", "4")
    assert found["same"] == 4


@pytest.mark.slow
def test_hundred_kills():
    assert tally("kill_commands.py", "--kills", "100")["same"] == 100


@pytest.mark.slow
def test_twenty_pairs():
    found = tally("kill_commands.py", "--doubles", "20")
    assert found["one_left"] + found["both_ended"] == 20 and found["one_left"] > 5
