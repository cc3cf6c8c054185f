"""A mistyped path is answered here, with the nearest runs, and is never sent to the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmedtune import cli
from qmedtune.errors import RecipeError
from qmedtune.local_names import check, looks_local, nearest_runs


@pytest.mark.parametrize(
    "name",
    ["runs/typo", "recipes/x.yaml", "/data/notes", "./x", "~/x", "a", "a/b/c", "st-mary/x.gguf", "here/x", "a b/c"],
)
def test_these_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_local(name)
    with pytest.raises(RecipeError, match="never sent to the Hub|is a recipe"):
        check(name, "model")


def test_an_id_of_the_hub_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_local("meta-llama/Llama-3.1-8B") and not looks_local("epfl-llm/meditron-7b")
    check("meta-llama/Llama-3.1-8B", "model.base")


def test_commands_name_the_nearest_runs_and_ask_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("cardiology", "flagship", "micro"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    assert nearest_runs("runs/cardiolgy")[0] == "runs/cardiology"

    def asked(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    for command in (["chat", "runs/cardiolgy"], ["eval", "runs/cardiolgy", "--tasks", "facts"]):
        assert cli.invoke(command) == 2
        said = capsys.readouterr().err
        assert "runs here: runs/cardiology" in said and len(said.splitlines()) <= 6
    (tmp_path / "x.yaml").write_text("name: x\n")
    assert cli.invoke(["eval", "x.yaml", "--tasks", "facts"]) == 2
    assert "is a recipe, no model" in capsys.readouterr().err
