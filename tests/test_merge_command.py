"""`qmedtune merge` of an adapter folder: proven, complete or absent, and nothing overwritten."""

import json

import pytest
from llama_folders import llama3_folder, write_adapter

from qmedtune import cli, store


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    base = llama3_folder(root / "base")
    return base, write_adapter(base, root / "adapter"), root


def test_an_adapter_folder_becomes_a_sealed_model(folders, tmp_path, capsys):
    base, adapter, _ = folders
    out = tmp_path / "merged"
    command = ["merge", str(adapter), "--base", str(base), "--out", str(out), "--dtype", "float32", "--json"]
    assert cli.invoke(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["violations"] == 0 and facts["dtype"] == "float32" and facts["modules"] > 0
    assert store.intact(out, full=True) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    before = (out / "config.json").read_bytes()
    assert cli.invoke(command) == 2
    assert "is there already" in capsys.readouterr().err and (out / "config.json").read_bytes() == before


def test_a_failed_proof_leaves_nothing_under_the_name(folders, tmp_path, capsys):
    base, adapter, _ = folders
    out = tmp_path / "merged"
    assert cli.invoke(["merge", str(adapter), "--base", str(base), "--out", str(out), "--max-kl", "1e-30"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and len([line for line in err.splitlines() if "error" in line]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged.refused"]
    assert "merged.refused" in err and "max_kl" in (tmp_path / "merged.refused" / "REFUSED.txt").read_text()


@pytest.mark.parametrize("name", ["base", "nothing"])
def test_what_has_no_adapter_is_refused(name, folders, tmp_path, capsys):
    root = folders[2]
    assert cli.invoke(["merge", str(root / name), "--out", str(tmp_path / "m"), "--offline"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and not (tmp_path / "m").exists()


def test_a_run_that_is_not_finished_says_so(micro_run, tmp_path, capsys):
    assert cli.invoke(["merge", str(micro_run.folder), "--out", str(tmp_path / "m")]) == 2
    assert "stage 02-sft is not finished" in capsys.readouterr().err
