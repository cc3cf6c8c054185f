"""`--on-end`: the user's command is told how a run ended, however it ended, and its failure changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_run

from qmedtune import cli
from qmedtune.errors import RunError
from qmedtune.interrupt import TimeLimit
from qmedtune.on_end import telling

WRITE = 'printf "%s|%s|%s|%s" "$QMEDTUNE_NAME" "$QMEDTUNE_STATUS" "$QMEDTUNE_HEADLINE" "$QMEDTUNE_RUN" > told'


@pytest.mark.parametrize(
    "raised, status, line",
    [
        (RunError("no room\nfree space"), "failed", "no room"),
        (TimeLimit(), "stopped", "time limit reached; the same command continues from here"),
        (ValueError("the patient's name"), "failed", "ValueError"),
    ],
)
def test_an_end_that_is_raised(raised: BaseException, status: str, line: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(type(raised)), telling(WRITE, "mine", tmp_path):
        raise raised
    assert (tmp_path / "told").read_text() == f"mine|{status}|{line}|{tmp_path}"


def test_an_end_that_is_reached(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with telling(WRITE, "mine", tmp_path) as end:
        end.told(make_run())
    name, status, line, _ = (tmp_path / "told").read_text().split("|")
    assert (name, status) == ("mine", "finished") and line.startswith("facts 0.06 → 0.81")


def test_a_command_that_fails_is_warned_about_and_nothing_else(tmp_path: Path, capsys):
    with telling("exit 3", "mine", tmp_path) as end:
        end.told(make_run())
    assert "exit code 3" in capsys.readouterr().err


def test_through_the_command_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    from conftest import MICRO

    assert cli.invoke(["run", str(MICRO), "--out", "theirs", "--offline", "--on-end", WRITE]) == 2
    assert (tmp_path / "told").read_text().startswith("micro|failed|--out: theirs holds files that no run made")
