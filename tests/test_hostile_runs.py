"""Hostile run folders (hostile_runs.py) given to the commands that take a run: nothing runs, nothing outside of the
folder is touched, and each refusal says which folder, in at most six lines.

Here each case meets one command; `pytest -m slow` gives each to all, and `python tests/test_hostile_runs.py RUN BASE`
prints what became of them, as docs/attacks.md has it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import Attacker, Outcome, count, refusal_complaints
from hostile_folders import OWNED, good_folders
from hostile_runs import RUNS, RunCase, good_run

COMMANDS = ("report", "verify", "items", "erase", "runs", "compare", "eval", "predict", "export", "merge")
SECONDS, BYTES = 30, 1 << 30
OUTSIDE = "a user's own file"


def words_of(command: str, folder: Path, other: Path, here: Path) -> list[str]:
    here.mkdir(parents=True, exist_ok=True)
    (here / "questions.jsonl").write_text('{"instruction": "What is aspirin?"}\n')
    run = str(folder)
    return {
        "report": ["report", run],
        "verify": ["report", run, "--verify"],
        "items": ["items", run],
        "erase": ["erase", run, "--text"],
        "runs": ["runs", str(folder.parent)],
        "compare": ["compare", run, str(other)],
        "eval": ["eval", run, "--tasks", "facts", "--limit", "8", "--offline"],
        "predict": ["predict", run, "--data", str(here / "questions.jsonl"), "--out", str(here / "a.jsonl"),
                    "--max-new-tokens", "4", "--offline"],
        "export": ["export", run, "--as", "gguf", "--out", str(here / "exported"), "--offline"],
        "merge": ["merge", run, "--out", str(here / "merged"), "--offline"],
    }[command]  # fmt: skip


def ask(attacker: Attacker, case: RunCase, command: str, good: Path, out: Path) -> tuple[Outcome, list[str]]:
    place = out / command / case.folder
    place.mkdir(parents=True)
    (place / "outside.txt").write_text(OUTSIDE)
    folder = Path(shutil.copytree(good, place / case.folder))
    case.change(folder)
    here = place / "here"
    outcome = attacker(words_of(command, folder, good, here), here, hostile=folder)
    return outcome, complaints(case, command, outcome, place)


def complaints(case: RunCase, command: str, outcome: Outcome, place: Path) -> list[str]:
    """What did not hold."""
    found = [f"executed {event}" for event in outcome.executed]
    escaped = [path for path in place.iterdir() if path.name.startswith("ESCAPED")]
    if escaped or any(path.name == OWNED for path in place.rglob("*")) or Path(OWNED).exists():
        found.append("the folder has written outside of itself")
    if (place / "outside.txt").read_text() != OUTSIDE:
        found.append("a file outside of the folder was changed")
    if (place / "users-own-data").exists() and not list((place / "users-own-data").rglob("train.jsonl")):
        found.append("text outside of the folder was removed")
    if outcome.code == 0 and command in case.must_refuse:
        found.append("taken in silence")
    if outcome.code != 0:
        found += refusal_complaints(outcome, case.folder)
    if "\x1b" in outcome.said:
        found.append("control characters reach the terminal")
    if outcome.seconds > SECONDS or outcome.peak_bytes > BYTES:
        found.append(f"took {outcome.seconds:.0f} s and {outcome.peak_bytes >> 20} MiB")
    return found


@pytest.fixture(scope="module")
def good(micro_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    made = good_folders(micro_run.base, place / "parts")
    return good_run(micro_run.folder, made.model, made.adapter, place / "good_run")


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    with Attacker() as found:
        yield found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_good_run_is_used(command: str, good: Path, attacker: Attacker, tmp_path: Path):
    outcome, found = ask(attacker, RunCase("good", lambda folder: None), command, good, tmp_path)
    assert outcome.code == 0 and not found, outcome.said


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.folder)
def test_a_hostile_run_is_refused_or_does_no_harm(case: RunCase, good: Path, attacker: Attacker, tmp_path: Path):
    command = COMMANDS[RUNS.index(case) % len(COMMANDS)]
    outcome, found = ask(attacker, case, command, good, tmp_path)
    assert not found, f"{command}: {found}\n{outcome.said[-1500:]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.folder)
def test_every_command_meets_it(case: RunCase, good: Path, attacker: Attacker, tmp_path: Path):
    for command in COMMANDS:
        outcome, found = ask(attacker, case, command, good, tmp_path)
        assert not found, f"{command}: {found}\n{outcome.said[-1500:]}"


def table(run: Path, base: Path) -> None:
    """Every case and every command, by command. run: one whose data is packed; base: its model."""
    counts: dict[str, Counter] = {command: Counter() for command in COMMANDS}
    with tempfile.TemporaryDirectory() as folder, Attacker() as attacker:
        place = Path(folder).resolve()
        made = good_folders(base, place / "parts")
        good = good_run(run, made.model, made.adapter, place / "good_run")
        for case in RUNS:
            for command in COMMANDS:
                outcome, found = ask(attacker, case, command, good, place / "asked")
                row = counts[command]
                count(row, outcome, found)
                for each in found:
                    print(f"{case.folder}, {command}: {each}: {outcome.said[-300:]!r}", file=sys.stderr)
    columns = ("asked", "refused", "did no harm", "executed", "held")
    print("| command | " + " | ".join(columns) + " |\n|" + " --- |" * 6)
    for command, row in counts.items():
        print(f"| `{command}` | " + " | ".join(str(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    table(Path(sys.argv[1]), Path(sys.argv[2]))
