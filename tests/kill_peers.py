"""Kill one process of a run of two, or both, at random moments; give the same command again; compare bit for bit.

    python tests/kill_peers.py --kills 20 --seed 7

Half of the kills take one process (either of them), half take both at once. After each: no process of the run is left,
the same command finishes (so no lock is left either), and its weights are those of a run of two that nobody killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from qmedtune import store

ROOT = Path(__file__).parent.parent
SETTINGS = ("stages[1].sft.batch=3", "stages[1].sft.epochs=1.5", "stages[0].cpt.tokens=2500", "save.every=3")
WEIGHTS = ("01-cpt/adapter/adapter_model.safetensors", "02-sft/adapter/adapter_model.safetensors")
MARK = "QMEDTUNE_KILL_PEERS"  # in the environment of every process of one attempt
LEFT_S = 60.0  # a process that is left after so long is an orphan


@dataclass
class Tally:
    """Of `kills` killed runs: `same` ended with the same weights; where the kills fell, and what went wrong."""

    kills: int = 0
    same: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    caught_in: Counter[str] = field(default_factory=Counter)
    gone_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def start(out: Path, mark: str) -> subprocess.Popen[bytes]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words = [sys.executable, "-m", "qmedtune", "run", str(ROOT / "recipes" / "micro.yaml"), "--offline"]
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
    words += ["--out", str(out), "--gpus", "2", *settings]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def processes(mark: str) -> list[int]:
    """Those of one attempt that still are there, oldest first."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment, state = (folder / "environ").read_bytes(), (folder / "stat").read_text()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0") and state.rpartition(")")[2].split()[0] != "Z":
            found.append(int(folder.name))
    return sorted(found)


def weights(out: Path) -> list[str]:
    files = [out / name for name in WEIGHTS] + sorted((out / "merged").glob("*.safetensors"))
    return [store.sha256_file(file) for file in files]


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def attempt(out: Path, moment: float, take: str, tally: Tally) -> None:
    """Start a run, kill `take` ("leader", "follower" or "all") after `moment` seconds, and give the command again."""
    mark = f"{out.name}-{os.getpid()}"
    run = start(out, mark)
    time.sleep(moment)
    there = processes(mark)
    followers = [pid for pid in there if pid != run.pid]
    kill({"leader": [run.pid], "follower": followers[:1], "all": there}[take])
    killed = time.monotonic()
    tally.kills += 1
    tally.taken[take if there else "nothing: it had ended"] += 1
    building = sorted(path.name for path in (out / ".building").glob("*") if path.is_dir())
    tally.caught_in[building[-1] if building else "between steps"] += 1
    while processes(mark) and time.monotonic() < killed + LEFT_S:
        run.poll()
        time.sleep(0.1)
    tally.gone_s.append(time.monotonic() - killed)
    if left := processes(mark):
        tally.wrong.append(f"{out.name}: {len(left)} processes left {LEFT_S:.0f} s after {take} was killed")
        kill(left)
    run.wait()


def again(out: Path, expected: list[str], tally: Tally) -> None:
    mark = f"{out.name}-again-{os.getpid()}"
    code = start(out, mark).wait(600)
    if code != 0:
        tally.wrong.append(f"{out.name}: exit code {code} when the command was given again")
    elif weights(out) != expected:
        tally.wrong.append(f"{out.name}: other weights")
    else:
        tally.same += 1
    if left := processes(mark):
        tally.wrong.append(f"{out.name}: {len(left)} processes left after the end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    drawn, tally = random.Random(given.seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        assert start(whole, "whole").wait(600) == 0, whole.with_suffix(".log").read_text()[-2000:]
        length, expected = time.monotonic() - started, weights(whole)
        print(f"a run of two that nobody kills: {length:.1f} s", flush=True)
        for number in range(given.kills):
            take = "all" if number % 2 else drawn.choice(("leader", "follower"))
            out = Path(folder) / f"run-{number:02d}"
            attempt(out, drawn.uniform(0.25, 1.0) * length, take, tally)
            again(out, expected, tally)
            print(f"{tally.kills} kills, {tally.same} the same, {len(tally.wrong)} wrong", flush=True)
    print(f"taken: {dict(tally.taken)}; caught in: {dict(tally.caught_in)}")
    print(f"the others were gone within {max(tally.gone_s):.1f} s")
    print("\n".join(tally.wrong))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
