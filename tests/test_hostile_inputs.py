"""Hostile data files and recipes (hostile_inputs.py) given to `plan` and `run`: refused or passed over, in bounded
time and memory, and never executed. `python tests/test_hostile_inputs.py` prints the table of docs/attacks.md."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import Attacker, Outcome
from hostile_inputs import INPUTS, Input

SECONDS = 30
BYTES = 3 << 29  # 1.5 GiB: a batch of Parquet may hold one


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    with Attacker() as found:
        yield found


def complaints(case: Input, outcome: Outcome, here: Path) -> list[str]:
    found = [f"executed {event}" for event in outcome.executed]
    if (here / "OWNED").exists():
        found.append("code has run")
    if outcome.code == 0 and not case.read:
        found.append("read in silence")
    if outcome.code not in (0, 1, 2, 3, 4):
        found.append(f"exit code {outcome.code}")
    if outcome.code and not 1 <= len(outcome.lines) <= 6:
        found.append(f"{len(outcome.lines)} lines")
    if "--debug" in " ".join(outcome.lines) or "Traceback" in outcome.said:
        found.append("an error without words")
    if "\x1b" in outcome.said:
        found.append("colours reach the terminal")
    if outcome.seconds > SECONDS or outcome.peak_bytes > BYTES:
        found.append(f"took {outcome.seconds:.0f} s and {outcome.peak_bytes >> 20} MiB")
    return found


def ask(attacker: Attacker, case: Input, command: str, out: Path) -> tuple[Outcome, list[str]]:
    here = out / command / case.folder
    here.mkdir(parents=True)
    case.make(here)
    (here / "r.yaml").write_text(case.text(), encoding="utf-8")
    words = (
        ["plan", "r.yaml"] if command == "plan" else ["run", "r.yaml", "--out", "run", "--until", "data", "--offline"]
    )
    outcome = attacker(words, here, hostile=here)
    return outcome, complaints(case, outcome, here)


def test_there_are_at_least_fifty_cases():
    assert len({case.folder for case in INPUTS}) == len(INPUTS) >= 50


@pytest.mark.parametrize("case", INPUTS[::4], ids=lambda case: case.folder)
def test_hostile_input_does_no_harm(case, attacker, tmp_path):
    check(case, "plan" if INPUTS.index(case) % 8 == 0 else "run", attacker, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.folder)
def test_no_hostile_input_does_harm(case, attacker, tmp_path):
    for command in ("plan", "run"):
        check(case, command, attacker, tmp_path)


def check(case: Input, command: str, attacker: Attacker, tmp_path: Path) -> None:
    outcome, found = ask(attacker, case, command, tmp_path)
    if command == "plan":  # it reads a sample, and may find nothing wrong with it
        found = [each for each in found if each != "read in silence"]
    assert not found, f"{found}\n{outcome.said[-1500:]}"


def table() -> None:
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as place, Attacker() as attacker:
        for case in INPUTS:
            outcome, found = ask(attacker, case, "run", Path(place))
            row = counts.setdefault(case.group, Counter())
            row["cases"] += 1
            row["refused"] += outcome.code != 0
            row["read or passed over"] += outcome.code == 0 and not found
            row["executed"] += bool(outcome.executed)
            row["held"] += not found
            for each in found:
                print(f"{case.folder}: {each} | {' / '.join(outcome.lines)[:200]}", file=sys.stderr, flush=True)
    columns = ("cases", "refused", "read or passed over", "executed", "held")
    print("| group | " + " | ".join(columns) + " |\n|" + " --- |" * 6)
    for group, row in counts.items():
        print(f"| {group} | " + " | ".join(str(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    table()
