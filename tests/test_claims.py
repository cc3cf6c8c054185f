"""`--out` in somebody's own folder: refused, and not one byte of it changed. Folders of ours are known again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MICRO

from qmedtune import claims, cli, record, store
from qmedtune.errors import RecipeError, RunError

FOREIGN_SEAL = {"seal.json": json.dumps({"key": "k", "digest": "d", "facts": {}, "files": {}, "sha256": "x"})}
# name: {path: text}: what a user may have in a folder that is given as --out.
FOLDERS: dict[str, dict[str, str]] = {
    "notes": {"notes.csv": "text\na note\n"},
    "thesis": {"report.md": "# My thesis\n"},
    "page": {"report.html": "<html>mine</html>"},
    "their run.json": {"run.json": "{}"},
    "their run.json, a list": {"run.json": "[]"},
    "their run.json, not JSON": {"run.json": "run: 1"},
    "their run.json, another tool's": {"run.json": json.dumps({"id": 1, "stages": [], "status": "ok"})},
    "run.json nested too deeply": {"run.json": "[" * 100_000},
    "evaluation.json": {"evaluation.json": '{"mine": 1}'},
    "metrics": {"metrics.jsonl": '{"loss": 1}\n'},
    "models": {"merged/model.safetensors": "weights", "merged/config.json": "{}"},
    "models with a seal": {
        "merged/model.safetensors": "weights",
        **{f"merged/{k}": v for k, v in FOREIGN_SEAL.items()},
    },
    "data": {"data/notes/train.jsonl": '{"text": "mine"}\n'},
    "adapter": {"01-cpt/adapter/adapter_model.safetensors": "weights"},
    "base": {"base/config.json": "{}"},
    "evaluation": {"evaluation/facts.items.jsonl": "{}\n"},
    "their .history": {".history/old.md": "mine"},
    "their .building": {".building/site/plan.txt": "mine"},
    "hidden files": {".bashrc": "mine"},
    "git": {".git/HEAD": "ref: refs/heads/main\n"},
    "home": {".ssh/config": "Host x\n", "Documents/letter.txt": "dear"},
    "empty folder inside": {"sub/": ""},
    "empty file": {"x": ""},
    "lock of another tool and files": {".lock": "123", "a.txt": "mine"},
    "hashes of another tool and files": {".hashes.json": "{}", "a.txt": "mine"},
    "mark of another tool": {".qmedtune": "hello", "a.txt": "mine"},
    "mark, a list": {".qmedtune": "[1]", "a.txt": "mine"},
    "mark by somebody else": {".qmedtune": '{"made_by": "me"}', "a.txt": "mine"},
    "a folder as mark": {".qmedtune/x": "1"},
    "unicode names": {"Größe – é.txt": "mine"},
    "name with a newline": {"a\nb.txt": "mine"},
    "name with an escape": {"\x1b[31mred": "mine"},
    "ablation.json of theirs": {"ablation.json": "{}"},
    "arms": {"arms/base/seed-17/notes.txt": "mine"},
    "long name": {"x" * 200: "mine"},
}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(text)


def state(folder: Path) -> dict[str, tuple]:
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = cli.invoke([*arguments, "--offline"])
    said = capsys.readouterr().err
    assert code in (1, 2), said
    assert 1 <= len(said.strip().splitlines()) <= 6, said
    assert "\x1b" not in said
    return said


@pytest.mark.parametrize("command", ["run", "ablate"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_users_is_refused_and_left_as_it_is(name, command, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    fill(folder, FOLDERS[name])
    before = state(tmp_path)
    recipe = MICRO if command == "run" else MICRO.parent / "ablation.yaml"
    said = refused([command, str(recipe), "--out", str(folder)], capsys)
    assert "nothing was changed there" in said and "mine" in said
    assert state(tmp_path) == before


def test_there_are_at_least_forty_cases_over_both_commands():
    assert 2 * len(FOLDERS) + len(INPUTS) >= 40


def test_a_folder_reached_by_a_link_is_refused(tmp_path, capsys):
    fill(tmp_path / "mine", {"report.md": "mine"})
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert "nothing was changed" in refused(["run", str(MICRO), "--out", str(tmp_path / "link")], capsys)


@pytest.mark.parametrize("files", [{}, {".lock": "1"}, {".lock": "", ".hashes.json": "{}"}, {".run.json.7.part~": "x"}])
def test_new_empty_and_just_begun_folders_are_taken(files, tmp_path):
    claims.check(tmp_path / "new")
    fill(tmp_path, files)
    claims.check(tmp_path)


def test_the_mark_claims_a_folder(tmp_path):
    claims.mark(tmp_path)
    (tmp_path / "my notes.txt").write_text("mine")
    claims.check(tmp_path)


def earlier(folder: Path) -> Path:
    """As version 0.1 left a run: no mark."""
    (folder / claims.MARK).unlink(missing_ok=True)
    return folder


@pytest.fixture
def run_copy(micro_run, tmp_path) -> Path:
    return Path(shutil.copytree(micro_run.folder, tmp_path / "run"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "whole": lambda run: None,
    "run.json is gone": lambda run: (run / record.RUN).unlink(),
    "run.json is cut": lambda run: (run / record.RUN).write_text("{"),
    "no hashes": lambda run: (run / ".hashes.json").unlink(missing_ok=True),
    "the user's notes beside": lambda run: (run / "notes.md").write_text("mine"),
    "copied without hidden files": lambda run: (run / ".lock").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_run_folders_of_the_version_before_are_known(name, run_copy):
    DAMAGES[name](run_copy)
    claims.check(earlier(run_copy))


def test_a_run_of_the_version_before_goes_on_and_gets_the_mark(run_copy):
    assert cli.invoke(["run", str(MICRO), "--out", str(earlier(run_copy)), "--until", "data/01-cpt", "--offline"]) == 0
    assert claims.is_ours(run_copy) and (run_copy / claims.MARK).is_file()


def test_what_carries_no_stamp_is_never_retired(run_copy, capsys):
    """The user's own folder under a step's name, in a run folder of ours."""
    fill(run_copy, {"merged/weights.bin": "mine"})
    before = state(run_copy / "merged")
    said = refused(["run", str(MICRO), "--out", str(run_copy)], capsys)
    assert "merged" in said and "no seal" in said
    assert state(run_copy / "merged") == before
    with pytest.raises(RunError, match="no seal"):
        store.retire(run_copy / "merged", run_copy)


def test_eval_does_not_retire_the_users_evaluation(tmp_path):
    from qmedtune.evaluate import _sealed

    fill(tmp_path, {"evaluation/mine.csv": "mine"})
    with pytest.raises(RunError, match="no seal"):
        _sealed(tmp_path, "key", lambda folder: {})
    assert (tmp_path / "evaluation/mine.csv").read_text() == "mine"


RECIPE = """\
name: mine
model: {base: builtin:micro}
data:
  notes: {path: NOTES, kind: clinical}
  questions: {path: builtin:micro/instructions, kind: instructions, template: alpaca}
stages:
  - cpt: {mix: {notes: 1}, tokens: 2000}
"""
# what `data.notes.path` is, below a folder whose run/ is --out
INPUTS = ["run/data/notes.csv", "run/notes.csv", "run/*.csv", "run/**/*.csv", "run", "run/../run/notes.csv"]
READ_BACK = [".", "**/*.jsonl", "**/*", "./run/.."]


@pytest.mark.parametrize("path", INPUTS)
def test_a_source_inside_out_is_refused(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"run/data/notes.csv": "text\na note\n", "run/notes.csv": "text\na note\n"})
    claims.mark(tmp_path / "run")  # as if an earlier run of ours had been here
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("NOTES", json.dumps(path)))
    before = state(tmp_path)
    said = refused(["run", "mine.yaml", "--out", "run"], capsys)
    assert "data.notes.path" in said and "inside the run folder" in said
    assert state(tmp_path) == before


@pytest.mark.parametrize("path", READ_BACK)
def test_a_source_that_would_read_the_run_back_is_refused(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"notes.csv": "text\na note\n", "a.jsonl": '{"text": "a note"}\n'})
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("NOTES", json.dumps(path)))
    (tmp_path / "run").mkdir()
    said = refused(["run", "mine.yaml", "--out", "run"], capsys)
    assert "data.notes.path" in said and "what the run writes" in said
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("path", ["*.csv", "notes.csv", "**/*.csv"])
def test_a_run_folder_beside_its_sources_is_fine(path, tmp_path, monkeypatch):
    from qmedtune.parsing.loader import load_recipe

    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"notes.csv": "text\na note\n", "mine.yaml": RECIPE.replace("NOTES", json.dumps(path))})
    claims.check_inputs(load_recipe(Path("mine.yaml")).recipe, Path("run"))


def test_a_base_inside_out_is_refused(tmp_path, monkeypatch):
    from qmedtune.parsing.loader import load_recipe

    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"run/merged/config.json": "{}", "notes.csv": "text\na note\n"})
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("NOTES", "notes.csv").replace("builtin:micro}", "run/merged}"))
    with pytest.raises(RecipeError, match="model.base"):
        claims.check_inputs(load_recipe(Path("mine.yaml")).recipe, Path("run"))


@pytest.mark.parametrize("kind", ["hard link", "fifo"])
def test_a_lock_that_is_another_file_is_not_written(kind, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    os.link(tmp_path / "precious", lock) if kind == "hard link" else os.mkfifo(lock)
    with pytest.raises(RunError, match="no lock can be written"), store.lock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
