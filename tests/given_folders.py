"""Hostile folders of somebody else for every command: python tests/given_folders.py FOLDERS MODEL [COMMAND ...]

FOLDERS holds model folders, and adapter folders of MODEL (those with an adapter_config.json). Nobody says here which of
them are harmless: one that a command uses (exit 0) is named, for a person to judge; all else must be refused as
test_hostile_folders.py asks. Prints one row a command, then what was used and what did not hold.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ask_folders import COMMANDS, OF_ADAPTERS, complaints, words_of
from attack import Attacker, count
from hostile_folders import Case, Good


def folders(place: Path) -> Iterator[Path]:
    """Those with a configuration, also one floor down."""
    for path in sorted(place.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name in ("snapshots", "blobs"):
                yield from folders(path)
            else:
                yield path


def main(place: Path, model: Path, asked: list[str]) -> None:
    adapter = next(folder for folder in folders(place) if folder.name == "a_good")
    counts: dict[str, Counter[str]] = {}
    used: dict[str, list[str]] = {}
    bad = []
    with tempfile.TemporaryDirectory() as out, Attacker() as attacker:
        for folder in folders(place):
            is_adapter = (folder / "adapter_config.json").exists()
            for command in OF_ADAPTERS if is_adapter else COMMANDS:
                if command not in asked:
                    continue
                here = Path(out) / folder.name / command
                words = words_of(command, _case(folder), folder, Good(model, adapter), here)
                outcome = attacker(words, here, typed="What is aspirin?\n", hostile=folder)
                found = complaints(_case(folder), outcome, folder, here)
                if outcome.code == 0:
                    used.setdefault(folder.name, []).append(command)
                count(counts.setdefault(command, Counter()), outcome, found)
                for each in found:
                    bad.append(f"{folder.name}, {command}: {each}: {outcome.said[-300:]!r}")
    columns = ("asked", "refused", "did no harm", "executed", "held")
    print("| command | " + " | ".join(columns) + " |\n|" + " --- |" * 6)
    for command, row in counts.items():
        print(f"| `{command}` | " + " | ".join(str(row[column]) for column in columns) + " |")
    for name, commands in used.items():
        print(f"used: {name}: {', '.join(commands)}")
    print("\n".join(bad))


def _case(folder: Path) -> Case:
    return Case("given", folder.name.replace("_", " "), lambda _: None, harmless=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:] or list(COMMANDS))
