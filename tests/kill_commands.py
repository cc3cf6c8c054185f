"""Kill each command that writes at a random moment, give it again, compare; start each one twice at once, compare.

    python tests/kill_commands.py --kills 100
    python tests/kill_commands.py --doubles 20

Over predict, eval, merge, export and ablate in turn. A killed command, given again, must come to the same result bit
for bit; of two at once one does the work, the other comes to the same result or leaves with one to six clear lines.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from each_command import (
    Command,
    Materials,
    error_lines,
    expected_of,
    finish,
    is_clear,
    materials,
    named,
    preload,
    start,
)

TRIED = ["predict", "eval", "merge", "export", "ablate"]


def seconds_of(command: Command, given: Materials, folder: Path, expected: str) -> float:
    """How long it takes that nobody kills, on the machine as busy as it is now."""
    place = folder / "clean"
    place.mkdir()
    command.prepare(given, place)
    began = time.monotonic()
    assert finish(start(command.words(given, place), folder / "clean.said")) == 0
    took = time.monotonic() - began
    assert command.result(place) == expected
    shutil.rmtree(place)
    return took


def kills(names: list[str], number: int, seed: int, folder: Path) -> dict[str, Any]:
    preload()
    given, rng = materials(folder / "materials"), random.Random(seed)
    commands = named(names)
    expected = {command.name: expected_of(command, given, folder) for command in commands}
    took = {command.name: seconds_of(command, given, folder, expected[command.name]) for command in commands}
    tally: dict[str, Any] = {"seconds": took, "kills": {}, "after_the_end": 0, "same": 0, "odd": [], "different": []}
    for trial in range(number):
        command = commands[trial % len(commands)]
        one_kill(command, given, folder / "place", rng.uniform(0, took[command.name]), expected[command.name], tally)
        print(f"{trial + 1} of {number}: {tally['same']} the same", file=sys.stderr, flush=True)
    return tally


def one_kill(
    command: Command, given: Materials, place: Path, after_s: float, expected: str, tally: dict[str, Any]
) -> None:
    place.mkdir()
    command.prepare(given, place)
    said, where = place.with_name("place.said"), f"{command.name}, killed after {after_s:.2f} s"
    pid = start(command.words(given, place), said)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    tally["after_the_end"] += finish(pid) == 0
    tally["kills"][command.name] = tally["kills"].get(command.name, 0) + 1
    try:
        before = command.result(place)
    except AssertionError as error:
        before = None
        tally["odd"].append(f"{where}: {error}")
    if before not in (None, expected):
        tally["odd"].append(f"{where}: another result stands under the final name")
    code = finish(start(command.words(given, place), said))
    allowed = (0, command.again) if before == expected else (0,)
    if code in allowed and command.result(place) == expected:
        tally["same"] += 1
    else:
        tally["different"].append(f"{where}: again exit {code}, {said.read_text()[-300:]}")
    shutil.rmtree(place)


def doubles(names: list[str], number: int, seed: int, folder: Path) -> dict[str, Any]:
    preload()
    given, rng = materials(folder / "materials"), random.Random(seed)
    commands = named(names)
    expected = {command.name: expected_of(command, given, folder) for command in commands}
    tally: dict[str, Any] = {"pairs": {}, "one_left": 0, "both_ended": 0, "said": [], "odd": [], "different": []}
    for trial in range(number):
        command = commands[trial % len(commands)]
        one_double(command, given, folder / "place", rng.choice((0, 0, 0.05, 0.3)), expected[command.name], tally)
        print(f"{trial + 1} of {number}: {len(tally['different'])} different", file=sys.stderr, flush=True)
    return tally


def one_double(
    command: Command, given: Materials, place: Path, later_s: float, expected: str, tally: dict[str, Any]
) -> None:
    """Two at once, the second a little later."""
    place.mkdir()
    command.prepare(given, place)
    where = f"{command.name}, the second {later_s} s later"
    said = [place.with_name(f"{name}.said") for name in ("first", "second")]
    pids = [start(command.words(given, place), said[0])]
    time.sleep(later_s)
    pids.append(start(command.words(given, place), said[1]))
    codes = [finish(pid) for pid in pids]
    tally["pairs"][command.name] = tally["pairs"].get(command.name, 0) + 1
    if 0 not in codes or command.result(place) != expected:
        tally["different"].append(f"{where}: exits {codes}, {[path.read_text()[-300:] for path in said]}")
    if codes == [0, 0]:
        tally["both_ended"] += 1
    elif 0 in codes:
        loser = said[0] if codes[0] else said[1]
        tally["one_left"] += 1
        tally["said"].append(f"{command.name}: {' / '.join(error_lines(loser))}"[:200])
        if not is_clear(loser) or max(codes) > 4 or min(codes) < 0:
            tally["odd"].append(f"{where}: exits {codes}, {loser.read_text()[-300:]}")
    shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=TRIED)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--doubles", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bad = 0
    for work, number in ((kills, options.kills), (doubles, options.doubles)):
        if number:
            with tempfile.TemporaryDirectory() as folder:
                tally = work(options.commands, number, options.seed, Path(folder).resolve())
            print(json.dumps(tally, indent=1))
            bad += len(tally["odd"]) + len(tally["different"])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
