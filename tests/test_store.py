"""Attempts and what a kill leaves in them: nothing that was paid for is lost, nothing foreign is sealed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import crash
import pytest

from qmedtune import disk, store
from qmedtune import hashes as hashing


def attempt(root: Path, key: str) -> Path:
    return store.begin(root / "01-cpt", root, key, {"lr": 1}, keep_partial=True)


def test_an_interrupted_attempt_comes_back_when_its_recipe_does(tmp_path: Path):
    (attempt(tmp_path, "a" * 64) / "checkpoint").write_text("hours of work")
    assert [path.name for path in attempt(tmp_path, "b" * 64).iterdir()] == [store.STAMP]
    again = attempt(tmp_path, "a" * 64)
    assert (again / "checkpoint").read_text() == "hours of work"
    assert again == attempt(tmp_path, "a" * 64) == store.building_of(tmp_path / "01-cpt", tmp_path)


def test_an_attempt_that_cannot_be_continued_starts_empty(tmp_path: Path):
    (attempt(tmp_path, "a" * 64) / "half").write_text("")
    folder = store.begin(tmp_path / "01-cpt", tmp_path, "a" * 64, {}, keep_partial=False)
    assert [path.name for path in folder.iterdir()] == [store.STAMP]


@pytest.mark.parametrize("stamp", [None, "", "[1]", '{"key": 5}'])
def test_an_attempt_whose_stamp_is_damaged_is_put_aside(tmp_path: Path, stamp: str | None):
    """Its checkpoints may be days of work; what it was made from is not known any more."""
    building = attempt(tmp_path, "a" * 64)
    (building / store.SCRATCH).mkdir()
    (building / store.SCRATCH / "checkpoint").write_text("hours of work")
    (building / store.STAMP).unlink() if stamp is None else (building / store.STAMP).write_text(stamp)
    assert [path.name for path in attempt(tmp_path, "a" * 64).iterdir()] == [store.STAMP]
    assert [path.read_text() for path in tmp_path.glob(".history/*/scratch/checkpoint")] == ["hours of work"]


def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    building = attempt(tmp_path, "a" * 64)
    (building / "weights").write_text("w")
    sealed = store.publish(building, tmp_path / "01-cpt", tmp_path, "a" * 64, {})
    monkeypatch.setattr(store, "sha256_file", raises(OSError(5, "Input/output error")))  # a bad sector
    assert store.damage(tmp_path / "01-cpt", sealed, full=True) == ["weights: unreadable (Input/output error)"]


def test_a_damaged_partial_result_is_made_again(tmp_path: Path):
    path = tmp_path / "scratch" / "00000.json"
    first = store.kept(path, lambda: {"rows": [(0.1, 2)], "none": None})
    assert first == {"rows": [[0.1, 2]], "none": None}
    assert store.kept(path, lambda: "made again") == first
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert store.kept(path, lambda: "made again") == "made again"
    path.write_text("")
    assert store.kept(path, lambda: "and again") == "and again"


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '"x"', "{}", '{"sha256": 1}'])
def test_what_is_no_seal_is_none(tmp_path: Path, text: str):
    (tmp_path / store.SEAL).write_text(text)
    assert store.read_seal(tmp_path) is None


def test_a_link_never_writes_into_a_file_that_is_there(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    os.link(tmp_path / "b", tmp_path / "name of b")
    with pytest.raises(FileExistsError):
        disk.link(tmp_path / "a", tmp_path / "name of b")
    assert (tmp_path / "b").read_text() == "b"


def test_hashes_are_remembered_by_what_a_change_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two edits within one tick of the clock leave size and times alone: a file is remembered once it has settled.
    Whoever puts an old time back has changed the inode's own."""
    path, hashes = tmp_path / "notes.csv", store.HashCache(tmp_path / "hashes")
    path.write_text("one")
    first = hashes.sha256(path)
    assert not hashes.changed
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert hashes.sha256(path) == first and hashes.changed
    times = path.stat()
    monkeypatch.setattr(hashing, "sha256_file", lambda _: "read again")
    assert hashes.sha256(path) == first
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and hashes.sha256(path) == "read again"


def test_a_result_killed_before_its_rename_is_kept_when_the_recipe_changes(tmp_path: Path):
    """Sealed, and then another key: whether its step can resume or not, it comes back with its own key."""
    for number, keep_partial in enumerate((True, False)):
        key, folder = f"{number}" * 64, tmp_path / "merged"
        building = store.begin(folder, tmp_path, key, {}, keep_partial=keep_partial)
        (building / "weights").write_text(key)
        (building / store.SCRATCH).mkdir()
        (building / store.SCRATCH / "checkpoint").write_text("large")
        store.seal(building, key, {})
        store.begin(folder, tmp_path, "f" * 64, {}, keep_partial=keep_partial)
        assert store.recall(folder, tmp_path, key)
        assert sorted(path.name for path in folder.iterdir()) == [store.SEAL, "weights"]


@pytest.mark.parametrize("damaged", ["mask", "tokens", "documents"])
def test_files_that_belong_together_are_taken_over_together(tmp_path: Path, damaged: str):
    """One damaged file of an earlier result: none is taken, and nothing that is written then reaches that result."""
    key, folder = "a" * 64, tmp_path / "01-cpt"
    names = ("mask", "tokens", "documents")
    building = attempt(tmp_path, key)
    for name in names:
        (building / name).write_text(name)
    sealed = store.publish(building, folder, tmp_path, key, {})
    building = attempt(tmp_path, "b" * 64)
    paths = [building / name for name in names]
    assert store.take_over(paths) and [path.read_text() for path in paths] == list(names)
    (folder / damaged).unlink()  # a file of its own: the links above keep the old one
    (folder / damaged).write_text("x" * len(damaged))
    assert not store.take_over(paths) and not any(path.exists() for path in paths)
    paths[1].write_text("new")
    assert store.damage(folder, sealed, full=True) == [f"{damaged}: sha256 differs"]


def test_of_optional_files_those_are_taken_that_were_there(tmp_path: Path):
    building = attempt(tmp_path, "a" * 64)
    (building / "tokens").write_text("tokens")
    store.publish(building, tmp_path / "01-cpt", tmp_path, "a" * 64, {})
    building = attempt(tmp_path, "b" * 64)
    assert store.take_over([building / "mask", building / "tokens"])
    assert not (building / "mask").exists() and (building / "tokens").read_text() == "tokens"
    assert not store.take_over([building / "tokens", building / "documents"])


def test_an_attempt_is_kept_when_a_result_is_borrowed(tmp_path: Path):
    key, root, donor = "a" * 64, tmp_path / "run", tmp_path / "other"
    store.publish(store.begin(donor / "01-cpt", donor, key, {}, keep_partial=True), donor / "01-cpt", donor, key, {})
    (attempt(root, "b" * 64) / "checkpoint").write_text("hours of work")
    assert store.borrow(root / "01-cpt", root, key, [donor])
    assert (attempt(root, "b" * 64) / "checkpoint").read_text() == "hours of work"


def test_what_a_step_resumes_from_stays_until_its_result_is_sealed(tmp_path: Path, monkeypatch):
    building = attempt(tmp_path, "a" * 64)
    (building / store.SCRATCH).mkdir()
    (building / store.SCRATCH / "checkpoint").write_text("hours of work")
    (building / "adapter").write_text("result")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "sha256_file", raises(KeyboardInterrupt))
        store.publish(building, tmp_path / "01-cpt", tmp_path, "a" * 64, {})
    assert (attempt(tmp_path, "a" * 64) / store.SCRATCH / "checkpoint").is_file()
    sealed = store.publish(building, tmp_path / "01-cpt", tmp_path, "a" * 64, {})
    assert list(sealed.files) == ["adapter"]
    assert sorted(path.name for path in (tmp_path / "01-cpt").iterdir()) == ["adapter", store.SEAL]


def test_a_crash_at_any_system_call_of_a_publication_loses_nothing(tmp_path: Path):
    """A new result replaces an old one. Whatever call is the last, the same steps then end with both intact."""
    root, old, new = tmp_path / "run", "a" * 64, "b" * 64
    folder = root / "01-cpt"

    def build(key: str) -> None:
        building = store.begin(folder, root, key, {}, keep_partial=True)
        (building / "sub").mkdir(exist_ok=True)
        (building / "sub" / "weights").write_text(key)
        (building / store.SCRATCH).mkdir(exist_ok=True)
        (building / store.SCRATCH / "checkpoint").write_text("x")
        store.publish(building, folder, root, key, {})

    def start_over() -> None:
        shutil.rmtree(root, ignore_errors=True)
        build(old)

    def recover() -> None:
        assert not folder.exists() or store.intact(folder, full=True), "half an artefact under its name"
        if not (store.intact(folder, new) or store.complete(folder, root, new)):
            build(new)
        assert store.intact(folder, new, full=True)
        assert sorted(path.name for path in folder.iterdir()) == [store.SEAL, "sub"]
        assert store.recall(folder, root, old) and store.intact(folder, old, full=True)
        assert store.recall(folder, root, new) and store.intact(folder, new, full=True)

    start_over()
    assert crash.everywhere(lambda: build(new), recover, start_over) > 15


def raises(error: type[BaseException] | BaseException):
    def function(*_):
        raise error

    return function


def test_everything_is_on_the_disk_before_the_seal_and_the_seal_before_the_rename(tmp_path: Path, monkeypatch):
    """The order of system calls is what power loss depends on: files, their folders, seal, its folder, the rename."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path)}")
        fsync(handle)

    def noted_replace(old: Path, new: Path) -> None:
        calls.append(f"rename {Path(new).relative_to(tmp_path)}")
        replace(old, new)

    building = attempt(tmp_path, "a" * 64)
    (building / "sub").mkdir()
    (building / "sub" / "weights").write_text("w")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.publish(building, tmp_path / "01-cpt", tmp_path, "a" * 64, {})
    inside = ".building/01-cpt"
    order = [f"sync {inside}/sub/weights", f"sync {inside}/sub", f"rename {inside}/{store.SEAL}", f"sync {inside}"]
    order += ["rename 01-cpt", "sync .building"]
    assert [call for call in calls if call in order] == order
    assert "sync ." in calls[calls.index("rename 01-cpt") :]


def test_what_a_killed_write_left_is_not_sealed(tmp_path: Path, monkeypatch):
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    for folder in (clean, killed):
        folder.mkdir()
        store.write_json(folder / "facts.json", [1])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: None)  # SIGKILL before the rename
        store.write_json(killed / "facts.json", [2])
    assert len(list(killed.iterdir())) == 2
    assert store.seal(killed, "key", {}).digest == store.seal(clean, "key", {}).digest
    assert store.intact(killed, "key", full=True)
