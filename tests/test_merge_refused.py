"""A merge that is not published costs nothing else: the run is evaluated and reported, and one command goes on. And an
adapter names the base that it was trained on, also where that is one that the run has made."""

import json
import shlex
import shutil
from pathlib import Path

import merge_rounding
import peft
import pytest
import torch
from builders import make_run
from conftest import MICRO
from transformers import AutoModelForCausalLM

from qmedtune import cli, store, verify
from qmedtune.errors import MergeRefused
from qmedtune.evaluation.open_model import locate
from qmedtune.merge_folder import adapters_of_run
from qmedtune.parsing.loader import load_recipe
from qmedtune.reporting import tables
from qmedtune.results import Merge
from qmedtune.run import run

QUICK = ["stages[0].cpt.tokens=1000", "stages[1].sft.epochs=0.2", "evaluate.tasks[0].limit=4"]


def go(folder: Path, *sets: str, until: str | None = None):
    loaded = load_recipe(MICRO, [*QUICK, *sets])
    return run(loaded.recipe, loaded.text, folder, offline=True, until=until)


@pytest.fixture(scope="module")
def refused(micro_run, tmp_path_factory):
    """A run whose merge is right, and further from base + adapters than its recipe allows."""
    folder = tmp_path_factory.mktemp("refused") / "run"
    with pytest.raises(MergeRefused) as caught:
        go(folder, "merge.verify.max_kl=1e-30")
    return folder, str(caught.value)


def test_the_run_is_evaluated_and_reported(refused):
    folder, message = refused
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "failed" and facts["error"] == message
    assert facts["evaluation"]["tasks"]["facts"]["final"]["n"] == 4
    assert set(facts["evaluation"]["perplexity"]) == {"literature", "notes"}
    merge = facts["merge"]
    assert (merge["status"], merge["path"], merge["base"]) == ("refused", "merged.refused", "full16")
    assert merge["kl"] > 1e-30 and "merge.verify.max_kl" in merge["error"]
    assert "no: the proof has failed" in (folder / "report.md").read_text()
    assert "merged.refused" in (folder / "report.html").read_text()
    assert verify.verify(folder)["folders"] > 5


def test_what_was_written_is_kept_under_a_name_that_says_so(refused):
    folder, message = refused
    assert not (folder / "merged").exists() and f"kept as {folder / 'merged.refused'}" in message
    assert "max_kl" in (folder / "merged.refused" / "REFUSED.txt").read_text()
    assert not (folder / "merged.refused" / store.SEAL).exists()
    assert AutoModelForCausalLM.from_pretrained(folder / "merged.refused").dtype == torch.bfloat16


def test_the_adapters_are_usable_and_the_named_command_goes_on(refused, capsys):
    folder, message = refused
    assert len(message.splitlines()) <= 6
    command = shlex.split(message.splitlines()[-1])
    assert command[:2] == ["qmedtune", "merge"]
    assert cli.invoke([*command[1:], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["violations"] == 0 and Path(facts["path"]) == folder.with_name("run-merged")
    assert locate(str(folder / "02-sft" / "adapter"), offline=True).kind == "adapter"


def test_the_same_recipe_without_the_limit_goes_on_from_there(refused, tmp_path):
    folder = Path(shutil.copytree(refused[0], tmp_path / "run"))
    before = (folder / "02-sft" / store.SEAL).read_bytes()
    facts = go(folder)
    assert facts.finished and facts.merge.status == "sealed"
    assert (folder / "02-sft" / store.SEAL).read_bytes() == before, "nothing is trained again"
    assert verify.verify(folder)["folders"] > 5


def test_an_adapter_on_a_folded_base_names_that(micro_run, tmp_path):
    folder = tmp_path / "run"
    go(folder, "stages[1].sft.adapter=merge_then_new", "adapter.train_embeddings=false", until="02-sft")
    adapter = folder / "02-sft" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    noted = json.loads((adapter / "trained_on.json").read_text())
    assert config["base_model_name_or_path"] == noted["base"] == "../../02-sft-base"
    assert json.loads((folder / "01-cpt/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "builtin:micro"
    )
    assert locate(str(adapter), offline=True).base == (folder / "02-sft-base").resolve()
    with pytest.raises(OSError, match=r"\.\./\.\./02-sft-base"):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    out = tmp_path / "merged"
    assert cli.invoke(["merge", str(adapter), "--out", str(out), "--offline"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "02-sft-base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    ids = torch.arange(5, 37)[None]
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=0.05)


def test_a_base_that_was_not_trained_on_is_refused_with_the_right_name(micro_run, tmp_path, capsys):
    folder = tmp_path / "run"
    go(folder, "stages[1].sft.adapter=merge_then_new", "adapter.train_embeddings=false", until="02-sft")
    adapter = folder / "02-sft" / "adapter"
    assert cli.invoke(["merge", str(adapter), "--base", str(micro_run.base), "--out", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert "trained on other weights" in error and "../../02-sft-base" in error


@pytest.mark.slow
def test_the_table_of_roundings_is_made_from_a_run(refused, tmp_path):
    """tests/merge_rounding.py on adapters that are a tenth of what was trained."""
    found = adapters_of_run(refused[0], offline=True)
    forms = {form: merge_rounding.FORMS[form] for form in ("float32", "bfloat16, nearest")}
    job = merge_rounding.Measurement(found, refused[0], [0.1], 256, forms, "micro")
    base, exact, nearest = merge_rounding.measure(job, tmp_path)
    assert set(base.nll) == {"literature", "notes"} and 0 <= base.facts["scores"]["accuracy"] <= 1
    assert exact.facts["lost"] in (None, pytest.approx(0, abs=1e-4)) and nearest.facts["violations"] == 0
    table = merge_rounding.markdown([base, exact, nearest])
    assert len(table.splitlines()) == 5 and "x 0.1 | bfloat16, nearest" in table


OF_0_1 = {
    "path": "merged", "status": "sealed", "base": "full16", "dtype": "bfloat16", "modules": 14, "adapters": 1,
    "tied": True, "kl": 4e-6, "kl_max": 2e-5, "top1": 1.0, "max_abs_logit_diff": 0.01, "max_weight_error": 1.6e-3,
    "shift_from_nf4": {"kl": 1e-3, "kl_max": 1e-2, "top1": 0.99, "max_abs_logit_diff": 0.2}, "sha256": "0" * 64,
}  # fmt: skip


def test_merges_of_version_0_1_are_shown():
    shown = dict(tables.merge(make_run(merge=Merge.model_validate(OF_0_1))).rows)
    assert shown["KL divergence, merged against the same base + adapters"] == "4e-06"
    assert "Largest weight error, relative to its norm" in shown and "Rounding" not in shown


def test_a_loss_is_warned_of():
    facts = {**OF_0_1, "rounding": "nearest", "rounding_seed": None, "rounding_why": "as stated", "lost": 0.17}
    facts |= {"elements": 1000, "violations": 0, "swallowed": 0.9, "warnings": ["nearest rounding lost 17.0%"]}
    table = tables.merge(make_run(merge=Merge.model_validate(facts)))
    assert dict(table.rows)["Rounding"] == "nearest: as stated" and table.note == "nearest rounding lost 17.0%"
    assert dict(table.rows)["Lost of the change by rounding (KL)"] == "17.000%"
