"""Answers for files of records: order, damage, resuming after a kill, and the conversation of `chat`."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from llama_folders import llama3_folder, write_adapter

from qmedtune import chat, predict, store
from qmedtune.data.packing import templates
from qmedtune.data.packing.framing import codec_of, frame_of
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation import generation, scoring
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.shorten import fitted

QUESTIONS = ["What does lisinopril treat?", "Which adverse effects has metformin?", "Is aspirin safe?\nSecond line."]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("predict")
    base = llama3_folder(root / "base", max_position_embeddings=512)
    write_adapter(base, root / "stage" / "adapter", seed=1, size=0.5)
    templates.save(templates.load("alpaca"), root / "stage")
    return root


@pytest.fixture(scope="module")
def opened(stage) -> OpenModel:
    return open_model(locate(str(stage / "stage" / "adapter"), base=str(stage / "base"), offline=True))


def ask(stage: Path, data: Path, out: Path, **options) -> dict:
    options = {"base": str(stage / "base"), "max_new_tokens": 8, "offline": True, **options}
    return predict.predict(str(stage / "stage" / "adapter"), data, out, **options).as_json()


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(opened: OpenModel, messages: list[dict]) -> str:
    prompts = scoring.prompt_texts(opened.tokenizer, opened.template, [messages])
    return generation.generate(opened.model, opened.tokenizer, prompts, 8, stop=opened.template.stop)[0].text


def test_answers_come_in_the_order_of_the_file(stage, opened, tmp_path):
    data = jsonl(tmp_path / "q.jsonl", [{"id": f"q{i}", "question": q} for i, q in enumerate(QUESTIONS)])
    facts = ask(stage, data, tmp_path / "a.jsonl")
    answers = rows(tmp_path / "a.jsonl")
    assert [row["id"] for row in answers] == ["q0", "q1", "q2"]
    assert [row["answer"] for row in answers] == [expected(opened, [{"role": "user", "content": q}]) for q in QUESTIONS]
    assert (facts["records"], facts["answered"], facts["damaged"]) == (3, 3, 0)
    assert facts["template"] == "alpaca" and not list(tmp_path.glob("*.part"))


def test_csv_in_and_out_with_an_instruction(stage, opened, tmp_path):
    data = tmp_path / "notes.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "note"], *((i, q) for i, q in enumerate(QUESTIONS))])
    ask(stage, data, tmp_path / "a.csv", column="note", instruction="Summarise this note.")
    with (tmp_path / "a.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    first = [{"role": "user", "content": "Summarise this note.", "input": QUESTIONS[0]}]
    assert [row["id"] for row in answers] == ["0", "1", "2"]
    assert answers[0]["answer"] == expected(opened, first)


def test_conversations_are_continued_behind_their_last_user_message(stage, opened, tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "the reference answer"},
    ]
    ask(stage, jsonl(tmp_path / "q.jsonl", [{"messages": messages}]), tmp_path / "a.jsonl")
    assert rows(tmp_path / "a.jsonl")[0]["answer"] == expected(opened, messages[:2])


def test_files_for_an_outside_judge_are_read_as_published(stage, opened, tmp_path):
    """HealthBench's: the conversation is under `prompt`, and the rubrics are found by `prompt_id`."""
    turns = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Why?"}]
    turns.append({"role": "user", "content": QUESTIONS[1]})
    rubric = {"criterion": "Names lactic acidosis.", "points": 5, "tags": ["axis:accuracy"]}
    shared = {"canary": "healthbench", "rubrics": [rubric], "example_tags": ["theme:hedging"]}
    records = [
        {**shared, "prompt": turns[:1], "prompt_id": "4a5f", "ideal_completions_data": None},
        {**shared, "prompt": turns, "prompt_id": "7c21", "ideal_completions_data": {"ideal_completion": "..."}},
        {**shared, "prompt": turns[1:2], "prompt_id": "9e00"},
    ]
    facts = ask(stage, jsonl(tmp_path / "healthbench.jsonl", records), tmp_path / "a.jsonl")
    answers = rows(tmp_path / "a.jsonl")
    assert [row["id"] for row in answers] == ["4a5f", "7c21", "9e00"] and facts["damaged"] == 1
    assert [row["answer"] for row in answers[:2]] == [expected(opened, turns[:1]), expected(opened, turns)]
    assert answers[2]["error"] == "no user message"


def test_damaged_records_keep_their_row(stage, tmp_path):
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "Is it?"}\n{"question": \n{"question": null}\n{"question": "Why?"}\n')
    facts = ask(stage, data, tmp_path / "a.jsonl")
    answers = rows(tmp_path / "a.jsonl")
    assert [row["answer"] is None for row in answers] == [False, True, True, False]
    assert [row.get("error") for row in answers[1:3]] == ["broken JSON", "question is null"]
    assert (facts["records"], facts["damaged"]) == (4, 2)


def test_killed_prediction_continues_behind_the_last_whole_line(stage, tmp_path, monkeypatch):
    records = [{"question": f"{q} {i}"} for i in range(4) for q in QUESTIONS]
    data = jsonl(tmp_path / "q.jsonl", records)
    ask(stage, data, tmp_path / "whole.jsonl")
    monkeypatch.setattr(predict, "WINDOW", 3)
    real, asked = predict._answers, []

    def dies(opened, window, *rest):
        asked.append(len(window))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(opened, window, *rest)

    monkeypatch.setattr(predict, "_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(stage, data, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    part = tmp_path / "a.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"id": "line-7", "ans')  # a line that the kill cut
    with pytest.raises(RecipeError, match="another model, file or option"):
        ask(stage, data, tmp_path / "a.jsonl", max_new_tokens=9)
    ask(stage, data, tmp_path / "a.jsonl")
    assert asked == [3, 3, 3, 3, 3]  # two windows before the kill, the one that died, the two that were left
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"note": "secret words"}, {}, "which column holds the question"),
        ({"secret words of a patient": 1}, {}, "none with a name"),
        ({"note": "secret words"}, {"column": "nota"}, "no column 'nota'"),
    ],
)
def test_questions_that_cannot_be_found_are_an_error_without_text(stage, tmp_path, record, options, message):
    with pytest.raises(RecipeError, match=message) as error:
        ask(stage, jsonl(tmp_path / "q.jsonl", [record]), tmp_path / "a.jsonl", **options)
    assert "secret" not in str(error.value)


def test_nothing_of_the_text_reaches_the_terminal(stage, tmp_path, capfd):
    data = jsonl(tmp_path / "q.jsonl", [{"question": "Zebrafish Smith, born 1950"}])
    ask(stage, data, tmp_path / "a.jsonl")
    captured = capfd.readouterr()
    assert "Zebrafish" not in captured.out + captured.err
    answer = rows(tmp_path / "a.jsonl")[0]["answer"]
    assert answer and answer not in captured.out + captured.err


def test_an_existing_answer_file_is_not_overwritten(stage, tmp_path):
    data = jsonl(tmp_path / "q.jsonl", [{"question": "Is it?"}])
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        ask(stage, data, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_the_same_prediction_again_has_nothing_to_do(stage, tmp_path, monkeypatch, capfd):
    data, out = seven(tmp_path), tmp_path / "a.csv"
    facts = ask(stage, data, out)
    written = out.read_bytes()
    monkeypatch.setattr(predict, "open_model", lambda *arguments: pytest.fail("a model was loaded"))
    assert ask(stage, data, out) == facts and out.read_bytes() == written
    assert "nothing is left to do" in capfd.readouterr().err
    with pytest.raises(RecipeError, match="not as this command makes it"):
        ask(stage, data, out, max_new_tokens=4)
    out.write_bytes(written + b"edited\n")
    with pytest.raises(RecipeError, match="not as this command makes it"):
        ask(stage, data, out)


@pytest.mark.parametrize(
    ("name", "says"), [("answers.xlsx", "not written as .xlsx"), ("nowhere/a.csv", "mkdir -p .*nowhere")]
)
def test_names_that_cannot_be_written_are_refused_before_anything_is_read(stage, tmp_path, name, says):
    with pytest.raises(RecipeError, match=says):
        ask(stage, seven(tmp_path), tmp_path / name)


LONG = "START " + "word " * 3000 + "END"


def test_of_a_record_that_is_too_long_the_middle_goes_and_the_instruction_stays(stage, tmp_path):
    data = jsonl(tmp_path / "q.jsonl", [{"id": "a", "note": LONG}, {"id": "b", "note": "short"}])
    asked = predict.QuestionFile(data, "note", "Summarise this note.")
    where = {"base": str(stage / "base"), "offline": True}
    cut, whole = predict.dry_run(str(stage / "stage" / "adapter"), asked, max_new_tokens=8, **where).records
    tokenizer = open_model(locate(str(stage / "stage" / "adapter"), base=str(stage / "base"), offline=True)).tokenizer
    text, short = tokenizer.decode(cut.ids), tokenizer.decode(whole.ids)
    assert cut.truncated and not whole.truncated
    before, after = short.split("short")
    assert text.startswith(before + "START") and text.endswith("END" + after) and "[...]" in text
    assert 0.9 * 504 <= len(cut.ids) <= 504
    facts = ask(stage, data, tmp_path / "a.jsonl", column="note", instruction="Summarise this note.")
    assert facts["truncated"] == 1 and facts["answered"] == 2


def test_a_record_without_room_for_its_question_keeps_its_row(stage, tmp_path):
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "Why?"}]
    data = jsonl(tmp_path / "q.jsonl", [{"id": "a", "messages": messages}, {"id": "b", "messages": messages[1:]}])
    facts = ask(stage, data, tmp_path / "a.jsonl")
    first, second = rows(tmp_path / "a.jsonl")
    assert first["answer"] is None and "leave no room" in first["error"]
    assert second["answer"] is not None and facts["answered"] == 1


# ---- chat ------------------------------------------------------------------------------------------------------------


def interrupted(stage, data, out, monkeypatch) -> Path:
    """A prediction that died in its second window: 3 of 7 rows are in the .part file."""
    real, calls = predict._answers, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(predict, "WINDOW", 3)
    monkeypatch.setattr(predict, "_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(stage, data, out)
    monkeypatch.setattr(predict, "_answers", real)
    return out.with_name(out.name + ".part")


def seven(tmp_path) -> Path:
    return jsonl(tmp_path / "q.jsonl", [{"id": f"q{i}", "question": f"What is {i}?"} for i in range(7)])


def test_a_second_prediction_into_the_same_file_leaves(stage, tmp_path, monkeypatch):
    data, out = seven(tmp_path), tmp_path / "a.jsonl"
    real, seen = predict._answers, []

    def meanwhile(*arguments):
        with pytest.raises(RunError, match="another process is writing"):
            predict.predict(str(stage / "stage" / "adapter"), data, out, base=str(stage / "base"), offline=True)
        seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(predict, "_answers", meanwhile)
    assert ask(stage, data, out)["records"] == 7 and seen
    assert [row["id"] for row in rows(out)] == [f"q{i}" for i in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.seal", "q.jsonl"]
    assert out.stat().st_mode & 0o077 == 0


def test_a_process_that_waited_for_nothing_does_not_write_again(stage, tmp_path):
    """It opened the .part file before the first one published and removed it."""
    out = tmp_path / "a.jsonl"
    with store.lock_file(tmp_path / "a.jsonl.part", "wait"):
        out.write_text("answers")
    with pytest.raises(RecipeError, match="is there already"):
        ask(stage, seven(tmp_path), out)


@pytest.mark.parametrize(
    ("line", "replaced", "says"),
    [
        (2, b'{"id": "q1", "answ\n', ":3: damaged"),
        (2, b"[1]\n", ":3: damaged"),
        (2, b"\0\0\0\n", ":3: damaged"),
        (0, b"not json\n", ":1: damaged"),
        (0, b"[]\n", ":1: damaged"),
        (2, b'{"id": "another", "answer": "x"}\n', "row 2 is not of the record"),
        (2, b"", "row 2 is not of the record"),
    ],
)
def test_damage_of_the_part_file_is_named(line, replaced, says, stage, tmp_path, monkeypatch):
    data, out = seven(tmp_path), tmp_path / "a.jsonl"
    part = interrupted(stage, data, out, monkeypatch)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:line], replaced, *lines[line + 1 :]]))
    with pytest.raises(RunError) as caught:
        ask(stage, data, out)
    assert says in str(caught.value) and str(part) in str(caught.value)
    assert part.exists() and not out.exists()


def test_another_version_does_not_go_on(stage, tmp_path, monkeypatch):
    data, out = seven(tmp_path), tmp_path / "a.jsonl"
    interrupted(stage, data, out, monkeypatch)
    monkeypatch.setattr(predict, "code_versions", lambda: {"transformers": "another"})
    with pytest.raises(RecipeError, match="another version"):
        ask(stage, data, out)


def test_chat_answers_as_the_evaluation_does_and_remembers(opened):
    out = io.StringIO()
    first, second = [{"role": "user", "content": QUESTIONS[0]}], {"role": "user", "content": QUESTIONS[1]}
    chat.converse(opened, iter([QUESTIONS[0], QUESTIONS[1], "/reset", "", QUESTIONS[1], "/quit", "not read"]), out, 8)
    said = expected(opened, first)
    remembered = expected(opened, [*first, {"role": "assistant", "content": said}, second])
    assert out.getvalue() == f"{said}\n{remembered}\n{expected(opened, [second])}\n"
    assert remembered != expected(opened, [second])


def test_system_message_opens_every_conversation(opened):
    out = io.StringIO()
    system = {"role": "system", "content": "Be brief."}
    chat.converse(opened, iter([QUESTIONS[0], "/reset", QUESTIONS[0]]), out, 8, system=system["content"])
    said = expected(opened, [system, {"role": "user", "content": QUESTIONS[0]}])
    assert out.getvalue() == f"{said}\n{said}\n"


def test_long_conversations_forget_their_beginning(opened, capfd):
    out = io.StringIO()
    chat.converse(opened, iter([f"{number} " + "why? " * 30 for number in range(8)]), out, 8)
    assert len(out.getvalue()) > 8
    assert "no longer fits" in capfd.readouterr().err


def test_of_a_message_that_is_too_long_the_middle_goes_and_is_told(opened, capfd):
    frame = frame_of(opened.template, codec_of(opened.tokenizer))
    system = {"role": "system", "content": "Be brief."}
    found = fitted(frame, [system, {"role": "user", "content": LONG}], 504)
    assert found.messages[0] == system and found.asked.text.count("Be brief.") == 1
    text = found.messages[-1]["content"]
    assert text.startswith("START word") and text.endswith("word END") and " [...] " in text
    [whole] = frame.ask([[system, {"role": "user", "content": LONG}]])
    assert found.left_out == len(whole.ids) - len(found.asked.ids) and 0.9 * 504 <= len(found.asked.ids) <= 504
    out = io.StringIO()
    chat.converse(opened, iter([LONG]), out, 8, system="Be brief.")
    said = capfd.readouterr().err.replace("\n", " ")
    assert f"takes 504 tokens, and {found.left_out:,} of its middle" in said and "START" not in said


def test_a_system_message_without_room_for_a_question_is_an_error(opened):
    frame = frame_of(opened.template, codec_of(opened.tokenizer))
    with pytest.raises(RecipeError, match="leave no room for a question in 504 tokens"):
        fitted(frame, [{"role": "system", "content": LONG}, {"role": "user", "content": "Why?"}], 504)


def test_piped_input_is_read_line_by_line(stage, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n/quit\n"))
    chat.chat(str(stage / "stage" / "adapter"), base=str(stage / "base"), max_new_tokens=8, offline=True)
    assert capsys.readouterr().out.strip()
