"""Through the command line: what `predict --dry-run` would ask begins what `data show` says was trained on."""

import json

from conftest import MICRO
from transformers import AutoTokenizer

from qmedtune import cli


def told(capsys, *arguments):
    capsys.readouterr()
    assert cli.invoke([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_would_be_asked_begins_what_is_trained_on(micro_run, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.invoke(["data", str(MICRO), "--out", str(run), "--offline"]) == 0
    shown = told(capsys, "data", "show", MICRO, "--out", run, "--stage", "02-sft", "--count", 3)
    trained = [document for row in shown["rows"] for document in row["documents"]]
    assert len(trained) >= 3
    for document in trained:
        assert document["source"] == "instructions" and document["from"] == 0
        assert len(document["ids"]) == len(document["supervised"])
        assert set(document["supervised"]) == {0, 1}

    lines = (run / "data" / "instructions" / "train.jsonl").read_text().splitlines()
    records = {record["id"]: record["messages"][:-1] for record in map(json.loads, lines)}
    questions = tmp_path / "questions.jsonl"
    asked_of = [{"messages": records[document["id"]]} for document in trained]
    questions.write_text("".join(json.dumps(record) + "\n" for record in asked_of))
    asked = told(capsys, "predict", micro_run.base, "--data", questions, "--dry-run", "--template", "alpaca")
    for document, record in zip(trained, asked["records"], strict=True):
        first_answered = document["supervised"].index(1)
        assert record["ids"] == document["ids"][:first_answered]
        assert document["ids"][-1] in record["end"]


def test_plan_and_data_show_say_how_documents_are_bordered(micro_run, capsys):
    """The same marks and the same reason before and after packing, as text for people and as JSON."""
    shown = told(capsys, "data", "show", MICRO, "--out", micro_run.folder, "--stage", "01-cpt", "--count", 1)
    planned = told(capsys, "plan", MICRO)
    assert planned["borders"] == shown["borders"]
    start, end, why = (shown["borders"][key] for key in ("start", "end", "why"))
    [first, *_] = shown["rows"][0]["documents"]
    tokens = AutoTokenizer.from_pretrained(micro_run.base).convert_ids_to_tokens([first["ids"][0], first["ids"][-1]])
    assert tokens == [start, end] and f"eos {end} closes them" in why
    assert cli.invoke(["data", "show", str(MICRO), "--out", str(micro_run.folder), "--stage", "01-cpt"]) == 0
    assert f"documents: {why}" in capsys.readouterr().out
    assert cli.invoke(["plan", str(MICRO)]) == 0
    assert f"documents: {why}" in " ".join(capsys.readouterr().out.split())
