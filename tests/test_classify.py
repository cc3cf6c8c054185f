"""A classify stage: which weights move, what is scored on, AUROC by hand, and that it is a branch of the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO
from safetensors.torch import load_file
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight as sklearn_weights

from qmedtune import interrupt, keys, store, train
from qmedtune.data.packing.classes import HELD_OUT, IDS, LABELS, VALIDATION, LabelledRows, pack_classes
from qmedtune.data.packing.pack import StageToPack
from qmedtune.data.reading.records import label_of
from qmedtune.data.reading.rejects import Unusable
from qmedtune.data.synthetic import outcomes
from qmedtune.data.synthetic.world import make_world
from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation.statistics import auroc
from qmedtune.model_stack import ModelStack
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import Recipe
from qmedtune.smoke import smoke
from qmedtune.steps import steps_of
from qmedtune.training import classify
from qmedtune.training.checkpoints import BEST
from qmedtune.training.classify import result
from qmedtune.training.trainer import make_optimizer

SOURCE = "{path: builtin:micro/outcomes, kind: clinical, split_by: patient, columns: {label: label}}"


def stage(**keys: object) -> str:
    given = {"data": "outcome", "epochs": 2, "seq_len": 64, "batch": 4, **keys}
    return "{classify: {" + ", ".join(f"{k}: {str(v).lower()}" for k, v in given.items()) + "}}"


def recipe(*settings: str, **keys: object) -> Recipe:
    cpt = "{cpt: {mix: {literature: 1, notes: 1}, tokens: 2000, batch: 4}}"
    stages = f"stages=[{cpt}, {stage(**keys)}]"
    loaded = load_recipe(MICRO, [f"data.outcome={SOURCE}", stages, "adapter.train_embeddings=false", *settings])
    return resolve(loaded.recipe)[0]


def records(folder: Path, rows: list[tuple[str, object]], held_out: list[tuple[str, object]]) -> dict[str, Path]:
    for name, some in (("train", rows), ("heldout", held_out)):
        lines = [
            json.dumps({"id": f"{name}-{i}", "text": text, "label": label}) for i, (text, label) in enumerate(some)
        ]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return {"outcome": folder}


@pytest.fixture(scope="module")
def packed(micro_run, tmp_path_factory) -> Path:
    """The built-in labelled notes of the micro world, packed and sealed as a run does."""
    folder, out = tmp_path_factory.mktemp("records"), tmp_path_factory.mktemp("packed")
    split = {False: [], True: []}
    for record in outcomes.builtin_records("builtin:micro/outcomes"):
        split[record["held_out"]].append((record["text"], record["label"]))
    facts = pack_classes(
        StageToPack(recipe(), 1, micro_run.base, records(folder, split[False], split[True])), out
    ).as_json()
    store.seal(out, "test", facts)
    return out


def trained(micro_run, packed: Path, out: Path, earlier: Path, **keys: object) -> dict:
    inputs = train.StageInputs(ModelStack(micro_run.base, (earlier,)), packed)
    return train.train_stage(recipe(**keys), 1, inputs, out).as_json()


@pytest.fixture(scope="module")
def notes_adapter(micro_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cpt")
    train.train_stage(recipe(), 0, micro_run.inputs(), out)
    return out / "adapter"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def moved(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"adapter": "frozen"}, set()),
        pytest.param({"adapter": "continue"}, {"adapter"}, marks=pytest.mark.slow),
        pytest.param({"adapter": "new"}, {"adapter"}, marks=pytest.mark.slow),
        ({"adapter": "new", "train_earlier": True}, {"adapter", "earlier-1"}),
    ],
)
def test_each_way_trains_what_it_says(micro_run, packed: Path, notes_adapter: Path, tmp_path: Path, keys, left):
    """The four ways of Clinical LLaMA's comparison."""
    before = store.sha256_file(notes_adapter / "adapter_model.safetensors")
    facts = trained(micro_run, packed, tmp_path, notes_adapter, **keys)
    assert {path.parent.name for path in tmp_path.glob("*/adapter_model.safetensors")} == left
    assert store.sha256_file(notes_adapter / "adapter_model.safetensors") == before
    if keys["adapter"] == "continue":
        assert moved(tmp_path / "adapter", notes_adapter)
    if "earlier-1" in left:
        assert moved(tmp_path / "earlier-1", notes_adapter)
    head = load_file(tmp_path / "head.safetensors")
    assert head["weight"].shape == (2, 256) and head["weight"].abs().max() > 0
    found = facts["classification"]
    assert found["labels"] == 2 and found["n"] == found["held_out"] == 50 and 0 <= found["auroc"] <= 1
    assert facts["tokens"]["supervised"] == 2 * found["documents"]
    items = [json.loads(line) for line in (tmp_path / "heldout.items.jsonl").read_text().splitlines()]
    assert len(items) == 50 and items[0].keys() == {"id", "gold", "highest"}


@pytest.mark.parametrize("multi_label", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_the_text_tells_is_learnt(micro_run, notes_adapter: Path, tmp_path: Path, multi_label: bool):
    """Labels that are words of the text: held-out notes are told apart, those of two labels by both."""
    rng = np.random.default_rng(0)
    words = ("nausea", "rash", "cough")

    def note() -> tuple[str, str]:
        said = sorted(rng.choice(words, size=1 + (multi_label and rng.random() < 0.5), replace=False))
        return f"Nursing note: day {rng.integers(2, 9)}, pt reports {' and '.join(said)}.", ", ".join(said)

    for name in ("in", "packed", "out"):
        (tmp_path / name).mkdir()
    inputs = records(tmp_path / "in", [note() for _ in range(80)], [note() for _ in range(40)])
    keys = {"multi_label": multi_label, "epochs": 5, "batch": 2, "lr": 3e-3}
    store.seal(
        tmp_path / "packed",
        "t",
        pack_classes(StageToPack(recipe(**keys), 1, micro_run.base, inputs), tmp_path / "packed").as_json(),
    )
    facts = trained(micro_run, tmp_path / "packed", tmp_path / "out", notes_adapter, **keys)
    found = facts["classification"]
    assert found["auroc"] > 0.75 and found["ci95"][0] > 0.65 and found["scored_labels"] == 3
    assert facts["loss"]["last"] < 0.6 * facts["loss"]["first"]


def stop_after(step: int):
    """Raise the flag that SIGTERM raises, once this optimiser step is done."""
    original = train.StageCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            interrupt.stop.signal = 15
        original(self, args, state, control, **kwargs)

    return on_step_end


@pytest.mark.slow
def test_a_stopped_stage_goes_on_to_the_same_weights(micro_run, packed, notes_adapter, tmp_path, monkeypatch):
    keys = {"adapter": "new", "train_earlier": True}
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    whole = trained(micro_run, packed, tmp_path / "whole", notes_adapter, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(train.StageCallback, "on_step_end", stop_after(2))
        with pytest.raises(interrupt.Interrupted):
            trained(micro_run, packed, tmp_path / "halves", notes_adapter, **keys)
    monkeypatch.setattr(interrupt.stop, "signal", None)
    halves = trained(micro_run, packed, tmp_path / "halves", notes_adapter, **keys)
    assert halves["steps"] == whole["steps"] > 2 and halves["classification"] == whole["classification"]
    for name in ("head.safetensors", "adapter/adapter_model.safetensors", "earlier-1/adapter_model.safetensors"):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "halves" / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_rows_name_each_document_at_its_last_token(packed: Path):
    rows = LabelledRows(packed / HELD_OUT)
    seen = []
    for row in range(len(rows)):
        labels = rows[row]["labels"]
        ends = np.flatnonzero(labels != -100)
        assert list(ends) == list(np.cumsum(rows.pieces(row)[:, 2]) - 1)
        seen += labels[ends].tolist()
    assert sorted(seen) == list(range(rows.num_documents)) == list(range(len(rows.targets)))


def test_labels_are_those_of_training_and_unknown_ones_are_counted(micro_run, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    rows = [("a note", "b, a"), ("a note too", "c"), ("a third", ["a"])]
    inputs = records(tmp_path / "in", rows, [("held", "a;c"), ("out", "z")])
    facts = pack_classes(StageToPack(recipe(multi_label=True), 1, micro_run.base, inputs), tmp_path / "out").as_json()
    assert json.loads((tmp_path / "out" / LABELS).read_text()) == ["a", "b", "c"]
    assert np.load(tmp_path / "out" / "targets.npy").tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert np.load(tmp_path / "out" / HELD_OUT / "targets.npy").tolist() == [[1, 0, 1], [0, 0, 0]]
    assert facts["classes"] == {"labels": 3, "documents": 3, "held_out": 2, "unknown": 1}


@pytest.mark.parametrize(
    ("rows", "held", "said"),
    [
        ([("a", "x"), ("b", "x")], [("c", "x")], "1 label in all"),
        ([("a", "x"), ("b", "y")], [], "nothing is held out"),
    ],
)
def test_what_cannot_be_learnt_or_scored_is_refused(micro_run, tmp_path: Path, rows, held, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=said):
        pack_classes(StageToPack(recipe(), 1, micro_run.base, records(tmp_path / "in", rows, held)), tmp_path / "out")


def test_auroc_by_hand_and_by_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    assert auroc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])) == 0.75
    assert auroc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5
    assert np.isnan(auroc(np.array([1.0, 2.0]), np.array([True, True])))
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 300).astype(float), rng.random(300) < 0.3
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))


def test_the_macro_average_leaves_out_labels_that_all_or_none_have():
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], np.uint8)
    scores = np.array([[2.0, 1, 0], [1.0, 2, 0], [4.0, 3, 0], [3.0, 4, 0]])
    found = result(targets, scores, list("abcd"), seed=0)
    assert (found.auroc, found.scored_labels, found.n) == (0.75, 1, 4)
    assert result(targets[:, 1:], scores[:, 1:], list("abcd"), seed=0).auroc is None


def test_the_interval_counts_patients_not_their_notes():
    """Ten notes of each patient that say the same leave the interval as wide as one note each does."""
    rng = np.random.default_rng(1)
    right = rng.random(40) < 0.5
    targets, scores = (
        np.stack([right, ~right], 1).astype(np.uint8),
        rng.normal(size=(40, 2)) + np.eye(2)[right.astype(int)],
    )
    once = result(targets, scores, [str(i) for i in range(40)], seed=0)
    many = result(np.repeat(targets, 10, 0), np.repeat(scores, 10, 0), [str(i // 10) for i in range(400)], seed=0)
    assert many.auroc == pytest.approx(once.auroc) and (many.n, many.patients) == (400, 40)
    width = [found.ci95[1] - found.ci95[0] for found in (once, many)]
    assert width[0] == pytest.approx(width[1], rel=0.25)


def test_a_classify_stage_is_a_branch():
    made = recipe()
    more = made.model_copy(update={"stages": [*made.stages, made.stages[1]]})
    needs = {step.name: step.needs for step in steps_of(more, more, store.HashCache(Path("unwritten")))}
    assert needs["02-classify"]["adapter-1"] == needs["03-classify"]["adapter-1"] == "01-cpt/adapter"
    assert needs["merged"] == {"base": "base", "adapter-1": "01-cpt/adapter", "validation": "data/validation"}
    assert "validation" not in needs["02-classify"] and needs["data/02-classify"]["outcome"] == "data/outcome"


def test_a_plan_counts_what_is_trained():
    def planned(**keys: object) -> dict:
        path = [f"data.outcome={SOURCE}", "adapter.train_embeddings=false"]
        stages = "stages=[{cpt: {mix: {notes: 1}, tokens: 2000}}, " + stage(**keys) + "]"
        return make_plan(load_recipe(MICRO, [*path, stages]).recipe)["stages"][1]

    frozen, continued = planned(adapter="frozen"), planned(adapter="continue")
    assert frozen["trained_parameters"] == 0 < continued["trained_parameters"]
    assert 0 < frozen["trained"] == continued["trained"] and frozen["peak_bytes"] < continued["peak_bytes"]


def test_a_note_may_be_read_on_and_labelled():
    made = recipe("evaluate.tasks=[]")
    steps = {step.name: step.needs for step in steps_of(made, made, store.HashCache(Path("unwritten")))}
    assert steps["data/outcome"] == {} and "data/literature" in steps["data/notes"].values()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stages[1].classify.adapter=none"], "allowed: continue, new, frozen"),
        (["stages[1].classify.adapter=continue", "stages[1].classify.train_earlier=true"], "nothing earlier to train"),
        (["stages[0].cpt.adapter=frozen"], "only a classify stage"),
        (["data.outcome.columns={}"], r"columns: \{label: NAME\}"),
        (["data.outcome.holdout=0.0"], "held out to score on"),
        (["stages[1].classify.data=instructions"], "classify reads texts"),
        (["stages[1].classify.loss_on=all"], "unknown key"),
    ],
)
def test_wrong_values_are_told(settings: list[str], said: str):
    with pytest.raises(RecipeError, match=said):
        recipe(*settings, adapter="new")


def test_labels_are_names_or_lists_of_them():
    assert [label_of(v) for v in ("x", 1, 1.0, True, ["a", 2])] == ["x", "1", "1", "true", ["a", "2"]]
    for bad in (None, "", float("nan"), [None], {"a": 1}):
        with pytest.raises(Unusable):
            label_of(bad)


def test_the_built_in_outcomes_follow_from_effects_that_the_text_does_not_tell():
    world = make_world("micro")
    found = list(outcomes.records(world))
    assert {r["label"] for r in found if r["held_out"]} == set(outcomes.LABELS.values())
    drugs = {drug.name: drug for drug in world.new}
    for row in found:
        drug = drugs[row["patient"].removeprefix("out-")]
        assert drug.effect not in row["text"] and drug.name in row["text"]
        assert row["label"] == outcomes.LABELS[drug.effect in outcomes.SERIOUS]


def test_smoke_gives_labelled_sources_the_built_in_labels():
    smoked = smoke(load_recipe(MICRO.parent / "systems" / "clinical_llama.yaml").recipe)
    assert smoked.data["outcome"].path == "builtin:outcomes" and smoked.data["outcome"].columns == {"label": "label"}
    assert smoked.data["notes"].path == "builtin:notes"


def test_balanced_weights_are_scikit_learns_and_change_the_loss():
    """Classes of 6, 3 and 1: 10 / (3 x count). Over the documents they are 1 on average."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    targets = np.eye(3, dtype=np.uint8)[labels]
    theirs = sklearn_weights("balanced", classes=np.arange(3), y=labels)
    assert classify.class_weights(targets, multi_label=False) == pytest.approx(theirs)
    assert classify.class_weights(targets, multi_label=False)[labels].mean() == pytest.approx(1.0)
    assert classify.class_weights(targets, multi_label=True) == pytest.approx([4 / 6, 7 / 3, 9 / 1])
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    plain, balanced = (classify.Head(8, targets, False, on).nll(logits, torch.from_numpy(targets)) for on in (0, 1))
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    assert float(balanced) == pytest.approx(float((each * torch.from_numpy(theirs[labels])).sum()), rel=1e-5)
    assert float(plain) == pytest.approx(float(each.sum()), rel=1e-5)


def test_auprc_and_f1_are_scikit_learns():
    generator = np.random.default_rng(5)
    targets, scores = (generator.random((80, 4)) < 0.3).astype(np.uint8), generator.integers(-4, 5, (80, 4)) / 2
    found = classify.result(targets, scores, [str(i) for i in range(80)], 0)
    assert found.auprc == pytest.approx(metrics.average_precision_score(targets, scores, average="macro"))
    chosen = classify.decided(targets, scores, multi_label=True)
    for average in ("micro", "macro"):
        theirs = metrics.f1_score(targets, scores > 0, average=average, zero_division=0)
        assert chosen[f"{average}_f1"] == pytest.approx(theirs)
    labels = targets.argmax(1)
    single = classify.decided(np.eye(4, dtype=np.uint8)[labels], scores, multi_label=False)
    assert single["accuracy"] == single["micro_f1"] == pytest.approx((scores.argmax(1) == labels).mean())
    theirs = metrics.f1_score(labels, scores.argmax(1), average="macro", labels=sorted(set(labels)), zero_division=0)
    assert single["macro_f1"] == pytest.approx(theirs)


def test_a_stage_may_have_an_adapter_and_an_epsilon_of_its_own(micro_run, packed, notes_adapter, tmp_path):
    keys_given = {"adapter": "new", "lora": "{r: 2, alpha: 3}", "adam_eps": 1e-5, "class_weights": "balanced"}
    facts = trained(micro_run, packed, tmp_path, notes_adapter, **keys_given)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert recipe(**keys_given).adapter_of(0).r == recipe().adapter.r != 2
    again = load_file(tmp_path / "heldout.scores.safetensors")
    known = again["targets"].sum(1) > 0
    targets, scores = again["targets"][known].numpy(), again["scores"][known].numpy()
    areas = [metrics.roc_auc_score(t, s) for t, s in zip(targets.T, scores.T, strict=True) if 0 < t.sum() < len(t)]
    assert facts["classification"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    section = recipe(**keys_given).stages[1].section
    assert make_optimizer(torch.nn.Linear(2, 2), section).defaults["eps"] == 1e-5


def test_what_stages_did_before_keeps_its_key():
    """The new keys at their defaults are no change: a stage of version 0.1 stays finished."""
    section = keys.training_section(recipe(), recipe(), 1)["training"]
    assert not {"adam_eps", "lora", "class_weights"} & section.keys()
    changed = recipe(adam_eps=1e-6)
    assert keys.training_section(changed, changed, 1)["training"]["adam_eps"] == 1e-6


# ---- weights that validation chooses ---------------------------------------------------------------------------------


def noted(folder: Path, patients: int, each: int = 2) -> dict[str, Path]:
    """Notes of patients, each of one label, and as many held out of others."""
    words = ("nausea", "rash")
    for name in ("train", "heldout"):
        lines = []
        for number in range(patients * each):
            who = number // each
            text = f"Nursing note: day {number % 7 + 2}, pt reports {words[who % 2]}."
            record = {"id": f"{name}-{number}", "patient": f"{name}-{who}", "text": text, "label": words[who % 2]}
            lines.append(json.dumps(record) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"outcome": folder}


def ids_in(folder: Path) -> set[str]:
    return {name for name, _ in json.loads((folder / IDS).read_text())}


def test_whole_patients_are_set_apart_and_nobody_is_in_two_parts(micro_run, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    inputs = noted(tmp_path / "in", 40)
    facts = pack_classes(StageToPack(recipe(validation=0.25), 1, micro_run.base, inputs), tmp_path / "out").as_json()
    parts = [ids_in(tmp_path / "out"), ids_in(tmp_path / "out" / VALIDATION), ids_in(tmp_path / "out" / HELD_OUT)]
    patients = [{int(name.partition("-")[2]) // 2 for name in part} for part in parts]
    assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 40
    assert 4 <= len(patients[1]) <= 16 and len(parts[2]) == 80
    assert facts["classes"]["validation"] == len(parts[1]) == 80 - facts["classes"]["documents"]
    assert not list((tmp_path / "out").glob("*.jsonl"))  # no second copy of the text
    plain = pack_classes(StageToPack(recipe(), 1, micro_run.base, inputs), tmp_path / "out").as_json()
    assert plain["classes"]["documents"] == 80 and "validation" not in plain["classes"]


def test_one_patient_cannot_be_set_apart(micro_run, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="one patient"):
        pack_classes(
            StageToPack(recipe(validation=0.25), 1, micro_run.base, noted(tmp_path / "in", 1, 8)), tmp_path / "out"
        )


def test_the_weights_with_the_lowest_validation_loss_are_kept(micro_run, notes_adapter: Path, tmp_path: Path):
    """Later epochs are not the best, and what is scored are the kept weights."""
    for name in ("in", "packed", "out"):
        (tmp_path / name).mkdir()
    keys = {"validation": 0.25, "epochs": 5, "batch": 2, "lr": 1.0, "adapter": "frozen", "class_weights": "balanced"}
    keys |= {"schedule": "constant", "warmup": "{ratio: 1.0}"}  # small steps learn, then larger ones overshoot
    inputs = noted(tmp_path / "in", 20)
    asked = recipe("validate={}", **keys)  # at the end of each epoch
    packing = pack_classes(StageToPack(asked, 1, micro_run.base, inputs), tmp_path / "packed")
    store.seal(tmp_path / "packed", "t", packing.as_json())
    stage_inputs = train.StageInputs(ModelStack(micro_run.base, (notes_adapter,)), tmp_path / "packed")
    facts = train.train_stage(asked, 1, stage_inputs, tmp_path / "out").as_json()
    losses = {found["step"]: found["outcome"] for found in facts["validation"] if found["step"]}
    assert len(losses) >= 5 and facts["kept_by"] == ["outcome"]
    assert facts["kept_step"] == min(losses, key=losses.__getitem__) and len(set(losses.values())) > 1
    assert facts["kept_step"] < facts["steps"]
    assert facts["classification"]["validation"] == len(ids_in(tmp_path / "packed" / VALIDATION))
    kept = load_file(tmp_path / "out" / "head.safetensors")
    best = load_file(tmp_path / "out" / store.SCRATCH / BEST)
    assert torch.equal(kept["weight"], best["head.linear.weight"])


def test_without_validation_keys_are_as_before():
    before, now = recipe(), recipe(validation=0.125)
    assert "validation" not in keys.tokens_section(before, 1)["packing"]
    assert keys.tokens_section(now, 1)["packing"]["validation"] == 0.125
    assert keys.training_section(before, before, 1) == keys.training_section(now, now, 1)
