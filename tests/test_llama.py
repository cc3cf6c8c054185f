"""Real LLaMA folders, with random weights: load, CPT, SFT, merge, evaluate, and a plain reload by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MICRO
from llama_folders import llama2_folder, llama3_folder
from safetensors.torch import load_file, save_file

from qmedtune import model as models
from qmedtune import plan
from qmedtune.errors import RecipeError
from qmedtune.model_stack import INDEX
from qmedtune.parsing.loader import load_recipe
from qmedtune.results import Run
from qmedtune.run import run

DRUGS = ("metformin", "lisinopril", "aspirin", "warfarin", "ibuprofen", "insulin", "heparin", "digoxin")
USES = ("diabetes", "hypertension", "stroke", "thrombosis", "pain", "hyperglycaemia", "embolism", "heart failure")


def write_data(folder: Path) -> dict[str, dict]:
    """Three small sources in three formats, and multiple-choice items."""
    literature, notes, instructions, items = [], [], [], []
    for number in range(60):
        drug, use = DRUGS[number % 8], USES[number % 8]
        literature.append(
            {"id": f"l{number}", "text": f"Trial {number}: {drug} improved {use} in {number + 9} patients."}
        )
        notes.append(f'{number},p{number % 7},"HPI: on {drug}.\nPlan {number}: continue, review {use}."')
        instructions.append(
            {"instruction": f"What does {drug} treat? (case {number})", "input": "", "output": f"It treats {use}."}
        )
    for number in range(8):
        options = {letter: USES[(number + i - number % 4) % 8] for i, letter in enumerate("ABCD")}
        question = f"Which condition is {DRUGS[number]} given for?"
        items.append({"question": question, "answer_idx": "ABCD"[number % 4], "options": options})
    (folder / "literature.jsonl").write_text("".join(json.dumps(row) + "\n" for row in literature))
    (folder / "notes.csv").write_text("row_id,subject,text\n" + "\n".join(notes) + "\n")
    (folder / "instructions.json").write_text(json.dumps(instructions))
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    columns = {"id": "row_id", "patient": "subject", "text": "text"}
    return {
        "literature": {"path": str(folder / "literature.jsonl"), "kind": "literature", "holdout": 0.2},
        "notes": {"path": str(folder / "notes.csv"), "kind": "clinical", "split_by": "patient", "columns": columns,
                  "holdout": 0.2},
        "instructions": {"path": str(folder / "instructions.json"), "kind": "instructions"},
    }  # fmt: skip


def recipe_file(folder: Path, base: Path, **stage: object) -> Path:
    common = {"seq_len": 128, "batch": 4, "micro_batch": 2, "lr": 2e-3}
    recipe = {
        "name": "llama",
        "model": {"base": str(base)},
        "adapter": {"r": 8, "alpha": 16, "train_embeddings": stage.pop("train_embeddings", True)},
        "data": write_data(folder),
        "hygiene": {"dedup": {"near": False}},
        "stages": [
            {"cpt": {"mix": {"literature": 1, "notes": 1}, "epochs": 2.0, **common}},
            {"sft": {"data": "instructions", "epochs": 1, **common, **stage}},
        ],
        "validate": {"every": 5, "on": ["literature", "notes"]},
        "evaluate": {"tasks": [{"task": "medqa", "path": str(folder / "items.jsonl")}], "perplexity": ["notes"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_file(path: Path) -> tuple[Run, Path]:
    loaded, out = load_recipe(path), path.parent / "run"
    return run(loaded.recipe, loaded.text, out, offline=True), out


@pytest.mark.parametrize("write_folder", [llama3_folder, llama2_folder])
def test_a_llama_folder_goes_through_the_whole_run(tmp_path: Path, write_folder: Callable[[Path], Path]):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = write_folder(tmp_path / "base")
    result, out = run_file(recipe_file(tmp_path, base))
    assert result.finished and result.merge is not None
    cpt, sft = result.stages
    assert cpt.loss.last < cpt.loss.first and sft.loss.last < sft.loss.first
    assert cpt.tokens.read == cpt.tokens.kept + cpt.tokens.dropped
    assert result.merge.kl <= 1e-4
    items = [json.loads(line) for line in (out / "evaluation" / "medqa.items.jsonl").read_text().splitlines()]
    assert len(items) == 8
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does aspirin treat?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    logits = merged(**prompt).logits
    assert torch.isfinite(logits).all()
    # Trained embeddings unties what was tied; the plain loader must see both matrices.
    assert not merged.config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


@pytest.mark.parametrize("adapter", ["new", "merge_then_new"])
def test_stacked_and_folded_adapters_merge_to_what_was_trained(tmp_path: Path, adapter: str):
    base = llama3_folder(tmp_path / "base")
    result, out = run_file(recipe_file(tmp_path, base, adapter=adapter, train_embeddings=False))
    assert result.finished and result.merge.kl <= 1e-4
    assert (out / "02-sft" / "adapter" / "adapter_model.safetensors").is_file()
    first, second = (stage.adapter.sha256 for stage in result.stages)
    assert first != second
    assert (out / "02-sft-base").is_dir() == (adapter == "merge_then_new")


def test_a_base_without_one_of_its_tensors_is_refused(tmp_path: Path):
    """transformers fills what is missing with random numbers and says so in a log that nobody reads."""
    base = llama2_folder(tmp_path / "base", num_hidden_layers=1)
    recipe, _ = plan.resolve(load_recipe(MICRO).recipe)
    assert models.load_base(base, recipe.model)
    path = next(base.glob("*.safetensors"))
    weights = load_file(path)
    lost = next(name for name in sorted(weights) if "norm" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path, {"format": "pt"})
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text())
        index["weight_map"].pop(lost)
        (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(RecipeError, match=rf"tensor {lost} is missing \(of 1\)\nfetch the model again"):
        models.load_base(base, recipe.model)
