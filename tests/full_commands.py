"""A disk that is full from one write, fsync, rename, link or new file on, for every one of them, in each command.

    python tests/full_commands.py                        # eval, report, predict, merge, export
    python tests/full_commands.py eval report --every 1 --once

Needs a C compiler (full.c). Each trial: the command meets ENOSPC at call n; it must fail with one to six clear lines or
come to its whole result; nothing half-made stands under a final name; given again, with room, it comes to the same
result bit for bit. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from each_command import COMMANDS, Command, Materials, expected_of, finish, is_clear, materials, named, preload, start

HERE = Path(__file__).parent
TRIED = ["eval", "report", "predict", "merge", "export"]
LIBRARY = "QMEDTUNE_TEST_FULL"


def compiled(folder: Path) -> Path:
    library = folder / "full.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "full.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def calls_of(command: Command, given: Materials, folder: Path) -> int:
    """How many calls of a whole command are counted."""
    place = folder / "counted"
    place.mkdir()
    command.prepare(given, place)
    assert trial(command, given, place, sys.maxsize, False) == 0
    calls = int((folder / "calls").read_text())
    assert calls > 3, (folder / "counted.said").read_text()[-600:]
    shutil.rmtree(place)
    return calls


def trial(command: Command, given: Materials, place: Path, number: int, once: bool) -> int:
    """The exit code of a command for which the disk is full from call `number` on, anywhere below `place`; how many
    calls there were stands in a file beside it."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.full_seen.restype = ctypes.c_long
    leave = os._exit

    def told(code: int) -> None:
        (place.parent / "calls").write_text(str(library.full_seen()))
        leave(code)

    def arm() -> None:
        os._exit = told  # type: ignore[assignment]
        library.full_from(ctypes.c_long(number), int(once), str(place).encode())

    return finish(start(command.words(given, place), place.parent / f"{place.name}.said", arm))


def experiment(names: list[str], every: int, once: bool, folder: Path) -> dict[str, Any]:
    preload()
    given = materials(folder / "materials")
    tally: dict[str, Any] = {
        "calls": {},
        "trials": 0,
        "failed_clearly": 0,
        "ended_whole": 0,
        "odd": [],
        "different": [],
    }
    for command in named(names):
        expected = expected_of(command, given, folder)
        calls = calls_of(command, given, folder)
        tally["calls"][command.name] = calls
        for number in range(COMMANDS.index(command) % every, calls, every):
            one(command, given, folder / "place", (number, once), expected, tally)
            bad = len(tally["odd"]) + len(tally["different"])
            print(f"{command.name}, call {number} of {calls}: {bad} not as promised", file=sys.stderr, flush=True)
    return tally


def one(
    command: Command, given: Materials, place: Path, at: tuple[int, bool], expected: str, tally: dict[str, Any]
) -> None:
    place.mkdir()
    command.prepare(given, place)
    said, where = place.with_name("place.said"), f"{command.name}, call {at[0]}"
    code = trial(command, given, place, *at)
    tally["trials"] += 1
    try:
        found = command.result(place)
    except AssertionError as error:
        found = None
        tally["odd"].append(f"{where}: {error}")
    if code == 0 and found == expected:
        tally["ended_whole"] += 1
    elif code in (1, 4) and found in (None, expected) and is_clear(said):
        tally["failed_clearly"] += 1
    else:
        tally["odd"].append(f"{where}: exit {code}, {said.read_text()[-300:]}")
    if found == expected and command.again:  # all was done but the last call
        code = command.again
    else:
        code = finish(start(command.words(given, place), said))
    if code not in (0, command.again) or command.result(place) != expected:
        tally["different"].append(f"{where}: again exit {code}, {said.read_text()[-300:]}")
    shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=TRIED)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--once", action="store_true", help="the one call alone fails")
    options = parser.parse_args()
    if LIBRARY not in os.environ:  # loaded before anything else: in a process of its own
        with tempfile.TemporaryDirectory() as folder:
            library = str(compiled(Path(folder)))
            environment = {**os.environ, "LD_PRELOAD": library, LIBRARY: library, "HF_HUB_OFFLINE": "1"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        tally = experiment(options.commands, options.every, options.once, Path(folder).resolve())
    print(json.dumps(tally, indent=1))
    sys.exit(1 if tally["odd"] or tally["different"] else 0)


if __name__ == "__main__":
    main()
