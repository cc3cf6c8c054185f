"""`erase --text`: no text is left, what is left can be verified, and a killed attempt can be given again."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MICRO

from qmedtune import cli, store
from qmedtune.erase import erase
from qmedtune.errors import RunError
from qmedtune.privacy import NOTE, erased
from qmedtune.verify import verify


@pytest.fixture
def copy(micro_run, tmp_path) -> Path:
    run = Path(shutil.copytree(micro_run.folder, tmp_path / "run"))
    (run / ".history" / "data__notes-x").mkdir(parents=True)
    (run / ".history" / "data__notes-x" / "train.jsonl").write_text('{"text": "earlier"}')
    return run


def texts(run: Path) -> list[str]:
    """Long pieces of what was kept, as they would be found in any file."""
    rows = (run / "data" / "notes" / "train.jsonl").read_text().splitlines()
    return [json.loads(row)["text"][:60] for row in rows[:50]]


def test_no_text_is_left_and_the_rest_is_verified(copy, capsys):
    pieces, before = texts(copy), verify(copy)
    seals = {path: path.read_bytes() for path in copy.rglob(store.SEAL) if ".history" not in path.parts}
    assert cli.invoke(["erase", str(copy), "--text", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] > 10 and facts["bytes"] > 1000
    for path in copy.rglob("*"):
        held = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        assert not any(piece in held for piece in pieces), path
    assert not (copy / ".history").exists() and not (copy / ".building").exists()
    assert all(path.read_bytes() == content for path, content in seals.items())
    after = verify(copy)
    assert after["erased"] > 10 and after["files"] + after["erased"] == before["files"]
    assert cli.invoke(["report", str(copy), "--verify"]) == 0
    assert "erased: " in capsys.readouterr().out


def test_what_is_left_is_still_watched(copy):
    erase(copy)
    path = next(path for path in copy.rglob(store.SEAL) if path.parent.name == "notes")
    path.write_text(path.read_text().replace('"read": ', '"read": 1'))
    with pytest.raises(RunError, match=r"data/notes/seal\.json: damaged"):
        verify(copy)


def test_a_file_that_goes_missing_is_not_called_erased(copy):
    (copy / "data" / "notes" / "train.jsonl").unlink()
    with pytest.raises(RunError, match=r"train\.jsonl: missing"):
        verify(copy)
    (copy / NOTE).write_text(json.dumps({"files": ["data/notes/train.jsonl"]}))  # a note without its hash
    assert erased(copy).files == frozenset()
    with pytest.raises(RunError, match=r"train\.jsonl: missing"):
        verify(copy)


def test_a_killed_erasure_is_finished_by_the_same_command(copy, monkeypatch):
    real, calls = Path.unlink, []

    def dies(path, *arguments, **named):
        if path.is_relative_to(copy / "data"):
            calls.append(path)
            if len(calls) == 4:
                raise KeyboardInterrupt
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        erase(copy)
    monkeypatch.setattr(Path, "unlink", real)
    erase(copy)
    assert [path for path in (copy / "data").rglob("*") if path.is_file() and path.name != store.SEAL] == []
    assert verify(copy)["erased"] > 10


def test_what_a_killed_write_has_left_goes_too(copy):
    leftover = copy / f".items.html.77{store.PART}"
    leftover.write_text("a note")
    erase(copy)
    assert not leftover.exists()


def test_only_a_run_of_ours_is_erased(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("mine")
    assert cli.invoke(["erase", str(tmp_path), "--text"]) == 1
    assert (tmp_path / "data" / "mine.jsonl").read_text() == "mine"
    assert cli.invoke(["erase", str(tmp_path)]) == 2
    assert "--text" in capsys.readouterr().err


def test_an_erased_run_can_be_run_again(copy):
    erase(copy)
    assert cli.invoke(["run", str(MICRO), "--out", str(copy), "--until", "data/01-cpt", "--offline"]) == 0
    assert (copy / "data" / "notes" / "train.jsonl").is_file()
    assert verify(copy)["files"] > 12
