"""The ledger of a source, the split, and what never reaches a log or an error."""

import json
import random
import time

import pytest
from builders import make_recipe

from qmedtune.data.hygiene.clean import clean
from qmedtune.data.prepare import prepare_source
from qmedtune.errors import DataError

SECRET = "Zebedee Quill"


def recipe(path, kind="literature", hygiene=None, evaluate=None, **source):
    source = {"path": str(path), "kind": kind, **source}
    stages = [{"cpt": {"mix": {"one": 1}}}]
    return make_recipe({"one": source, "two": source}, stages, hygiene=hygiene or {}, evaluate=evaluate or {})


def prepare(tmp_path, recipe, name="one", **inputs):
    out = tmp_path / f"out-{name}-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    return prepare_source(recipe, name, inputs, out).as_json(), out


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(folder, part="train"):
    return [json.loads(line).get("text") for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(60)) for _ in range(count)]


def test_identity_over_every_fate(tmp_path):
    own = sentences(300)
    question = "Does vitamin C given before anaesthesia shorten the stay of adults after hip surgery?"
    (tmp_path / "bench.json").write_text(
        json.dumps([{"question": question, "options": {"A": "yes"}, "answer_idx": "A"}])
    )
    rows = [{"text": t} for t in own]
    rows += [{"text": own[3]}, {"text": own[4].upper() + " "}]  # exact, but for case and space
    rows += [{"text": own[5] + " changed"}]  # near
    rows += [{"text": f"{own[6]} zz {question.upper()} {own[7]} yy"}]  # contaminated
    rows += [{"text": ""}, {"text": None}]  # rejected
    rows += [{"text": sentences(1, 9)[0], "retracted": "yes"}]  # refused
    path = jsonl(tmp_path / "a.jsonl", rows)
    tasks = {"tasks": [{"task": "medqa", "path": str(tmp_path / "bench.json")}]}
    facts, out = prepare(tmp_path, recipe(path, evaluate=tasks))
    assert facts["records"] == {
        "read": 307, "kept": 300, "rejected": 2, "duplicates": 3, "contaminated": 1, "refused": 1,
    }  # fmt: skip
    assert facts["near_duplicates"] == 1
    assert len(texts(out)) + len(texts(out, "heldout")) == 300
    assert len(texts(out, "heldout")) == facts["held_out"]
    assert facts["contamination"]["medqa"]["records"] == 1
    assert not (out / "work.jsonl").exists()
    assert not (out / "bands").exists()


def test_every_stage_can_be_off(tmp_path):
    own = sentences(50)
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*own, own[0], own[1] + " x"]])
    off = {"clean": False, "dedup": {"exact": False, "near": False}, "decontaminate": "off", "phi": "off"}
    facts, _ = prepare(tmp_path, recipe(path, hygiene=off))
    assert facts["records"]["kept"] == 52


def test_later_sources_lose_what_earlier_ones_have(tmp_path):
    own = sentences(40)
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in own])
    made = recipe(path, hygiene={"dedup": {"near": False}})
    _, first = prepare(tmp_path, made)
    jsonl(path, [{"text": t} for t in own[:15] + sentences(5, 1)])
    facts, _ = prepare(tmp_path, made, "two", one=first)
    assert facts["records"]["duplicates"] == 15


def test_split_is_stable_when_records_are_added(tmp_path):
    own = sentences(400)
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in own[:200]])
    _, small = prepare(tmp_path, recipe(path, holdout=0.2))
    jsonl(path, [{"text": t} for t in own])
    _, large = prepare(tmp_path, recipe(path, holdout=0.2))
    assert set(texts(small, "heldout")) < set(texts(large, "heldout"))
    assert set(texts(small)) < set(texts(large))
    assert len(texts(large, "heldout")) == pytest.approx(80, abs=25)


def test_patients_are_never_on_both_sides(tmp_path):
    rows = [{"text": t, "subject_id": i % 40} for i, t in enumerate(sentences(400))]
    _, out = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows), "clinical", split_by="patient", holdout=0.3))
    sides = [
        {json.loads(r)["patient"] for r in (out / f"{p}.jsonl").read_text().splitlines()} for p in ("train", "heldout")
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_small_source_still_holds_something_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(6)])
    facts, _ = prepare(tmp_path, recipe(path))
    assert facts["held_out"] == 1
    assert prepare(tmp_path, recipe(path, holdout=0.0))[0]["held_out"] == 0


def test_notes_without_patient_cannot_be_split_by_patient(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(6)])
    with pytest.raises(DataError, match="no patient id"):
        prepare(tmp_path, recipe(path, "clinical", split_by="patient"))


def test_too_much_damage_stops_without_quoting(tmp_path, capsys):
    rows = [{"text": t} for t in sentences(50)] + [{"text": None, "note": SECRET}, {"text": [SECRET, 1]}]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows), "clinical"))
    message = str(caught.value)
    assert "2 of 52 records are unusable" in message
    assert len(message.splitlines()) <= 6
    assert caught.value.exit_code == 3
    shown = capsys.readouterr()
    assert not any(word in message + shown.out + shown.err for word in SECRET.split())


def test_half_a_percent_of_damage_is_fine_at_one_percent(tmp_path):
    rows = [{"text": t} for t in sentences(199)] + [{"text": 1}]
    facts, out = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows)))
    assert facts["records"]["rejected"] == 1
    row = json.loads((out / "rejects.jsonl").read_text())
    assert row == {"source": "one", "file": str(tmp_path / "a.jsonl"), "line": 200, "reason": "text is not a string"}


def test_nothing_left_is_an_error(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "retracted": True}])
    with pytest.raises(DataError, match="no record is left of 1 read"):
        prepare(tmp_path, recipe(path))


def test_result_is_the_same_each_time(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in sentences(500)])
    one, two = (prepare(tmp_path, recipe(path))[0] for _ in range(2))
    assert one == two


def test_near_duplicates_of_earlier_sources_are_removed_too(tmp_path):
    own = sentences(60)
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in own])
    made = recipe(path)
    _, first = prepare(tmp_path, made)
    jsonl(path, [{"text": f"{t} edited"} for t in own[:25]] + [{"text": t} for t in sentences(9, 1)])
    facts, _ = prepare(tmp_path, made, "two", one=first)
    assert (facts["near_duplicates"], facts["near"]["of_earlier_sources"]) == (25, 25)
    assert facts["records"]["kept"] == 9 and len(facts["near"]["examples"]) == 3
    off = recipe(path, hygiene={"dedup": {"near": False}})
    assert prepare(tmp_path, off, "two", one=first)[0]["records"]["kept"] == 34


def test_ids_of_notes_are_no_examples(tmp_path):
    rows = [{"id": f"note {i}", "text": t} for i, t in enumerate([*sentences(9), sentences(1)[0] + " more"])]
    facts, _ = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows), "clinical"))
    assert facts["near_duplicates"] == 1 and facts["near"]["examples"] == []


def test_language_and_length_are_decisions_that_are_counted(tmp_path):
    english = "It was found that the patients who had been treated with this were not at risk of a stroke, as is known."
    german = "Es wurde auch gefunden, dass alle die Patienten mit dem Mittel nicht für einen Schlag anfällig sind; und "
    german += "das ist so."
    rows = [{"text": t} for t in (english, german, "Short.", "word " * 500)] + [{"text": t} for t in sentences(3)]
    hygiene = {"languages": ["en", "fr"], "min_characters": 20, "max_characters": 2000}
    facts, _ = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows), hygiene=hygiene))
    assert facts["records"]["refused"] == 3 and facts["records"]["kept"] == 4
    assert facts["reasons"] == {
        "language de is not among hygiene.languages": 1, "shorter than hygiene.min_characters": 1,
        "longer than hygiene.max_characters": 1,
    }  # fmt: skip


def test_cleaning_is_counted(tmp_path):
    rows = [{"text": sentences(1)[0]}, {"text": "two  blanks here and\u200b one mark"}]
    facts, _ = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows)))
    assert facts["cleaned"] == {"records": 1, "characters": 2}
    facts, _ = prepare(tmp_path, recipe(jsonl(tmp_path / "b.jsonl", rows[:1])))
    assert facts["cleaned"] == {"records": 0, "characters": 0}


def test_a_source_says_itself_what_happens_to_identifiers(tmp_path):
    said = {
        "instruction": "I am Mr. Quill, MRN: 4451822. What now?",
        "input": "Dr. Quill, 555-123-4567",
        "output": "Rest.",
    }
    path = jsonl(tmp_path / "a.jsonl", [{**said, "output": "Rest."}])
    facts, out = prepare(tmp_path, recipe(path, "instructions", holdout=0.0))
    assert facts["phi"] == {} and "Quill" in (out / "train.jsonl").read_text()
    facts, out = prepare(tmp_path, recipe(path, "instructions", holdout=0.0, phi="redact"))
    assert facts["phi"]["records"] == 1 and facts["phi"]["identifiers"] == 4
    assert not any(part in (out / "train.jsonl").read_text() for part in ("Quill", "4451822", "123-4567"))
    note = jsonl(tmp_path / "b.jsonl", [{"text": "Seen by Dr. Quill."}])
    facts, _ = prepare(tmp_path, recipe(note, "clinical", holdout=0.0, phi="off"))
    assert facts["phi"] == {}


def test_emrqa_notes_are_clinical_text_whatever_they_are_used_for(tmp_path):
    qas = [{"question": ["Who?"], "answers": [{"text": "rest"}]}]
    paragraph = {"note_id": "1", "context": ["Seen by Dr. Quill.", "Plan: rest."], "qas": qas}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"title": "medication", "paragraphs": [paragraph]}]}))
    made = recipe(path, "instructions", {"phi": "redact"}, format="emrqa", holdout=0.0)
    facts, out = prepare(tmp_path, made)
    assert facts["phi"]["classes"] == {"name": 1} and "Quill" not in (out / "train.jsonl").read_text()


@pytest.mark.parametrize("corpus", ["literature", "notes", "general", "instructions"])
def test_the_built_in_world_passes_whole(tmp_path, corpus):
    kind = {"notes": "clinical"}.get(corpus, corpus)
    made = recipe(f"builtin:{corpus}", kind, evaluate={"tasks": ["facts"]})
    facts, _ = prepare(tmp_path, made)
    assert facts["records"]["kept"] == facts["records"]["read"]
    assert facts["contamination"]["facts"]["found"] == []


# ---- clean -----------------------------------------------------------------------------------------------------------


def test_notes_keep_lines_blanks_and_marks():
    note = "HISTORY:\r\n  [**Name**] has  Hgb [12] \r\n\r\n\r\n\r\nPLAN: ___\x07\n"
    assert clean(note, "clinical") == "HISTORY:\n  [**Name**] has  Hgb [12]\n\nPLAN: ___"


@pytest.mark.parametrize("kind", ["literature", "clinical", "general", "instructions"])
def test_no_pattern_guesses_at_brackets(kind):
    text = "Stay was 12 [8-15] days, age 45 [38, 52]; F [1,306] = .56, as before [12, 14].\n[1] An item."
    assert clean(text + "\u200b", kind) == text


@pytest.mark.parametrize(
    "text", ["a" + " " * 40_000 + "b", "\n" * 40_000, " \n" * 20_000, "[1," * 13_000, " a" * 20_000]
)
@pytest.mark.parametrize("kind", ["clinical", "literature"])
def test_cleaning_takes_linear_time(kind, text):
    started = time.process_time()
    clean(text, kind)
    assert time.process_time() - started < 0.5


def test_questions_about_one_note_are_no_near_duplicates(tmp_path):
    note, other = sentences(2, seed=3)
    rows = [
        {"instruction": f"What is said of {n}?", "input": note * 3, "output": f"{n}."}
        for n in ("pain", "sleep", "gait")
    ]
    rows += [{"instruction": "What is said of pain?", "input": f"{note * 3} end", "output": "pain."}]
    rows += [{"instruction": "What is said of pain?", "input": other * 3, "output": "pain."}]
    facts, _ = prepare(tmp_path, recipe(jsonl(tmp_path / "a.jsonl", rows), "instructions"))
    assert facts["records"]["kept"] == 4 and facts["near_duplicates"] == 1


def test_sources_are_read_before_a_built_in_base_is_made(tmp_path, monkeypatch):
    from qmedtune.run import run

    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.csv").write_text("id,id\n1,2\n")
    made = recipe(tmp_path / "a.csv")
    with pytest.raises(DataError, match="names a column twice"):
        run(made, "", tmp_path / "run", until="data", offline=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_unicode_is_composed():
    assert clean("cafe\u0301", "general") == "caf\u00e9"
