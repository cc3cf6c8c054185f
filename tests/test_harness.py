"""Our choice scores against lm-evaluation-harness's own, item by item (needs the extra `lm-eval`)."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from llama_folders import llama2_folder, llama3_folder

from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation.measure import ModelToMeasure, Settings, measure
from qmedtune.evaluation.open_model import locate, open_model
from qmedtune.evaluation.scoring import choice_logprobs, prompt_texts
from qmedtune.recipe import TaskSection
from qmedtune.tasks import load_task

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow
REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))

from qmedtune.evaluation import harness  # noqa: E402


def pubmedqa_file(folder: Path) -> Path:
    """The real file where it is there, else records of the same shape."""
    real = REAL / "eval" / "pubmedqa_train.json"
    if real.is_file():
        return real
    texts = [f"Arm {i} had {i * 7 % 11} events among {40 + i} patients." for i in range(40)]
    records = {
        str(1000 + i): {
            "QUESTION": f"Does treatment {i} lower the rate of events?",
            "CONTEXTS": [text, texts[-i - 1]],
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i, text in enumerate(texts)
    }
    path = folder / "pubmedqa.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def medqa_file(folder: Path, num_options: int) -> Path:
    letters = "ABCDE"[:num_options]
    path = folder / f"medqa{num_options}.jsonl"
    lines = []
    for n in range(30):
        question = f"A patient of {20 + n} years has sign {n * 3 % 7}. Which drug?"
        options = {letter: f"drug {letter.lower()}{n * (i + 2) % 13}" for i, letter in enumerate(letters)}
        lines.append({"question": question, "options": options, "answer_idx": letters[n % num_options]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def benchmark(name: str, folder: Path) -> TaskSection:
    path = pubmedqa_file(folder) if name == "pubmedqa" else medqa_file(folder, int(name[-1]))
    return TaskSection(task=name.rstrip("45"), path=str(path), limit=15)


@pytest.mark.parametrize("name", ["pubmedqa", "medqa4", "medqa5"])
@pytest.mark.parametrize(("make", "template"), [(llama3_folder, "question_answer"), (llama2_folder, "alpaca")])
@pytest.mark.parametrize("boundary", ["segment", "joint"])
def test_choices_equal_the_harness_item_by_item(make, template, name, boundary, tmp_path, no_network):
    """segment is what `qmedtune eval` and `qmedtune eval --harness task=FILE` score, joint the harness's own way."""
    torch.set_num_threads(2)
    opened = open_model(locate(str(make(tmp_path / "model", max_position_embeddings=2048)), template=template))
    opened.model.float()
    task = load_task(benchmark(name, tmp_path), seed=1)
    (tmp_path / "tasks").mkdir()
    written = harness.write_harness_task(tmp_path / "tasks", task, opened)
    found = harness.run_harness(opened, [written], tmp_path / "tasks", limit=None, batch=8, seed=1, boundary=boundary)
    samples = sorted(found["samples"][written], key=lambda sample: sample["doc_id"])
    prompts = prompt_texts(opened.tokenizer, opened.template, [item.messages for item in task.items])
    options = [item.options for item in task.items]
    scores = choice_logprobs(opened.model, opened.tokenizer, prompts, options, boundary=boundary)
    assert len(samples) == len(task.items) == 15
    correct = 0
    for sample, item, score in zip(samples, task.items, scores, strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert score.sums == pytest.approx(theirs, abs=1e-3)
        ours = float(score.sums.index(max(score.sums)) == item.gold)
        normalised = float(score.per_character.index(max(score.per_character)) == item.gold)
        assert (sample["acc"], sample["acc_norm"]) == (ours, normalised)
        correct += int(ours)
    assert found["results"][written]["acc,none"] == pytest.approx(correct / 15)
    if boundary == "segment":
        settings = Settings(opened.template, False, 8192)
        rows = measure(ModelToMeasure(opened.model, opened.tokenizer, "model", settings, tmp_path), task)
        assert [row["correct"] for row in rows] == [bool(sample["acc"]) for sample in samples]


def test_a_model_and_a_file_through_the_bridge(tmp_path, no_network):
    folder = llama3_folder(tmp_path / "model", max_position_embeddings=2048)
    path = pubmedqa_file(tmp_path)
    result = harness.evaluate_with_harness(
        str(folder), [f"pubmedqa={path}", "facts"], limit=5, template="alpaca", offline=True
    )
    assert set(result.tasks) == {"pubmedqa", "facts"}
    for scores in result.tasks.values():
        assert 0 <= scores["acc"] <= 1 and scores["acc_stderr"] >= 0


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


def test_a_task_of_the_harness_on_a_local_file(tmp_path, no_network):
    """medqa_4options as the harness ships it: its prompt, its fields, no data set to fetch."""
    folder = llama3_folder(tmp_path / "model", max_position_embeddings=1024)
    endings = {f"ending{i}": f"drug {i}" for i in range(4)}
    rows = [{"sent1": f"Which drug {n}?", **endings, "label": n % 4} for n in range(8)]
    path = tmp_path / "medqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = harness.evaluate_with_harness(
        str(folder), [f"medqa_4options={path}", "facts"], limit=6, template="alpaca", offline=True
    )
    assert set(result.tasks) == {"medqa_4options", "facts"}
    assert 0 <= result.tasks["medqa_4options"]["acc"] <= 1
    broken = {
        "sent1": ([without(row, "sent1") for row in rows], "cannot make its questions"),
        "ending2": ([rows[0], without(rows[1], "ending2")], "jsonl:2: only some .* `ending2`"),
        "label": ([{**row, "label": 7} for row in rows], "cannot make its questions"),
        "empty": ([], "no record"),
    }
    for name, (lines, message) in broken.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=message):
            harness.evaluate_with_harness(str(folder), [f"medqa_4options={path}"], template="alpaca", offline=True)
    for task, error in (("medqa_4options=absent.jsonl", "no such file"), ("medka_4options", "has no task")):
        with pytest.raises((DataError, RecipeError), match=error):
            harness.evaluate_with_harness(str(folder), [task], template="alpaca", offline=True)


def test_data_that_is_not_here_is_told_with_the_way_on(tmp_path, no_network):
    base = llama2_folder(tmp_path / "base", max_position_embeddings=512)
    with pytest.raises(DataError) as told:
        harness.evaluate_with_harness(str(base), ["winogrande"], limit=2, offline=True)
    lines = str(told.value).splitlines()
    assert "--harness winogrande: its data is not on this machine" in lines[0]
    assert lines[-1].endswith("--harness winogrande=FILE") and len(lines) == 3
