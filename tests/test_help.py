"""`--help`: every command has examples that parse, and a shell completes commands, options and values."""

import os
import shlex
import subprocess
import sys

import pytest
import typer.main

from qmedtune import cli
from qmedtune.commands.examples import EXAMPLES

GROUP = typer.main.get_command(cli.app)
LINES = [(name, line) for name, lines in EXAMPLES.items() for line in lines]


def test_every_command_has_an_example():
    assert set(EXAMPLES) == set(cli.COMMANDS)


@pytest.mark.parametrize(("name", "line"), LINES, ids=[line for _, line in LINES])
def test_an_example_is_shown_and_parses(name, line, capsys):
    assert cli.invoke([name, "--help"]) == 0
    assert f"  {line}\n" in capsys.readouterr().out
    words = shlex.split(line.partition("#")[0].rpartition("|")[2].partition(">")[0])
    assert words[:2] == ["qmedtune", name]
    command = GROUP.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words[2:])  # raises for an unknown option, value or word too many


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qmedtune re", {"report", "recipe"}),
        ("qmedtune run --of", {"--offline"}),
        ("qmedtune export --as gg", {"gguf"}),
    ],
)
def test_a_shell_completes(typed, offered):
    words = typed.split(" ")
    asked = {"_QMEDTUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "qmedtune"], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert offered <= set(done.stdout.split()) and done.stderr == ""
