"""What goes wrong with an evaluation: one clear error through the real command line, exit 2 or 3, nothing scored.

And what interrupts it: after SIGKILL nothing reads as a result, and the same command gives what it would have given.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from llama_folders import llama2_folder, llama3_folder

from qmedtune import cli
from qmedtune.data.packing import templates
from qmedtune.evaluation import measure

MEDQA = {"question": "Which drug?", "options": {"A": "aspirin", "B": "insulin"}, "answer_idx": "B"}
NLI = {"premise": "P", "hypothesis": "H", "label": "entailment"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """base (with a chat template of its own) and plain (without one)."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    llama3_folder(root / "base", max_position_embeddings=512)
    llama2_folder(root / "plain", max_position_embeddings=512)
    return root


@pytest.fixture
def refused(models, tmp_path, capsys, monkeypatch):
    """(exit code, error) of `qmedtune eval MODEL ...` that must neither score an item nor write anything."""

    def never(*arguments):
        raise AssertionError("an item was scored")

    monkeypatch.setattr(measure, "_score", never)

    def refused(model: str, *options: str) -> tuple[int, str]:
        out = tmp_path / "out"
        code = cli.invoke(["eval", str(models / model), *options, "--offline", "--out", str(out)])
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err
        errors = said.err.splitlines()
        begin = next(i for i, line in enumerate(errors) if line.lower().startswith("error"))
        assert 1 <= len(errors[begin:]) <= 6, said.err
        assert not list(out.rglob("*.items.jsonl")) and not list(out.rglob("evaluation.json"))
        return code, "\n".join(errors[begin:])

    return refused


def write(path: Path, *records: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("task", "record", "says"),
    [
        ("medqa", {"options": MEDQA["options"], "answer_idx": "B"}, "q.jsonl:2: field `question` is missing"),
        ("medqa", {**MEDQA, "answer_idx": "C"}, "q.jsonl:2: the answer is none of the options"),
        ("bionli", {**NLI, "label": "perhaps"}, "q.jsonl:2: `label` is none of the labels"),
        ("outcome", {"text": "t", "label": "unknown"}, "q.jsonl:2: `label` is none of the labels"),
        ("hoc", {"text": "t", "labels": ["sleep"]}, "q.jsonl:2: a label of `labels` is no hallmark"),
        ("summarization", {"text": "t"}, "q.jsonl:2: no known pair of text and summary"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(refused, tmp_path, task, record, says):
    good = {"medqa": MEDQA, "bionli": NLI, "outcome": {"text": "t", "label": 1}, "hoc": {"text": "t", "labels": []}}
    first = {"summarization": {"text": "t", "summary": "s"}, **good}[task]
    code, error = refused("base", "--tasks", f"facts,{task}={write(tmp_path / 'q.jsonl', first, record)}")
    assert code == 3 and says in error


def test_an_empty_split(refused, tmp_path):
    write(tmp_path / "medqa" / "train.jsonl", MEDQA)
    (tmp_path / "medqa" / "test.jsonl").write_text("\n")
    code, error = refused("base", "--tasks", f"medqa={tmp_path / 'medqa'}")
    assert code == 3 and "test.jsonl: no item for task medqa" in error
    code, error = refused("base", "--tasks", f"medqa={tmp_path / 'medqa'}", "--split", "dev")
    assert code == 3 and "no file of the split `dev`\n  splits there: test, train" in error


def test_unlabelled_and_one_sided_splits(refused, tmp_path):
    row = {"id": "x", "question": "Q", "opa": "a1", "opb": "b1", "opc": "c1", "opd": "d1", "cop": -1}
    code, error = refused("base", "--tasks", f"medmcqa={write(tmp_path / 'test.json', row)}")
    assert code == 3 and "test split is unlabelled: take the dev split" in error
    path = write(tmp_path / "o.jsonl", {"text": "t", "label": 1}, {"text": "u", "label": 1})
    code, error = refused("base", "--tasks", f"outcome={path}")
    assert code == 3 and "same outcome" in error


def test_unknown_names(refused, tmp_path):
    path = write(tmp_path / "q.jsonl", NLI)
    code, error = refused("base", "--tasks", f"medkqa={path}")
    assert code == 2 and "did you mean 'medqa'?" in error
    code, error = refused("base", "--tasks", f"bionli={path}", "--metric", "macrof1")
    assert code == 2 and "did you mean 'macro_f1'?" in error
    code, error = refused("base", "--tasks", "facts", "--template", "alpacca")
    assert code == 2 and "did you mean 'alpaca'?" in error
    code, error = refused("base", "--tasks", "facts", "--split", "tets")
    assert code == 2


def test_a_task_asked_twice(refused, tmp_path):
    """Its scores carry its name: the second file was reported with what the first had scored."""
    first, second = (write(tmp_path / name, {**MEDQA, "answer_idx": name}) for name in "AB")
    code, error = refused("base", "--tasks", f"medqa={first},medqa={second}")
    assert code == 2 and "--tasks: medqa is there twice" in error


def test_too_few_examples_and_seeds(refused, tmp_path):
    path = write(tmp_path / "q.jsonl", MEDQA)
    code, error = refused("base", "--tasks", f"medqa={path}", "--shots", "2")
    assert code == 3 and "2 examples asked, 0 there" in error
    code, error = refused("base", "--tasks", "facts", "--shots", "1", "--shot-seeds", "2")
    assert code == 2 and "--shot-seeds" in error


def test_a_template_that_does_not_fit_the_model(refused, models, tmp_path):
    code, error = refused("plain", "--tasks", "facts", "--template", "chat")
    assert code == 2 and "no chat template of its own" in error
    templates.save(templates.load("chat", models / "base"), tmp_path)  # the other tokenizer's, with its marks
    code, error = refused("plain", "--tasks", "facts", "--template", str(tmp_path / "template.json"))
    assert code == 2 and "does not fit this model: its tokenizer has no token '<|" in error
    (tmp_path / "template.json").write_text('{"name": "mine", "nonsense": 1}')
    code, error = refused("plain", "--tasks", "facts", "--template", str(tmp_path / "template.json"))
    assert code == 3 and "not a template" in error


def test_a_template_that_refuses_the_conversation(refused, models, tmp_path):
    """Found while the prompts are made, before the first item of any task is scored."""
    strict = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
    (tmp_path / "template.json").write_text(json.dumps({"name": "strict", "source": strict}))
    path = str(tmp_path / "template.json")
    code, error = refused("plain", "--tasks", "facts", "--shots", "1", "--template", path)
    assert code == 3 and "refuses this conversation" in error


def test_another_template_than_the_trained_one_is_said(models, tmp_path, capsys):
    stage = tmp_path / "stage"
    from llama_folders import write_adapter

    write_adapter(models / "plain", stage / "adapter")
    templates.save(templates.load("alpaca"), stage)
    options = ["--base", str(models / "plain"), "--tasks", "facts", "--limit", "2", "--no-generate", "--offline"]
    assert cli.invoke(["eval", str(stage / "adapter"), *options, "--template", "chatml"]) == 0
    assert "was trained with the template alpaca and is asked with chatml" in capsys.readouterr().err


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------

SLOWED = """
import sys, time
from qmedtune import cli
from qmedtune.evaluation import measure
real = measure._score
measure.PART = 8
def slowly(*arguments):
    time.sleep(0.4)
    return real(*arguments)
measure._score = slowly
sys.exit(cli.invoke(sys.argv[1:]))
"""


@pytest.mark.slow  # three processes that import torch: 25 s
def test_sigkill_leaves_no_result_and_the_same_command_goes_on(models, tmp_path):
    def command(out: str) -> list[str]:
        options = ["--tasks", "facts", "--limit", "40", "--template", "alpaca", "--offline", "--json"]
        return [sys.executable, "-c", SLOWED, "eval", str(models / "plain"), *options, "--out", str(tmp_path / out)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command("whole"), capture_output=True, text=True, check=True, env=environment)
    process = subprocess.Popen(command("cut"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (parts := list((tmp_path / "cut").rglob("model-facts/*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == b""
    assert parts and not (tmp_path / "cut" / "evaluation").exists()
    assert not list((tmp_path / "cut").rglob("evaluation.json"))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("model-facts/*.json")}
    assert 1 <= len(kept) < 5  # five parts of eight
    again = subprocess.run(command("cut"), capture_output=True, text=True, check=True, env=environment)
    assert json.loads(again.stdout)["tasks"] == json.loads(whole.stdout)["tasks"]
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "evaluation").glob("*.items.jsonl")}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "cut" / "evaluation").glob("*.items.jsonl")}
