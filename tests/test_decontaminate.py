"""Planted benchmark text is found whatever its case, punctuation and spacing; clean text is left alone."""

import json
import os
import random
import re
from pathlib import Path

import pytest
from builders import make_recipe

from qmedtune.data.hygiene import decontaminate
from qmedtune.data.hygiene.benchmarks import benchmark_items
from qmedtune.data.hygiene.decontaminate import BenchmarkItem, build, search
from qmedtune.errors import DataError

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
VOCABULARY = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("ne", "ra", "tol", "mic", "x")]


def sentence(rng, low, high):
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(low, high)))


def corpus(rng, count):
    return [". ".join(sentence(rng, 8, 25) for _ in range(10)) for _ in range(count)]


def disguised(rng, text):
    """Other case, punctuation and spacing."""
    text = rng.choice([str.upper, str.title, str.swapcase])(text)
    text = re.sub(r"\s", lambda _: rng.choice(["  ", "\n", " - ", ", ", "\u00a0"]), text)
    return rng.choice(["\u201c{}\u201d", "({})", "{}?!"]).format(text)


def plant(rng, host, text):
    cut = rng.randrange(len(host))
    return f"{host[:cut]} {text} {host[cut:]}"


def test_four_hundred_planted_items_and_a_clean_corpus():
    rng = random.Random(0)
    items = [BenchmarkItem("t", str(i), (sentence(rng, 6, 60),)) for i in range(400)]
    index = build(items)
    clean = corpus(rng, 2000)
    hosts = corpus(rng, 400)
    dirty = [plant(rng, host, items[i].texts[0]) for i, host in enumerate(hosts[:200])]
    dirty += [plant(rng, host, disguised(rng, items[200 + i].texts[0])) for i, host in enumerate(hosts[200:])]
    assert len(search(index, dirty, [None] * 400)) == 400
    assert len(search(index, clean, [None] * 2000)) <= 2  # 0.1 %


def test_thirteen_words_are_enough_and_twelve_are_not():
    rng = random.Random(1)
    words = sentence(rng, 30, 30).split()
    index = build([BenchmarkItem("t", "1", (" ".join(words),))])
    assert search(index, [f"aaa {' '.join(words[5:18])} bbb"], [None])[0].words == 13
    assert search(index, [f"aaa {' '.join(words[5:17])} bbb"], [None]) == []


def test_pmids_count_without_any_shared_text():
    index = build([BenchmarkItem("pubmedqa", "7", ("a question of more than three words",), "7")])
    (hit,) = search(index, ["nothing in common", "nothing either"], ["7", "8"])
    assert (hit.record, hit.words) == (0, 0)


def test_matches_never_span_two_records():
    rng = random.Random(2)
    words = sentence(rng, 13, 13).split()
    index = build([BenchmarkItem("t", "1", (" ".join(words),))])
    assert search(index, [" ".join(words[:6]), " ".join(words[6:])], [None, None]) == []


def test_a_phrase_of_the_language_is_given_back():
    hits = [(0, 5)] * 50 + [(1, 5)] * 3 + [(2, 13)] * 50
    assert decontaminate.given_back(hits, 10_000) == {0}


def test_overlap_names_items_for_a_split_evaluation():
    items = [
        BenchmarkItem("a", "q1", ("one two three four five",)),
        BenchmarkItem("a", "q2", ("six seven eight nine ten",)),
    ]
    report = decontaminate.overlap(items, [(4, 1, 5), (9, 1, 0)], set())
    assert {task: found.as_json() for task, found in report.items()} == {
        "a": {"items": 2, "found": ["q2"], "records": 2, "by_pmid": 1, "given_back": 0}
    }


def recipe(**sections):
    data = sections.pop("data", {"a": {"path": "builtin:literature", "kind": "literature"}})
    return make_recipe(data, [{"cpt": {"mix": {"a": 1}}}], **sections)


SCHEMAS = {
    "pubmedqa.json": (
        {"31": {"QUESTION": "Is it so?", "CONTEXTS": ["Because one."]}},
        ["Is it so?", "Because one."],
        "31",
    ),
    "medqa.jsonl": ({"question": "Which one?", "options": {"A": "x"}, "answer_idx": "A"}, ["Which one?"], None),
    "medmcqa.jsonl": ({"question": "Which two?", "opa": "x", "cop": 1, "id": "m1"}, ["Which two?"], None),
    "plain.csv": ("stem,A\nWhich three?,x\n", ["Which three?"], None),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_benchmark_schemas(tmp_path, name):
    content, texts, pmid = SCHEMAS[name]
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    for made in (
        recipe(evaluate={"tasks": [{"task": "x", "path": str(path)}]}),
        recipe(hygiene={"decontaminate": [str(path)]}),
    ):
        (item,) = benchmark_items(made)
        assert list(item.texts) == texts
        assert item.pmid == pmid


def test_the_built_in_questions_are_looked_for():
    items = benchmark_items(recipe(evaluate={"tasks": ["facts"]}))
    assert len(items) == 120
    index = build(items)
    assert index.too_short == 0
    assert len(search(index, [f"Quiz. {items[3].texts[0]} Yes."], [None])) == 1


def test_a_missing_benchmark_is_named(tmp_path):
    made = recipe(evaluate={"tasks": [{"task": "medqa", "path": str(tmp_path / "none.jsonl")}]})
    with pytest.raises(DataError, match="benchmark medqa is not there"):
        benchmark_items(made)


def test_a_folder_of_mmlu_subjects(tmp_path):
    """Published without a header; the ids are those of the evaluation, so that it can be split."""
    from qmedtune.tasks import load_task

    folder = tmp_path / "mmlu"
    folder.mkdir()
    for name, stem in (("anatomy_test", "Which bone\nis longest?"), ("genetics_test", "Which base pairs?")):
        (folder / f"{name}.csv").write_text(f'"{stem}",a,b,c,d,B\nAnother one?,a,b,c,d,A\n')
    made = recipe(evaluate={"tasks": [{"task": "mmlu", "path": str(folder)}]})
    items = benchmark_items(made)
    assert [item.texts for item in items[:2]] == [("Which bone\nis longest?",), ("Another one?",)]
    assert [i.id for i in items] == [i.id for i in load_task(made.evaluate.tasks[0], 0).items]


def test_every_item_of_a_record_is_found_where_the_evaluation_is_split():
    rng = random.Random(4)
    items = [BenchmarkItem("t", str(i), (sentence(rng, 15, 20),)) for i in range(5)] + [
        BenchmarkItem("t", "5", ("no text of it",), "77")
    ]
    index = build([*items, BenchmarkItem("u", "same", items[0].texts)])
    text = f"{items[3].texts[0]} and {items[0].texts[0]}"
    assert len(search(index, [text, "else"], ["77", None])) == 1
    assert {hit.item for hit in search(index, [text, "else"], ["77", None], every=True)} == {0, 3, 5, 6}


def test_named_benchmarks_say_how_to_get_them_where_there_is_no_network(monkeypatch):
    import datasets

    def absent(*_, **__):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(DataError, match="medqa .* is not in the local cache"):
        benchmark_items(recipe(hygiene={"decontaminate": ["medqa"]}))


def test_named_benchmarks_in_the_form_that_the_hub_has(monkeypatch):
    import datasets

    rows = {
        "qiaojin/PubMedQA": {"pubid": 12, "question": "Is it so?", "context": {"contexts": ["One.", "Two."]}},
        "cais/mmlu": {"question": "Which bone?", "choices": ["a", "b", "c", "d"], "answer": 1},
        "GBaker/MedQA-USMLE-4-options": {"question": "Which drug?", "options": {"A": "x"}, "answer_idx": "A"},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list([rows[name]]))
    made = recipe(hygiene={"decontaminate": ["pubmedqa", "mmlu_medical", "medqa"]})
    items = benchmark_items(made)
    assert (items[0].texts, items[0].pmid, items[0].id) == (("Is it so?", "One.", "Two."), "12", "12")
    assert [item.id for item in items[1:7]][:2] == ["anatomy/1", "clinical_knowledge/1"]
    assert items[1].texts == ("Which bone?",) and items[7].texts == ("Which drug?",)


def test_a_benchmark_of_the_evaluation_goes_before_the_public_one(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "My own question?"}) + "\n")
    tasks = {"tasks": [{"task": "medqa", "path": str(path)}]}
    (item,) = benchmark_items(recipe(evaluate=tasks, hygiene={"decontaminate": ["medqa"]}))
    assert item.texts == ("My own question?",)


def test_split_keeps_the_text_and_scores_the_benchmark_in_two_parts(tmp_path):
    from qmedtune import store
    from qmedtune.data.prepare import prepare_source
    from qmedtune.evaluate import _overlapping
    from qmedtune.evaluation.summary import overlap_result
    from qmedtune.tasks import load_task

    rng = random.Random(6)
    stems = [sentence(rng, 20, 25) for _ in range(4)]
    exam, texts = tmp_path / "exam.jsonl", tmp_path / "texts.jsonl"
    options = {"options": {"A": "x", "B": "y"}, "answer_idx": "A"}
    exam.write_text("".join(json.dumps({"question": stem, **options}) + "\n" for stem in stems))
    text = f"{sentence(rng, 50, 60)} {stems[1].upper()} {stems[3]} {sentence(rng, 50, 60)}"
    texts.write_text(json.dumps({"text": text}) + "\n")
    made = recipe(
        evaluate={"tasks": [{"task": "medqa", "path": str(exam)}]}, hygiene={"contaminated": "split"},
        data={"a": {"path": str(texts), "kind": "literature", "holdout": 0.0}},
    )  # fmt: skip
    building = store.begin(tmp_path / "a", tmp_path, "key", {}, keep_partial=True)
    facts = prepare_source(made, "a", {}, building).as_json()
    store.publish(building, tmp_path / "a", tmp_path, "key", facts)
    assert facts["records"]["kept"] == 1 and facts["contamination"]["medqa"]["found"] == ["line-2", "line-4"]
    task = load_task(made.evaluate.tasks[0], 0)
    known = _overlapping([tmp_path / "a"])["medqa"]
    rows = [
        {"correct": right, "truncated": False, "normalised": {"correct": right}, "confidence": 0.5, "tie": False}
        for right in (False, True, True, True)
    ]
    parts = overlap_result(task, {"model": rows}, 0, known)
    clean, overlapping = parts["clean"].model, parts["overlapping"].model
    assert clean is not None and overlapping is not None and len(parts) == 2
    assert ((clean.n, clean.value), (overlapping.n, overlapping.value)) == ((2, 0.5), (2, 1.0))


@pytest.mark.skipif(not REAL.is_dir(), reason="real text is not part of the repository")
def test_real_pubmedqa_questions_are_all_found_and_real_abstracts_are_clean():
    rng = random.Random(3)
    abstracts = [
        json.loads(line)["text"] for line in (REAL / "literature/hoc_abstracts.jsonl").read_text().splitlines()
    ]
    made = recipe(evaluate={"tasks": [{"task": "pubmedqa", "path": str(REAL / "eval/pubmedqa_train.json")}]})
    items = benchmark_items(made)
    index = build([BenchmarkItem(i.task, i.id, i.texts[:1]) for i in items])  # the questions alone
    planted = [plant(rng, rng.choice(abstracts), item.texts[0]) for item in items]
    assert {hit.record for hit in search(index, planted, [None] * 500)} == set(range(500))
    whole = build(items)
    assert len(search(whole, abstracts, [None] * len(abstracts))) <= len(abstracts) // 1000
