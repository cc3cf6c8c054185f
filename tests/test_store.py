"""Attempts and what a kill leaves in them: nothing that was paid for is lost, nothing foreign is sealed."""

from __future__ import annotations

from pathlib import Path

from qmedtune import store


def attempt(root: Path, key: str) -> Path:
    return store.begin(root / "01-cpt", root, key, keep_partial=True)


def test_an_interrupted_attempt_comes_back_when_its_recipe_does(tmp_path: Path):
    (attempt(tmp_path, "a" * 64) / "checkpoint").write_text("hours of work")
    assert [path.name for path in attempt(tmp_path, "b" * 64).iterdir()] == [store.STAMP]
    again = attempt(tmp_path, "a" * 64)
    assert (again / "checkpoint").read_text() == "hours of work"
    assert again == attempt(tmp_path, "a" * 64) == store.building_of(tmp_path / "01-cpt", tmp_path)


def test_an_attempt_that_cannot_be_continued_starts_empty(tmp_path: Path):
    (attempt(tmp_path, "a" * 64) / "half").write_text("")
    folder = store.begin(tmp_path / "01-cpt", tmp_path, "a" * 64, keep_partial=False)
    assert [path.name for path in folder.iterdir()] == [store.STAMP]


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
