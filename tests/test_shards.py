"""A corpus cleaned in shards by datatrove is what one machine makes of it. Needs the extra `datatrove`; Ray: `ray`."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qmedtune.data.prepare import prepare_source
from qmedtune.data.shards import passes
from qmedtune.data.shards.job import JOB, FileSeen, cut_evenly, plan_job
from qmedtune.errors import QmedtuneError
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import Recipe

SCRIPT = Path(__file__).parents[1] / "examples" / "many_machines.py"
SOURCES = ("articles", "notes", "asked")
QUESTION = "Does vitamin C given before anaesthesia shorten the stay of adults after hip surgery?"
HEADER = " ".join(f"boilerplate{n}" for n in range(30))


def words(rng, count):
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(count))


def like(rng, text):
    """One word of 60 changed."""
    tokens = text.split(" ")
    tokens[rng.randrange(len(tokens))] = f"x{rng.randrange(10**6)}"
    return " ".join(tokens)


def corpus(folder, num, num_files=5, seed=0):
    """Texts, notes of patients and questions in files; a tenth of each are copies of earlier ones, also across files
    and sources, exact or near; some are damaged, refused, contaminated, or hold identifiers."""
    rng, earlier = random.Random(seed), []
    for source in SOURCES:
        rows = []
        for i in range(num):
            text = words(rng, 60)
            roll = rng.random()
            if earlier and roll < 0.05:
                text = rng.choice(earlier)
            elif earlier and roll < 0.15:
                text = like(rng, rng.choice(earlier))
            elif roll < 0.17:
                text += f" zz {QUESTION.upper()} yy"
            elif roll < 0.18:
                text = ""
            elif roll < 0.23:
                text = f"{HEADER} {text}"
            elif roll < 0.3:
                text = f"Name: Anna Weber  MRN: {rng.randrange(10**7):07d}\n{text}\u200b\r\n  seen on 03/04/2021"
            if text:
                earlier.append(text)
            rows.append(row_of(source, i, text, rng))
        write(folder / source, rows, num_files)
    (folder / "bench.json").write_text(json.dumps([{"question": QUESTION, "options": {"A": "yes"}, "answer_idx": "A"}]))


def row_of(source, number, text, rng):
    if source == "asked":
        return {"instruction": text, "input": words(rng, 5) if number % 3 else "", "output": words(rng, 8)}
    if source == "notes":
        return {"note_id": f"n{number}", "subject_id": rng.randrange(50), "text": text, "ISERROR": number % 97 == 3}
    return {"abstract": text, "pmid": str(number)}


def write(folder, rows, num_files):
    folder.mkdir(parents=True)
    size = -(-len(rows) // num_files)
    for number in range(num_files):
        lines = [json.dumps(row) + "\n" for row in rows[number * size : (number + 1) * size]]
        (folder / f"{number}.jsonl").write_text("".join(lines))


def recipe_file(folder, sources=SOURCES, phi="redact"):
    kinds = {"articles": {"kind": "literature"}, "asked": {"kind": "instructions"}}
    kinds["notes"] = {"kind": "clinical", "split_by": "patient", "phi": phi}
    data = {name: {"path": str(folder / name), **kinds[name]} for name in sources}
    stages = [{"cpt": {"mix": {"articles": 1, "notes": 1}}}, {"sft": {"data": "asked"}}]
    recipe = {
        "name": "t", "model": {"base": "builtin:tiny"}, "data": data,
        "hygiene": {"max_bad_fraction": 0.2},
        "stages": stages[: len(sources) - 1],
        "evaluate": {"tasks": [{"task": "medqa", "path": str(folder / "bench.json")}]},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def on_one_machine(recipe, out):
    """The sources of a recipe as a run makes them: folders and ledgers by name."""
    folders, ledgers = {}, {}
    for name in recipe.used_sources():
        folders[name] = out / name
        folders[name].mkdir(parents=True)
        inputs = {other: folders[other] for other in recipe.compared_with(name)}
        ledgers[name] = prepare_source(recipe, name, inputs, folders[name]).as_json()
    return folders, ledgers


def from_shards(recipe, shards, out):
    """The same, of a recipe that reads the shards and leaves to them what was done there."""
    data = {}
    for name, source in recipe.data.items():
        data[name] = source.model_copy(update={"path": str(shards / name / "shards"), "phi": "off"})
    near = recipe.hygiene.dedup.model_copy(update={"near": False})
    hygiene = recipe.hygiene.model_copy(update={"dedup": near})
    return on_one_machine(recipe.model_copy(update={"data": data, "hygiene": hygiene}), out)


def many_machines(*args, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=1800)


def assert_the_same(recipe, shards, tmp_path):
    """Ledgers, and what is trained on and held out, byte for byte."""
    folders, alone = on_one_machine(recipe, tmp_path / "alone")
    again, _ = from_shards(recipe, shards, tmp_path / "again")
    for name in recipe.used_sources():
        ledger = json.loads((shards / name / "ledger.json").read_text())
        assert ledger.pop("sha256") is None and alone[name].pop("sha256")
        assert ledger == alone[name], name
        for part in ("train.jsonl", "heldout.jsonl"):
            assert (again[name] / part).read_bytes() == (folders[name] / part).read_bytes(), (name, part)
        assert (shards / name / "rejects.jsonl").read_bytes() == (folders[name] / "rejects.jsonl").read_bytes()
    return alone


def assert_eventful(ledgers):
    """A corpus in which nothing happens would prove nothing."""
    for name, ledger in ledgers.items():
        records = ledger["records"]
        assert records["duplicates"] >= ledger["near_duplicates"] > 0, name
        assert min(records["rejected"] + records["refused"], records["contaminated"]) > 0, name
    assert ledgers["notes"]["records"]["duplicates"] > ledgers["notes"]["near_duplicates"]
    assert ledgers["notes"]["near"]["of_earlier_sources"] > 3 and ledgers["notes"]["phi"]["records"] > 20


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_SECRETS", str(tmp_path / "secrets"))
    return tmp_path / "secrets"


@pytest.fixture
def planned(tmp_path, secrets):
    """(recipe, folder of the job) of a small corpus."""
    corpus(tmp_path, 60)
    recipe = load_recipe(recipe_file(tmp_path)).recipe
    plan_job(recipe, tmp_path / "job", 3)
    return recipe, tmp_path / "job"


def do_all(recipe, out):
    for name in recipe.used_sources():
        num = len(json.loads((out / JOB).read_text())["value"]["sources"][name]["shards"])
        for shard in range(num):
            passes.treat(out, name, shard)
        passes.compare(out, name)
        for shard in range(num):
            passes.write(out, name, shard, passes.kept_records(out, name, shard))
        passes.check(out, name)


def test_two_workers_make_what_one_machine_makes(tmp_path, secrets):
    pytest.importorskip("datatrove")
    corpus(tmp_path, 400)
    path = recipe_file(tmp_path, ("articles", "notes"))
    said = many_machines(path, tmp_path / "job", "--tasks", "3", "--workers", "2")
    assert said.returncode == 0, said.stderr[-2000:]
    recipe = load_recipe(path).recipe
    alone = assert_the_same(recipe, tmp_path / "job", tmp_path)
    assert_eventful(alone)
    logs = [file.read_text(errors="replace") for file in (tmp_path / "job" / "logs").rglob("*") if file.is_file()]
    assert logs and not any("Anna Weber" in log for log in [*logs, said.stdout, said.stderr])
    names = sorted(file.name for file in (tmp_path / "job" / "notes" / "shards").glob("[!.]*"))
    assert names == [f"0000{n}-of-00003.jsonl.gz" for n in range(3)]


def test_number_of_shards_changes_nothing(tmp_path, secrets):
    corpus(tmp_path, 250)
    recipe = load_recipe(recipe_file(tmp_path)).recipe
    made = []
    for tasks in (1, 4):
        out = tmp_path / f"job{tasks}"
        plan_job(recipe, out, tasks)
        do_all(recipe, out)
        lines = b""
        for shard in sorted((out / "notes" / "shards").glob("*.gz")):
            lines += gzip.decompress(shard.read_bytes())
        made.append((lines, (out / "notes" / "ledger.json").read_text()))
    assert made[0] == made[1]
    assert_eventful(assert_the_same(recipe, out, tmp_path))


def test_versions_of_pubmed_replace_each_other_across_shards(tmp_path, secrets):
    def citation(pmid, text):
        return (
            f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>T</ArticleTitle>"
            f"<Abstract><AbstractText>{text}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"
        )

    folder, rng = tmp_path / "articles", random.Random(1)
    folder.mkdir()
    for number in range(4):
        articles = "".join(citation(10 * number + i - 3 * (number > 0), words(rng, 60)) for i in range(10))
        gone = "<DeleteCitation><PMID>1</PMID></DeleteCitation>" if number == 3 else ""
        (folder / f"pubmed26n000{number}.xml").write_text(f"<PubmedArticleSet>{articles}{gone}</PubmedArticleSet>")
    recipe = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"articles": 1}}}],
        "data": {"articles": {"path": str(folder), "kind": "literature"}},
    })  # fmt: skip
    plan_job(recipe, tmp_path / "job", 4)
    do_all(recipe, tmp_path / "job")
    alone = assert_the_same(recipe, tmp_path / "job", tmp_path)
    assert alone["articles"]["records"]["duplicates"] == 4


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def refused(work, *args):
    with pytest.raises(QmedtuneError) as caught:
        work(*args)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 6 and "Anna Weber" not in message
    return message


def test_a_shard_that_is_missing_or_cut_off_is_named_and_made_again(planned):
    recipe, out = planned
    for shard in range(3):
        passes.treat(out, "articles", shard)
    records = out / "articles" / "treated" / "00001.jsonl"
    whole = records.read_bytes()
    records.write_bytes(whole[:-100])
    assert "shard 2 of 3 is missing or damaged\ngive the same command again" in refused(passes.compare, out, "articles")
    records.unlink()
    assert "shard 2 of 3 is missing or damaged" in refused(passes.compare, out, "articles")
    passes.treat(out, "articles", 1)
    assert records.read_bytes() == whole
    (out / "notes" / "treated" / ".77-00000.jsonl").write_text("of a task that was killed")
    do_all(recipe, out)
    assert not list(out.rglob(".77-*"))
    written = out / "notes" / "shards" / "00002-of-00003.jsonl.gz"
    last = written.read_bytes()
    written.write_bytes(last[:-50])
    assert "1 of 3 shards missing or damaged: 00002-of-00003.jsonl.gz" in refused(passes.check, out, "notes")
    assert not passes.is_whole(out)
    do_all(recipe, out)
    assert written.read_bytes() == last and passes.is_whole(out)


def test_two_machines_with_one_process_number_do_not_write_into_each_others_files(planned, monkeypatch):
    """A scheduler took the first for dead: on a shared file system the second treats the same shard meanwhile."""
    _, out = planned
    unfinished: list[str] = []
    in_batches = passes.in_batches

    def interrupted(*args):
        if not unfinished:  # the first has its files open
            unfinished.extend(path.name for path in (out / "notes" / "treated").glob(".[0-9]*-*"))
            passes.treat(out, "notes", 0)
        return in_batches(*args)

    monkeypatch.setattr(passes, "in_batches", interrupted)
    monkeypatch.setattr(passes.os, "getpid", lambda: 4242)
    num = passes.treat(out, "notes", 0)
    assert unfinished and all(name.startswith(".4242-") for name in unfinished)  # what `check` sweeps
    assert not list((out / "notes" / "treated").glob(".[0-9]*-*"))
    assert passes.treat(out, "notes", 0) == num > 0  # is found whole


def test_a_run_refuses_a_folder_of_shards_that_are_not_all_there(planned, tmp_path):
    recipe, out = planned
    do_all(recipe, out)
    (out / "articles" / "shards" / "00001-of-00003.jsonl.gz").unlink()
    message = refused(from_shards, recipe, out, tmp_path / "again")
    assert "1 of 3 shards are missing or cut off" in message and "00001-of-00003.jsonl.gz" in message


def test_the_corpus_must_be_what_was_planned(planned, tmp_path):
    _, out = planned
    file = tmp_path / "articles" / "4.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"{len(whole):,} when the job was planned" in refused(passes.treat, out, "articles", 2)
    file.unlink()
    assert f"{file} is not there" in refused(passes.treat, out, "articles", 2)


def test_a_machine_with_other_versions_is_named(planned):
    _, out = planned
    held = json.loads((out / JOB).read_text())["value"]
    held["versions"]["numpy"] = "1.2.3"
    from qmedtune.hashes import write_checked

    write_checked(out / JOB, held)
    assert "numpy" in (said := refused(passes.treat, out, "articles", 0)) and "the job began with 1.2.3" in said


def test_a_machine_without_the_secret_makes_none(planned, secrets):
    _, out = planned
    moved = shutil.move(secrets / "surrogates.key", secrets / "elsewhere")
    said = refused(passes.treat, out, "notes", 0)
    assert "a secret that is not here" in said and "not there" in said
    assert not (secrets / "surrogates.key").exists()
    (secrets / "surrogates.key").write_bytes(b"another one of the same length.."[:32])
    (secrets / "surrogates.key").chmod(0o600)
    assert "another one" in refused(passes.treat, out, "notes", 0)
    shutil.move(moved, secrets / "surrogates.key")
    passes.treat(out, "notes", 0)


def test_a_folder_belongs_to_one_job(planned, tmp_path):
    recipe, out = planned
    plan_job(recipe, out, 3)
    assert "another number of shards" in refused(plan_job, recipe, out, 2)
    with (tmp_path / "articles" / "0.jsonl").open("a") as file:
        file.write('{"abstract": "one more"}\n')
    assert "begun with other sources (first: " in refused(plan_job, recipe, out, 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    assert "holds no job" in refused(plan_job, recipe, tmp_path / "full", 3)


def test_what_cannot_be_cut_is_refused(planned, tmp_path):
    recipe, _ = planned
    limited = recipe.data["articles"].model_copy(update={"max_records": 5})
    data = {**recipe.data, "articles": limited}
    said = refused(plan_job, recipe.model_copy(update={"data": data}), tmp_path / "new", 3)
    assert "data.articles.max_records" in said
    builtin = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"one": 1}}}],
        "data": {"one": {"path": "builtin:literature", "kind": "literature"}},
    })  # fmt: skip
    assert "no source of this recipe is read from files" in refused(plan_job, builtin, tmp_path / "new", 3)


def test_an_error_of_ours_leaves_no_text_in_the_logs(planned, monkeypatch):
    pytest.importorskip("datatrove")
    from datatrove.executor.local import LocalPipelineExecutor

    from qmedtune.data.shards import blocks

    def breaks(out, name, shard):
        note = "Name: Anna Weber"
        raise ValueError(note)

    _, out = planned
    monkeypatch.setattr(passes, "treat", breaks)
    logs = out / "logs"
    with pytest.raises(blocks.ShardError, match="ValueError in test_shards.py"):
        LocalPipelineExecutor([blocks.Treat(str(out), "notes")], tasks=1, workers=1, logging_dir=str(logs)).run()
    assert blocks.errors_in(out)[0].startswith("notes-treat-00000: ValueError in test_shards.py")
    assert not any(
        "Anna Weber" in file.read_text() for file in out.rglob("*") if file.is_file() and file.suffix != ".jsonl"
    )


def test_files_are_cut_into_neighbours_of_equal_bytes():
    def cut(sizes, tasks):
        groups = cut_evenly([FileSeen(path=str(n), size=size, mtime_ns=0) for n, size in enumerate(sizes)], tasks)
        assert [file.path for group in groups for file in group] == [str(n) for n in range(len(sizes))]
        return [sum(file.size for file in group) for group in groups]

    assert cut([10] * 12, 3) == [40, 40, 40]
    assert cut([10, 90, 10, 10, 80], 2) == [110, 90] or cut([10, 90, 10, 10, 80], 2) == [100, 100]
    assert len(cut([1, 1, 1000], 8)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_twenty_thousand_documents(tmp_path, secrets, executor):
    """Ray on one machine, 20,000 documents in three sources: the same records and ledgers as on one."""
    pytest.importorskip("datatrove")
    if executor == "ray":
        pytest.importorskip("ray")
    corpus(tmp_path, 6667, num_files=12)
    path = recipe_file(tmp_path)
    said = many_machines(path, tmp_path / "job", "--tasks", "6", "--workers", "2", "--executor", executor)
    assert said.returncode == 0, said.stderr[-2000:]
    alone = assert_the_same(load_recipe(path).recipe, tmp_path / "job", tmp_path)
    assert_eventful(alone)
    assert sum(alone[name]["records"]["read"] for name in SOURCES) == 20_001
    print(json.dumps({name: {**alone[name]["records"], "near": alone[name]["near_duplicates"]} for name in SOURCES}))
    again = many_machines(path, tmp_path / "job", "--tasks", "6", "--workers", "2", "--executor", executor)
    assert again.returncode == 0 and again.stdout == said.stdout
