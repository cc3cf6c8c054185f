"""What a step's key must notice, and what it must not: files named in a recipe, and settings that packing reads."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import MICRO
from llama_folders import llama2_folder

from qmedtune import base, keys, store
from qmedtune.parsing.loader import load_recipe
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import ModelSection, Recipe
from qmedtune.run import steps_of
from qmedtune.smoke import smoke


def micro(*settings: str) -> Recipe:
    return load_recipe(MICRO, settings).recipe


def source_section(folder: Path, recipe: Recipe) -> dict:
    return keys.source_section(recipe, "literature", store.HashCache(folder / "hashes.json"))


def test_a_listed_benchmark_that_changes_is_checked_against_again(tmp_path: Path):
    listed = tmp_path / "exam.jsonl"
    recipe = micro(f"hygiene.decontaminate=[{listed}]")
    absent = source_section(tmp_path, recipe)
    listed.write_text('{"question": "one"}\n')
    first = source_section(tmp_path, recipe)
    listed.write_text('{"question": "another"}\n')
    assert absent != first != source_section(tmp_path, recipe)


def test_a_listed_benchmark_makes_data_independent_of_the_evaluation(tmp_path: Path):
    listed = f"hygiene.decontaminate=[{tmp_path / 'exam.jsonl'}]"
    other = "evaluate.tasks=[]"
    assert source_section(tmp_path, micro(listed)) == source_section(tmp_path, micro(listed, other))
    assert source_section(tmp_path, micro()) != source_section(tmp_path, micro(other))


def test_every_file_of_a_benchmark_folder_counts(tmp_path: Path):
    folder = tmp_path / "mmlu"
    folder.mkdir()
    (folder / "anatomy.csv").write_text("a\n")
    recipe = micro(f"evaluate.tasks=[{{task: mmlu, path: {folder}}}]")
    hashes = store.HashCache(tmp_path / "hashes.json")
    before = keys.evaluation_section(recipe, hashes)
    (folder / "genetics.csv").write_text("b\n")
    assert keys.evaluation_section(recipe, hashes) != before


def test_an_edited_template_file_packs_again(tmp_path: Path):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"name": "mine"}))
    recipe = micro(f"data.instructions.template={template}")
    before = keys.tokens_section(recipe, 1)
    template.write_text(json.dumps({"name": "ours"}))
    assert keys.tokens_section(recipe, 1) != before
    assert keys.tokens_section(recipe, 0) == keys.tokens_section(micro(), 0)


def test_what_carries_the_loss_changes_the_validation_rows():
    on = "validate.on=[instructions]"
    assert keys.validation_section(micro(on)) != keys.validation_section(micro(on, "stages[1].sft.loss_on=all"))


def test_a_chat_template_is_part_of_a_base(tmp_path: Path):
    folder = llama2_folder(tmp_path / "base")

    def digest() -> str:
        return base.identify(ModelSection(base=str(folder)), offline=True).digest

    before = digest()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert digest() != before


def test_smoke_takes_nothing_that_was_chosen_for_another_card():
    recipe = smoke(load_recipe(MICRO.parent / "llama3_1b_colab_t4.yaml").recipe)
    assert recipe.model.compute_dtype == recipe.model.attention == recipe.model.kernels == recipe.memory == "auto"
    assert smoke(micro("hygiene.decontaminate=[exam.jsonl]")).hygiene.decontaminate == "evaluation"


def test_an_evaluation_compares_with_the_base_before_anything_was_folded_into_it(tmp_path: Path):
    hashes = store.HashCache(tmp_path / "hashes.json")

    def needs(*settings: str) -> dict[str, str]:
        recipe, _ = resolve(micro(*settings))
        return {step.name: step.needs for step in steps_of(recipe, recipe, hashes)}["evaluation"]

    folded = needs("stages[1].sft.adapter=merge_then_new")
    assert (folded["origin"], folded["base"], folded["adapter-1"]) == ("base", "02-sft-base", "02-sft/adapter")
    assert "origin" not in needs() and needs()["base"] == "base"


def test_a_report_that_changes_its_patient_is_read_again(tmp_path: Path):
    """MIMIC-CXR: the folder names the patient, the file the study; the text alone does not tell them."""
    recipe, places = micro(f"data.literature.path={tmp_path / 'files'}"), []
    for patient in ("p10000001", "p10000002"):
        folder = tmp_path / "files" / "p10" / patient
        folder.mkdir(parents=True)
        (tmp_path / "files" / "p10" / "s1.txt").write_text("FINDINGS: none")
        (tmp_path / "files" / "p10" / "s1.txt").rename(folder / "s1.txt")
        (tmp_path / "files" / "p10" / "s0.txt").write_text("FINDINGS: some")
        places.append(source_section(tmp_path, recipe)["files"])
        (folder / "s1.txt").unlink()
    assert places[0] != places[1]


def test_a_hub_dataset_is_keyed_by_its_commit_and_stays_so_offline(tmp_path: Path, monkeypatch):
    import huggingface_hub

    recipe = micro("data.literature.path=owner/texts", "data.literature.format=huggingface")
    answers = iter(["c0ffee", "c0ffee", "decaf", OSError("no network")])

    class Api:
        def dataset_info(self, name, revision, timeout):
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            return type("Info", (), {"sha": answer})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    hashes = store.HashCache(tmp_path / "hashes.json")
    keyed = [keys.source_section(recipe, "literature", hashes)["files"] for _ in range(4)]
    assert keyed[0] == keyed[1] == [["owner/texts", "c0ffee"]]
    assert keyed[2] == keyed[3] == [["owner/texts", "decaf"]]


def test_every_file_of_another_model_counts(tmp_path: Path):
    """Of a folder and of a run, also of one that trained all parameters: what is read of it or copied from it."""
    for place in (".", "merged", "02-sft/model"):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
    (tmp_path / "02-sft" / "template.json").write_text("{}")
    recipe = load_recipe(MICRO, [f"merge.with={tmp_path}"]).recipe
    marks = keys.merge_section(recipe)
    for path in sorted(tmp_path.rglob("*.*")):
        path.write_text('{"other": 1}')
        changed = keys.merge_section(recipe)
        assert changed != marks, path
        marks = changed
    (tmp_path / "run.json").write_text("{}")  # written again by every report
    assert keys.merge_section(recipe) == marks
