"""Signals and the time limit on whole processes: exit codes, how soon, and that the same command then ends the same.

Each child is forked from a process that has imported the libraries (see kill.py); the command line is the real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("signals.py")


def ran(kind: str, tmp_path: Path) -> dict:
    command = [sys.executable, str(SCRIPT), kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_signal_seals_within_one_step_and_a_second_one_leaves_at_once(tmp_path: Path):
    found = ran("once,twice", tmp_path)
    once, twice = found["once"], found["twice"]
    assert once["code"] == 143
    assert 1 <= once["sealed_step"] - once["step_at_signal"] + 1 <= 3  # the step in hand, and one that had just begun
    assert "stopped by SIGTERM; the same command continues from here" in once["said"]
    assert once["status"] == "stopped"
    assert twice["code"] == 143
    assert twice["seconds"] < 1.0  # the step in hand takes 30 s


@pytest.mark.slow
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path: Path):
    assert ran("whole", tmp_path)["whole"] == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}


@pytest.mark.slow
def test_signals_at_random_moments_of_a_run(tmp_path: Path):
    found = ran("random", tmp_path)["random"]
    assert found["different"] == [] and found["half_artefacts"] == []
    assert set(found["codes"]) <= {"0", "129", "130", "143"} and sum(found["codes"].values()) == 20


@pytest.mark.slow
def test_time_limits_add_up_to_a_run(tmp_path: Path):
    found = ran("time-limit", tmp_path)["time-limit"]
    assert found["codes"][-1] == 0 and len(found["codes"]) > 1
    assert set(found["codes"]) == {0}  # a planned stop is no failure
    # With the start of the process; the limit is 2 s on a machine that does the whole run in 12.
    assert found["overrun_s"] < 2.5 * found["limit_s"]
    assert found["same_weights"]


@pytest.mark.slow
def test_a_second_run_leaves_at_any_moment_of_the_first(tmp_path: Path):
    found = ran("second", tmp_path)["second"]
    codes = found["codes"]
    refused = codes.index(0) if 0 in codes else len(codes)
    assert found["same_weights"] and refused > 3
    # The last may come when the first has let go of its lock and is on its way out: they find everything done.
    assert set(codes[:refused]) == {1} and set(codes[refused:]) <= {0} and found["refused"] == refused
