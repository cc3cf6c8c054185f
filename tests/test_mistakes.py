"""What beginners get wrong: each mistake gets at most six lines, the right exit code and a next step, and nothing is
written or lost. All through the real command line, in process."""

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_tokenizers import byte_level, save

from qmedtune import cli
from qmedtune.base import identify, note_base
from qmedtune.data.packing.tokens import load_codec
from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation.open_model import locate
from qmedtune.llama_shape import facts_from_config
from qmedtune.model_settings import check_all
from qmedtune.model_stack import ADAPTER_TENSORS, ModelStack, parameters
from qmedtune.recipe import ModelSection

RECIPE = """\
name: mine
model: {base: builtin:micro}
adapter: {r: 4, alpha: 8}
data:
  notes: {path: notes.csv, kind: clinical}
  questions: {path: builtin:micro/instructions, kind: instructions, template: alpaca}
stages:
  - cpt: {mix: {notes: 1}, tokens: 2000}
  - sft: {data: questions, epochs: 1}
"""


@dataclass(frozen=True)
class Mistake:
    """`edit` replaces text of the recipe, `files` are put beside it, `code` and the words in `says` are expected."""

    name: str
    code: int
    says: tuple[str, ...]
    edit: tuple[str, str] = ("", "")
    files: tuple[tuple[str, str], ...] = (("notes.csv", "text\na note\n"),)
    command: str = "run mine.yaml"


NO_NOTES: tuple[tuple[str, str], ...] = ()
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
MISTAKES = [
    Mistake("recipe not found", 2, ("no such file", "did you mean mine.yaml"), command="run mien.yaml"),
    Mistake("a folder instead of a recipe", 2, ("a folder", "mine.yaml"), command="run ."),
    Mistake("not YAML", 2, ("mine.yaml:3", "not YAML", "begins on line 2"), ("builtin:micro}", "builtin:micro")),
    Mistake("tabs", 2, ("mine.yaml:5", "a tab", "spaces"), ("  notes:", "\tnotes:")),
    Mistake("wrong key", 2, ("mine.yaml:3 adapter.aplha", "did you mean `alpha`"), ("alpha: 8", "aplha: 8")),
    Mistake("wrong type", 2, ('got "many"', "a whole number"), ("tokens: 2000", "tokens: many")),
    Mistake("key in the wrong section", 2, ("belongs in", "stages[].cpt"), ("r: 4", "lr: 1e-4")),
    Mistake("two of the same key", 2, ("duplicate key", "line 2"), ("adapter:", "model: {base: x}\nadapter:")),
    Mistake("unknown template", 2, ('no template "alpacca"', "`alpaca`"), ("alpaca", "alpacca")),
    Mistake("unknown task", 2, ("pubmedqa",), ("stages:", "evaluate: {tasks: [pubmedq]}\nstages:")),
    Mistake("task without its file", 2, ("path: FILE",), ("stages:", "evaluate: {tasks: [medqa]}\nstages:")),
    Mistake("benchmark with a bad record", 3, ("exam.jsonl:1", "`question` is missing"),
        ("stages:", "evaluate: {tasks: [{task: medqa, path: exam.jsonl}]}\nhygiene: {decontaminate: 'off'}\nstages:"),
        (("notes.csv", "text\na note\n"), ("exam.jsonl", '{"options": {"A": "x", "B": "y"}, "answer_idx": "A"}\n')),
    ),
    Mistake("unknown metric", 2, ("did you mean 'macro_f1'",),
        ("stages:", "evaluate: {tasks: [{task: bionli, path: exam.jsonl, metric: f1_macro}]}\n"
         "hygiene: {decontaminate: 'off'}\nstages:"),
        (("notes.csv", "text\na note\n"),
         ("exam.jsonl", '{"premise": "p", "hypothesis": "h", "label": "entailment"}\n')),
    ),
    Mistake("one draw of examples", 2, ("shot_seeds", "3, 20"),
        ("stages:", "evaluate: {tasks: [{task: facts, shots: 2, shot_seeds: 1}]}\nstages:"),
    ),
    Mistake("negative ratio", 2, ("got -1", "from 0 up"), ("{notes: 1}", "{notes: -1}")),
    Mistake("mixture names an absent source", 2, ("no source", "`notes`"), ("{notes: 1}", "{nots: 1}")),
    Mistake("notes given to sft", 2, ("kind clinical", "instructions"), ("data: questions", "data: notes")),
    Mistake("Windows path", 2, ("Windows path", "/mnt/c"), ("path: notes.csv", "path: 'D:\\data\\notes.csv'")),
    Mistake("remote code", 2, ("never run",), ("builtin:micro}", "builtin:micro, trust_remote_code: true}")),
    Mistake("unknown built-in base", 2, ("builtin:tiny",), ("builtin:micro}", "builtin:large}")),
    Mistake("base folder that is not there", 2, ("model.base", "./llama"), ("builtin:micro}", "./llama}")),
    Mistake(
        "gated model, offline, not in the cache", 2, ("meta-llama/Llama-3.2-1B", "hf download"),
        ("builtin:micro}", "meta-llama/Llama-3.2-1B}"), command="run mine.yaml --offline",
    ),
    Mistake("data file that is not there", 3, ("notes.csv", "no such file"), files=NO_NOTES),
    Mistake("pattern without matches", 3, ("nothing matches",), ("notes.csv", '"notes/*.txt"')),
    Mistake("empty data file", 3, ("notes.csv", "empty"), files=(("notes.csv", ""),)),
    Mistake("Git LFS pointer", 3, ("Git LFS", "git lfs pull"), files=(("notes.csv", LFS),)),
    Mistake("variable that is not set", 3, ("NOTES", "not set", "export NOTES="), ("notes.csv", '"${NOTES}/n.csv"')),
    Mistake("unknown extension", 2, ("no reader for .rtf", "format"), ("s.csv", "s.rtf"), (("notes.rtf", "x"),)),
    Mistake("unknown built-in source", 2, ("did you mean `builtin:notes`",), ("path: notes.csv", "path: builtin:note")),
    Mistake("out folder not writable", 2, ("--out", "cannot write"), command="run mine.yaml --out notes.csv/run"),
    Mistake("until a step that does not exist", 2, ("no step 'x'", "01-cpt"), command="run mine.yaml --until x"),
    Mistake("--set without a value", 2, ("key.path=value",), command="run mine.yaml --set seed"),
    Mistake("--set of an unknown key", 2, ("did you mean `seed`",), command="run mine.yaml --set sed=3"),
    Mistake("unknown command", 2, ("Did you mean 'run'",), command="rum mine.yaml"),
    Mistake("unknown option", 2, ("--ofline",), command="run mine.yaml --ofline"),
    Mistake("no recipe given", 2, ("RECIPE", "qmedtune run --help"), command="run"),
    Mistake("time limit in words", 2, ("90s, 55m, 2h",), command="run mine.yaml --time-limit soon"),
    Mistake("report of no run", 2, ("no run in this folder", "qmedtune run"), command="report runs/mine"),
    Mistake("does not fit", 4, ("01-cpt", "remedies"), ("name:", "memory: 0.1\nname:"), command="plan mine.yaml"),
]  # fmt: skip


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def no_network(*arguments, **named):
    raise AssertionError("a refused run must not open a connection")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with its own caches, no network, no variables of the user."""
    for name in ("HF_HOME", "QMEDTUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("NOTES", "DATA", "TEXT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(arguments, folder, capsys):
    """(exit code, error text) of a command that must leave `folder` as it is."""
    before = tree(folder.parent)
    code = cli.invoke(arguments)
    out, err = capsys.readouterr()
    assert tree(folder.parent) == before, "a refused command wrote something"
    assert out == "" and "Traceback" not in err
    assert 1 <= len(err.splitlines()) <= 6, err
    assert all(len(line) <= 400 for line in err.splitlines())
    return code, err


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_answered_with_what_to_do(mistake, place, capsys):
    old, new = mistake.edit
    assert old in RECIPE
    (place / "mine.yaml").write_text(RECIPE.replace(old, new, 1) if old else RECIPE)
    for name, text in mistake.files:
        (place / name).write_text(text)
    code, err = refused(mistake.command.split(), place, capsys)
    assert code == mistake.code, err
    for words in mistake.says:
        assert words in err, err


def test_there_are_enough_of_them():
    assert len({mistake.name for mistake in MISTAKES}) >= 30


# ---------------------------------------------------------------------------------------------- folders that are traps


def model_folder(path, **config):
    """The smallest folder that is a LLaMA to everything that does not load it."""
    path.mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "num_key_value_heads": 2}
    described = {**base, **shape, "max_position_embeddings": 128, **config}
    (path / "config.json").write_text(json.dumps(described))
    shapes = parameters(facts_from_config("mine", {**described, "model_type": "llama"}, ""), described)
    save_file({name: np.ones(size, np.float32) for name, size in shapes.items()}, path / "model.safetensors")
    return path


def run_on(folder, place, capsys):
    (place / "notes.csv").write_text("text\na note\n")
    (place / "mine.yaml").write_text(RECIPE.replace("builtin:micro}", f"{folder}}}", 1))
    return refused(["run", "mine.yaml", "--offline"], place, capsys)


def test_pickled_weights_are_refused(place, capsys):
    folder = model_folder(place / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, err = run_on(folder, place, capsys)
    assert code == 2 and "pickled" in err and "safetensors" in err


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(name, place, capsys):
    folder = model_folder(place / "base")
    described = json.loads((folder / "config.json").read_text()) if name == "config.json" else {}
    (folder / name).write_text(json.dumps({**described, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    code, err = run_on(folder, place, capsys)
    assert code == 2 and "auto_map" in err and "never run" in err


@pytest.mark.parametrize("target", ["/etc/hostname", "../../secret.json"])
def test_links_out_of_a_model_folder_are_refused(target, place, capsys):
    folder = model_folder(place / "base")
    (place.parent / "secret.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(target)
    code, err = run_on(folder, place, capsys)
    assert code == 2 and "link" in err


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_damaged_weights_file_is_named(damage, place, capsys):
    path = model_folder(place / "base") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes({"truncated": path.read_bytes()[:-1], "header": content, "empty": b""}[damage])
    code, err = run_on(path.parent, place, capsys)
    assert code == 2 and "base/model.safetensors: " in err and "safetensors file" in err


def test_a_flipped_bit_in_the_hubs_cache_is_named(place, capsys):
    """Its files are links to blobs that are named by their sha256."""
    snapshot = model_folder(place / "models--a--b") / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = place / "models--a--b" / "blobs"
    blobs.mkdir()
    (place / "models--a--b" / "config.json").rename(snapshot / "config.json")
    content = bytearray((place / "models--a--b" / "model.safetensors").read_bytes())
    blob = blobs / hashlib.sha256(content).hexdigest()
    (snapshot / "model.safetensors").symlink_to(blob)
    blob.write_bytes(content)
    section = ModelSection(base=str(snapshot))
    identify(section, offline=True)
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(RecipeError, match=r"0123/model.safetensors: damaged since it was fetched\ndelete .*blobs/"):
        identify(section, offline=True)


def test_an_adapter_is_no_base(place, capsys):
    folder = model_folder(place / "base")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    code, err = run_on(folder, place, capsys)
    assert code == 2 and "holds an adapter" in err and "qmedtune merge" in err


def test_an_adapter_that_names_code_is_refused(place):
    folder = model_folder(place / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"megatron_config": {"x": 1}, "megatron_core": "evil"}))
    with pytest.raises(RecipeError, match="`megatron_config` asks for remote code, which is never run"):
        check_all(folder)


def adapter_of(base, path, below=()):
    """A folder that says which weights it was trained on, as training writes it."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file({"a": np.ones(2, np.float32)}, path / ADAPTER_TENSORS)
    note_base(path, "mine", ModelStack(base, tuple(below)), "nf4")
    return path


def test_an_adapter_of_another_base_is_refused(place):
    mine, other = model_folder(place / "mine"), model_folder(place / "other")
    zeros = {name: np.zeros_like(value) for name, value in load_file(other / "model.safetensors").items()}
    save_file(zeros, other / "model.safetensors")
    adapter = adapter_of(mine, place / "adapter")
    assert locate(str(adapter)).base == mine
    with pytest.raises(RecipeError, match=r"was trained on other weights than .*other\nsha256 .*--base: mine"):
        locate(str(adapter), base=str(other))


def test_one_adapter_of_a_stack_is_refused(place):
    base = model_folder(place / "base")
    first = adapter_of(base, place / "first")
    with pytest.raises(RecipeError, match="on top of an earlier adapter\nname the run"):
        locate(str(adapter_of(base, place / "second", [first])))


def test_a_tokenizer_of_another_model_is_refused(place):
    """Before anything is tokenised; training asks the loaded model again."""
    tokenizer = byte_level()
    tokens, folder = tokenizer.get_vocab_size(), save(tokenizer, place / "base")
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokens}))
    load_codec(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokens - 1}))
    with pytest.raises(DataError, match=f"has {tokens} tokens, the model only {tokens - 1} embeddings\nuse the"):
        load_codec(folder)


def test_another_architecture_is_refused(place, capsys):
    folder = model_folder(place / "base", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    code, err = run_on(folder, place, capsys)
    assert code == 2 and "gpt2" in err and "llama" in err.lower()


# --------------------------------------------------------------------------------------- mistakes around a run folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(place, capsys):
    (place / "mine.yaml").write_text(RECIPE)
    (place / "notes.csv").write_text("text\na note\n")
    locked = place / "locked"
    locked.mkdir(mode=0o500)
    code, err = refused(["run", "mine.yaml", "--out", "locked/run"], place, capsys)
    assert code == 2 and "cannot write" in err and "--out" in err


def test_a_second_run_in_the_same_folder_leaves(place, capsys):
    from qmedtune import store

    (place / "mine.yaml").write_text(RECIPE)
    (place / "notes.csv").write_text("text\na note\n")
    with store.lock(place / "runs" / "mine"):
        code, err = refused(["run", "mine.yaml"], place, capsys)
    assert code == 1 and f"already running (pid {os.getpid()})" in err


@pytest.mark.parametrize("name", [".lock", ".building/01-cpt/metrics.jsonl", ".building", "data"])
def test_a_link_in_a_run_folder_is_refused(name, place, capsys):
    """A run folder that somebody else made: what is written through its links lands elsewhere."""
    (place / "mine.yaml").write_text(RECIPE)
    (place / "notes.csv").write_text("text\na note\n")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "file").write_text("precious")
    link = place / "runs" / "mine" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(place / "elsewhere" / ("file" if "." in link.name[1:] or name == ".lock" else ""))
    code, err = refused(["run", "mine.yaml"], place, capsys)
    assert code == 2 and f"runs/mine/{name} is a link" in err


def test_a_bad_recipe_leaves_a_run_as_it_is(place, capsys):
    run = place / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"status": "finished"}')
    (place / "mine.yaml").write_text(RECIPE.replace("r: 4", "r: -4"))
    code, err = refused(["run", "mine.yaml"], place, capsys)
    assert code == 2 and "adapter.r" in err
    assert Path(run / "run.json").read_text() == '{"status": "finished"}'


# ------------------------------------------------------------------------------------------------ the machine's limits


def on_a_machine(monkeypatch, **facts):
    from dataclasses import replace

    from qmedtune.planning import capacity, resolve
    from qmedtune.planning.machine import this_machine

    machine = replace(this_machine(), **facts)
    monkeypatch.setattr(capacity, "this_machine", lambda: machine)
    monkeypatch.setattr(resolve, "this_machine", lambda: machine)


@pytest.mark.parametrize("words", ["--out content/drive/MyDrive/run", "--set data.notes.path=content/drive/n.csv"])
def test_a_drive_that_is_not_mounted(words, place, monkeypatch, capsys):
    from qmedtune import disk

    monkeypatch.setattr(disk, "DRIVE", place / "content" / "drive")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    (place / "mine.yaml").write_text(RECIPE)
    (place / "notes.csv").write_text("text\na note\n")
    code, err = refused(["run", "mine.yaml", *words.split()], place, capsys)
    assert code == (2 if "--out" in words else 3) and "not mounted" in err and "drive.mount(" in err


def test_too_little_ram_is_said_before_anything_is_written(place, monkeypatch, capsys):
    (place / "mine.yaml").write_text(RECIPE)
    (place / "notes.csv").write_text("text\na note\n")
    on_a_machine(monkeypatch, host_bytes=2**28)
    code, err = refused(["run", "mine.yaml"], place, capsys)
    assert code == 4 and "of host memory, this machine has 256 MiB" in err and "remedy" in err


def test_a_real_llama_without_a_gpu_is_warned_about(monkeypatch, capsys):
    from qmedtune.planning import capacity
    from qmedtune.planning.memory import Setup
    from qmedtune.planning.shapes import base_facts
    from qmedtune.recipe import ModelSection

    on_a_machine(monkeypatch, kind="cpu", host_bytes=2**35)
    facts = base_facts(ModelSection(base="meta-llama/Llama-3.2-1B"))
    capacity._check_machine(facts, [Setup(64, 1, True, "adamw", "bfloat16")])
    said = capsys.readouterr().err
    assert "1.24B parameters on a CPU takes days" in said and "T4 GPU" in said and "--smoke" in said
