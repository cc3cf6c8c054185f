"""`merge.sweep`: the two parts of the items share nothing, the rule, and a whole run that searches for a share."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MICRO, ROOT

from qmedtune import claims, interrupt, plan, record, report, store, sweep
from qmedtune.ablate import ablate
from qmedtune.ablation.arms import arms_of
from qmedtune.errors import RecipeError
from qmedtune.evaluation import choosing, halves
from qmedtune.evaluation.measure import MeasuredModel
from qmedtune.evaluation.scoring import Perplexity
from qmedtune.export import ExportJob, export
from qmedtune.exporting import push
from qmedtune.merging.sibling import clinical_sources, find
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.reporting import sweeps
from qmedtune.results import Merge, MixedWith, Run, SweepPoint
from qmedtune.run import run
from qmedtune.smoke import smoke
from qmedtune.steps import steps_of
from qmedtune.tasks import load_task
from qmedtune.tasks.item_parts import identified, part_of

SIBLING = ("name=sibling", "stages=[{sft: {data: instructions, epochs: 1, batch: 16}}]", "evaluate.perplexity=[]",
           "validate.on=[]", "evaluate.tasks=[{task: facts, limit: 6}]")  # fmt: skip
TEXTS = "evaluate.perplexity=[literature, notes, general]"
CPT = ("stages=[{cpt: {mix: {literature: 8, notes: 8, general: 4}, tokens: 4000, batch: 4}}]", TEXTS)


def searching(sibling: object, **keys: str) -> list[str]:
    """Overrides of the micro recipe: CPT, mixed with `sibling`."""
    asked = {"lambda": "[0, 0.5, 1]", "choose": "answers", **keys}
    told = ", ".join(f"{key}: {value}" for key, value in asked.items())
    return [*CPT, f"merge.with={sibling}", f"merge.sweep={{{told}}}", "evaluate.template=alpaca"]


# ---- the two parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_items_are_in_one_part_alone_and_in_all_words(share: float):
    tasks = "evaluate.tasks=[{task: facts, limit: 20}, {task: facts, shots: 2}]"
    recipe = load_recipe(MICRO, [tasks, f"evaluate.development={share}"]).recipe
    [chosen_by] = halves.development_tasks(recipe)  # without examples both are one
    scored, with_examples = halves.scored_tasks(recipe)
    development = {item.id for item in chosen_by.items}
    assert development and not development & {item.id for item in scored.items}
    assert len(development) + len(scored.items) == 20
    assert not development & {item.id for item in with_examples.items}  # without a limit there are more to draw from
    whole = load_recipe(MICRO, ["evaluate.tasks=[{task: facts, shots: 2}]", f"evaluate.development={share}"]).recipe
    [others] = halves.development_tasks(whole)
    assert not {item.id for item in others.items} & {item.id for item in with_examples.items}
    assert {item.id for draw in with_examples.draws for item in draw} == {item.id for item in with_examples.items}


def test_an_item_has_one_part_under_every_limit_and_in_other_words(tmp_path: Path):
    """By rank, a question would be chosen by in a task of 400 and scored in one of 40."""
    rows = []
    for number in range(400):
        rows.append({"id": f"q{number}", "question": f"Which is {number}?", "options": ["a", "b"], "answer": 0})
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spaced = tmp_path / "spaced.jsonl"  # under other names, and with other options
    for row in rows:
        row |= {"id": f"other-{row['id']}", "question": row["question"].upper() + " ", "options": ["a", "c"]}
    spaced.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts: dict[str, str] = {}
    for file in (path, spaced):
        for limit in (400, 199, 40):
            recipe = load_recipe(MICRO, ["evaluate.development=0.3"]).recipe
            task = load_task(TaskSection(task="choice", path=str(file), limit=limit), 5, "micro")
            for part in ("development", "scored"):
                for item in part_of(task, recipe, part).items:
                    assert parts.setdefault(item.id.removeprefix("other-"), part) == part
    assert 0.2 < list(parts.values()).count("development") / 400 < 0.4
    other_seed = load_recipe(MICRO, ["evaluate.development=0.3", "evaluate.items_seed=99"]).recipe
    drawn = {item.id: "development" for item in part_of(task, other_seed, "development").items}
    assert any(parts[name.removeprefix("other-")] == "scored" for name in drawn)


def test_the_plan_counts_the_items_that_are_scored():
    recipe = load_recipe(MICRO, ["evaluate.development=0.5"]).recipe
    [scored] = halves.scored_tasks(recipe)
    planned = plan.make_plan(recipe)["evaluation"]
    assert planned is not None and len(scored.items) < 20
    assert [task["questions"] for task in planned["tasks"]] == [len(scored.items)]


def test_without_a_share_everything_is_scored():
    recipe = load_recipe(MICRO).recipe
    [task] = halves.scored_tasks(recipe)
    assert recipe.development == 0 and len(task.items) == 20


def test_what_was_taken_from_one_thing_stays_together():
    recipe = load_recipe(MICRO, ["evaluate.development=0.5"]).recipe
    task = load_task(recipe.evaluate.tasks[0], 1, "micro")
    notes = [replace(item, group=f"note {number // 4}") for number, item in enumerate(task.items)]
    abstracts = [replace(item, id=f"{item.id}-2", pmid=f"{number // 3}") for number, item in enumerate(task.items)]
    whole = replace(task, items=tuple(identified([*notes, *abstracts])))
    development, scored = (part_of(whole, recipe, part) for part in ("development", "scored"))
    units = {item.group or item.pmid for item in development.items}
    assert units and not units & {item.group or item.pmid for item in scored.items}
    assert len(development.items) + len(scored.items) == 40


def test_too_few_items_are_refused_before_anything_is_trained():
    recipe = load_recipe(MICRO, ["evaluate.tasks=[{task: facts, limit: 1}]", "evaluate.development=0.5"]).recipe
    with pytest.raises(RecipeError, match=r"evaluate\.development"):
        halves.development_tasks(recipe)


# ---- the rule --------------------------------------------------------------------------------------------------------


def point(share: float, gain: float, loss: float | None, allowed: bool = True) -> SweepPoint:
    return SweepPoint(share=share, gain=gain, general_loss=loss, allowed=allowed)


def test_the_largest_gain_within_the_limit_is_chosen():
    points = [point(0, 0.5, 0.09, allowed=False), point(0.5, 0.4, 0.04), point(1, 0.4, 0.01)]
    assert choosing.choose(points) == (points[2], [])  # as good, and less is lost
    points = [point(0.5, 0.4, None), point(0, 0.4, None)]
    assert choosing.choose(points)[0] is points[1]  # less of the other model
    points = [point(0, 0.5, 0.2, allowed=False), point(1, 0.1, 0.1, allowed=False)]
    chosen, warnings = choosing.choose(points)
    assert chosen is points[1] and "the least loss was taken, 10.0%" in warnings[0]


def rows(right: list[bool], written: list[bool]) -> list[dict]:
    made = []
    for known, said in zip(right, written, strict=True):
        generation = {"correct": said, "parsed": True, "ended": "stop"}
        row = {"correct": known, "logprobs": [0.0, -1.0], "confidence": 0.7, "truncated": False}
        made.append({**row, "normalised": {"correct": known}, "generation": generation})
    return made


def perplexities(**values: float) -> dict[str, Perplexity]:
    return {name: Perplexity(value, 0.0, 10) for name, value in values.items()}


@pytest.mark.parametrize(
    ("choose", "gain"), [("tasks", 0.25), ("answers", 0.5), ("perplexity", pytest.approx(0.6931, abs=1e-4))]
)
def test_gain_and_loss_worked_by_hand(choose: str, gain: float):
    overrides = [*CPT, "merge.with=m", f"merge.sweep={{choose: {choose}, max_general_loss: 0.2}}"]
    recipe = load_recipe(MICRO, [*overrides, "evaluate.tasks=[{task: facts, limit: 8}]"]).recipe
    tasks = halves.development_tasks(recipe)
    rule = choosing.rule_of(recipe, recipe.merge.sweep, tasks)
    base = MeasuredModel(
        {"facts": rows([True, False, False, False], [False] * 4)}, perplexities(literature=8, notes=8, general=10)
    )
    mixed = MeasuredModel(
        {"facts": rows([True, True, False, False], [True, True, False, False])},
        perplexities(literature=2, notes=8, general=12.5),
    )
    found = choosing.point_of(rule, mixed, base, 0.5)
    assert found.gain == gain  # (1 + 1) / 4 - 1 / 4; 2 / 4; mean of ln(8 / 2) and ln(8 / 8)
    assert found.general_loss == pytest.approx(0.25) and found.allowed is False
    assert choosing.within_noise(rule, mixed, mixed) is (None if choose == "perplexity" else True)


def test_a_large_difference_is_no_noise():
    recipe = load_recipe(MICRO, [*CPT, "merge.with=m", "merge.sweep={choose: tasks}"]).recipe
    rule = choosing.rule_of(recipe, recipe.merge.sweep, halves.development_tasks(recipe))
    right, wrong = MeasuredModel({"facts": rows([True] * 10, [True] * 10)}, {}), rows([False] * 10, [True] * 10)
    assert choosing.within_noise(rule, MeasuredModel({"facts": wrong}, {}), right) is False


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sibling(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sibling") / "run"
    loaded = load_recipe(MICRO, SIBLING)
    run(loaded.recipe, loaded.text, folder, offline=True)
    return folder


@pytest.fixture(scope="module")
def searched(sibling: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Recipe, Run]]:
    """A run that is stopped after the first point, and goes on."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    loaded = load_recipe(MICRO, searching(sibling))
    patch, real, measured = pytest.MonkeyPatch(), sweep.Measuring.at, []

    def at(self, share):
        if len(measured) == 1 and share not in measured:
            measured.append(share)
            raise interrupt.Stopped("now")
        measured.append(share)
        return real(self, share)

    patch.setattr(sweep.Measuring, "at", at)
    with pytest.raises(interrupt.Stopped):
        run(loaded.recipe, loaded.text, folder, offline=True)
    patch.undo()
    yield folder, loaded.recipe, run(loaded.recipe, loaded.text, folder, offline=True)


def test_the_chosen_share_is_what_is_merged(searched):
    folder, recipe, found = searched
    assert found.finished and found.merge is not None
    assert [point.share for point in found.merge.sweep] == [0, 0.5, 1]
    assert found.merge.share == found.merge.chosen and found.merge.method == "linear"
    told = json.loads((folder / "run.json").read_text())["merge"]
    assert told["lambda"] == told["chosen"] and set(told["sweep"][0]) >= {"lambda", "tasks", "perplexity"}
    assert set(told["sweep"][0]["perplexity"]) == {"literature", "notes", "general"}
    best = max(point["gain"] for point in told["sweep"])
    assert next(point["gain"] for point in told["sweep"] if point["lambda"] == told["chosen"]) == best
    assert told["with"]["name"].endswith("run") and told["violations"] == 0
    assert not list((folder / "sweep").glob("**/*.safetensors")) and not (folder / "sweep" / "scratch").exists()


def test_the_final_score_is_taken_on_other_items(searched):
    folder, _, found = searched

    def ids(place: str) -> set[str]:
        lines = (folder / place / "facts.items.jsonl").read_text().splitlines()
        return {json.loads(line)["id"] for line in lines}

    assert len(ids("sweep")) == len(ids("evaluation")) == 10 and not ids("sweep") & ids("evaluation")
    assert found.scored.tasks["facts"].final is not None and found.scored.tasks["facts"].final.n == 10


def test_held_out_texts_are_parted_by_documents(searched):
    folder, recipe, _ = searched
    parts = []
    for part in ("development", "scored"):
        texts = halves.texts_of(recipe, folder / "data" / "validation", 64, part)
        parts.append({source: {window[0] for window in rows._windows} for source, rows in texts.items()})
    for source, documents in parts[0].items():
        assert documents and parts[1][source] and not documents & parts[1][source]


def test_report_and_card_tell_of_the_sweep(searched):
    folder, _, found = searched
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "How much of the other model" in page and 'class="sweep"' in page and "## Sweep" in text
    assert "the highest mean score of the tasks by the answers that are written" in text
    assert "chosen" in (folder / "merged" / "README.md").read_text()
    assert found.merge is not None and "lambda 0.5: gain" in sweeps.figure(found.merge)
    assert sweeps.figure(Merge()) == ""


def test_finished_is_finished_and_another_sibling_is_another_merge(searched, sibling: Path):
    folder, recipe, _ = searched
    loaded = load_recipe(MICRO, searching(sibling))
    before = (folder / "merged" / "seal.json").stat().st_mtime_ns
    run(loaded.recipe, loaded.text, folder, offline=True)
    assert (folder / "merged" / "seal.json").stat().st_mtime_ns == before


def test_what_the_other_model_has_seen_stays_with_the_mix(searched, sibling: Path, tmp_path: Path):
    """The run that searched read clinical notes; mixed into another one, it brings them along."""
    folder, _, _ = searched
    assert clinical_sources(find(str(folder), offline=True)) == {"notes": None}
    assert clinical_sources(find(str(folder / "merged"), offline=True)) == {"notes": None}
    assert clinical_sources(find(str(sibling), offline=True)) == {}
    whole = tmp_path / "trained whole"  # a run of all parameters has its model in the stage's folder
    shutil.copytree(folder / "merged", whole / "02-sft" / "model")
    shutil.copy(folder / "run.json", whole / "run.json")
    assert clinical_sources(find(str(whole / "02-sft" / "model"), offline=True)) == {"notes": None}
    other = MixedWith(name="elsewhere/notes-model", clinical={"notes": "MODELS MAY BE PUBLISHED"})
    run = record.load(sibling).model_copy(update={"merge": Merge(mixed_with=other)})
    store.write_json(tmp_path / "run.json", run.as_json())
    with pytest.raises(RecipeError, match="is mixed with notes-model, which was trained on clinical text"):
        push.check_terms(tmp_path, said=False)
    assert "notes-model was trained on clinical notes" in report.model_card(run)
    with pytest.raises(RecipeError, match=r"merge\.with"):
        export(ExportJob(str(folder), tmp_path / "out", "gguf-adapter"))


def test_a_sibling_of_another_base_costs_no_training(sibling: Path, tmp_path: Path):
    loaded = load_recipe(MICRO, [*CPT, "model.base=builtin:tiny", f"merge.with={sibling}"])
    from qmedtune import mixed_merge

    micro = load_recipe(MICRO, [*CPT, f"merge.with={tmp_path / 'no such run'}"])
    with pytest.raises(RecipeError, match="merge.with"):
        run(micro.recipe, micro.text, tmp_path / "out", offline=True)
    assert not (tmp_path / "out" / "01-cpt").exists()
    assert loaded.recipe.merge.other == str(sibling) and mixed_merge.HALF == 0.5


def test_the_merge_arm_is_the_recipe_and_the_others_leave_the_model_out(sibling: Path):
    recipe = load_recipe(MICRO, [*searching(sibling), "ablate={arms: [base, cpt, merge], seeds: 1}"]).recipe
    arms = {arm.name: arm for arm in arms_of(recipe, plan.resolve(recipe)[0])}
    assert list(arms) == ["base", "cpt", "merge"] and arms["merge"].is_reference and not arms["cpt"].is_reference
    plain, mixed = arms["cpt"].recipe, arms["merge"].recipe
    assert plain is not None and mixed is not None
    assert plain.merge.other is None and plain.merge.sweep is None and mixed.merge.other == str(sibling)
    [one], [two] = halves.scored_tasks(plain), halves.scored_tasks(mixed)
    assert [item.id for item in one.items] == [item.id for item in two.items]


def test_an_ablation_holds_the_mix_against_the_corpora_alone(searched, sibling: Path, tmp_path: Path):
    """End to end: the mixed arm is the run above, found finished; the other one shares its training."""
    folder, _, found = searched
    asked = load_recipe(MICRO, [*searching(sibling), "ablate={arms: [base, cpt, merge], seeds: 1}"])
    out = tmp_path / "ablation"
    mixed, plain = (out / "arms" / arm / "seed-17" for arm in ("merge", "cpt"))
    out.mkdir()
    claims.mark(out)
    shutil.copytree(folder, mixed)
    made = (mixed / "merged" / "seal.json").stat().st_mtime_ns
    result = ablate(asked, out, offline=True)
    assert result.status == "finished" and result.reference == "merge"
    assert (mixed / "merged" / "seal.json").stat().st_mtime_ns == made, "nothing of the finished arm was made again"
    adapter = "01-cpt/adapter/adapter_model.safetensors"
    assert (plain / adapter).stat().st_ino == (mixed / adapter).stat().st_ino, "trained once"
    assert not (plain / "sweep").exists() and record.load(plain).merge.share is None
    table = {(row["arm"], row["measure"]): row for row in csv.DictReader((out / "ablation.csv").open())}
    assert {arm for arm, _ in table} == {"base", "cpt", "merge"}
    final = found.scored.tasks["facts"].final
    assert final is not None and float(table["merge", "facts"]["mean"]) == pytest.approx(final.accuracy, abs=1e-4)
    base = found.scored.tasks["facts"].base
    assert base is not None and float(table["base", "facts"]["mean"]) == pytest.approx(base.accuracy, abs=1e-4)
    differences = (out / "differences.csv").read_text()
    assert "cpt,merge" in differences or "merge,cpt" in differences
    assert ">merge<" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["cpt_then_instruct", "llama3_8b_cpt_then_instruct"])
def test_shipped_recipes_are_planned_and_rehearsed_without_their_sibling(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml").recipe
    planned = plan.make_plan(recipe)
    assert planned["disk"]["parts"]["mix of the sweep"] == planned["disk"]["parts"]["merged model"] > 0
    assert any(note.startswith("merge.with:") for note in planned["notes"])
    rehearsed, _ = plan.resolve(smoke(recipe))
    assert rehearsed.merge.other == "builtin:tiny"
    steps = {step.name: step for step in steps_of(rehearsed, rehearsed, store.HashCache(tmp_path / "hashes.json"))}
    assert list(steps)[-3:] == ["sweep", "merged", "evaluation"]
    assert steps["merged"].folders["sweep"] == "sweep" and "merged" not in steps["sweep"].folders
