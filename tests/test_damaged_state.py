"""What a command finds of its own from before, cut, changed or not of this world: it heals, or says so in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MICRO, MicroRun
from hostile_folders import good_folders
from hostile_runs import good_run

from qmedtune import base, cli, hashes, makers, record, store
from qmedtune.errors import RunError
from qmedtune.parsing.loader import load_recipe

FACTS = ["--tasks", "facts", "--limit", "4"]


@pytest.fixture(scope="module")
def good(micro_run: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it; not to be changed."""
    place = tmp_path_factory.mktemp("state")
    made = good_folders(micro_run.base, place / "parts")
    return good_run(micro_run.folder, made.model, made.adapter, place / "good_run")


def flip(path: Path) -> None:
    """One bit in the middle, under the time that it had."""
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.invoke(words)
    return code, capsys.readouterr().err


# ---- a bit that flips under an unchanged time ------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_by_every_command_that_reads_it(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "q.jsonl").write_text('{"instruction": "What is aspirin?"}\n')
    run = Path(shutil.copytree(good, tmp_path / "run"))
    flip(run / "merged" / "model.safetensors")
    for stage in ("01-cpt", "02-sft"):
        flip(run / stage / "adapter" / "adapter_model.safetensors")
    for model in (run, run / "merged", run / "01-cpt" / "adapter"):
        for words in (
            ["eval", str(model), *FACTS],
            ["predict", str(model), "--data", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl")],
            ["chat", str(model)],
            ["export", str(model), "--as", "gguf-adapter" if "adapter" in model.name else "gguf", "--out",
             str(tmp_path / "export")],
        ):  # fmt: skip
            code, told = said([*words, "--offline"], capsys)
            assert code == 1 and "sha256 differs" in told and len(told.splitlines()) <= 6, (words, told)
    code, told = said(["merge", str(run), "--out", str(tmp_path / "again"), "--offline"], capsys)
    assert code == 1 and "adapter_model.safetensors: sha256 differs" in told
    assert not any((tmp_path / name).exists() for name in ("a.jsonl", "export", "again"))


def test_a_run_does_not_train_on_a_flipped_bit(micro_run: MicroRun, tmp_path: Path):
    run = Path(shutil.copytree(micro_run.folder, tmp_path / "run"))
    flip(run / "data" / "01-cpt" / "rows.npy")
    code = cli.invoke(["run", str(MICRO), "--out", str(run), "--until", "01-cpt", "--offline"])
    assert code == 1 and not (run / "01-cpt").exists()


# ---- the cache of built-in bases -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def each_seal(folder: Path) -> None:
    for path in folder.rglob(store.SEAL):
        path.unlink()


CUTS: dict[str, Callable[[Path], object]] = {
    "weights": lambda made: cut(made / "01-pretrain" / "model" / "model.safetensors"),
    "a seal": lambda made: cut(made / "01-pretrain" / store.SEAL),
    "no seals": each_seal,
    "all that is not weights": lambda made: [path.unlink() for path in made.rglob("*.json")],
    "the mark": lambda made: [cut(made / name) for name in (".qmedtune", "run.json", ".lock")],
    "kept text": lambda made: [cut(path) for path in (made / "data").rglob("*.jsonl")],
}


@pytest.mark.parametrize("what", CUTS)
def test_a_cut_cache_heals(what: str, micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the pretraining itself, which is stood in for: it takes seconds, and the same bytes come out."""
    from qmedtune import builtin_base

    made = base.builtin_folder("builtin:micro")
    weights = made / "01-pretrain" / "model" / "model.safetensors"
    shutil.copytree(made, tmp_path / "bases" / made.name)
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path))
    CUTS[what](tmp_path / "bases" / made.name)

    def trained(recipe, text, folder: Path, *, offline: bool) -> None:
        from qmedtune import claims

        claims.check(folder)  # as a run does first
        claims.check_steps(folder, ["data/general", "data/01-pretrain", "01-pretrain"])
        shutil.copytree(made / "01-pretrain", folder / "01-pretrain", dirs_exist_ok=False)

    monkeypatch.setattr(builtin_base, "run", trained)
    monkeypatch.setattr(makers, "_makers", [builtin_base.make])
    found = base.identify(load_recipe(MICRO).recipe.model, offline=True).make()
    assert store.sha256_file(found / "model.safetensors") == store.sha256_file(weights)


# ---- state files -----------------------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "wrong types": b'{"name": [], "remembered:x": {}, "files": 5, "sha256": "x", "key": 1}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_state_is_passed_over(content: bytes, micro_run: MicroRun, tmp_path: Path):
    """.hashes.json, seals, stamps, heartbeats and partial results: made again, never an error without words."""
    run = Path(shutil.copytree(micro_run.folder, tmp_path / "run"))
    for name in (".hashes.json", "run.json", "heartbeat.json", "data/notes/seal.json"):
        (run / name).write_bytes(content)
    assert hashes.read_checked(run / ".hashes.json") is None
    assert store.read_seal(run / "data" / "notes") is None
    assert record.read(run) is None
    code = cli.invoke(["run", str(MICRO), "--out", str(run), "--until", "data/notes", "--offline"])
    assert code == 0 and json.loads((run / "run.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("command", ["report", "eval", "merge", "export"])
def test_a_broken_run_json_is_told_by_its_name(
    command: str, content: bytes, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(good, tmp_path / "run", copy_function=os.link))
    (run / "run.json").unlink()
    (run / "run.json").write_bytes(content)
    words = {
        "report": ["report", str(run)],
        "eval": ["eval", str(run), *FACTS, "--offline"],
        "merge": ["merge", str(run), "--out", str(tmp_path / "m"), "--offline"],
        "export": ["export", str(run), "--as", "gguf-adapter", "--out", str(tmp_path / "e"), "--offline"],
    }[command]
    code, told = said(words, capsys)
    assert code in (1, 2) and "run.json" in told and "--debug" not in told and len(told.splitlines()) <= 6, told


def test_a_lock_that_is_a_hard_link_is_not_written_to(micro_run: MicroRun, tmp_path: Path):
    run = Path(shutil.copytree(micro_run.folder, tmp_path / "run"))
    (tmp_path / "precious").write_text("precious")
    (run / ".lock").unlink()
    os.link(tmp_path / "precious", run / ".lock")
    with pytest.raises(RunError, match="hard link to another file"), store.lock(run):
        pass
    assert cli.invoke(["run", str(MICRO), "--out", str(run), "--until", "data/notes", "--offline"]) == 1
    assert (tmp_path / "precious").read_text() == "precious"


# ---- names that are not UTF-8 ----------------------------------------------------------------------------------------

NO_UTF8 = os.fsdecode(b"ward-\xff")


@pytest.mark.parametrize(
    "words",
    [
        ["run", f"{NO_UTF8}.yaml"],
        ["run", str(MICRO), "--out", NO_UTF8],
        ["plan", f"{NO_UTF8}.yaml"],
        ["report", NO_UTF8],
        ["erase", NO_UTF8, "--text"],
        ["runs", NO_UTF8],
        ["eval", NO_UTF8, *FACTS],
        ["eval", "x", "--tasks", f"pubmedqa={NO_UTF8}"],
        ["predict", "x", "--data", f"{NO_UTF8}.csv", "--out", "a.jsonl"],
        ["predict", "x", "--data", "q.csv", "--out", NO_UTF8],
        ["chat", NO_UTF8],
        ["merge", NO_UTF8, "--out", "m"],
        ["export", "x", "--as", "gguf", "--out", NO_UTF8],
    ],
    ids=lambda words: f"{words[0]} {ascii(words[-1])}",
)
def test_a_name_that_is_not_utf8_is_refused_in_words(words: list[str], capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    code, told = said(words, capsys)
    assert code == 2 and "is not UTF-8" in told and "ward-" in told and len(told.splitlines()) <= 6
    assert list(tmp_path.iterdir()) == []


def test_files_of_such_names_in_a_source_are_read_or_told(tmp_path: Path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in (b"ward-\xff.jsonl", b"ward.jsonl"):
        rows = [
            json.dumps({"id": f"{name!r}-{n}", "text": f"note {n} of the ward {name!r} is well"}) for n in range(40)
        ]
        (notes / os.fsdecode(name)).write_text("\n".join(rows) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {base: builtin:micro}\nadapter: {r: 4, alpha: 8}\n"
        f"data: {{notes: {{path: {notes}, kind: clinical}}}}\nstages: [{{cpt: {{mix: {{notes: 1}}, tokens: 1000}}}}]\n"
    )
    words = ["run", str(recipe), "--out", str(tmp_path / "run"), "--until", "data/notes", "--offline"]
    code, told = said(words, capsys)
    assert code == 0 or ("UTF-8" in told and "--debug" not in told), told
    if code == 0:
        run = record.read(tmp_path / "run")
        assert run is not None and run.data["notes"].records.read in (40, 80)


# ---- what lies beside the weights of a base --------------------------------------------------------------------------


def test_folders_of_licences_beside_a_base_cost_no_merge(good: Path, tmp_path: Path):
    parts = good.parent / "parts"
    model = Path(shutil.copytree(parts / "good", tmp_path / "model"))
    for name in ("LICENSES", "NOTICE", "LICENSE.d"):
        (model / name).mkdir()
        (model / name / "Apache-2.0.txt").write_text("text")
    (model / "LICENSE.txt").write_text("text")
    words = ["merge", str(parts / "good-adapter"), "--base", str(model), "--out", str(tmp_path / "m"), "--offline"]
    assert cli.invoke(words) == 0
    assert (tmp_path / "m" / "LICENSE.txt").read_text() == "text"
    words = ["export", str(tmp_path / "m"), "--as", "transformers", "--out", str(tmp_path / "e"), "--offline"]
    assert cli.invoke(words) == 0


# ---- text of others in Markdown --------------------------------------------------------------------------------------

FENCE = "```\n# not ours\n<script>x</script>\n~~~\n`````"


def test_nothing_that_others_wrote_opens_or_closes_a_block_of_markdown(tmp_path: Path):
    from builders import make_run

    from qmedtune.exporting.card import code, write_card
    from qmedtune.report import markdown, model_card
    from qmedtune.reporting.facts import Metrics
    from qmedtune.results import Run

    raw = make_run().as_json()
    evil = make_run(
        name=FENCE, status=FENCE, warnings=[FENCE], recipe_sha256=FENCE, error=FENCE, recipe_text=f"name: x\n{FENCE}",
        merge={**raw["merge"], "warnings": [FENCE], "error": FENCE, "path": FENCE},
    )  # fmt: skip
    evil = Run.model_validate(evil.as_json())
    for text in (markdown(evil, Metrics()), model_card(evil).split("---\n", 2)[2]):
        head, _, recipe = text.partition("## Recipe")
        assert "\n```" not in head and "\n# not" not in head and "<script" not in head and "\n~~~" not in head
        fences = [line for line in recipe.splitlines() if line.startswith("``````")]
        assert len(fences) in (0, 2)
    assert code("a`b``c") == "``` a`b``c ```" and code("plain") == "`plain`"
    (tmp_path / "README.md").write_bytes(b"\xff\xfe" + b"x" * (3 << 20))
    write_card(tmp_path, "t", ["x"], tmp_path)
    assert (tmp_path / "README.md").stat().st_size < 4 << 20


def test_a_run_of_an_evil_name_exports_inside_of_its_folder(good: Path, tmp_path: Path):
    from hostile_runs import EVIL_NAME, rewritten

    run = Path(shutil.copytree(good, tmp_path / "run"))
    rewritten(name=EVIL_NAME)(run)
    words = ["export", str(run), "--as", "vllm", "--out", str(tmp_path / "a b`c"), "--offline"]
    assert cli.invoke(words) == 0
    card = (tmp_path / "a b`c" / "README.md").read_text()
    assert "`` vllm serve '" in card and "$(" not in card.partition("---")[0]
    assert not list(tmp_path.rglob("OWNED*"))
