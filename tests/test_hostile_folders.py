"""Hostile model and adapter folders (hostile_folders.py) given to the commands: nothing runs, nothing loads in silence,
and each refusal names the folder in at most six lines, in bounded time and memory.

Here one folder in four meets one command, another one each; `pytest -m slow` gives every folder to every command, and
`python tests/test_hostile_folders.py` prints what became of them by group, as docs/attacks.md has it.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ask_folders import ADAPTER_FORMS, COMMANDS, OF_ADAPTERS, complaints, words_of
from attack import Attacker, Outcome, count
from hostile_folders import ADAPTERS, MODELS, Case, Good, good_folders, make

QUICK = 4  # one case in so many, in half a minute; all of them `pytest -m slow`


def ask(attacker: Attacker, case: Case, command: str, good: Good, out: Path) -> tuple[Outcome, list[str]]:
    folder = out / case.folder
    if not folder.exists():
        make(case, good.adapter if case in ADAPTERS else good.model, out)
    here = out / "here" / case.folder / command
    words = words_of(command, case, folder, good, here)
    outcome = attacker(words, here, typed="What is aspirin?\n", hostile=folder)
    return outcome, complaints(case, outcome, folder, here)


def commands_of(case: Case) -> tuple[str, ...]:
    return case.asked or (OF_ADAPTERS if case in ADAPTERS else COMMANDS)


def one_command(case: Case) -> str:
    """Another one for each case; what is harmless is answered, which is quicker than trained."""
    possible = commands_of(case)
    return "predict" if case.harmless else possible[[*MODELS, *ADAPTERS].index(case) % len(possible)]


@pytest.fixture(scope="module")
def good(micro_run, tmp_path_factory: pytest.TempPathFactory) -> Good:
    return good_folders(micro_run.base, tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    with Attacker() as found:
        yield found


def test_names_and_numbers_of_the_cases():
    names = [case.folder for case in (*MODELS, *ADAPTERS)]
    assert len(names) == len(set(names)) >= 200


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_the_good_folders_are_used(command, good, attacker, tmp_path):
    untouched = Case("good", command, lambda folder: None, harmless=True)
    outcome, found = ask(attacker, untouched, command, good, tmp_path)
    assert outcome.code == 0 and not found, outcome.said


@pytest.mark.parametrize("case", [*MODELS, *ADAPTERS][::QUICK], ids=lambda case: case.folder)
def test_a_hostile_folder_is_refused_or_does_no_harm(case, good, attacker, tmp_path):
    outcome, found = ask(attacker, case, one_command(case), good, tmp_path)
    assert not found, f"{one_command(case)}: {found}\n{outcome.said[-1500:]}"


@pytest.mark.parametrize("form", ADAPTER_FORMS)
def test_an_adapter_that_is_pickled_is_exported_in_no_form(form: str, good: Good, attacker: Attacker, tmp_path: Path):
    [case] = [case for case in ADAPTERS if case.folder == "adapter-pickled"]
    folder = make(case, good.adapter, tmp_path)
    words = ["export", str(folder), "--as", form, "--base", str(good.model), "--out", str(tmp_path / "x"), "--offline"]
    outcome = attacker(words, tmp_path / "here", hostile=folder)
    assert not complaints(case, outcome, folder, tmp_path), outcome.said[-1500:]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MODELS, *ADAPTERS], ids=lambda case: case.folder)
def test_every_command_refuses_it(case, good, attacker, tmp_path):
    for command in commands_of(case):
        outcome, found = ask(attacker, case, command, good, tmp_path)
        assert not found, f"{command}: {found}\n{outcome.said[-1500:]}"


def table(base: Path) -> None:
    """Every folder and every command (or those that are named behind the base), by group."""
    counts: dict[str, Counter] = {}
    asked = sys.argv[2:] or COMMANDS
    with tempfile.TemporaryDirectory() as place, Attacker() as attacker:
        good = good_folders(base, Path(place))
        for case in (*MODELS, *ADAPTERS):
            for command in commands_of(case):
                if command not in asked:
                    continue
                outcome, found = ask(attacker, case, command, good, Path(place))
                row = counts.setdefault(case.group, Counter())
                count(row, outcome, found)
                for each in found:
                    print(f"{case.folder}, {command}: {each}", file=sys.stderr)
            counts.setdefault(case.group, Counter())["folders"] += 1
    columns = ("folders", "asked", "refused", "did no harm", "executed", "held")
    print("| group | " + " | ".join(columns) + " |\n|" + " --- |" * 7)
    for group, row in counts.items():
        print(f"| {group} | " + " | ".join(str(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    table(Path(sys.argv[1]))
