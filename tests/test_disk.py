"""Full and read-only disks: a clear message, what is sealed stays, with room again the run ends as if nothing was."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import MICRO
from kill import weights

from qmedtune import disk
from qmedtune.errors import DoesNotFit, RunError
from qmedtune.parsing.loader import load_recipe
from qmedtune.planning import capacity
from qmedtune.run import run

SCRIPT = Path(__file__).with_name("full_disk.py")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
Usage = namedtuple("Usage", "total used free")


def may_mount() -> bool:
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


mounts = pytest.mark.skipif(not may_mount(), reason="needs user namespaces that may mount a tmpfs")


def on_a_disk(kind: str, tmp_path: Path) -> tuple[dict, str]:
    (tmp_path / "disk").mkdir()
    command = [*NAMESPACE, sys.executable, str(SCRIPT), kind, str(tmp_path / "disk"), str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "result").read_text()), done.stderr


@mounts
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asked", "unasked"])
def test_a_full_disk_costs_nothing_but_the_space(kind: str, tmp_path: Path):
    found, _ = on_a_disk(kind, tmp_path)
    loaded = load_recipe(MICRO, ["save.every=3"])
    run(loaded.recipe, loaded.text, tmp_path / "run", offline=True)
    assert found["weights"] == weights(tmp_path / "run")
    assert len(found["said"]) > 5 and max(found["checkpoints"]) >= 2
    reason = "bytes needed" if kind == "asked" else "No space left"
    assert sum(reason in said for said in found["said"]) > 5
    assert all(len(said.splitlines()) <= 6 and "same command" in said for said in found["said"])


@mounts
def test_a_disk_that_became_read_only_is_one_error(tmp_path: Path):
    found, said = on_a_disk("read-only", tmp_path)
    assert found["code"] == 2
    assert "is read-only" in said and "Traceback" not in said


def test_room_is_asked_for_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "free_bytes", lambda place: 1_000_000)
    loaded = load_recipe(MICRO)
    with pytest.raises(DoesNotFit, match=r"needs .*bytes\), .*1,000,000 bytes\)\nlargest: checkpoints"):
        run(loaded.recipe, loaded.text, tmp_path / "run", offline=True)
    assert not (tmp_path / "run").exists()


def test_what_an_attempt_has_written_is_not_asked_for_again():
    parts = {"checkpoints": 900, "merged model": 200}
    capacity.refuse_too_little(parts, 300, 800)
    with pytest.raises(DoesNotFit, match="801 bytes"):
        capacity.refuse_too_little(parts, 299, 800)


def test_too_little_room_for_a_write_names_what_is_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**9, 10**9 - 5000, 5000))
    disk.check_room(tmp_path / "not" / "there", 5000, "checkpoint 20")
    with pytest.raises(RunError, match=r"no room for checkpoint 20: 5,001 bytes needed, 5,000 free\n.*\.history"):
        disk.check_room(tmp_path, 5001, "checkpoint 20")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk.write_atomic(tmp_path / "run.json", "old")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write_atomic(tmp_path / "run.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "old"}


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), disk.lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_where_nothing_can_be_locked_a_run_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with disk.lock(tmp_path):
        assert "has no locks; do not start a second run" in capfd.readouterr().err


def test_files_that_go_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second run counts what the first is writing; the lock, which is asked next, must be what refuses it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("12345")
    (tmp_path / "gone").write_text("")
    assert sum(map(capacity._file_bytes, disk.below(tmp_path))) == 5
    found = list(disk.below(tmp_path))
    for path in found:
        path.unlink() if path.is_file() else None
    assert sum(map(capacity._file_bytes, found)) == 0
