"""`track:`: what a tracker's own library reads back is metrics.jsonl, and nothing else comes of it.

The real libraries, each skipped where it is not installed. Whoever follows a run is a process of its own: it is watched
by an audit hook that Python loads in every process (`sitecustomize`).
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MICRO
from fingerprint import losses, steady

from qmedtune import cli, train
from qmedtune.errors import RunError
from qmedtune.tracking.follow import follow, point_of
from qmedtune.tracking.points import Point

GUARD = """
import os, sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "subprocess.Popen"):
        said.write(f"{event} {args}\\n")
if "qmedtune.tracking.follow" in " ".join(sys.orig_argv):
    said = open(os.environ["GUARD_LOG"], "a", buffering=1)
    said.write("begun\\n")
    sys.addaudithook(hook)
"""
# With these trackio.init would log to a Space, to a bucket and to a server.
TEMPTING = {
    "TRACKIO_SPACE_ID": "someone/space",
    "TRACKIO_DATASET_ID": "someone/data",
    "TRACKIO_BUCKET_ID": "someone/bucket",
    "TRACKIO_SERVER_URL": "http://127.0.0.1:9",
    "SPACE_REPO_NAME": "space",
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
}


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What followers do that they must not; `begun` once for each."""
    site, log = tmp_path / "site", tmp_path / "guard.log"
    site.mkdir()
    (site / "sitecustomize.py").write_text(GUARD)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("GUARD_LOG", str(log))
    for name, value in TEMPTING.items():
        monkeypatch.setenv(name, value)
    return log


def micro(out: Path, *words: str) -> int:
    return cli.invoke(["run", str(MICRO), "--offline", "--out", str(out), *words])


def figures_of(out: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a stage as metrics.jsonl has it, by the names of the trackers."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["stage"] != stage:
            continue
        for key in ("loss", "grad_norm", "lr", "tokens", "tokens_per_s", "memory"):
            if entry.get(key) is not None:
                curves.setdefault(f"train/{key}", []).append((entry["step"], entry[key]))
        for source, loss in entry.get("validation", {}).items():
            curves.setdefault(f"validation/{source}", []).append((entry["step"], loss))
    return curves


def in_tensorboard(out: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(out / "tensorboard" / stage)).Reload()
    curves = {}
    for tag in found.Tags()["scalars"]:
        curves[tag] = [(event.step, event.value) for event in found.Scalars(tag)]
    return curves


def in_trackio(out: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """As trackio's own reader in a process of its own has it: its folder is chosen when it is imported."""
    asked = (
        "import json, sys\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "logs = SQLiteStorage.get_logs('micro', sys.argv[1])\n"
        "print(json.dumps([{**log, 'timestamp': str(log['timestamp'])} for log in logs]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(out / "trackio")}
    command = [sys.executable, "-c", asked, stage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    curves: dict[str, list[tuple[int, float]]] = {}
    for log in json.loads(done.stdout):
        step = log.pop("step")
        assert log.pop("timestamp").startswith("20")
        for name, value in log.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def assert_is(found: dict[str, list[tuple[int, float]]], told: dict[str, list[tuple[int, float]]]) -> None:
    """The same curves, every step once and in order, every figure to the precision of fp32."""
    assert found.keys() == told.keys() and len(told) >= 8
    for name, curve in told.items():
        assert [step for step, _ in found[name]] == [step for step, _ in curve], name
        values = [value for _, value in found[name]]
        assert np.asarray(values, np.float32).tolist() == np.asarray([value for _, value in curve], np.float32).tolist()


def assert_scores(found: dict[str, list[tuple[int, float]]], out: Path) -> None:
    """What run.json says of base (step 0) and result (1), and nothing else."""
    scored = json.loads((out / "run.json").read_text())["evaluation"]
    facts, told = scored["tasks"]["facts"], {}
    told["facts/accuracy"] = (facts["base"]["accuracy"], facts["final"]["accuracy"])
    written = facts["base"]["generation"]["accuracy"], facts["final"]["generation"]["accuracy"]
    told["facts/generation accuracy"] = written
    for name, text in scored["perplexity"].items():
        told[f"perplexity/{name}"] = (text["base"], text["final"])
    assert found.keys() == told.keys() and len(told) == 4
    for name, values in told.items():
        assert [step for step, _ in found[name]] == [0, 1]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=1e-6)


def assert_holds_no_text(out: Path, tracker: str) -> None:
    """No text of a record, no path, no name of machine or user in any byte that was written, nor in a file's name."""
    files = [path for path in (out / tracker).rglob("*") if path.is_file()]
    assert files
    held = b"\n".join([path.read_bytes() + str(path.relative_to(out)).encode() for path in files])
    for path in (out / tracker).rglob("*"):  # a source of the run is clinical
        assert path.stat().st_mode & 0o077 == 0, path
    texts = []
    for source in sorted((out / "data").glob("*/train.jsonl")):
        for line in source.read_text().splitlines():
            record = json.loads(line)
            texts += [record["text"]] if "text" in record else [part["content"] for part in record["messages"]]
    assert len(texts) > 300
    for text in texts:
        for piece in (text[:24], text[-24:]):
            assert piece.encode() not in held or len(piece) < 12, piece
    for secret in (str(out), str(MICRO.parent), str(Path.home()) + "/", socket.gethostname(), TEMPTING["HF_TOKEN"]):
        assert secret.encode() not in held, secret
    if len(getpass.getuser()) > 4:
        assert getpass.getuser().encode() not in held


def test_a_run_that_fails_and_goes_on(own_cache: Path, tmp_path: Path, guard: Path, monkeypatch: pytest.MonkeyPatch):
    """One run three times: it fails behind a checkpoint, ends, and gets another tracker when it has ended."""
    pytest.importorskip("tensorboard")
    out, other = tmp_path / "run", tmp_path / "untracked"

    def on_step_end(self, args, state, control, **given):
        if state.global_step == 8:  # the checkpoint before it is of step 5
            raise RunError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(train.StageCallback, "on_step_end", on_step_end)
        assert micro(out, "--set", "track=tensorboard") == 1
    assert max(step for step, _ in in_tensorboard(out, "01-cpt")["train/loss"]) == 7
    assert not (out / "tensorboard" / "scores").exists()
    assert micro(out, "--set", "track=tensorboard") == 0
    for stage in ("01-cpt", "02-sft"):
        assert_is(in_tensorboard(out, stage), figures_of(out, stage))
    assert_scores(in_tensorboard(out, "scores"), out)
    assert_holds_no_text(out, "tensorboard")
    assert guard.read_text() == "begun\n" * 2

    assert micro(other) == 0
    assert not (other / "tensorboard").exists() and guard.read_text() == "begun\n" * 2
    assert losses(other) == losses(out)
    for weights in sorted(other.rglob("*.safetensors")):
        assert weights.read_bytes() == (out / weights.relative_to(other)).read_bytes(), weights
    assert untold(out) == untold(other)

    assert micro(out) == 0 and micro(out, "--set", "track=tensorboard") == 0  # nothing is left to do for either
    pytest.importorskip("trackio")
    assert micro(out, "--set", "track=trackio") == 0
    for stage in ("01-cpt", "02-sft"):
        assert_is(in_trackio(out, stage), figures_of(out, stage))
    assert_scores(in_trackio(out, "scores"), out)
    assert_holds_no_text(out, "trackio")
    assert set(guard.read_text().splitlines()) == {"begun"}


def untold(out: Path) -> object:
    """run.json without the key, and what stands for the text of the recipe."""
    facts = json.loads((out / "run.json").read_text())
    for name in ("sha256", "recipe_sha256"):
        facts.pop(name)
    facts["recipe"].pop("track", None)
    return steady(facts)


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.curves: dict[str, list[Point]] = {}
        self.begun: list[str] = []

    def begin(self, stage: str) -> None:
        self.begun.append(stage)
        self.curves[stage] = []

    def add(self, stage: str, points) -> None:
        self.curves[stage] += points

    def close(self) -> None:
        self.begun.append("closed")


def line(step: int, loss: float) -> str:
    return json.dumps({"stage": "01-cpt", "step": step, "loss": loss, "time": 1e9 + step}) + "\n"


def test_a_curve_is_followed_as_it_grows_goes_back_and_is_sealed(tmp_path: Path):
    building, sealed, tracker = tmp_path / ".building" / "01-cpt", tmp_path / "01-cpt", Kept()
    building.mkdir(parents=True)
    metrics = building / "metrics.jsonl"
    looks = iter(range(6))
    steps: list[list[int]] = []

    def ended() -> bool:
        """What happens between two looks."""
        look = next(looks)
        steps.append([point.step for point in tracker.curves.get("01-cpt", [])])
        if look == 1:
            metrics.write_text(line(1, 4.0) + line(2, 3.5) + '{"stage": "01-cpt", "st')  # in the middle of a write
        elif look == 2:
            metrics.write_text(line(1, 4.0) + line(2, 3.5) + line(3, 3.0))
        elif look == 3:  # back to the checkpoint of step 1, and already further than before
            metrics.write_text(line(1, 4.0) + line(2, 3.4) + line(3, 3.1) + line(4, 2.9))
        elif look == 4:
            building.rename(sealed)
        elif look == 5:
            (sealed / "metrics.jsonl").write_text((sealed / "metrics.jsonl").read_text() + line(5, 2.0))
        return look == 5

    follow(tmp_path, ["01-cpt", "02-sft"], tracker, ended)
    assert steps == [[], [], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert [point.figures["train/loss"] for point in tracker.curves["01-cpt"]] == [4.0, 3.4, 3.1, 2.9, 2.0]
    assert tracker.begun == ["01-cpt", "01-cpt", "closed"]
    assert tracker.curves["01-cpt"][0].at == 1e9 + 1


@pytest.mark.parametrize(
    ("logged", "figures"),
    [
        ({"loss": 2.0, "grad_norm": None, "lr": 1e-4, "warning": "x"}, {"train/loss": 2.0, "train/lr": 1e-4}),
        ({"validation": {"notes": 1.5, "literature": None}}, {"validation/notes": 1.5}),
        ({"warning": "step 3: loss 9.1 is a spike"}, None),
        ({"loss": float("nan"), "said": "text", "kept": True}, None),
    ],
)
def test_figures_alone_are_taken(logged, figures):
    found = point_of(json.dumps({"stage": "01-cpt", "step": 3, **logged}).encode())
    assert (found.figures if found else None) == figures


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_missing_package_is_told_before_anything_begins(tracker, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, tracker, None)  # as where it is not installed
    out = tmp_path / "run"
    assert cli.invoke([command, str(MICRO), "--set", f"track={tracker}", "--out", str(out)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"error: track: {tracker} is not installed", f"  pip install 'qmedtune[{tracker}]'"]
    assert not out.exists()


def test_a_tracker_that_cannot_write_stops_no_run(own_cache: Path, tmp_path: Path, capsys):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert micro(out, "--until", "data") == 0
    (out / "tensorboard").write_text("a file where the folder should be")
    assert micro(out, "--until", "01-cpt", "--set", "track=tensorboard") == 0
    assert "the curves for tensorboard are not complete" in capsys.readouterr().err
    assert (out / "01-cpt" / "seal.json").is_file()
