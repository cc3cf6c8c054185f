"""Parts and processes change nothing but the time: same bytes for any number, and only a changed file's part again."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from builders import make_recipe

from qmedtune import store
from qmedtune.data.hygiene import first_pass, per_record
from qmedtune.data.prepare import prepare_source
from qmedtune.errors import RunError
from qmedtune.interrupt import Interrupted
from qmedtune.recipe import SourceSection

PARTS = ("train.jsonl", "heldout.jsonl", "rejects.jsonl", "hashes.npy")


def recipe(path, kind="clinical", hygiene=None, **settings):
    source, stages = {"path": str(path), "kind": kind}, [{"cpt": {"mix": {"notes": 1}}}]
    return make_recipe({"notes": source}, stages, hygiene={"phi": "redact", **(hygiene or {})}, **settings)


def make(recipe, out):
    out.mkdir(parents=True)
    facts = prepare_source(recipe, "notes", {}, out).as_json()
    return facts, {name: (out / name).read_bytes() for name in PARTS}


def note(rng, length=60):
    words = " ".join(f"w{rng.randrange(4000)}" for _ in range(length))
    return f"Seen by Dr. Quill on {rng.randint(1, 12)}/{rng.randint(1, 28)}/2011. MRN: {rng.randrange(10**7)}. {words}"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Nine files in as many parts, with damage, duplicates across files and benchmark text in them."""
    monkeypatch.setattr(first_pass, "PART_BYTES", 1)
    folder, rng = tmp_path / "corpus", random.Random(0)
    folder.mkdir()
    copied = note(rng, 400)  # without a patient its surrogates differ from record to record
    for number in range(9):
        rows = [json.dumps({"text": note(rng)}) for _ in range(70)]
        rows += [json.dumps({"text": copied}), json.dumps({"text": f"{copied} {number}"}), "{broken", '{"text": null}']
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    return folder


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, corpus, monkeypatch):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": "w1 w2 w3 w4 w5 w6 of a benchmark question"}) + "\n")
    hygiene = {"max_bad_fraction": 0.1, "decontaminate": [str(exam)]}
    alone = make(recipe(corpus, hygiene=hygiene, workers=1), tmp_path / "alone")
    assert make(recipe(corpus, hygiene=hygiene, workers=3), tmp_path / "three") == alone
    monkeypatch.setattr(first_pass, "PART_BYTES", 1 << 30)
    facts, files = make(recipe(corpus, hygiene=hygiene), tmp_path / "one part")
    assert (facts, files) == alone
    assert facts["records"]["rejected"] == 18 and facts["records"]["duplicates"] == 17
    assert facts["phi"]["records"] == 630 + 18 and b"Quill" not in files["train.jsonl"]


def test_workers_are_as_many_as_the_input_is_worth(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    files = sorted(corpus.iterdir())
    assert per_record.worker_count("auto", files) == 1 and per_record.worker_count(5, files) == 5
    monkeypatch.setattr(per_record, "WORKER_BYTES", 100_000)
    assert 1 < per_record.worker_count("auto", files) <= 3


def test_a_worker_that_dies_is_named(corpus, monkeypatch):
    with per_record.Pool(recipe(corpus), "notes", [], 2) as pool:
        batches = pool.treated([("a.jsonl", n, {"id": str(n), "text": "x " * 40})] for n in range(200))
        next(batches)
        assert pool.executor is not None
        for process in pool.executor._processes.values():
            process.kill()
        with pytest.raises(RunError, match="workers=1"):
            list(batches)


def test_a_worker_that_a_signal_ended_first_is_no_failure(corpus, monkeypatch):
    """Slurm signals the workers too: the run then ends with 143, not with a worker's death."""
    with per_record.Pool(recipe(corpus), "notes", [], 2) as pool:
        batches = pool.treated([("a.jsonl", n, {"id": str(n), "text": "x " * 40})] for n in range(200))
        next(batches)
        assert pool.executor is not None
        for process in pool.executor._processes.values():
            process.terminate()
        monkeypatch.setattr(per_record.stop, "signal", signal.SIGTERM)
        with pytest.raises(Interrupted):
            list(batches)


ENDLESS = """
from itertools import count
from qmedtune.data.hygiene.per_record import Pool
from qmedtune.recipe import Recipe
recipe = Recipe.model_validate({{
    "name": "t", "model": {{"base": "builtin:tiny"}}, "stages": [{{"cpt": {{"mix": {{"a": 1}}}}}}],
    "data": {{"a": {{"path": "unused", "kind": "clinical"}}}},
}})
if __name__ == "__main__":
    with Pool(recipe, "a", [], 2) as pool:
        for _ in pool.treated([("a.jsonl", n, {{"id": str(n), "text": "Call 555-123-4567. " * 99}})] for n in count()):
            open({started!r}, "a").close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script, started = tmp_path / "endless.py", tmp_path / "started"
    script.write_text(ENDLESS.format(started=str(started)))
    parent = subprocess.Popen([sys.executable, str(script)])
    ends = time.monotonic() + 60
    while not started.exists() and time.monotonic() < ends:
        time.sleep(0.1)
    workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}").is_dir() for pid in workers) and time.monotonic() < ends:
        time.sleep(0.1)
    assert len(workers) >= 2 and not any(Path(f"/proc/{pid}").is_dir() for pid in workers)


def counting(monkeypatch):
    made, original = [], first_pass._make_part

    def counted(pool, files, part, work):
        made.append([file.name for file in files])
        return original(pool, files, part, work)

    monkeypatch.setattr(first_pass, "_make_part", counted)
    return made


def test_a_killed_pass_goes_on_at_its_part(tmp_path, corpus, monkeypatch):
    made = recipe(corpus, hygiene={"max_bad_fraction": 0.1})
    whole = make(made, tmp_path / "whole")
    calls, original = [], first_pass.read_items

    def dies(source, files, spill):
        calls.append(files)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(source, files, spill)

    out = tmp_path / "killed"
    out.mkdir()
    monkeypatch.setattr(first_pass, "read_items", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_source(made, "notes", {}, out)
    again = counting(monkeypatch)
    facts = prepare_source(made, "notes", {}, out).as_json()
    assert again == [[f"{n}.jsonl"] for n in range(3, 9)]
    assert (facts, {name: (out / name).read_bytes() for name in PARTS}) == whole


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".npy", ".json"])
def test_a_damaged_part_of_an_interrupted_attempt_is_made_again(tmp_path, corpus, monkeypatch, suffix):
    """No seal covers it yet."""
    made, out = recipe(corpus, hygiene={"max_bad_fraction": 0.1}), tmp_path / "out"
    whole = make(made, out)
    path = sorted((out / "parts").glob(f"*{suffix}"))[0]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    again = counting(monkeypatch)
    facts = prepare_source(made, "notes", {}, out).as_json()
    assert len(again) == 1
    assert (facts, {name: (out / name).read_bytes() for name in PARTS}) == whole


def test_a_changed_file_redoes_its_own_part(tmp_path, corpus, monkeypatch):
    made, run = recipe(corpus, hygiene={"max_bad_fraction": 0.1}), tmp_path / "run"
    out = run / "data" / "notes"
    building = store.begin(out, run, "first", {}, keep_partial=True)
    store.publish(building, out, run, "first", prepare_source(made, "notes", {}, building).as_json())
    changed = corpus / "4.jsonl"
    changed.write_text(changed.read_text().replace("w1", "v1"))
    (corpus / "zz.jsonl").write_text(json.dumps({"text": note(random.Random(1))}))
    again = counting(monkeypatch)
    building = store.begin(out, run, "second", {}, keep_partial=True)
    facts = prepare_source(made, "notes", {}, building).as_json()
    assert again == [["4.jsonl"], ["zz.jsonl"]]
    assert (facts, {name: (building / name).read_bytes() for name in PARTS}) == make(made, tmp_path / "afresh")


@pytest.mark.parametrize("phi_mode", ["redact", "report"])
def test_other_recognisers_redo_every_part(tmp_path, corpus, monkeypatch, phi_mode):
    """A part holds what was redacted, or counted, by those that it was made with."""
    made, run = recipe(corpus, hygiene={"max_bad_fraction": 0.1, "phi": phi_mode}), tmp_path / "run"
    out = run / "data" / "notes"
    building = store.begin(out, run, "first", {}, keep_partial=True)
    store.publish(building, out, run, "first", prepare_source(made, "notes", {}, building).as_json())
    parts = len(list((out / "parts").glob("*.zst")))
    monkeypatch.setattr(first_pass.phi, "VERSION", first_pass.phi.VERSION + 1)
    again = counting(monkeypatch)
    prepare_source(made, "notes", {}, store.begin(out, run, "second", {}, keep_partial=True))
    assert len(again) == parts > 1


def test_a_damaged_part_is_made_again(tmp_path, corpus, monkeypatch):
    made, run = recipe(corpus, hygiene={"max_bad_fraction": 0.1}), tmp_path / "run"
    out = run / "data" / "notes"
    building = store.begin(out, run, "first", {}, keep_partial=True)
    store.publish(building, out, run, "first", prepare_source(made, "notes", {}, building).as_json())
    part = sorted((out / "parts").glob("*.zst"))[0]
    part.write_bytes(part.read_bytes()[:-5])
    again = counting(monkeypatch)
    prepare_source(made, "notes", {}, store.begin(out, run, "second", {}, keep_partial=True))
    assert len(again) == 1


def test_pubmed_versions_replace_each_other_across_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "PART_BYTES", 1)

    def citation(pmid, text):
        return (
            f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>T{pmid}</ArticleTitle><Abstract>"
            f"<AbstractText>{text}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"
        )

    files = {
        "pubmed25n0001.xml.gz": [citation(n, f"old {n}") for n in (1, 2, 3)],
        "pubmed25n0002.xml.gz": [citation(2, "new 2"), citation(4, "four")],
        "pubmed25n0003.xml.gz": ["<DeleteCitation><PMID>3</PMID></DeleteCitation>", citation(5, "five")],
    }
    folder = tmp_path / "pubmed"
    folder.mkdir()
    for name, records in files.items():
        text = f"<PubmedArticleSet>{''.join(records)}</PubmedArticleSet>"
        (folder / name).write_bytes(gzip.compress(text.encode()))
    facts, _ = make(recipe(folder, "literature"), tmp_path / "out")
    lines = [(tmp_path / "out" / name).read_text().splitlines() for name in ("train.jsonl", "heldout.jsonl")]
    assert {json.loads(line)["text"] for some in lines for line in some} == {
        "T1\nold 1", "T2\nnew 2", "T4\nfour", "T5\nfive",
    }  # fmt: skip
    assert facts["records"] == {
        "read": 6, "kept": 4, "rejected": 0, "duplicates": 2, "contaminated": 0, "refused": 0,
    }  # fmt: skip


def test_a_saved_dataset_is_read_once_whatever_its_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(first_pass, "PART_BYTES", 1)
    rng = random.Random(2)
    made = datasets.Dataset.from_list([{"text": note(rng)} for _ in range(30)])
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    out = tmp_path / "out"
    out.mkdir()
    source = SourceSection(path=str(tmp_path / "saved"), kind="clinical", format="huggingface")
    whole = recipe("unused").model_copy(update={"data": {"notes": source}})
    assert prepare_source(whole, "notes", {}, out).as_json()["records"]["read"] == 30


def test_parts_are_cut_where_names_say_so(tmp_path, monkeypatch):
    """A file that comes in between moves no border but its own."""
    monkeypatch.setattr(first_pass, "PART_BYTES", 3000)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(200):
        (folder / f"s{number:03d}.txt").write_text("x" * 100)
    before = {tuple(group) for group in first_pass._parts(sorted(folder.iterdir()))}
    (folder / "s100a.txt").write_text("x" * 100)
    after = {tuple(group) for group in first_pass._parts(sorted(folder.iterdir()))}
    assert len(before) > 3 and len(after - before) <= 2
    assert np.mean([len(group) for group in before]) < 61
