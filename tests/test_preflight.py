"""Faulty bases, templates and data sets are refused by `plan` and by `run` before anything is trained: in at most six
lines, with what to do, and without any text of a record. Through the real command line, on real folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from llama_folders import LLAMA3_CHAT, llama3_folder

from qmedtune import cli, preflight
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.run import run, steps_of
from qmedtune.store import HashCache

WAY_ON = re.compile(r"\b(allowed|give|name|use|mend|fetch|merge|set|save|raise|convert)\b")
SECRET = "zolpidemXY"  # stands in every record; no message may hold it
RECIPE = """\
name: mine
model: {base: base}
adapter: {r: 4, alpha: 8}
data:
  notes: {path: notes.jsonl, kind: clinical}
  questions: {path: questions.jsonl, kind: instructions}
stages:
  - cpt: {mix: {notes: 1}, tokens: 2000, seq_len: 64, batch: 4}
  - sft: {data: questions, epochs: 1, seq_len: 256, batch: 4}
merge: {base: full16}
evaluate:
  tasks: [{task: choice, path: exam.jsonl}]
  generate: false
"""


def questions(count: int = 40, **more: object) -> list[dict]:
    return [
        {"id": str(n), "instruction": f"What is {SECRET} {n} for?", "output": f"It treats condition {n}.", **more}
        for n in range(count)
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def exam(answer: str = "A") -> list[dict]:
    return [{"question": f"Which {n}?", "options": ["one", "two"], "answer": answer} for n in range(4)]


def edit_json(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**fields, **changes}.items() if v is not None}))


def template(text: str) -> Callable[[Path], None]:
    return lambda place: edit_json(place / "base" / "tokenizer_config.json", chat_template=text)


def rows(name: str, made: Callable[[], list[dict]]) -> Callable[[Path], None]:
    return lambda place: write_lines(place / name, made())


# ---- faults ----------------------------------------------------------------------------------------------------------


def no_tokenizer(place: Path) -> None:
    (place / "base" / "tokenizer.json").unlink()


def no_end_token(place: Path) -> None:
    tokenizer = place / "base" / "tokenizer.json"
    edit_json(place / "base" / "tokenizer_config.json", eos_token=None)
    tokenizer.write_text(tokenizer.read_text().replace("<|end_of_text|>", "<|other|>"))


def another_shape(place: Path) -> None:
    edit_json(place / "base" / "config.json", vocab_size=200)


def another_tokenizer(place: Path) -> None:
    """Its last token has no row of the embeddings."""
    path = place / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = tokenizer["added_tokens"][0]
    for number in range(2000):
        tokenizer["added_tokens"].append({**first, "id": 3000 + number, "content": f"<|more {number}|>"})
    path.write_text(json.dumps(tokenizer))


def pickled(place: Path) -> None:
    for path in (place / "base").glob("*.safetensors*"):
        path.unlink()
    (place / "base" / "pytorch_model.bin").write_bytes(b"")


def truncated(place: Path) -> None:
    shard = sorted((place / "base").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(place: Path) -> None:
    sorted((place / "base").glob("*.safetensors"))[1].unlink()


def an_adapter(place: Path) -> None:
    (place / "base" / "adapter_config.json").write_text("{}")


def remote_code(place: Path) -> None:
    edit_json(place / "base" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def not_a_llama(place: Path) -> None:
    edit_json(place / "base" / "config.json", model_type="mistral")


def damaged_lines(place: Path) -> None:
    with (place / "notes.jsonl").open("a") as file:
        file.write(f'{{"text": "{SECRET}\n' * 20)


@dataclass(frozen=True)
class Fault:
    name: str
    do: Callable[[Path], None]
    says: str
    recipe: tuple[str, str] = ("", "")
    code: int = 2


LONG = {"output": f"{SECRET} was given for the condition and helped. " * 60}


def talks(*roles: str) -> list[dict]:
    records = []
    for number in range(40):
        messages = [{"role": role, "content": f"{SECRET} {number} {role}"} for role in roles]
        records.append({"messages": messages})
    return records


def refuses_system(place: Path) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template(refusal + LLAMA3_CHAT)(place)
    write_lines(place / "questions.jsonl", talks("system", "user", "assistant"))


def rewrites_turns(place: Path) -> None:
    template("{{ bos_token }}{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")(place)
    write_lines(place / "questions.jsonl", talks("user", "assistant", "user", "assistant"))


NO_ANSWERS = [{"instruction": SECRET}] * 40
FAULTS = [
    Fault("no tokenizer.json", no_tokenizer, "tokenizer.json", code=3),
    Fault("no end token", no_end_token, "eos", code=3),
    Fault("weights of another shape", another_shape, "config.json asks for"),
    Fault("the tokenizer of another model", another_tokenizer, "embeddings", code=3),
    Fault("pickled weights", pickled, "pickled"),
    Fault("a truncated shard", truncated, "damaged safetensors"),
    Fault("a missing shard", missing_shard, "missing"),
    Fault("an adapter as base", an_adapter, "adapter"),
    Fault("remote code", remote_code, "auto_map"),
    Fault("another architecture", not_a_llama, "mistral"),
    Fault("a template that is no Jinja", template("{% for m in messages %}{{ m.content }}"), "template"),
    Fault("a template with an unknown filter", template("{{ messages[0].content | nosuch }}"), "template"),
    Fault("a template that reads what is not there", template("{{ messages[0].name.first }}"), "template"),
    Fault("a template of another model", template(LLAMA3_CHAT.replace("eot_id", "im_end")), "<|im_end|>"),
    Fault("a template that refuses system messages", refuses_system, "refuses this conversation", code=3),
    Fault("a template that rewrites earlier turns", rewrites_turns, "rewrites earlier turns", code=3),
    Fault("records beyond seq_len", rows("questions.jsonl", lambda: questions(**LONG)), "seq_len 256", code=3),
    Fault("other columns", rows("notes.jsonl", lambda: [{"prose": SECRET}] * 40), "columns", code=3),
    Fault("damaged lines", damaged_lines, "max_bad_fraction", code=3),
    Fault("questions without answers", rows("questions.jsonl", lambda: NO_ANSWERS), "records", code=3),
    Fault("an exam without options", rows("exam.jsonl", lambda: [{"question": "Which?"}]), "exam.jsonl:1", code=3),
    Fault("an exam with a foreign answer", rows("exam.jsonl", lambda: exam("Q")), "exam.jsonl:1", code=3),
    Fault("fp16 on a CPU", lambda place: None, "float16", ("base: base", "base: base, compute_dtype: float16")),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, data and a base with nothing wrong."""
    place = tmp_path_factory.mktemp("sound")
    llama3_folder(place / "base")
    write_lines(
        place / "notes.jsonl", [{"text": f"Note {n}: the patient took {SECRET} for two weeks."} for n in range(80)]
    )
    write_lines(place / "questions.jsonl", questions())
    write_lines(place / "exam.jsonl", exam())
    (place / "mine.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(sound, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    return tmp_path / "here"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_fault_is_refused_before_training(command: str, fault: Fault, place: Path, monkeypatch, capsys):
    monkeypatch.setattr("qmedtune.train.train_stage", lambda *_, **__: pytest.fail("it was trained"))
    fault.do(place)
    (place / "mine.yaml").write_text(RECIPE.replace(*fault.recipe) if fault.recipe[0] else RECIPE)
    code = cli.invoke([command, "mine.yaml", *(["--offline"] if command == "run" else [])])
    out, err = capsys.readouterr()
    refusal = err[err.rindex("error:") :] if "error:" in err else err
    assert code == fault.code, err
    assert len(refusal.splitlines()) <= 6 and fault.says in refusal and WAY_ON.search(refusal), err
    assert SECRET not in out + err and "Traceback" not in err
    assert not (place / "runs/mine/01-cpt").exists()


def test_there_are_fifteen_and_more():
    assert len({fault.name for fault in FAULTS}) >= 15


def test_nothing_wrong_is_refused(place: Path):
    """The same recipe without a fault is planned, and runs to its end."""
    loaded = load_recipe(place / "mine.yaml")
    plan = make_plan(loaded.recipe)
    assert all(source["sampled"] for source in plan["data"])
    result = run(loaded.recipe, loaded.text, place / "out", offline=True)
    assert result.finished


def test_all_data_comes_before_the_first_training_step(place: Path):
    settings = ["stages[1].sft.adapter=merge_then_new", "adapter.train_embeddings=false"]
    recipe = load_recipe(place / "mine.yaml", settings).recipe
    found = [step.kind for step in steps_of(recipe, recipe, HashCache(Path("unwritten")))]
    assert found == ["data"] * 4 + ["cpt", "fold", "sft", "merge", "evaluation"]


def test_shapes_are_told_apart():
    def talk(*roles: str, given: str = "") -> list[dict[str, str]]:
        return [{"role": role, "content": "x", **({"input": given} if given else {})} for role in roles]

    one, two = talk("user", "assistant"), talk("user", "assistant", given="y")
    system, long = talk("system", "user", "assistant"), talk(*("user", "assistant") * 9)
    assert preflight.shapes([one, one, two, system, long, talk(*("user", "assistant") * 8)]) == [one, two, system, long]


@pytest.mark.parametrize(
    ("found", "of", "allowed", "whole", "expected"),
    [
        (3, 50, 0.05, True, True),
        (3, 50, 0.05, False, False),
        (40, 50, 0.05, False, True),
        (2, 200, 0.005, False, False),
    ],
)
def test_a_sample_is_judged_only_where_it_is_sure(found: int, of: int, allowed: float, whole: bool, expected: bool):
    assert preflight.surely_above(found, of, allowed, whole=whole) is expected
