"""The Markdown examples: every command is run, every figure that comes from a plan is that plan's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from llama_cpp import LlamaCpp
from markdown_commands import blocks, run_page

from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning.machine import Machine

EXAMPLES = ROOT / "examples"
PAGES = sorted(EXAMPLES.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (EXAMPLES / target).is_file(), target


def test_the_lab_pages_costs_are_the_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """To the digit that is told: a machine without a card plans for the page's."""
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setattr("qmedtune.plan.this_machine", lambda: Machine("cpu", "a CPU", 24 << 30, 24 << 30, 2, True))
    plan = make_plan(load_recipe(ROOT / "recipes" / "llama3_8b_24gb.yaml").recipe)
    gib = 2**30
    expected = {
        "GPU memory": max(stage["peak_bytes"] for stage in plan["stages"]) / gib,
        "host memory": plan["host"]["needed_bytes"] / gib,
        "disk": plan["disk"]["needed_bytes"] / gib,
        "time of continual": plan["stages"][0]["seconds"] / 3600,
    }
    page = (EXAMPLES / "lab_workstation.md").read_text(encoding="utf-8")
    for what, figure in expected.items():
        told = re.search(rf"^\| {what}.*\| ([\d.]+) (?:GiB|h)", page, re.M)[1]  # type: ignore[index]
        assert told == f"{figure:.1f}", f"{what}: the page says {told}, the plan {figure:.1f}"


@pytest.mark.slow
def test_the_lab_page_from_downloads_to_an_answer(tmp_path: Path):
    printed, work = run_page(EXAMPLES / "lab_workstation.md", tmp_path)
    facts = json.loads((work / "runs" / "lab" / "run.json").read_text())
    assert facts["status"] == "finished" and facts["offline"]
    assert facts["data"]["notes"]["records"]["kept"] > 200
    log = (work / "lab.log").read_text()
    assert "stopped by SIGTERM" in log, "the signal came before the end"
    card = (work / "runs" / "lab" / "merged" / "README.md").read_text()
    assert "PhysioNet Credentialed Health Data License" in card and str(tmp_path) not in card
    assert not list((tmp_path / "medical" / "notes").glob("*"))[0].stat().st_mode & 0o077
    assert len(blocks(EXAMPLES / "lab_workstation.md")) >= 9 and "sealed folders are as they were sealed" in printed


@pytest.mark.slow
def test_the_page_about_own_data_from_an_export_to_a_report(tmp_path: Path):
    printed, work = run_page(EXAMPLES / "bring_your_own_data.md", tmp_path)
    facts = json.loads((work / "runs" / "mine" / "run.json").read_text())
    assert facts["status"] == "finished" and facts["data"]["notes"]["phi"]["mode"] == "redact"
    assert '"reason": "text is empty"' in printed
    found = dict(re.findall(r"\| notes \| identifier: (\w+) \(redact\) \| (\d+) \|", printed))
    assert {"name", "mrn", "phone", "date"} <= set(found) and min(map(int, found.values())) >= 150
    assert re.search(r"^articles +literature +41 +40 +0 +0 +1 ", printed, re.M), "the copied question is found"
    assert "── questions #" in printed and "«Hold the drug and review in a week.</s>»" in printed
    for page in ("report.html", "report.md", "merged/README.md"):
        assert "Hartwell" not in (work / "runs" / "mine" / page).read_text()


@pytest.mark.slow
def test_the_serving_page_hands_over_model_and_template(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qmedtune.data.packing import templates

    printed, work = run_page(EXAMPLES / "serve.md", tmp_path, RUN="runs/served", RECIPE="recipes/micro.yaml")
    merged = work / "runs" / "served" / "merged"
    template = templates.load(merged)
    question = [{"role": "user", "content": "What does volusev treat?"}]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    wanted = template.prompt(question)
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == (
        tokenizer.bos_token + wanted
    )
    served = work / "runs" / "served"
    modelfile = (served / "ollama" / "Modelfile").read_text()
    text = modelfile.split('"""')[1]
    _, with_system, without, end = re.split(r"{{ if .System }}|{{ else }}|{{ end }}", text)
    assert without.replace("{{ .Prompt }}", question[0]["content"]) == wanted and not end
    assert "{{ .System }}" in with_system
    [file] = re.findall(r"^FROM \./(.*)$", modelfile, re.M)
    assert 'PARAMETER stop "</s>"' in modelfile
    by_transformers, by_chat = printed.partition("tokenizer_config.json\n")[2].splitlines()[:2]
    assert by_transformers == by_chat != ""
    for place in (served / "gguf" / "micro-f16.gguf", served / "gguf-q8" / "micro-q8_0.gguf", served / "ollama" / file):
        with LlamaCpp(place) as reads:
            ids = reads.tokenize(wanted)
            assert ids == tokenizer(tokenizer.bos_token + wanted, add_special_tokens=False).input_ids
            assert reads.logits(ids).shape == (len(ids), reads.n_tokens)
    AutoModelForCausalLM.from_pretrained(served / "vllm")
