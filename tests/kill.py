"""Kill a run at random moments, give the same command again, compare what comes out bit for bit.

    python tests/kill.py --kills 200
    python tests/kill.py --recipe recipes/cpt_then_sft.yaml --kills 15 --cold

The first is the micro recipe with a warm base cache, the second the flagship, its base pretrained in every run.

Runs are forked from a process that has imported the libraries already, so that the kills fall into the run and not into
eight seconds of imports. A watcher polls meanwhile: no folder may carry its final name without an intact seal.
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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS: list[str] = []
CLEAN_EVERY = 5  # kills, after which the length of a run is measured again: they are to fall on all of it


@dataclass
class Tally:
    """Of `kills` killed runs: `same` finished with the same weights when the command was given again."""

    clean_s: list[float] = field(default_factory=list)
    kills: int = 0
    same: int = 0
    polls: int = 0
    half_artefacts: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    caught_in: dict[str, int] = field(default_factory=dict)


def preload() -> None:
    """Prepare the process and import what a run imports, without starting a thread."""
    from qmedtune import process

    process.prepare()
    import qmedtune.data.packing.pack
    import qmedtune.data.prepare
    import qmedtune.evaluate
    import qmedtune.merge
    import qmedtune.report
    import qmedtune.train  # noqa: F401


def start(recipe: Path, out: Path, cache: Path) -> int:
    """Fork a child that runs the command (with SETTINGS as its `--set`); returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ["QMEDTUNE_CACHE"] = str(cache)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        log = os.open(str(out) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        from qmedtune.parsing.loader import load_recipe
        from qmedtune.run import run

        loaded = load_recipe(recipe, SETTINGS)
        run(loaded.recipe, loaded.text, out, offline=True)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(out: Path) -> dict[str, str]:
    """sha256 of every adapter and merged weight file of a finished run."""
    from qmedtune.store import sha256_file

    found = [*out.glob("*/adapter/*.safetensors"), *out.glob("merged/*.safetensors")]
    assert found
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(found)}


def half_artefacts(out: Path) -> list[str]:
    """Folders under their final name, checkpoints too, whose seal is missing or does not fit their files."""
    from qmedtune import store

    bad = []
    sealed_by_step = [*out.glob("data/*"), *out.glob("0*-*"), out / "merged", out / "evaluation"]
    for folder in [*sealed_by_step, *out.glob(".building/*/scratch/checkpoint-*")]:
        if folder.is_dir():
            sealed = store.read_seal(folder)
            # A folder may be retired between the two looks: only one that is still there counts.
            if (sealed is None or store.damage(folder, sealed, full=False)) and folder.is_dir():
                bad.append(folder.name)
    return bad


def place(out: Path) -> str:
    """What was being built when the kill came."""
    building = sorted((out / ".building").glob("*")) if (out / ".building").is_dir() else []
    return building[0].name if building else "between steps"


def run_kills(recipe: Path, kills: int, *, seed: int, cold: bool, folder: Path) -> Tally:
    """The whole experiment below `folder`; every run starts from nothing, with a cold or a warm base cache."""
    preload()
    rng, tally, cache = random.Random(seed), Tally(), folder / "cache"
    warm = finish(start(recipe, folder / "warm", cache))
    assert warm == 0, (folder / "warm.log").read_text()
    expected = weights(folder / "warm")
    for number in range(kills):
        if number % CLEAN_EVERY == 0:
            tally.clean_s.append(clean_seconds(recipe, folder / "clean", cache, expected, cold))
        one_kill(recipe, folder / f"kill-{number}", cache, rng.uniform(0, tally.clean_s[-1]), expected, tally, cold)
    return tally


def clean_seconds(recipe: Path, out: Path, cache: Path, expected: dict[str, str], cold: bool) -> float:
    """How long a run takes that nobody kills, on the machine as busy as it is now; its weights are the others'."""
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    began = time.monotonic()
    code = finish(start(recipe, out, cache))
    assert code == 0 and weights(out) == expected, f"exit {code}; {Path(f'{out}.log').read_text()[-400:]}"
    shutil.rmtree(out)
    return round(time.monotonic() - began, 2)


def one_kill(
    recipe: Path, out: Path, cache: Path, after_s: float, expected: dict[str, str], tally: Tally, cold: bool
) -> None:
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    pid, deadline = start(recipe, out, cache), time.monotonic() + after_s
    while time.monotonic() < deadline:
        time.sleep(0.02)
        tally.polls += 1
        tally.half_artefacts += half_artefacts(out)
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    tally.kills += 1
    tally.half_artefacts += half_artefacts(out)
    where = place(out)
    tally.caught_in[where] = tally.caught_in.get(where, 0) + 1
    again = finish(start(recipe, out, cache))
    if again == 0 and weights(out) == expected:
        tally.same += 1
        shutil.rmtree(out)
    else:
        told = Path(f"{out}.log").read_text(encoding="utf-8")[-400:]  # the folder goes with the experiment
        tally.different.append(f"{out.name}: exit {again}, killed after {after_s:.2f} s in {where}; {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "micro.yaml")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="empty the base cache before every run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeatable")
    options = parser.parse_args()
    SETTINGS.extend(options.set)
    with tempfile.TemporaryDirectory() as folder:
        tally = run_kills(options.recipe, options.kills, seed=options.seed, cold=options.cold, folder=Path(folder))
    print(json.dumps(vars(tally), indent=1))
    sys.exit(0 if tally.same == tally.kills and not tally.half_artefacts else 1)


if __name__ == "__main__":
    main()
