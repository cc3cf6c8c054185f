"""Every key of a recipe is described: in the schema, by `qmedtune recipe`, and on the generated page."""

import json
from pathlib import Path

import pytest

from qmedtune.cli import invoke
from qmedtune.parsing import described, grammar

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
# Keys that stood in no documentation before there was this page.
ONCE_UNTOLD = [
    "deterministic",
    "double_quantization",
    "rslora",
    "dropout",
    "keep",
    "max_grad_norm",
    "weight_decay",
    "betas",
]


def described_in_schema():
    """Every property of the JSON Schema, as (section, key, description). Where a key and the section behind it have the
    same words, pydantic writes them at the section alone."""
    schema = grammar.json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    found = []
    for section, body in sections.items():
        for key, value in body.get("properties", {}).items():
            behind = sections.get(value.get("$ref", "").rpartition("/")[2], {})
            found.append((section, key, value.get("description") or behind.get("description", "")))
    return found


@pytest.mark.parametrize(("section", "key", "text"), described_in_schema(), ids=lambda value: str(value)[:30])
def test_every_key_of_the_schema_has_a_sentence(section, key, text):
    assert text.endswith((".", "]`).", ")")) and len(text.split()) >= 4, (section, key)
    assert "\n" not in text and "  " not in text


def test_every_key_of_the_schema_is_among_the_described_ones():
    told = {key.path[-1] for section in described.every_section() for key in section.keys}
    assert told == {path[-1] for path in grammar.key_paths()} - {"*", "[]"}


def test_the_page_is_what_is_generated():
    assert PAGE.read_text(encoding="utf-8") == described.markdown() + "\n", (
        "qmedtune recipe --markdown > docs/recipe.md"
    )


@pytest.mark.parametrize("key", ONCE_UNTOLD)
def test_a_key_is_told_on_the_terminal(key, capsys):
    assert invoke(["recipe", key]) == 0
    out = capsys.readouterr().out
    assert f".{key}\n" in f".{out}" and "allowed: " in out and "default: " in out and len(out.splitlines()) <= 10


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("lr", ["stages[].KIND.lr"]),
        ("stages[0].cpt.lr", ["stages[].KIND.lr"]),
        ("data.notes.path", ["data.NAME.path"]),
        ("path", ["data.NAME.path", "evaluate.tasks[].path"]),
        ("validate.every", ["validate.every"]),
        ("seed", ["seed"]),
        ("adapter", ["adapter", "ablate.adapter", "stages[].KIND.adapter"]),
        ("sft.data", ["stages[].sft.data"]),
        ("merge.verify.max_kl", ["merge.verify.max_kl"]),
        ("warmup.ratio", ["stages[].KIND.warmup.ratio"]),
    ],
)
def test_a_key_is_found_by_its_last_parts(asked, shown):
    assert sorted(key.shown for key in described.find(asked)) == sorted(shown)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("learning_rat", "qmedtune recipe"), ("epoch", "`epochs`"), ("cpt.mixx", "`mix`"), ("x.yaml", "plan x.yaml")],
)
def test_a_wrong_key_is_answered_with_the_nearest(asked, hint, capsys):
    assert invoke(["recipe", asked]) == 2
    err = capsys.readouterr().err
    assert hint in err and len(err.splitlines()) <= 6


def test_all_keys_and_json(capsys):
    assert invoke(["recipe"]) == 0
    assert "data.NAME.holdout\n" in capsys.readouterr().out
    assert invoke(["recipe", "holdout", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["key"] == "data.NAME.holdout" and found["default"] == "0.05" and not found["required"]
