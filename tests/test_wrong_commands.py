"""A hundred wrong command lines: at most six lines, the right exit code, and the right next step. In process.

What is nearly right (a table from Excel, a mark of Windows' editors) has to work. Nothing is scored or trained here but
one run of the micro recipe, which the commands are about.
"""

from __future__ import annotations

import io
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MICRO, ROOT

from qmedtune import cli
from qmedtune.parsing.loader import load_recipe
from qmedtune.run import run

TABLE = "note_id,subject_id,text\n" + "".join(
    f"{i},p{i % 5},On day {i} patient {i} came with pain of the chest and was given {i * 7} mg.\n" for i in range(40)
)
RECIPE = """\
name: NAME
model: {base: builtin:micro}
adapter: {r: 4, alpha: 8}
data:
  notes: {path: "FILE", kind: clinical}
  questions: {path: builtin:micro/instructions, kind: instructions, template: alpaca, max_records: 30}
stages:
  - cpt: {mix: {notes: 1}, tokens: 2000}
  - sft: {data: questions, epochs: 1}
"""


@dataclass(frozen=True)
class Case:
    """`command` after `qmedtune`, the exit code, and what its answer has to say."""

    command: str
    code: int
    says: str

    @property
    def name(self) -> str:
        return self.command or "(nothing)"


def about(name: str, code: int, says: str, content: bytes | str | None = None, file: str = "notes.csv", **edit: str):
    """A recipe `lab/NAME.yaml` about one file beside it; `edit`: old text -> new text of the recipe."""
    return name, code, says, content, file, edit


# Recipes and tables as they come out of people's editors: (name, code, says, content of the table, its name, edits).
TABLES = [
    about("table_with_bom", 0, "Record ledger", b"\xef\xbb\xbf" + TABLE.encode()),
    about("windows_lines", 0, "Record ledger", TABLE.replace("\n", "\r\n")),
    about("utf16_table", 0, "Record ledger", TABLE.encode("utf-16")),
    about("western_table", 0, "Record ledger", TABLE.replace("chest", "Brustkörb").encode("latin-1")),
    about("semicolons", 0, "Record ledger", TABLE.replace(",", ";")),
    about("tabs_between", 0, "Record ledger", TABLE.replace(",", "\t"), "notes.tsv"),
    about("blank_in_name", 0, "Record ledger", TABLE, "my notes.csv"),
    about("capitals", 0, "Record ledger", TABLE, "NOTES.CSV"),
    about("other_ending", 2, "no reader for .dat", TABLE, "notes.dat"),
    about("nothing_in_it", 3, "the file is empty", ""),
    about("half_json", 3, "mend the file", "{half", "notes.json"),
    about("no_text_column", 3, "set `columns:`", TABLE.replace("text", "whatever")),
    about("broken_pdf", 3, "truncated or corrupt", b"%PDF-1.4\n%", "notes.pdf"),
    about("no_such_table", 3, "no such file or folder", None, "nots.csv"),
    about("wrong_column", 3, "did you mean text", TABLE, kind="kind: clinical, columns: {text: txt}"),
    about("variable", 3, "export MY_NOTES=", TABLE, **{"lab/notes.csv": "${MY_NOTES}/notes.csv"}),
    about("windows_path", 2, "/mnt/c", TABLE, **{'"lab/notes.csv"': r"'C:\notes\notes.csv'"}),
    about("no_match", 3, "nothing matches", TABLE, **{"lab/notes.csv": "lab/*.jsonl"}),
    about("tab_indent", 2, "a tab in the indentation", TABLE, **{"  notes:": "\tnotes:"}),
    about("blank_in_run", 2, "letters, digits", TABLE, **{"name: blank_in_run": "name: my run"}),
    about("no_name", 2, "name: missing", TABLE, **{"name: no_name\n": ""}),
    about("section_twice", 2, "duplicate key; it stands already on line", TABLE, **{"stages:": "data: {}\nstages:"}),
    about("other_trainers_key", 2, "here it is `lr`", TABLE, **{"name:": "learning_rate: 1e-4\nname:"}),
    about("other_trainers_adapter_key", 2, "did you mean `r`", TABLE, **{"r: 4": "lora_r: 4"}),
]  # fmt: skip

CASES = [
    # ---- models
    Case("chat runs/mircro", 2, "runs here: runs/micro"),
    Case("plan runs/micro/run.json", 2, "a file of a run; give the recipe that it was made from"),
    Case("run https://example.org/recipe.yaml", 2, "https://example.org/recipe.yaml: recipes are files on this"),
    Case("eval runs/micro --task facts", 2, "here it is: --tasks TASK"),
    Case("predict runs/micro --input notes.csv", 2, "here it is: --data FILE"),
    Case("export runs/micro --format gguf --out e", 2, "here it is: --as gguf"),
    Case("export runs/micro", 2, "gguf, gguf-adapter, ollama, vllm, transformers, hub"),
    Case("run recipes/micro.yaml --num-gpus 2", 2, "here it is: --gpus N"),
    Case("chat runs/none", 2, "never sent to the Hub"),
    Case("chat recipes/micro.yaml", 2, "such as runs/micro"),
    Case("chat recipes/micro", 2, "runs here: runs/micro"),
    Case("chat", 2, "example: qmedtune chat runs/mine"),
    Case("chat .", 2, "runs here: runs/micro"),
    Case("chat runs/micro/data", 2, "the run that it belongs to: runs/micro"),
    Case("chat runs/micro/01-cpt", 2, "the adapter of this stage: runs/micro/01-cpt/adapter"),
    Case("chat runs/micro --template alpacca", 2, "did you mean 'alpaca'"),
    Case("chat runs/micro --quantization int8", 2, "'nf4', 'none'"),
    Case("eval runs/micro", 2, "--tasks (facts, pubmedqa=FILE ...)"),
    Case("eval --tasks facts", 2, "Missing argument 'MODEL'"),
    Case("eval runs/micro --tasks fact", 2, "did you mean 'facts'"),
    Case("eval runs/micro --tasks facts,", 2, "allowed: facts, pubmedqa"),
    Case("eval runs/micro --tasks pubmedqa", 2, "--tasks pubmedqa=FILE"),
    Case("eval runs/micro --tasks pubmedqa=/none.json", 3, "/none.json: no such file"),
    Case("eval runs/micro --tasks pubmedqua=exam.json", 2, "did you mean 'pubmedqa'"),
    Case("eval runs/micro --tasks facts --harness hellaswag", 2, "give one of --tasks"),
    Case("eval runs/micro --tasks facts --limit 0", 2, "greater than or equal to 1"),
    Case("eval runs/micro --tasks facts --shots -1", 2, "greater than or equal to 0"),
    Case("eval runs/micro --tasks perplexity", 2, "perplexity=FILE"),
    Case("evaluate runs/micro", 2, "here it is: qmedtune eval"),
    Case("merge runs/micro", 2, "example: qmedtune merge runs/mine --out merged"),
    Case("merge runs/micro --out runs/micro/merged", 2, "is there already"),
    Case("merge runs/micro --out m --weights cpt=0.5", 2, "allowed: 01-cpt, 02-sft"),
    Case("merge runs/micro --out m --weights 01-cpt", 2, "01-cpt=0.7"),
    Case("merge runs/micro/merged --out m", 2, "nothing to merge"),
    Case("export runs/micro --as ggml --out x", 2, "'gguf'"),
    Case("export runs/micro --as gguf", 2, "--out: name the folder"),
    Case("export runs/micro --as gguf --quant q3 --out x", 2, "q8_0"),
    Case("export runs/typo --as gguf --out x", 2, "runs here: runs/micro"),
    Case("predict runs/micro --data none.csv --out a.csv", 3, "none.csv: no such file"),
    Case("predict runs/micro --data exam.csv", 2, "--out FILE is needed"),
    Case("predict runs/micro --data exam.csv --out a.csv --column qestion", 2, "columns there: question"),
    Case("predict runs/micro --data exam.csv --out none/a.csv", 2, "mkdir -p none"),
    Case("predict runs/micro --data exam.csv --out a.xlsx", 2, "allowed: .csv, .jsonl"),
    Case("predict runs/micro --data exam.csv --out exam.csv", 2, "give another name"),
    Case("predict --data exam.csv --out a.csv", 2, "Missing argument 'MODEL'"),
    # ---- recipes and runs
    Case("", 0, "Usage: qmedtune"),
    Case("run", 2, "example: qmedtune run recipes/cpt_then_sft.yaml"),
    Case("run recipes", 2, "for example recipes/audit.yaml"),
    Case("run micro", 2, "did you mean recipes/micro.yaml"),
    Case("run recipes/micro.yml", 2, "did you mean recipes/micro.yaml"),
    Case("run 'recipes/*.yml'", 2, "recipes here: recipes/audit.yaml"),
    Case("run https://example.org/recipe.yaml", 2, "fetch it first"),
    Case("run runs/micro", 2, "with --out runs/micro to go on"),
    Case("run recipes/micro.yaml --resume", 2, "give the same command again"),
    Case("run recipes/micro.yaml --set lr", 2, "stages[0].cpt.lr=1e-4"),
    Case("run recipes/micro.yaml --set stage[0].cpt.lr=1e-4", 2, "did you mean `stages`"),
    Case("run recipes/micro.yaml --set stages.0.cpt.lr=1e-4", 2, "the first item is stages[0]"),
    Case("run recipes/micro.yaml --set stages[0].cpt.lr=fast", 2, "a number in (0, 1] or auto"),
    Case("run recipes/micro.yaml --set stages[5].cpt.lr=1e-4", 2, "stages is a list of 2"),
    Case("run recipes/micro.yaml --set model.base=meta-llama/Llama-3.1-8B --offline --out runs/x", 2, "hf download"),
    Case("run recipes/micro.yaml --time-limit 1hour", 2, "90s, 55m, 2h"),
    Case("run recipes/micro.yaml --time-limit 0", 2, "90s, 55m, 2h"),
    Case("run recipes/micro.yaml --until", 2, "see: qmedtune run --help"),
    Case("run recipes/micro.yaml --until 03-cpt", 2, "allowed: data, 01-cpt"),
    Case("run recipes/micro.yaml --out recipes/micro.yaml", 2, "recipes/micro.yaml is a file"),
    Case("run recipes/micro.yaml --out exam.csv/x", 2, "give a folder that you may write to"),
    Case("run recipes/micro.yaml out=runs/x", 2, "see: qmedtune run --help"),
    Case("run recipes/micro.yaml -o x", 2, "here it is: --out DIR"),
    Case("run recipes/micro.yaml --offine", 2, "--offline"),
    Case("run recipes/micro.yaml --learning-rate 1e-4", 2, "--set stages[0].cpt.lr=1e-4"),
    Case("runn recipes/micro.yaml", 2, "Did you mean 'run'"),
    Case("train recipes/micro.yaml", 2, "here it is: qmedtune run"),
    Case("recipes/micro.yaml", 2, "did you mean: qmedtune run recipes/micro.yaml"),
    Case("help", 2, "see: qmedtune --help"),
    Case("-v", 2, "qmedtune --help"),
    Case("plan lab/relative.yaml", 2, "write lab/plain.csv"),
    Case("plan recipes/micro.yaml recipes/audit.yaml", 2, "see: qmedtune plan --help"),
    Case("plan recipes/micro.yaml --set stages[0].cpt.mix.notes=-1", 2, "a number from 0 up"),
    Case("data recipes/micro.yaml show", 2, "data show RECIPE"),
    Case("data show", 2, "data show RECIPE"),
    Case("data show recipes/audit.yaml", 2, "make it with: qmedtune data recipes/audit.yaml"),
    Case("data show recipes/micro.yaml --stage 3", 2, "allowed: 01-cpt, 02-sft"),
    Case("data show recipes/micro.yaml --stage sft", 0, "template alpaca"),
    Case("ablate recipes/micro.yaml", 2, "add one, for example: ablate:"),
    Case("ablate recipes/audit.yaml --seeds a", 2, "such as 17,18,19"),
    Case("report recipes/micro.yaml", 2, "runs here: runs/micro"),
    Case("report runs", 2, "runs here: runs/micro"),
    Case("report runs/none", 2, "runs here: runs/micro"),
    Case("report runs/micro/report.html", 2, "it lies in a run; give that: runs/micro"),
    Case("report --verify", 2, "Missing argument 'RUN'"),
    Case("erase runs/micro", 2, "qmedtune erase runs/micro --text"),
    Case("erase recipes/micro.yaml --text", 2, "runs here: runs/micro"),
    Case("runs none", 2, "give the folder that holds the runs"),
    Case("runs recipes/micro.yaml", 2, "is a file"),
    Case("watch runs/none", 2, "give a run, or the folder"),
    Case("watch --port 99999999", 2, "65535"),
    Case("watch --port abc", 2, "integer"),
    Case("compare runs/micro", 2, "name two runs or more"),
    Case("compare runs/micro runs/typo", 2, "see what is there: qmedtune runs"),
    Case("compare runs/micro recipes/micro.yaml", 2, "see what is there: qmedtune runs"),
    # ---- the rest
    Case("fetch", 2, "example: qmedtune fetch smollm2"),
    Case("fetch smolm2", 2, "allowed: smollm2"),
    Case("fetch smollm2 --from none.whl", 2, "no file none.whl"),
    Case("recipe learning_rate", 2, "did you mean `lr`"),
    Case("recipe recipes/micro.yaml", 2, "qmedtune plan recipes/micro.yaml"),
    Case("doctor --verbose", 2, "--debug"),
    Case("schema recipes/micro.yaml", 2, "see: qmedtune schema --help"),
    Case("selftest kernels", 2, "see: qmedtune selftest --help"),
    Case("bench", 2, "see: qmedtune bench --help"),
    Case("bench foo", 2, "see: qmedtune bench --help"),
    Case("bench kernel", 2, "Did you mean 'kernels'"),
    Case("bench train --shape foo", 2, "allowed: tiny"),
]


@pytest.fixture(scope="module")
def lab(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as people have it: recipes, one finished run, some tables."""
    place = tmp_path_factory.mktemp("lab")
    (place / "recipes").mkdir()
    for name in ("micro", "audit"):
        shutil.copy(ROOT / "recipes" / f"{name}.yaml", place / "recipes")
    (place / "lab").mkdir()
    (place / "lab" / "plain.csv").write_text(TABLE)
    (place / "lab" / "relative.yaml").write_text(RECIPE.replace("NAME", "relative").replace("FILE", "plain.csv"))
    (place / "exam.csv").write_text("question\nWhat does it treat?\n")
    (place / "exam.json").write_text("{}")
    loaded = load_recipe(MICRO)
    run(loaded.recipe, loaded.text, place / "runs" / "micro", offline=True)
    return place


@pytest.fixture
def answer(lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """(exit code, stdout, error lines) of a command line given in `lab`; no connection may be opened."""

    def no_network(*arguments, **named):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.delenv("MY_NOTES", raising=False)
    monkeypatch.chdir(lab)

    def answer(command: str) -> tuple[int, str, list[str]]:
        code = cli.invoke(shlex.split(command))
        out, err = capsys.readouterr()
        lines = err.splitlines()
        begin = next((number for number, line in enumerate(lines) if line.startswith("error")), len(lines))
        return code, out, lines[begin:]

    return answer


def check(code: int, out: str, error: list[str], expected: int, says: str) -> None:
    assert code == expected, (out, error)
    said = " ".join([out, *error])
    assert says in said, said
    assert "Traceback" not in said
    if expected:
        assert 1 <= len(error) <= 6 and all(len(line) <= 600 for line in error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_command_is_answered_with_the_next_step(case: Case, answer):
    check(*answer(case.command), case.code, case.says)


@pytest.mark.parametrize(("name", "code", "says", "content", "file", "edit"), TABLES, ids=lambda value: str(value)[:30])
def test_files_as_editors_leave_them(name, code, says, content, file, edit, lab: Path, answer):
    text = RECIPE.replace("NAME", name).replace("FILE", f"lab/{file}")
    for old, new in edit.items():
        old = "kind: clinical" if old == "kind" else old
        assert old in text
        text = text.replace(old, new, 1)
    for leftover in (lab / "lab").glob("n*.*"):
        leftover.unlink()
    if content is not None:
        (lab / "lab" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    (lab / "lab" / f"{name}.yaml").write_text(text)
    check(*answer(f"data lab/{name}.yaml"), code, says)


@pytest.mark.parametrize(
    ("encoded", "code", "says"),
    [("utf-8-sig", 0, "fits: "), ("utf-16", 2, "save the file as UTF-8"), ("cp1252", 2, "not UTF-8")],
)
def test_recipes_as_editors_leave_them(encoded: str, code: int, says: str, lab: Path, answer):
    text = "# Brustkörbe\r\n" + RECIPE.replace("NAME", "edited").replace("FILE", "lab/plain.csv").replace("\n", "\r\n")
    (lab / "lab" / "edited.yaml").write_bytes(text.encode(encoded))
    check(*answer("plan lab/edited.yaml"), code, says)


def test_a_recipe_of_the_folder_above_runs_in_its_own(lab: Path, answer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(lab / "lab")
    check(*answer("plan relative.yaml"), 0, "fits: ")


def test_a_slip_in_out_is_told_before_all_begins_anew(lab: Path, answer, monkeypatch: pytest.MonkeyPatch, capsys):
    from qmedtune.commands.common import warn_of_neighbour

    unfinished = lab / "runs" / "cardiology"
    unfinished.mkdir()
    text = (lab / "runs" / "micro" / "run.json").read_text().replace('"status": "finished"', '"status": "stopped"', 1)
    (unfinished / "run.json").write_text(text)
    for name, told in (("cardiolgy", True), ("cardiology2", False), ("nephrology", False)):
        warn_of_neighbour(lab / "runs" / name, "micro")
        assert ("to go on, --out" in capsys.readouterr().err) is told
    shutil.rmtree(unfinished)
