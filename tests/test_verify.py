"""`report --verify` names what differs; `data show` reaches the packed rows of a run."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import MICRO, MicroRun
from stages import stop_after

from qmedtune import cli
from qmedtune.errors import RecipeError, RunError
from qmedtune.verify import check_is_run, verify


@pytest.fixture
def copy(micro_run: MicroRun, tmp_path: Path) -> Path:
    """A run of which the data steps are sealed; may be damaged."""
    return Path(shutil.copytree(micro_run.folder, tmp_path / "run"))


def files_of(folder):
    kept = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [path for path in kept if not is_hidden(path.relative_to(folder))]


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def test_an_untouched_run_passes(copy):
    assert verify(copy)["folders"] == 6 and verify(copy)["files"] > 12


def test_one_flipped_bit_in_any_data_file_is_named(copy):
    rng = random.Random(3)
    contents = [path for path in files_of(copy / "data") if path.name != "seal.json"]
    assert len(contents) > 12
    for path in contents:
        whole = path.read_bytes()
        flip(path, rng)
        with pytest.raises(RunError) as caught:
            verify(copy)
        assert f"{path.relative_to(copy)}: sha256 differs" in str(caught.value)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("path", "old", "new", "named"),
    [
        ("data/notes/seal.json", '"digest": "', '"digest": "f', "data/notes/seal.json: damaged"),
        ("data/notes/seal.json", '"key": "', '"key": "f', "data/notes/seal.json: damaged"),
        ("data/notes/seal.json", '"read": ', '"read": 1', "data/notes/seal.json: damaged"),
        ("data/notes/seal.json", "{", "", "data/notes/seal.json: damaged"),
        ("run.json", '"recipe_text": "', '"recipe_text": "x', "recipe_text does not hash to recipe_sha256"),
        ("run.json", '"read": ', '"read": 1', "is not what was sealed"),
        ("run.json", "{", "", "run.json: unreadable"),
    ],
)
def test_changed_manifests_and_facts_are_named(copy, path, old, new, named):
    text = (copy / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new, 1))
    with pytest.raises(RunError) as caught:
        verify(copy)
    assert named in str(caught.value) and len(str(caught.value).splitlines()) <= 6


def test_missing_files_and_folders_without_a_run(copy, tmp_path):
    (copy / "data" / "01-cpt" / "rows.npy").unlink()
    with pytest.raises(RunError, match="data/01-cpt/rows.npy: missing"):
        verify(copy)
    with pytest.raises(RecipeError, match="no run in this folder"):
        check_is_run(tmp_path)


def test_a_sealed_step_without_its_seal_is_missing(copy):
    """Else whoever removes a seal could change what it sealed."""
    flip(copy / "data" / "notes" / "train.jsonl", random.Random(1))
    (copy / "data" / "notes" / "seal.json").unlink()
    with pytest.raises(RunError, match="data/notes: missing"):
        verify(copy)
    shutil.rmtree(copy / "data" / "notes")
    with pytest.raises(RunError, match="data/notes: missing"):
        verify(copy)
    shutil.rmtree(copy / "data")  # SECURITY.md: what one passes on holds no text
    assert verify(copy) == {"folders": 0, "files": 0}


def test_what_an_earlier_recipe_left_is_no_difference(copy):
    assert cli.invoke(["run", str(MICRO), "--out", str(copy), "--offline", "--until", "data/literature"]) == 0
    states = {step["name"]: step["status"] for step in json.loads((copy / "run.json").read_text())["steps"]}
    assert states["data/notes"] == "to do" and (copy / "data" / "notes").is_dir()
    assert verify(copy)["folders"] == 6


def test_a_run_that_is_interrupted_in_its_second_stage_passes(tmp_path, monkeypatch):
    """metrics.jsonl then goes on behind what is sealed."""
    command = ["run", str(MICRO), "--out", str(tmp_path / "run"), "--offline"]
    assert cli.invoke([*command, "--until", "01-cpt"]) == 0
    monkeypatch.setattr("qmedtune.train.StageCallback.on_step_end", stop_after(1))
    assert cli.invoke([*command, "--until", "02-sft"]) == 143
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(stages) == {"01-cpt", "02-sft"}
    assert verify(tmp_path / "run")["folders"] == 8


def test_one_flipped_bit_in_run_json_is_named(copy):
    path, rng = copy / "run.json", random.Random(9)
    whole = path.read_bytes()
    for _ in range(60):
        flip(path, rng)
        with pytest.raises(RunError, match="run.json: "):
            verify(copy)
        path.write_bytes(whole)


def test_a_file_that_was_added_is_named(copy):
    (copy / "data" / "01-cpt" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RunError, match="data/01-cpt/pytorch_model.bin: was added"):
        verify(copy)


def test_the_command_tells_and_exits(copy, capsys):
    assert cli.invoke(["report", str(copy), "--verify"]) == 0
    assert "sealed folders are as they were sealed" in capsys.readouterr().out
    flip(copy / "data" / "01-cpt" / "pieces.npy", random.Random(1))
    assert cli.invoke(["report", str(copy), "--verify", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "data/01-cpt/pieces.npy: sha256 differs" in err


@pytest.mark.slow
def test_one_flipped_bit_anywhere_in_a_finished_run_is_named(tmp_path):
    """Contents of all sealed folders and of the files at the root; manifests and facts: see above."""
    assert cli.invoke(["run", str(MICRO), "--out", str(tmp_path / "run"), "--offline"]) == 0
    verify(tmp_path / "run")
    rng = random.Random(5)
    for path in files_of(tmp_path / "run"):
        if path.name in ("seal.json", "run.json"):
            continue
        whole = path.read_bytes()
        flip(path, rng)
        with pytest.raises(RunError) as caught:
            verify(tmp_path / "run")
        assert path.name in str(caught.value) or "run.json: unreadable" in str(caught.value)
        path.write_bytes(whole)


def test_data_and_data_show_through_the_command_line(micro_run, capsys):
    arguments = [str(MICRO), "--out", str(micro_run.folder)]
    assert cli.invoke(["data", "show", *arguments, "--count", "1"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("documents: ") and "\nrow 0: " in out and "«" in out and "\x1b" not in out
    assert cli.invoke(["data", "show", *arguments, "--stage", "09-cpt"]) == 2
    assert "allowed: 01-cpt, 02-sft" in capsys.readouterr().err
    assert cli.invoke(["data", "shw", *arguments]) == 2
    assert "data show RECIPE" in capsys.readouterr().err
    run = json.loads((micro_run.folder / "run.json").read_text())
    assert run["status"] == "stopped"
