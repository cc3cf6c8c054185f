"""Strict reading: scalars as people mean them, all errors at once with line and key, suggestions, `--set`, fuzz."""

import hashlib
import re
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmedtune.errors import RecipeError
from qmedtune.parsing import grammar, strict_yaml
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import CptSection, SftSection

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
FLAGSHIP = next(path for path in RECIPES if path.stem == "cpt_then_sft")
SMALL = """\
name: small
model: {base: builtin:tiny}
data:
  notes: {path: builtin:notes, kind: clinical}
  questions: {path: builtin:instructions, kind: instructions, template: alpaca}
stages:
  - cpt: {mix: {notes: 1}}
  - sft: {data: questions}
validate: {on: [notes]}
"""


def write(tmp_path, text, name="small.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def error_of(tmp_path, text, overrides=()):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value).replace(str(path), "R")
    assert 1 <= len(message.splitlines()) <= 6
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1E-4", 1e-4), ("-.5", -0.5), ("1.", 1.0), ("2e9", 2_000_000_000), ("1.5e3", 1500.0),
        ("010", 10), ("+3", 3), ("12:30", "12:30"), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"),
        ("y", "y"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("0x1F", "0x1F"),
        ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("1e-4x", "1e-4x"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text, value):
    found = strict_yaml.resolve_scalar(text)
    assert found == value and type(found) is type(value)


def test_quotes_make_text():
    assert strict_yaml.parse("a: '2e-4'\nb: \"true\"").data == {"a": "2e-4", "b": "true"}


def test_learning_rates_are_numbers(tmp_path):
    loaded = load_recipe(write(tmp_path, SMALL.replace("mix: {notes: 1}", "mix: {notes: 1}, lr: 2e-4, tokens: 3e6")))
    section = loaded.recipe.stages[0].section
    assert isinstance(section, CptSection) and section.lr == 2e-4 and section.tokens == 3_000_000


def test_every_line_number_is_right(tmp_path):
    document = strict_yaml.parse(SMALL)
    lines = SMALL.splitlines()
    assert len(document.lines) > 15
    for path, number in document.lines.items():
        key = path[-1]
        assert key in lines[number - 1] if isinstance(key, str) else re.search("- |[[]", lines[number - 1])


def test_all_errors_come_at_once_with_line_and_key(tmp_path):
    text = SMALL.replace("builtin:tiny", "builtin:tiny, quantisation: nf4").replace("kind: clinical", "kind: clincal")
    text = text.replace("{notes: 1}}", "{noets: 1}, lr: fast}").replace("sft: {", "sft: {epochs: -1, ")
    assert error_of(tmp_path, text).splitlines() == [
        "R:2 model.quantisation: unknown key; did you mean `quantization`?",
        'R:4 data.notes.kind: got "clincal"; allowed: literature, clinical, general or instructions; '
        "did you mean `clinical`?",
        'R:7 stages[0].cpt.lr: got "fast"; allowed: a number in (0, 1] or auto',
        'R:7 stages[0].cpt.mix.noets: no source "noets" in `data`; did you mean `notes`? (sources: notes, questions)',
        "R:8 stages[1].sft.epochs: got -1; allowed: a number above 0 or auto",
    ]


def test_at_most_six_lines(tmp_path):
    text = SMALL + "\n".join(f"bad{i}: 1" for i in range(10))
    lines = error_of(tmp_path, text).splitlines()
    assert len(lines) == 6 and lines[-1] == "... and 5 more"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: small\n", "", "R name: missing; allowed: letters"),
        ("name: small", "nme: small", "R:1 nme: unknown key; did you mean `name`?"),
        ("name: small", "name: small\nlr: 1", "unknown key here; `lr` belongs in stages[].pretrain"),
        ("name: small", "name: small\nname: large", "R:2 name: duplicate key; it stands already on line 1"),
        ("name: small", "name: ../up", "allowed: letters, digits"),
        ("name: small", "name: small\nseed: 4294967296", "allowed: a whole number in [0, 4294967296)"),
        ("name: small", "name: small\nseed: 1.5", "R:2 seed: got 1.5; allowed: a whole number"),
        ("name: small", "name: small\ndeterministic: yes", 'got "yes"; allowed: true or false'),
        ("name: small", "name: small\nmerge:", "R:2 merge: got null; allowed: a section with base"),
        ("name: small", "name: small\n2024: x", "2024"),
        ("base: builtin:tiny", "base: 7", "R:2 model.base: got 7; allowed: text"),
        ("base: builtin:tiny", "base: C:\\m", "R:2 model.base: a Windows path"),
        ("base: builtin:tiny", "base: x, trust_remote_code: true", "code from a model folder is never run"),
        ("{base: builtin:tiny}", "builtin:tiny", "R:2 model: got \"builtin:tiny\"; allowed: a section with base"),
        ("mix: {notes: 1}", "mix: {notes: -1}", "stages[0].cpt.mix.notes: got -1; allowed: a number from 0 up"),
        ("mix: {notes: 1}", "mix: {notes: 0}", "at least one weight of `mix` must be above 0"),
        ("mix: {notes: 1}", "mix: {notes: .inf}", "got Infinity; allowed: a number from 0 up"),
        ("mix: {notes: 1}", "mix: {notes: 1}, tokens: 9, epochs: 2", "`tokens` is given too"),
        ("mix: {notes: 1}", "mix: {notes: 1}, warmup: {ratio: .1, steps: 3}", "exactly one of `ratio`"),
        ("mix: {notes: 1}", "mix: {notes: 1}, batch: 6, micro_batch: 4", "a divisor of batch (6)"),
        ("mix: {notes: 1}", "mix: {notes: 1}, adapter: new", "the first stage has no adapter before it"),
        ("data: questions", "data: questions, adapter: new", "set adapter.train_embeddings: false"),
        ("data: questions", "data: notes", '"notes" is of kind clinical; an sft stage learns from'),
        ("data: questions", "data: question", 'no source "question" in `data`; did you mean `questions`?'),
        ("  - cpt:", "  - ctp:", "R:7 stages[0].ctp: unknown key; did you mean `cpt`?"),
        ("  - cpt: {mix: {notes: 1}}", "  - {}", "a stage is one of `cpt`, `sft`, `pretrain`"),
        ("template: alpaca", "template: alpacca", "did you mean `alpaca`?"),
        ("name: small", "name: small\nsave: {every: 0}", "R:2 save.every: got 0; allowed: a whole number above 0"),
        ("on: [notes]", "keep_best: true", "name sources in validate.on"),
        ("on: [notes]", "on: [notse]", "R:9 validate.on[0]: no source \"notse\" in `data`; did you mean `notes`?"),
        ("name: small", "name: small\nevaluate: {perplexity: [general]}", 'no source "general"'),
        ("name: small", "name: small\nevaluate: {tasks: [fact]}", "did you mean `facts`?"),
        ("name: small", "name: small\nevaluate: {tasks: [facts, facts]}", "facts is there twice"),
        ("data:\n", "data:\n  validation: {path: builtin:notes, kind: clinical}\n", "a folder that the run makes"),
        ("name: small", "name: small\nevaluate: {tasks: [pubmedqa]}", "{task: pubmedqa, path: FILE}"),
        ("name: small", "name: small\nevaluate: {tasks: [{tsk: facts}]}", "did you mean `task`?"),
        ("kind: clinical", "kind: clinical, holdout: 0", "set data.notes.holdout above 0"),
        ("builtin:notes", r"'C:\notes\*.txt'", "a Windows path; under WSL drive C: is /mnt/c"),
        ("builtin:notes", r'"C:\notes"', "R:4 data.notes.path: a Windows path"),
        ("builtin:notes", r'"C:\data"', "in double quotes a backslash starts an escape"),
        ("data:\n", "data: &a\n", "R:3 data: anchor `&a`"),
        ("builtin:notes", "*x", "alias `*x`; write the value out"),
        ("mix: {notes: 1}", "mix: {<<: 1}", "merge key `<<`"),
        ("builtin:notes", "!!python/object/apply:os.system [ls]", "R:4 data.notes.path: tag `tag:yaml.org,2002:python"),
        ("  notes:", "\tnotes:", "R:4: a tab in the indentation"),
        ("name: small", "--- {}\n---\nname: small", "a second document"),
        ("name: small", "? [a]\n: b", "a key is a list, a mapping or an alias"),
        ("name: small", "name: small\n" + "x" * 201 + ": 1", "a key of 201 characters"),
        ("name: small", "name: \"\\ud800\"", "half of a surrogate pair"),
        ("name: small", 'name: "\\UFFFFFFFF"', "no Unicode character"),
        ("name: small", "name: [" * 30, "nested more than 16 levels"),
        ("name: small", "name: 'small", "not YAML"),
        ("  - cpt", " - cpt: x\n  - cpt", "not YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, old, new, expected):
    assert old in SMALL
    assert expected in error_of(tmp_path, SMALL.replace(old, new, 1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a recipe is a mapping"),
        (b"- a\n- b\n", "a recipe is a mapping"),
        ("name: x".encode("utf-16"), "UTF-16; save the file as UTF-8"),
        (b"name: x\nmodel: \xff\n", "R:2: a byte that is not UTF-8"),
        (b"name: a\x00b\n", "not plain text"),
        (b"x" * 300_000, "over 256 kB"),
        (b"a" * 200_000 + b": 1", "not YAML"),
        (b"[" * 100_000, "nested more than 16"),
        (b"- " * 100_000, "nested more than 16"),
        (b"{a: " * 50_000, "nested more than 16"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, expected):
    assert expected in error_of(tmp_path, content)


def test_missing_file_names_what_is_near(tmp_path):
    write(tmp_path, SMALL, "flagship.yaml")
    with pytest.raises(RecipeError, match="no such file; did you mean .*flagship.yaml"):
        load_recipe(tmp_path / "flagshp.yaml")
    with pytest.raises(RecipeError, match="a folder; give the recipe file, for example .*flagship.yaml"):
        load_recipe(tmp_path)


def test_low_learning_rates_and_unused_sources_warn(tmp_path):
    path = write(tmp_path, SMALL.replace("{data: questions}", "{data: questions, lr: 1e-5}"))
    (warning,) = load_recipe(path).warnings
    assert warning.startswith(f"{path}:8 stages[1].sft.lr: 1e-05 is a rate for full tuning")
    (warning,) = load_recipe(path, ["data.extra={path: x, kind: general}", "stages[1].sft.lr=1e-4"]).warnings
    assert "data.extra" in warning and "will not be read" in warning


def test_set_reaches_every_kind_of_place(tmp_path):
    path = write(tmp_path, SMALL.replace("  notes:", "  v1.notes:").replace("{notes: 1}", "{v1.notes: 1}"))
    path.write_text(path.read_text().replace("[notes]", "[v1.notes]"))
    sets = ["stages[0].cpt.lr=3e-4", "data.v1.notes.path=/x/*.txt", "merge.verify.max_kl=1", "stages[1].sft.epochs=2"]
    loaded = load_recipe(path, sets)
    cpt, sft = (stage.section for stage in loaded.recipe.stages)
    assert isinstance(sft, SftSection)
    assert (cpt.lr, sft.epochs) == (3e-4, 2)
    assert loaded.recipe.data["v1.notes"].path == "/x/*.txt" and loaded.recipe.merge.verify.max_kl == 1


def test_text_and_hash_carry_the_overrides(tmp_path):
    plain = load_recipe(write(tmp_path, SMALL))
    other = load_recipe(write(tmp_path, SMALL), ["seed=3"])
    assert plain.text == SMALL and other.text == SMALL + "# --set seed=3\n"
    assert other.sha256 == hashlib.sha256(other.text.encode()).hexdigest() != plain.sha256


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages[0].cpt.lr=fast", '--set stages[0].cpt.lr=fast: got "fast"; allowed: a number in (0, 1] or auto'),
        ("stages[0].cpt.rl=1", "did you mean `lr`?"),
        ("stage[0].cpt.lr=1", "stage is no list; did you mean `stages`?"),
        ("stages[7].cpt.lr=1", "stages is a list of 2; the first item is stages[0]"),
        ("stages.cpt.lr=1", "stages is a list of 2"),
        ("seed", "allowed: key.path=value"),
        ("=3", "allowed: key.path=value"),
        ("se\ned=3", "allowed: key.path=value"),
        ("seed=[", "not YAML"),
        ("seed=!!int 3", "tag"),
        ("model.trust_remote_code=true", "never run"),
        ("data.notes=", "got null; allowed: a section"),
    ],
)
def test_bad_overrides_say_which(tmp_path, override, expected):
    assert expected in error_of(tmp_path, SMALL, [override])


def slips(key):
    """Every single-letter slip: a letter too few, too many, wrong, or two swapped."""
    letters = string.ascii_lowercase + "_"
    for i in range(len(key) + 1):
        yield from (key[:i] + letter + key[i:] for letter in letters)
        if i < len(key):
            yield key[:i] + key[i + 1 :]
            yield from (key[:i] + letter + key[i + 1 :] for letter in letters)
        if i + 1 < len(key):
            yield key[:i] + key[i + 1] + key[i] + key[i + 2 :]


def section_keys():
    """(section path, key) of the schema, sections of the same keys once."""
    examples = {"[]": 0, "*": "x"}
    paths = []
    for path in grammar.key_paths():
        paths.append(tuple(examples.get(part, part) for part in path))
    return sorted({(tuple(grammar.keys_at(path[:-1])), path[-1]) for path in paths})


def unrecognised_slips(every):
    cases = [
        (known, key, slip) for known, key in section_keys() for slip in sorted(set(slips(key)) - set(known) - {""})
    ]
    chosen = cases[::every]
    assert len(cases) > 20_000 and {key for _, key, _ in chosen} == {key for _, key in section_keys()}
    return [(key, slip) for known, key, slip in chosen if f"`{key}`" not in grammar.did_you_mean(slip, known)]


def test_slips_of_every_key_are_understood():
    assert unrecognised_slips(every=41) == []


@pytest.mark.slow
def test_every_slip_of_every_key_is_understood():
    assert unrecognised_slips(every=1) == []


NASTY = [
    *"{}[]:-?|>%@`#'\"\\\t\x00\r\x85\ud7ff\u2028é",
    "!!python/object:x",
    "&a",
    "*a",
    "<<",
    "---",
    "...",
    "null",
    "true",
]
NASTY += [".nan", "-1", "1e999", "0" * 40, "9" * 40, "trust_remote_code: true", "auto", "builtin:", "${X}", "a" * 2000]
NASTY += ["[" * 50]


@st.composite
def mutated_recipe(draw):
    text = draw(st.sampled_from(RECIPES)).read_text(encoding="utf-8")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["insert", "delete", "replace", "line", "value", "swap"]))
        lines = text.splitlines(keepends=True) or [""]
        row = draw(st.integers(0, len(lines) - 1))
        piece = draw(st.one_of(st.sampled_from(NASTY), st.text(max_size=4)))
        if kind == "insert":
            text = text[:at] + piece + text[at:]
        elif kind == "delete":
            text = text[:at] + text[at + draw(st.integers(1, 20)) :]
        elif kind == "replace":
            text = text[:at] + piece + text[at + 1 :]
        elif kind == "line":
            text = "".join([*lines[:row], lines[row], *lines[row:]])
        elif kind == "value":
            lines[row] = re.sub(r":.*", lambda _, piece=piece: f": {piece}", lines[row], count=1)
            text = "".join(lines)
        else:
            lines[row], lines[-1] = lines[-1], lines[row]
            text = "".join(lines)
    return text


def check_only_recipe_errors(folder, text):
    path = folder / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except RecipeError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 6
        for line in lines:
            assert line.startswith((str(path), "... and ")) and line.isprintable() and len(line) <= 400


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=mutated_recipe())
def test_fuzzed_recipes_raise_only_recipe_errors(tmp_path_factory, text):
    check_only_recipe_errors(tmp_path_factory.getbasetemp(), text)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=mutated_recipe())
def test_fuzzed_recipes_in_full(tmp_path_factory, text):
    check_only_recipe_errors(tmp_path_factory.getbasetemp(), text)


@pytest.mark.parametrize(
    ("key", "entries", "most"),
    [("stages", "[" + "{cpt: {mix: {notes: 1}, tokens: 2000}}, " * 5000 + "]", 64),
     ("data", "{" + "".join(f"s{n}: {{path: a, kind: literature}}, " for n in range(5000)) + "}", 500)],
)  # fmt: skip
def test_lists_without_end_are_refused_at_once(key: str, entries: str, most: int, tmp_path: Path):
    path = tmp_path / "r.yaml"
    whole = {
        "name": "x",
        "model": "{base: builtin:micro}",
        "data": "{notes: {path: a.jsonl, kind: literature}}",
        "stages": "[{cpt: {mix: {notes: 1}, tokens: 2000}}]",
        key: entries,
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in whole.items()))
    with pytest.raises(RecipeError, match=f"{key}: got 5,000 entries; allowed: at most {most}"):
        load_recipe(path)
