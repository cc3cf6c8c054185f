"""JSON files element by element: damage costs itself, an unread rest is told, memory stays bounded."""

import gzip
import json
import random
import tracemalloc

import pytest

from qmedtune.data.prepare import prepare_source
from qmedtune.data.reading import json_stream, row_formats
from qmedtune.data.reading.rejects import Damaged, Unread
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(row_formats.read_json(path))


def texts(found):
    return [fields.get("text") for _, fields in found if isinstance(fields, dict)]


def reasons(found):
    return [fields.reason for _, fields in found if isinstance(fields, Damaged)]


def notes(count):
    return [{"text": f"owl {i}", "found": [{"text": f"inner {i}"}, {"text": "inner, }{ ]["}]} for i in range(count)]


DAMAGE = {
    "nan": ('"owl 5"', "NaN"),
    "bare word": ('"owl 5"', "owl 5"),
    "single quotes": ('"owl 5"', "'owl 5'"),
    "no colon": ('"text": "owl 5"', '"text" "owl 5"'),
    "comma before the brace": ('"owl 5"', '"owl 5",,'),
    "twice": ('"text": "owl 5"', '"text": "owl 5", "text": "owl 5"'),
    "raw newline": ("owl 5", "owl\n5"),
    "bad escape": ("owl 5", "owl \\q 5"),
    "not utf-8": ("owl 5", "owl \udcff 5"),
}


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_element_costs_itself_and_nothing_in_it_becomes_a_record(tmp_path, damage, indent):
    old, new = DAMAGE[damage]
    text = json.dumps(notes(40), indent=indent)
    assert text.count(old) == 1
    found = read(tmp_path / "a.json", text.replace(old, new).encode("utf-8", "surrogateescape"))
    assert texts(found) == [f"owl {i}" for i in range(40) if i != 5]
    assert len(reasons(found)) == 1 and not any(isinstance(f, Unread) for _, f in found)


def test_a_missing_quote_costs_one_element_where_lines_tell_its_end(tmp_path):
    found = read(tmp_path / "a.json", json.dumps(notes(9), indent=1).replace('"owl 5"', '"owl 5'))
    assert texts(found) == [f"owl {i}" for i in range(9) if i != 5]


@pytest.mark.parametrize("at", [0, 500, 1999])
def test_nan_in_one_of_two_thousand(tmp_path, at):
    elements = notes(2000)
    elements[at]["text"] = float("nan")
    for shape in (elements, {"data": elements}, {str(i): e for i, e in enumerate(elements)}):
        found = read(tmp_path / "a.json", json.dumps(shape))
        assert len(texts(found)) == 1999
        assert reasons(found) == ["NaN or Infinity in JSON"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('[{"text": "a"},, {"text": "b"}]', "ab"),
        ('[{"text": "a"} {"text": "b"}]', "ab"),
        ('[, {"text": "a"}, {"text": "b"}]', "ab"),
        ('[{"text": "a"}, {"text": "b"},]', "ab"),
    ],
)
def test_missing_and_doubled_commas_are_named(tmp_path, text, kept):
    found = read(tmp_path / "a.json", text)
    assert "".join(texts(found)) == kept
    assert reasons(found) == ["a comma of a JSON array is missing or doubled"]


LOST = {
    "two arrays": '[{"text": "a"}]\n[{"text": "b"}]',
    "two objects": '{"data": [{"text": "a"}]}{"data": []}',
    "words behind": '[{"text": "a"}] and so on',
    "not closed": '[{"text": "a"}, {"text": "b"',
    "not closed after comma": '[{"text": "a"},',
    "object not closed": '{"data": [{"text": "a"}, {"text": "b"}]',
    "brackets crossed": '[{"text": "a"}, {"text": ["b"}, {"text": "c"}]',
}


@pytest.mark.parametrize("case", LOST)
def test_an_unread_rest_is_told_as_such(tmp_path, case):
    found = read(tmp_path / "a.json", LOST[case])
    assert isinstance(found[-1][1], Unread)
    assert texts(found)[:1] == ["a"] and "c" not in texts(found)


@pytest.mark.parametrize("case", LOST)
def test_an_unread_rest_is_fatal_and_named(tmp_path, case):
    sound = "".join(json.dumps({"text": f"owl {i}"}) + "\n" for i in range(1000))
    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    (tmp_path / "in/sound.jsonl").write_text(sound)
    (tmp_path / "in/cut.json").write_text(LOST[case])
    made = {
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"a": 1}}}],
        "data": {"a": {"path": str(tmp_path / "in"), "kind": "general"}},
    }  # fmt: skip
    with pytest.raises(DataError, match=r"cut\.json:\d+: .*\n.*is not read"):
        prepare_source(Recipe.model_validate(made), "a", {}, tmp_path / "out")
    made["hygiene"] = {"max_bad_fraction": 1.0}
    facts = prepare_source(Recipe.model_validate(made), "a", {}, tmp_path / "out").as_json()
    assert facts["records"]["kept"] > 1000


def test_one_line_of_any_length(tmp_path):
    """40,000 records in one line of 30 MB, as an array and as an object's list; a limit on lines is none on JSON."""
    elements = [{"text": f"owl {i} " + "hoot " * 140} for i in range(40_000)]
    for shape in (elements, {"about": "owls", "data": elements}):
        found = read(tmp_path / "a.json", json.dumps(shape))
        assert len(texts(found)) == len(found) == 40_000


def test_marks_of_wrong_decoding_are_text(tmp_path):
    found = read(tmp_path / "a.json", json.dumps([{"text": "one \ufffd mark"}], ensure_ascii=False))
    assert texts(found) == ["one \ufffd mark"]


def test_elements_as_long_as_their_file_are_taken_apart(tmp_path, monkeypatch):
    """emrQA: an element of `data` holds thousands of paragraphs; read whole or in parts it is the same."""
    notes = [{"title": t, "paragraphs": [{"context": f"{t} {i} " + "hoot " * 99} for i in range(300)]} for t in "ab"]
    whole = read(tmp_path / "a.json", json.dumps({"data": notes}))
    monkeypatch.setattr(json_stream, "MAX_ELEMENT_CHARS", 50_000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 5_000)
    parts = read(tmp_path / "a.json", json.dumps({"data": notes}))
    assert [p for _, n in parts for p in n["paragraphs"]] == [p for _, n in whole for p in n["paragraphs"]]
    assert {n["title"] for _, n in parts} == {"a", "b"} and len(parts) == 600
    one = read(tmp_path / "a.json", json.dumps({"text": "hoot " * 20_000}))
    assert isinstance(one[0][1], Damaged) and len(one) == 1


def test_chunk_borders_change_nothing(tmp_path, monkeypatch):
    elements = [{"text": f'é\\" {i}', "n": [1.5e3, None, {"a": "}"}]} for i in range(50)]
    for chunk in range(1, 40):
        monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
        found = read(tmp_path / "a.json", json.dumps(elements, ensure_ascii=False, indent=chunk % 3 or None))
        assert [fields for _, fields in found] == elements


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_that_of_an_element(tmp_path, packed):
    with (gzip.open if packed else open)(tmp_path / "a.json", "wb") as file:
        file.write(b"[")
        for i in range(60_000):
            file.write(b", " * bool(i) + json.dumps({"text": f"{i} " + "hoot " * 200}).encode())
        file.write(b"]")
    (tmp_path / "a.json").rename(path := tmp_path / ("a.json.gz" if packed else "a.json"))
    tracemalloc.start()
    assert sum(isinstance(fields, dict) for _, fields in row_formats.read_json(path)) == 60_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_damaged_bytes_never_escape(tmp_path):
    rng = random.Random(5)
    sound = json.dumps(notes(30), indent=1).encode()
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(rng.choice([1, 2, 9])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 0, 1, 9])] = rng.choice([b'"', b"{", b"]", b"\\", b"\xff", b",", b"", b"\n"])
        found = read(tmp_path / "a.json", bytes(data))
        inner = [text for text in texts(found) if isinstance(text, str) and text.startswith("inner")]
        assert not inner, "an inner object became a record"
