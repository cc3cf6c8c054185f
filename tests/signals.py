"""What test_signals.py runs: `python tests/signals.py once|twice|whole|random|time-limit|second FOLDER` prints JSON.

The recipe is micro.yaml; `twice` makes its third optimiser step take 30 s.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from kill import ROOT, finish, half_artefacts, preload, weights

RECIPE = ROOT / "recipes" / "micro.yaml"


def start(out: Path, *options: str, slow_step: bool = False) -> int:
    """Fork a child that runs `qmedtune run`; its stderr goes to <out>.log."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background jobs ignore some
        signal.signal(number, signal.SIG_DFL)
    from qmedtune import cli, ui
    from qmedtune.training import trainer

    ui.forget_warnings()
    if slow_step:
        original = trainer.QTrainer.training_step

        def training_step(self, *given):
            if self.state.global_step == 2:
                (out / "in the step").touch()
                time.sleep(30)
            return original(self, *given)

        trainer.QTrainer.training_step = training_step  # type: ignore[method-assign]
    os._exit(cli.invoke(["run", str(RECIPE), "--out", str(out), "--offline", *options]))


def steps(out: Path) -> int:
    """Optimiser steps of 01-cpt that are in its metrics."""
    files = [*out.glob(".building/01-cpt/metrics.jsonl"), *out.glob("01-cpt/metrics.jsonl")]
    return files[0].read_text().count('"loss"') if files else 0


def wait_until(condition, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def sealed_step(out: Path) -> int:
    found = out.glob(".building/01-cpt/scratch/checkpoint-*/seal.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def clean(folder: Path) -> dict[str, str]:
    assert finish(start(folder / "clean")) == 0
    return weights(folder / "clean")


def once(folder: Path, number: signal.Signals = signal.SIGTERM) -> dict:
    out = folder / number.name
    pid = start(out)
    wait_until(lambda: steps(out) >= 3)
    at = steps(out)
    os.kill(pid, number)
    code = finish(pid)
    found = {"code": code, "step_at_signal": at, "sealed_step": sealed_step(out)}
    return found | {
        "said": Path(f"{out}.log").read_text(),
        "status": json.loads((out / "run.json").read_text())["status"],
    }


def whole(folder: Path) -> dict:
    expected, found = clean(folder), {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        found[number.name] = once(folder, number)["code"]
        assert finish(start(folder / number.name)) == 0
        assert weights(folder / number.name) == expected
    return found


def twice(folder: Path) -> dict:
    out = folder / "run"
    pid = start(out, slow_step=True)
    wait_until((out / "in the step").exists)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    return {"code": finish(pid), "seconds": time.monotonic() - began}


def at_random(folder: Path) -> dict:
    began = time.monotonic()
    expected = clean(folder)
    length_s, rng = time.monotonic() - began, random.Random(11)
    found: dict = {"different": [], "half_artefacts": [], "codes": {}}
    for number in range(20):
        out = folder / str(number)
        pid = start(out)
        time.sleep(rng.uniform(0, length_s))
        os.kill(pid, rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
        code = str(finish(pid))
        found["codes"][code] = found["codes"].get(code, 0) + 1
        found["half_artefacts"] += half_artefacts(out)
        if finish(start(out)) != 0 or weights(out) != expected:
            found["different"].append(number)
    return found


def time_limit(folder: Path) -> dict:
    began = time.monotonic()
    expected, out, codes, overrun_s = clean(folder), folder / "run", [], 0.0
    # A limit below what loading the model takes would stop every attempt there: on a busy machine it is longer.
    limit_s, status = max(2.0, (time.monotonic() - began) / 6), ""
    while status != "finished":
        began = time.monotonic()
        codes.append(finish(start(out, "--time-limit", f"{limit_s:.1f}s")))
        overrun_s = max(overrun_s, time.monotonic() - began - limit_s)
        status = json.loads((out / "run.json").read_text())["status"]
        assert status in ("stopped", "finished") and len(codes) < 60
    return {"codes": codes, "limit_s": limit_s, "overrun_s": overrun_s, "same_weights": weights(out) == expected}


def second(folder: Path) -> dict:
    """A run, and the same command again and again beside it."""
    expected, out = clean(folder), folder / "run"
    first, codes = start(out), []
    wait_until((out / ".lock").exists)
    while os.waitpid(first, os.WNOHANG) == (0, 0):
        codes.append(finish(start(out)))
    said = Path(f"{out}.log").read_text()
    return {
        "codes": codes,
        "refused": said.count(f"already running (pid {first})"),
        "same_weights": finish(start(out)) == 0 and weights(out) == expected,
    }


def main() -> None:
    preload()
    kind, folder = sys.argv[1], Path(sys.argv[2])
    kinds = {"once": once, "twice": twice, "whole": whole, "random": at_random, "time-limit": time_limit}
    kinds["second"] = second
    print(json.dumps({name: kinds[name](folder) for name in kind.split(",")}))


if __name__ == "__main__":
    main()
