"""What clinical data leaves behind: modes of files, names of inputs, comments, secrets, and what reaches a terminal."""

import json
import os
import re
import stat
from io import StringIO
from pathlib import Path

import pytest

from qmedtune import cli, hashes, record, store, terminal, ui
from qmedtune.commands.common import emit, say
from qmedtune.data.reading.sources import source_files, with_variables
from qmedtune.errors import DataError, RecipeError
from qmedtune.parsing.strict_yaml import without_comments
from qmedtune.recipe import SourceSection
from qmedtune.report import _fenced

RECIPE = """\
# Notes of Jane Doe, MRN 4482913; ask Dr. Bell. password: hunter2
name: mine  # hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345
model: {base: builtin:micro}
adapter: {r: 4, alpha: 8}
data:
  notes: {path: Jane_Doe_4482913.csv, kind: clinical}   # her own file
  questions: {path: builtin:micro/instructions, kind: instructions, template: "```"}
stages:
  - cpt: {mix: {notes: 1}, tokens: 2000}
"""


@pytest.fixture
def clinical_run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"note {i} of the ward is stable and well today\n" for i in range(60))
    (tmp_path / "Jane_Doe_4482913.csv").write_text("text\n" + rows)
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)  # a file just written is remembered too
    (tmp_path / "mine.yaml").write_text(RECIPE.replace(', template: "```"', ""))
    before = os.umask(0o022)
    try:
        assert cli.invoke(["run", "mine.yaml", "--out", "run", "--until", "data", "--offline"]) == 0
    finally:
        os.umask(before)
    return tmp_path / "run"


def test_a_clinical_run_is_its_owners_alone(clinical_run):
    for path in (clinical_run, *clinical_run.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert os.umask(0o022) == 0o022  # and the process's own mask is as it was


def test_names_in_paths_and_comments_stay_out_of_the_run_folder(clinical_run):
    """The recipe's own data path is what the user wrote down to be kept; nothing else repeats it."""
    held = json.loads((clinical_run / ".hashes.json").read_text())
    assert held and all(re.fullmatch("[0-9a-f]{64}", name) for name in held)
    for path in clinical_run.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        for secret in (b"hunter2", b"Dr. Bell", b"hf_aBc", b"her own file", b"MRN 4482913"):
            assert secret not in text, (path, secret)
    run = record.read(clinical_run)
    assert run and run.recipe_sha256 == record.text_sha256(run.recipe_text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a: 1 # x\nb: 2\n", "a: 1\nb: 2\n"),
        ('a: "x # y" # z\n', 'a: "x # y"\n'),
        ("a: x#y\n", "a: x#y\n"),
        ("a: |\n  # kept\nb: 1 # gone\n", "a: |\n  # kept\nb: 1\n"),
        ("# gone\n\na: 1\n# --set a=2\n", "a: 1\n# --set a=2\n"),
        ("a: 'it''s # in'\n", "a: 'it''s # in'\n"),
        ("a: {b: 1, # gone\n  c: 2}\n", "a: {b: 1,\n  c: 2}\n"),
    ],
)
def test_comments_are_taken_out_and_nothing_else(text, kept):
    assert without_comments(text) == kept


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "KEY"]
)
def test_a_secret_is_not_put_into_a_path(name, monkeypatch):
    monkeypatch.setenv(name, "hf_hunter2")
    with pytest.raises(DataError, match="looks like a secret") as caught:
        with_variables(f"/data/${{{name}}}/x.csv")
    assert "hunter2" not in str(caught.value)


def test_other_variables_are_put_in(monkeypatch):
    monkeypatch.setenv("NOTES", "/data/notes")
    assert with_variables("${NOTES}/x.csv") == "/data/notes/x.csv"


@pytest.mark.parametrize(
    "held", ["{", "[]", "5", '{"a": 1}', '{"' + "a" * 64 + '": 5}', "[" * 50_000, '{"/home/jane": [1]}', "\xff"]
)
def test_a_damaged_memory_of_hashes_is_forgotten(held, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(held, encoding="latin-1")
    (tmp_path / "x").write_text("x")
    cache = hashes.HashCache(path)
    assert cache.sha256(tmp_path / "x") == store.sha256_file(tmp_path / "x")
    assert not any("/" in name for name in cache.known)


@pytest.mark.parametrize("held", ["", "[]", "null", "5", '"x"', "{", "[" * 100_000, "\xff"])
def test_a_run_json_that_is_none_is_none(held, tmp_path):
    (tmp_path / record.RUN).write_text(held, encoding="latin-1")
    assert record.read(tmp_path) is None


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\x00\x7f"


def test_no_control_character_reaches_the_terminal(capsys):
    ui.error_panel([f"{ESCAPES}: no such file", ESCAPES])
    ui.warn(ESCAPES)
    ui.note(ESCAPES)
    ui.table(ESCAPES, ("a", "b"), [(ESCAPES, 1)])
    say(ESCAPES)
    emit({"a": ESCAPES})
    out, err = capsys.readouterr()
    assert not terminal.CONTROLS.search(out + err)
    assert json.loads(out[out.index("{") :])["a"] == ESCAPES


def test_an_answer_cannot_steer_the_terminal(monkeypatch):
    from qmedtune import chat

    monkeypatch.setattr(chat, "stream", lambda *_: iter(["fine ", ESCAPES]))
    out = StringIO()

    class Opened:
        model = tokenizer = None

    chat.answer(Opened, None, out, 5)  # type: ignore[arg-type]
    assert not terminal.CONTROLS.search(out.getvalue())


def test_a_debug_traceback_is_announced(capsys, monkeypatch):
    def fails(*_, **__):
        raise ValueError(f"Jane Doe {ESCAPES}")

    monkeypatch.setattr(cli.cli_run, "load", fails)
    for _ in range(2):  # a notebook gives several commands in one process: each says it
        assert cli.invoke(["--debug", "plan", "x.yaml"]) == 1
        err = " ".join(capsys.readouterr().err.split())  # wrapped as wide as the terminal is
        assert err.index("can quote text of your data") < err.index("Traceback")
        assert not terminal.CONTROLS.search(err)


@pytest.mark.parametrize("text", ["a: ```", "a: `````\n# hi", "```\n## Injected\n```", "plain"])
def test_a_recipe_cannot_leave_its_fence(text):
    lines = _fenced(text).splitlines()
    fence = lines[-1]
    assert set(fence) == {"`"} and lines[0] == f"{fence}yaml"
    assert fence not in text


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX")
def test_names_that_are_no_text_are_refused_in_words(tmp_path, capsys):
    name = os.fsdecode(b"n\xff.jsonl")
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        source_files(SourceSection(path=str(tmp_path), kind="general"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        from qmedtune import claims

        claims.check(tmp_path / os.fsdecode(b"\xff"))
    assert cli.invoke(["report", os.fsdecode(b"\xff")]) == 2
    assert capsys.readouterr().err
