"""Stand-ins: no two become one, none tells its value without the secret, and a run does not change them half-way."""

import json
import os
import random
import re
import stat
import string

import pytest
from builders import make_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phi_generated import planted

from qmedtune import keys, store
from qmedtune.data.hygiene import phi, secret, surrogates
from qmedtune.data.hygiene.phi import Span
from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe

KEY = bytes(range(32))


def stand_in(value: str, kind: str = "name", patient: str = "p1", key: bytes = KEY) -> str:
    return surrogates.redact(value, [Span(0, len(value), kind)], surrogates.StandIns(patient, key))


def test_a_thousand_names_of_one_patient_stay_a_thousand():
    rng = random.Random(0)
    names = {"".join(rng.choices(string.ascii_lowercase, k=6)).title() for _ in range(1000)}
    made = {stand_in(name) for name in names}
    assert len(made) == len(names)
    assert not made & names
    assert all(re.fullmatch(r"[A-Z][a-z]{5,16}", name) for name in made)


@pytest.mark.parametrize(("kind", "digits"), [("phone", 4), ("mrn", 3), ("ssn", 2), ("account", 1)])
def test_every_number_of_a_length_has_a_stand_in_of_its_own(kind, digits):
    """A permutation without a fixed point, of all values."""
    values = [f"{number:0{digits}d}" for number in range(10**digits)]
    made = [stand_in(value, kind) for value in values]
    assert sorted(made) == values
    assert all(a != b for a, b in zip(values, made, strict=True))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine the first draw takes seconds
@given(st.sets(st.from_regex(r"[A-Z]{0,2}[0-9]{3,9}(-[a-z0-9]{1,4})?", fullmatch=True), min_size=2, max_size=30))
def test_codes_are_mapped_one_to_one_in_their_shape(values):
    made = {value: stand_in(value, "mrn") for value in values}
    assert len(set(made.values())) == len(values)
    assert all(phi.shape(value) == phi.shape(new) and value != new for value, new in made.items())


def test_names_keep_their_case_and_agree_word_by_word():
    first, last = stand_in("Jane Doe").split()
    assert stand_in("DOE, JANE M").startswith(f"{last.upper()}, {first.upper()} ")
    assert stand_in("Doe") == last
    assert stand_in("van der Berg").startswith("van der ")


def test_the_secret_decides_and_patients_differ():
    other = bytes(32)
    for value, kind in (("Jane Doe", "name"), ("617-555-0143", "phone"), ("MR1234567", "mrn")):
        assert stand_in(value, kind) == stand_in(value, kind)
        assert stand_in(value, kind) != stand_in(value, kind, key=other)
        assert stand_in(value, kind) != stand_in(value, kind, patient="p2")
    shifts = {
        surrogates.redact("03/14/2019", [Span(0, 10, "date")], surrogates.StandIns("p", bytes([n]) * 32, True))
        for n in range(50)
    }
    assert len(shifts) > 40


def test_the_text_around_stays_and_so_does_a_sex():
    text = "94F seen by Dr. Smith on 3/4/19, MRN 1234567."
    out = surrogates.redact(text, phi.find(text), surrogates.StandIns("p", KEY))
    assert re.fullmatch(r"over 89 F seen by Dr\. [A-Z][a-z]+ on \[date\], MRN \d{7}\.", out)


def test_no_part_of_a_planted_identifier_is_left():
    for text, start, end, kind in planted(400, 5):
        if kind in ("zip", "age_over_89"):
            continue
        assert text[start:end] not in surrogates.redact(text, phi.find(text), surrogates.StandIns("p", KEY))


# ---- the secret -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_SECRETS", str(tmp_path / "secrets"))
    return tmp_path


def test_the_secret_is_made_once_and_for_its_owner_alone(place):
    made = secret.load()
    assert len(made) == 32 and secret.load() == made
    assert stat.S_IMODE((place / "secrets" / secret.FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE((place / "secrets").stat().st_mode) == 0o700
    assert made.hex() not in secret.fingerprint(made)


@pytest.mark.parametrize("damage", ["readable by others", "cut", "empty"])
def test_a_secret_that_is_none_is_refused(damage, place):
    secret.load()
    path = place / "secrets" / secret.FILE
    path.chmod(0o644) if damage == "readable by others" else path.write_bytes(b"x" if damage == "cut" else b"")
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        secret.load()


def test_a_secret_that_is_a_pipe_is_not_waited_for(place):
    (place / "secrets").mkdir(mode=0o700)
    os.mkfifo(place / "secrets" / secret.FILE, 0o600)
    with pytest.raises(RecipeError, match="no plain file"):
        secret.load()


@pytest.mark.parametrize("inside", ["run", "run/secrets", "run/data/../keys"])
def test_a_secret_in_the_run_folder_is_refused(inside, place, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_SECRETS", str(place / inside))
    with pytest.raises(RecipeError, match="lies in the run folder"):
        secret.check(place / "run")


def recipe(tmp_path, seed: int = 17) -> Recipe:
    path = tmp_path / "notes.jsonl"
    rows = [
        {"id": str(i), "patient": f"p{i % 7}", "text": f"Seen by Dr. Smith, MRN 12345{i:02d}. Stable."}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "kind": "clinical", "split_by": "patient"}
    stages = [{"cpt": {"mix": {"notes": 1}, "tokens": 2000}}]
    hygiene = {"phi": "redact", "dedup": {"near": False}}
    return make_recipe({"notes": source}, stages, "builtin:micro", seed=seed, hygiene=hygiene)


def test_the_secret_is_in_the_key_of_the_data_and_the_seed_gives_nothing_away(place):
    hashes = store.HashCache(place / "h.json")
    asked = recipe(place)
    before = keys.source_section(asked, "notes", hashes)
    assert before["secret"] == secret.fingerprint(secret.load())
    (place / "secrets" / secret.FILE).unlink()
    assert keys.source_section(asked, "notes", hashes) != before


def test_a_run_goes_on_with_its_own_secret_or_not_at_all(place):
    from qmedtune.run import run

    out = place / "run"
    run(recipe(place), "text", out, until="data", offline=True)
    first = (out / "data/notes/train.jsonl").read_text()
    assert "Dr. Smith" not in first
    key = place / "secrets" / secret.FILE
    run(recipe(place), "text", out, until="data", offline=True)
    assert (out / "data/notes/train.jsonl").read_text() == first
    held = [path for path in out.rglob("*") if path.is_file() and key.read_bytes() in path.read_bytes()]
    assert not held and key.read_bytes().hex() not in (out / "run.json").read_text()
    os.replace(key, place / "elsewhere")
    with pytest.raises(RecipeError, match="a secret that is not here"):
        run(recipe(place), "text", out, until="data", offline=True)
    assert not key.exists()  # nor was another made in its place
    os.replace(place / "elsewhere", key)
    run(recipe(place), "text", out, until="data", offline=True)
