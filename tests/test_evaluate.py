"""The evaluation step and `evaluate_model` on a random Llama-3.2-shaped folder with an adapter."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_recipe, make_run
from llama_folders import llama3_folder, write_adapter
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmedtune import api, evaluate, store
from qmedtune.data.packing import templates
from qmedtune.data.packing.framing import codec_of
from qmedtune.data.packing.pack import PackedRows, WholeDocuments, pack_validation
from qmedtune.data.prepare import prepare_source
from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import read_records
from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation import measure, scoring, statistics
from qmedtune.model_stack import ModelStack
from qmedtune.planning import precision
from qmedtune.planning.machine import card_of
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.reporting.facts import ALL, comparisons
from qmedtune.results import BaseAndFinal, Evaluation, Merge, Shift

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
MEDQA = {"question": "Which drug?", "options": {"A": "aspirin", "B": "insulin"}, "answer_idx": "B"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/, adapter/ with its template beside it, merged/ (another model), validation/."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluate")
    base = llama3_folder(root / "base", max_position_embeddings=512)
    llama3_folder(root / "merged", seed=5, max_position_embeddings=512)
    write_adapter(base, root / "stage" / "adapter", seed=1, size=0.5)
    templates.save(templates.load("alpaca"), root / "stage")
    for name in ("notes", "validation"):
        (root / name).mkdir()
    prepare_source(recipe(root), "notes", {}, root / "notes")
    pack_validation(recipe(root), base, {"notes": root / "notes"}, root / "validation")
    return root


def recipe(root: Path, tasks: list | None = None, merge: dict | None = None, **section) -> Recipe:
    notes = {"path": "builtin:micro/notes", "kind": "clinical", "split_by": "patient", "holdout": 0.3}
    return make_recipe(
        {"notes": notes},
        [{"cpt": {"mix": {"notes": 1.0}, "seq_len": 64}}],
        str(root / "base"),
        model={"compute_dtype": "float32"},
        merge=merge or {},
        evaluate={"tasks": tasks or ["facts"], "perplexity": ["notes"], "batch": 16, **section},
    )


def inputs(root: Path) -> evaluate.EvaluatedModels:
    trained = ModelStack(root / "base", (root / "stage" / "adapter",), root / "stage")
    return evaluate.EvaluatedModels(trained, merged=root / "merged", validation=root / "validation")


def items(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("evaluated")
    return evaluate.evaluate_step(recipe(folder), inputs(folder), out).as_json(), out


def test_scores_follow_from_the_items(evaluated):
    result, out = evaluated
    facts, lines = result["tasks"]["facts"], items(out / "facts.items.jsonl")
    assert len(lines) == facts["base"]["n"] == facts["final"]["n"] == 20
    for label in ("base", "final"):
        correct = [line[label]["prediction"] == line["gold"] for line in lines]
        assert facts[label]["accuracy"] == pytest.approx(sum(correct) / 20)
        assert facts[label]["ci95"] == list(statistics.wilson(sum(correct), 20))
        assert facts[label]["chance"] == pytest.approx(1 / 20)
        said = facts[label]["generation"]
        assert said["n"] == 20 and 0 <= said["unparsed"] <= 20
    before = [line["base"]["correct"] for line in lines]
    after = [line["final"]["correct"] for line in lines]
    paired = statistics.mcnemar(before, after)
    assert facts["paired"] == {
        "test": "McNemar exact",
        "gained": paired.gained,
        "lost": paired.lost,
        "p_value": paired.p_value,
    }
    assert json.loads((out / "evaluation.json").read_text()) == result
    assert sorted(path.name for path in out.glob("*.*")) == ["evaluation.json", "facts.items.jsonl"]


def test_facets_divide_the_items(evaluated):
    facts = evaluated[0]["tasks"]["facts"]
    assert set(facts["facets"]) == {"treats", "adverse"}
    for label in ("base", "final"):
        parts = [part[label] for part in facts["facets"].values()]
        assert sum(part["n"] for part in parts) == 20
        assert sum(part["accuracy"] * part["n"] for part in parts) / 20 == pytest.approx(facts[label]["accuracy"])


def test_base_and_final_are_different_models_on_the_same_text(evaluated):
    result, out = evaluated
    text = result["perplexity"]["notes"]
    assert text["base"] != text["final"] and text["tokens"] > 100
    lines = items(out / "facts.items.jsonl")
    assert all(line["base"]["logprobs"] != line["final"]["logprobs"] for line in lines)


def whole_documents(folder: Path) -> WholeDocuments:
    return WholeDocuments(PackedRows(folder / "validation" / "notes"), 512)


def text_perplexity(model, folder: Path) -> float:
    """Of the text alone: the marks that close a document are counted apart."""
    marks = codec_of(AutoTokenizer.from_pretrained(folder / "base")).special_ids
    return scoring.perplexity(model, whole_documents(folder), marks=marks).perplexity


def loaded(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_full16_evaluates_the_merged_folder(folder, evaluated, tmp_path):
    result = evaluate.evaluate_step(recipe(folder, precision="full16"), inputs(folder), tmp_path).as_json()
    alone = text_perplexity(loaded(folder / "merged", torch.float32), folder)
    assert result["perplexity"]["notes"]["final"] == pytest.approx(alone, rel=1e-5)
    assert (result["precision"], result["weights"]) == ("full16", "float32")
    assert "nf4" not in result["perplexity"]["notes"]


def test_delivered_scores_are_those_of_the_merged_folder_and_the_untouched_base(folder, evaluated):
    """Loaded again by plain transformers in the merge's dtype: the same perplexity, and the same for the base."""
    result, _ = evaluated
    text = result["perplexity"]["notes"]
    assert (result["precision"], result["weights"]) == ("delivered", "bfloat16")
    for label, name in (("base", "base"), ("final", "merged")):
        model = loaded(folder / name, torch.bfloat16).to(getattr(torch, result["computed_in"]))
        assert text[label] == pytest.approx(text_perplexity(model, folder), rel=2e-3)
    documents = list(whole_documents(folder))
    predicted = sum(int((row["labels"][1:] != -100).sum()) for row in documents)
    assert text["tokens"] + text["marks"] == predicted and text["marks"] == len(documents)


def test_nf4_stands_beside_what_is_delivered_and_is_what_nf4_alone_gives(folder, evaluated, tmp_path):
    beside = evaluated[0]["perplexity"]["notes"]["nf4"]
    trained = evaluate.evaluate_step(recipe(folder, precision="nf4"), inputs(folder), tmp_path).as_json()
    assert trained["precision"] == trained["weights"] == "nf4"
    for label in ("base", "final"):
        assert trained["perplexity"]["notes"][label] == pytest.approx(beside[label], rel=1e-6)
    assert beside["base"] != evaluated[0]["perplexity"]["notes"]["base"]


def test_without_a_merged_folder_the_base_and_its_adapters_are_scored_in_the_merge_dtype(folder, tmp_path):
    """A refused merge: the scores are those of a real merge of the same adapter, up to 16 bit."""
    without = replace(inputs(folder), merged=None)
    asked = recipe(folder, merge={"dtype": "float32"})
    result = evaluate.evaluate_step(asked, without, tmp_path).as_json()
    assert (result["precision"], result["weights"]) == ("delivered", "float32")
    out = tmp_path / "made"
    out.mkdir()
    merge(without.trained, out, asked)
    alone = text_perplexity(loaded(out, torch.float32), folder)
    assert result["perplexity"]["notes"]["final"] == pytest.approx(alone, rel=1e-4)


def merge(stack: ModelStack, out: Path, asked: Recipe) -> None:
    from qmedtune.merge import MergeJob
    from qmedtune.merge import merge as fold

    fold(MergeJob(stack, asked.merge, asked.model), out)


def test_what_does_not_fit_the_card_is_scored_in_nf4_and_says_so(folder):
    """An evaluation never stops a run: 16-bit weights beyond the card are a reason, not an error."""
    small = replace(card_of(8.0), memory_bytes=2 * 1024**3)
    taken = precision.decide(recipe(folder), machine=small)
    assert (taken.name, taken.weights) == ("nf4", "nf4") and "bfloat16 takes" in (taken.why or "")
    assert taken.facts("delivered")["asked"] == "delivered"
    taken = precision.decide(recipe(folder, precision="full16"), machine=small)
    assert taken.name == "nf4" and taken.facts("full16")["asked"] == "full16" and "float32 takes" in (taken.why or "")
    roomy = precision.decide(recipe(folder), machine=card_of(24.0))
    assert (roomy.name, roomy.weights, roomy.computed_in, roomy.why) == ("delivered", "bfloat16", "bfloat16", None)
    old = precision.decide(recipe(folder), machine=card_of(16.0, bf16=False))
    assert (old.weights, old.computed_in) == ("bfloat16", "float16")


@pytest.mark.parametrize("asked", ["delivered", "full16"])
def test_where_memory_runs_out_in_16_bit_both_are_scored_in_nf4(folder, evaluated, tmp_path, monkeypatch, asked):
    original = evaluate.open_contender

    def crowded(found, contender):
        if contender.label == "final" and not contender.taken.quantised:
            raise torch.OutOfMemoryError("injected")
        return original(found, contender)

    monkeypatch.setattr(evaluate, "open_contender", crowded)
    result = evaluate.evaluate_step(recipe(folder, precision=asked), inputs(folder), tmp_path).as_json()
    assert (result["precision"], result["asked"], result["weights"]) == ("nf4", asked, "nf4")
    assert any(said.startswith("scored in NF4, not as delivered: memory ran out") for said in result["warnings"])
    for label, value in evaluated[0]["perplexity"]["notes"]["nf4"].items():
        assert result["perplexity"]["notes"][label] == pytest.approx(value, rel=1e-6)
    asked_in = recipe(folder)
    nowhere = asked_in.model_copy(update={"model": asked_in.model.model_copy(update={"quantization": "none"})})
    assert precision.after_no_room(nowhere, precision.decide(nowhere)) is None


def test_where_memory_runs_out_in_scoring_batches_shrink_and_scores_stay(folder, tmp_path, monkeypatch):
    section = recipe(folder, tasks=[{"task": "facts", "limit": 12}])
    whole = evaluate.evaluate_step(section, inputs(folder), tmp_path / "whole").as_json()
    score, nll = scoring._score, scoring.rows_nll

    def small(model, batch, shared):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("injected")
        return score(model, batch, shared)

    def few(model, rows, batches):
        for batch in batches:
            if sum(len(rows[index]["input_ids"]) for index in batch) > 300:
                raise torch.OutOfMemoryError("injected")
            yield from nll(model, rows, [batch])

    monkeypatch.setattr(scoring, "_score", small)
    monkeypatch.setattr(scoring, "rows_nll", few)
    shrunk = evaluate.evaluate_step(section, inputs(folder), tmp_path / "shrunk").as_json()
    assert shrunk["precision"] == "delivered"
    for label in ("base", "final"):
        assert shrunk["tasks"]["facts"][label]["accuracy"] == whole["tasks"]["facts"][label]["accuracy"]
        assert shrunk["perplexity"]["notes"][label] == pytest.approx(whole["perplexity"]["notes"][label], rel=1e-4)
    monkeypatch.setattr(scoring, "_score", lambda *rest: small(None, [1, 2, 3], None))
    with pytest.raises(torch.OutOfMemoryError):
        measure.within_memory(lambda tokens: scoring._score(None, [], None), 4096)


def test_a_large_shift_between_trained_and_delivered_is_a_warning():
    assert precision.shift_warning(Merge(shift_from_nf4=Shift(kl=0.28, top1=0.69)))
    assert precision.shift_warning(Merge(shift_from_nf4=Shift(kl=0.01, top1=0.96))) is None
    assert precision.shift_warning(Merge(shift_from_nf4=None)) is None
    delivered = BaseAndFinal(base=20.0, final=15.2)
    told = precision.quantisation_note("notes", delivered, BaseAndFinal(base=26.0, final=15.34))
    assert told == "notes: perplexity -41% in NF4 but -24% delivered: the rest repaired quantisation"
    assert precision.quantisation_note("notes", delivered, BaseAndFinal(base=20.4, final=15.4)) is None


def test_documents_are_read_whole_and_every_token_once(folder):
    """Rows of 64 tokens cut documents; whole ones are what the tokenizer makes of each held-out text."""
    rows, whole = PackedRows(folder / "validation" / "notes"), whole_documents(folder)
    lengths = rows.document_lengths()[rows.drawn_documents()]
    assert max(lengths) > 64 and [len(row["input_ids"]) for row in whole] == lengths.tolist()
    cut = WholeDocuments(rows, 40)
    assert max(len(row["input_ids"]) for row in cut) == 40
    assert sum(int((row["labels"] != -100).sum()) for row in cut) == sum(lengths) - len(lengths)


def test_killed_evaluation_continues_and_gives_the_same(folder, tmp_path, monkeypatch):
    """Killed in the middle of the final model's task: nothing that was scored is scored again or reported half."""
    scored, real = [], measure._score
    monkeypatch.setattr(measure, "PART", 8)  # 20 items: three parts for each of two models
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = evaluate.evaluate_step(recipe(folder), inputs(folder), whole).as_json()

    def dies(model, task, questions, done):
        scored.append(len(questions))
        if len(scored) == 5:
            raise KeyboardInterrupt
        return real(model, task, questions, done)

    monkeypatch.setattr(measure, "_score", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_step(recipe(folder), inputs(folder), cut)
    assert [path.name for path in cut.iterdir()] == [store.SCRATCH]
    assert evaluate.evaluate_step(recipe(folder), inputs(folder), cut).as_json() == expected
    assert scored == [8, 8, 4, 8, 8, 8, 4]
    assert {p.name: p.read_bytes() for p in cut.glob("*.*")} == {p.name: p.read_bytes() for p in whole.glob("*.*")}


def test_no_text_of_a_source_is_written(folder, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**MEDQA, "question": "Zebrafish complains of quinsy?"}) + "\n")
    task = {"task": "medqa", "path": str(path)}
    out = tmp_path / "out"
    out.mkdir()
    evaluate.evaluate_step(recipe(folder, [task]), inputs(folder), out)
    written = "".join(file.read_text() for file in out.rglob("*") if file.is_file())
    assert "Zebrafish" not in written and "aspirin" not in written
    assert items(out / "medqa.items.jsonl")[0]["gold"] == "B"


def test_every_kind_of_metric_is_summed_up_and_compared(folder, tmp_path):
    """Generated only (ROUGE, hallmarks), ranked (AUROC) and labels (macro F1) in one evaluation."""
    records = {
        "summarization": [{"text": f"Note {n} on aspirin.", "summary": f"aspirin {n}"} for n in range(4)],
        "hoc": [{"text": f"Cells {n}", "labels": ["inducing angiogenesis"] if n % 2 else []} for n in range(4)],
        "outcome": [{"text": f"Note {n}", "label": n % 2} for n in range(6)],
        "bionli": [
            {"premise": f"P{n}", "hypothesis": "H", "label": ("entailment", "contradiction")[n % 2]} for n in range(4)
        ],
    }
    tasks = []
    for name, lines in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks.append({"task": name, "path": str(tmp_path / f"{name}.jsonl")})
    out = tmp_path / "out"
    out.mkdir()
    found = evaluate.evaluate_step(recipe(folder, tasks, perplexity=[]), inputs(folder), out).as_json()["tasks"]
    metrics = {"summarization": "rougeL", "hoc": "macro_f1", "outcome": "auroc", "bionli": "macro_f1"}
    for name, metric in metrics.items():
        for label in ("base", "final"):
            scores = found[name][label]
            assert scores["metric"] == metric and scores["n"] == len(records[name])
            assert scores["mean"] == scores[metric] and 0 <= scores[metric] <= 1
            assert scores["ci95"][0] <= scores[metric] <= scores["ci95"][1] + 1e-9
        assert len(items(out / f"{name}.items.jsonl")) == len(records[name])
        low, high = found[name]["difference"]["ci95"]
        assert low <= found[name]["final"][metric] - found[name]["base"][metric] + 1e-9 and low <= high
    assert "paired" in found["bionli"] and "paired" not in found["summarization"]
    assert "chance" not in found["bionli"]["base"]
    assert "aspirin" not in (out / "summarization.items.jsonl").read_text()
    odds = [line["base"]["logprobs"][1] - line["base"]["logprobs"][0] for line in items(out / "outcome.items.jsonl")]
    assert found["outcome"]["base"]["auroc"] == pytest.approx(roc_auc_score([0, 1] * 3, odds))


def test_zero_shot_and_few_shot_side_by_side_base_against_final(folder, evaluated, tmp_path):
    tasks = ["facts", {"task": "facts", "shots": 2}]
    found = evaluate.evaluate_step(recipe(folder, tasks, perplexity=[]), inputs(folder), tmp_path).as_json()["tasks"]
    assert found["facts"] == evaluated[0]["tasks"]["facts"]
    lines = items(tmp_path / "facts-2shot.items.jsonl")
    assert len(lines) == 60 and {line["draw"] for line in lines} == {0, 1, 2}
    assert all(len(line["shots"]) == 2 and line["id"] not in line["shots"] for line in lines)
    few = found["facts-2shot"]
    for label in ("base", "final"):
        right: list[list[bool]] = [[], [], []]
        for line in lines:
            right[line["draw"]].append(line[label]["correct"])
        assert few[label]["draws"] == pytest.approx([sum(draw) / 20 for draw in right])
        assert few[label]["accuracy"] == pytest.approx(sum(few[label]["draws"]) / 3)
        assert (few[label]["n"], few[label]["shots"], len(few[label]["generation"]["draws"])) == (20, 2, 3)
    change = few["difference"]
    assert change["value"] == pytest.approx(few["final"]["accuracy"] - few["base"]["accuracy"])
    low, high = change["ci95"]
    assert low <= change["value"] + 1e-9 and change["value"] <= high + 1e-9
    told = {(c.task, c.part): c for c in comparisons(make_run(evaluation=Evaluation.model_validate({"tasks": found})))}
    assert ("facts-2shot", ALL) in told and told["facts-2shot", ALL].final.n == 20


def test_bad_benchmark_stops_before_anything_is_scored(folder, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**MEDQA, "answer_idx": "C"}) + "\n")
    with pytest.raises(DataError, match=r"q.jsonl:1"):
        evaluate.evaluate_step(
            recipe(folder, ["facts", {"task": "medqa", "path": str(path)}]), inputs(folder), tmp_path
        )
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]


# ---- any one model ---------------------------------------------------------------------------------------------------


def test_adapter_folder_brings_its_template_and_equals_the_run(folder, evaluated, tmp_path):
    notes = tmp_path / "notes.jsonl"
    records = read_records("n", SourceSection(path="builtin:micro/notes", kind="clinical"), Rejects("n"))
    notes.write_text("".join(json.dumps({"text": record["text"]}) + "\n" for record in list(records)[:5]))
    result = api.evaluate_model(
        str(folder / "stage" / "adapter"),
        ["facts", f"perplexity={notes}"],
        base=str(folder / "base"),
        generate=False,
        limit=8,
        offline=True,
    )
    assert result["template"] == "alpaca" and result["quantization"] == "nf4"
    assert result["tasks"]["facts"]["model"]["n"] == 8
    assert "generation" not in result["tasks"]["facts"]["model"]
    [text] = result["perplexity"].values()
    assert text["model"] > 1 and text["tokens"] > 50


def test_every_token_of_a_long_text_is_predicted_once_and_counted_per_byte(folder, tmp_path):
    """A text of several windows and a short one; bits per byte do not depend on how many tokens a tokenizer makes."""
    texts = ["Zinc and aspirin at night. " * 60, "\u00e9t\u00e9"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows, size = measure.text_rows(tokenizer, path, 512)
    tokens = sum(len(ids) for ids in scoring.encode(tokenizer, texts))  # bos is not, eos is
    assert len(rows) > 2 and all(len(row["input_ids"]) <= 512 for row in rows)
    assert sum(int((row["labels"] != -100).sum()) for row in rows) == tokens
    assert size == sum(len(text.encode()) for text in texts) > sum(map(len, texts))
    found = api.evaluate_model(str(folder / "base"), [f"perplexity={path}"], template="alpaca", offline=True)
    [text] = found["perplexity"].values()
    assert (text["tokens"], text["marks"]) == (tokens - len(texts), len(texts))
    assert text["bits_per_byte"] == pytest.approx(np.log2(text["model"]) * text["tokens"] / size)
    marks = codec_of(tokenizer).special_ids
    assert text["model"] == pytest.approx(
        scoring.perplexity(base, rows, marks=marks).perplexity, rel=0.02
    )  # bf16 beside fp32


def test_finished_evaluation_is_not_repeated(folder, tmp_path, monkeypatch):
    def ask() -> dict:
        return api.evaluate_model(
            str(folder / "base"), ["facts"], template="alpaca", limit=3, generate=False, out=tmp_path, offline=True
        )

    first = ask()
    monkeypatch.setattr(measure, "measure", None)
    assert ask() == first
    monkeypatch.undo()
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["tasks"] == first["tasks"]


def test_a_corrected_answer_is_scored_again(folder, tmp_path):
    path = tmp_path / "q.jsonl"

    def accuracy(answer: str) -> float:
        path.write_text(json.dumps({**MEDQA, "answer_idx": answer}) + "\n")
        asked = {"template": "alpaca", "generate": False, "out": tmp_path / "out", "offline": True}
        found = api.evaluate_model(str(folder / "base"), [f"medqa={path}"], **asked)
        return found["tasks"]["medqa"]["model"]["accuracy"]

    assert {accuracy("A"), accuracy("B")} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("base", ["fact"], "did you mean 'facts'"),
        ("base", ["medqa"], "is read from a file"),
        ("base", ["perplexity"], "no file of texts"),
        ("absent", ["facts"], "absent"),
    ],
)
def test_bad_requests_are_refused(folder, name, tasks, message):
    with pytest.raises(RecipeError, match=message):
        api.evaluate_model(str(folder / name), tasks, offline=True)


def test_unfinished_run_says_what_to_do(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "x", "status": "stopped"}))
    with pytest.raises(RecipeError, match="no merged model yet"):
        api.evaluate_model(str(tmp_path), ["facts"], offline=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="real data absent")
def test_real_pubmedqa_on_a_random_model(folder, tmp_path):
    path = REAL / "eval" / "pubmedqa_train.json"
    result = api.evaluate_model(
        str(folder / "base"), [f"pubmedqa={path}"], template="alpaca", limit=5, out=tmp_path, offline=True
    )
    scores = result["tasks"]["pubmedqa"]["model"]
    assert scores["n"] == 5 and scores["chance"] == pytest.approx(1 / 3)
    assert scores["truncated"] == 5  # 512 positions do not hold an abstract in these 512 tokens: said, not hidden
