"""Names that nothing announces, by Presidio with a small spaCy model made here; a clear word where one is missing."""

import pytest

from qmedtune.data.hygiene import phi, presidio
from qmedtune.data.hygiene.presidio import check
from qmedtune.errors import RecipeError


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(presidio, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install 'qmedtune\[presidio\]'"):
        check("en_core_web_sm")


def test_names_of_the_finder_go_through_the_same_sieve():
    text = "Later Zoe Quill came, with Parkinson disease. Dr. Vogel was told."
    given = [(text.index(name), text.index(name) + len(name)) for name in ("Zoe Quill", "Parkinson", "Vogel")]
    found = phi.find(text, lambda _: given)
    assert [text[span.start : span.end] for span in found] == ["Zoe Quill", "Vogel"]
    assert {span.kind for span in found} == {"name"}
    assert [text[span.start : span.end] for span in phi.find(text)] == ["Vogel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A spaCy folder whose rules call three words a person: what is tested is the wiring, not a model."""
    pytest.importorskip("presidio_analyzer")
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": name} for name in ("Zoe Quill", "Quill", "Parkinson")])
    folder = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(folder)
    return str(folder)


def test_a_model_that_is_not_there_is_not_fetched(model, monkeypatch):
    def fetched(*_, **__):
        raise AssertionError("a run must not download")

    monkeypatch.setattr("socket.socket.connect", fetched)
    with pytest.raises(RecipeError, match="no spaCy model 'en_of_nowhere' here"):
        presidio.person_finder("en_of_nowhere")


def test_presidio_finds_names_in_running_text(model, tmp_path, monkeypatch):
    def fetched(*_, **__):
        raise AssertionError("a run must not download")

    monkeypatch.setattr("socket.socket.connect", fetched)
    persons = presidio.person_finder(model)
    text = "Later Zoe Quill came, with Parkinson disease; Quill left."
    found = phi.find(text, persons)
    assert [text[span.start : span.end] for span in found] == ["Zoe Quill", "Quill"]


def test_a_recipe_redacts_by_presidio(model, tmp_path):
    import json

    from qmedtune.data.prepare import prepare_source
    from qmedtune.recipe import Recipe

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "Later Zoe Quill came to the ward.", "subject_id": 4}))
    made = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"notes": 1}}}],
        "data": {"notes": {"path": str(path), "kind": "clinical", "holdout": 0.0}},
        "hygiene": {"phi": "redact", "presidio": model},
    })  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    facts = prepare_source(made, "notes", {}, out).as_json()
    text = json.loads((out / "train.jsonl").read_text())["text"]
    assert facts["phi"]["classes"] == {"name": 1}
    assert text.startswith("Later ") and text.endswith(" came to the ward.") and "Quill" not in text
