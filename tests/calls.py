"""Stop a run at every call that changes a folder, not at random moments; give the same command again, compare.

    python tests/calls.py kill          SIGKILL in place of the call
    python tests/calls.py full          the disk is full from this call on
    python tests/calls.py kill --every 40

Step by step over the micro recipe: what comes before a step is sealed already (hard links to one run, whose bytes must
not change). Prints one JSON object. `--every 40` takes one call in 40, beginning with a different one in each step.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from kill import ROOT, finish, half_artefacts, preload, weights

RECIPE = ROOT / "recipes" / "micro.yaml"
SETTINGS = ["save.every=3", "validate.keep_best=true", "validate.every=2"]
GROWING = ("open", "os.mkdir", "os.link")  # what a full disk refuses; files are removed and renamed all the same
CHANGING = (*GROWING, "os.rename", "os.remove", "os.rmdir")


def changes(event: str, given: tuple, out: str) -> bool:
    """Whether an audit event is a change below `out`. Names relative to an open folder are rmtree's: counted."""
    if event not in CHANGING:
        return False
    if event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes) else ""
    return f"{path}/".startswith(f"{out}/") or not path.startswith("/")


def stop_at(number: int, kind: str, out: str) -> list[str]:
    """From here on: SIGKILL in place of change `number` (from 0), or no room from then on. Returns the changes seen."""
    seen: list[str] = []

    def hook(event: str, given: tuple) -> None:
        if not changes(event, given, out):
            return
        seen.append(event)
        if len(seen) <= number:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))

    sys.addaudithook(hook)
    return seen


def start(out: Path, until: str | None, number: int | None, kind: str) -> int:
    """Fork a child that runs the recipe up to a step; it writes <out>.said: {"calls", "error", "type"}."""
    pid = os.fork()
    if pid:
        return pid
    code, said = 1, {"error": "", "type": ""}
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    seen = stop_at(sys.maxsize if number is None else number, kind, str(out))
    try:
        from qmedtune.parsing.loader import load_recipe
        from qmedtune.run import run

        loaded = load_recipe(RECIPE, SETTINGS)
        run(loaded.recipe, loaded.text, out, offline=True, until=until)
        code = 0
    except BaseException as error:
        said = {"error": str(error), "type": type(error).__name__}
    finally:
        calls = len(seen)
        Path(f"{out}.said").write_text(json.dumps({**said, "calls": calls}), encoding="utf-8")
        os._exit(code)


def run_to(out: Path, until: str | None, number: int | None = None, kind: str = "kill") -> tuple[int, dict[str, Any]]:
    said = Path(f"{out}.said")
    said.unlink(missing_ok=True)
    code = finish(start(out, until, number, kind))
    return code, json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}


def digests(out: Path) -> dict[str, str]:
    from qmedtune import store

    found = {path.parent.relative_to(out).as_posix(): store.read_seal(path.parent) for path in seals(out)}
    return {name: sealed.digest for name, sealed in sorted(found.items()) if sealed}


def seals(out: Path) -> list[Path]:
    return [path for path in out.rglob("seal.json") if not path.relative_to(out).parts[0].startswith(".")]


def contents(out: Path) -> dict[str, str]:
    from qmedtune.store import sha256_file

    return {str(path): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()}


def linked(source: Path, target: Path) -> Path:
    """A folder with the same files under a second name each; the lock is the one file that is written in place."""
    return Path(shutil.copytree(source, target, copy_function=os.link, ignore=lambda *_: [".lock"]))


def one(kind: str, before: Path, step: str, number: int, expected: dict[str, str], tally: dict) -> None:
    out = linked(before, before.with_name("out"))
    code, said = run_to(out, step, number, kind)
    where = f"{step}, call {number}"
    tally["stops"] += 1
    if kind == "kill" and code != -signal.SIGKILL:
        tally["odd"].append(f"{where}: not killed, exit {code}")
    if kind == "full" and not (code == 1 and "same command" in said["error"] and said["error"].count("\n") < 6):
        tally["odd"].append(f"{where}: {said['type']}: {said['error'][:300]}")
    tally["half_artefacts"] += [f"{where}: {name}" for name in half_artefacts(out)]
    code, said = run_to(out, step)
    if code or digests(out) != expected:
        different = [name for name, digest in expected.items() if digests(out).get(name) != digest]
        tally["different"].append(f"{where}: exit {code} {said.get('type')} {said.get('error', '')[:300]} {different}")
    shutil.rmtree(out)


def experiment(kind: str, every: int, folder: Path) -> dict[str, Any]:
    preload()
    os.environ["QMEDTUNE_CACHE"] = str(folder / "cache")
    whole = folder / "whole"
    code, _ = run_to(whole, None)
    assert code == 0
    steps = [step["name"] for step in json.loads((whole / "run.json").read_text())["steps"]]
    tally: dict[str, Any] = {"stops": 0, "calls": {}, "odd": [], "half_artefacts": [], "different": []}
    before = folder / "before"
    before.mkdir()
    for place, step in enumerate(steps):
        kept = contents(before)
        counted = linked(before, folder / "counted")
        code, said = run_to(counted, step)
        assert code == 0, said
        expected, calls = digests(counted), said["calls"]
        tally["calls"][step] = calls
        for number in range(7 * place % every, calls, every):
            one(kind, before, step, number, expected, tally)
        if contents(before) != kept:
            tally["different"].append(f"{step}: the files behind the links changed")
        shutil.rmtree(before)
        counted.rename(before)
    if weights(before) != weights(whole):
        tally["different"].append("step by step, the weights are others")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("kill", "full"))
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = experiment(options.kind, options.every, Path(folder))
    print(json.dumps(tally, indent=1))
    sys.exit(1 if tally["odd"] or tally["half_artefacts"] or tally["different"] else 0)


if __name__ == "__main__":
    main()
