"""The Markdown examples: every command is run, every figure that comes from a plan is that plan's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_commands import blocks, run_page

from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan

EXAMPLES = ROOT / "examples"
PAGES = sorted(EXAMPLES.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (EXAMPLES / target).is_file(), target


def test_the_lab_pages_costs_are_the_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DATA", str(tmp_path))
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
        told = float(re.search(rf"^\| {what}.*\| ([\d.]+) (?:GiB|h)", page, re.M)[1])  # type: ignore[index]
        assert told == pytest.approx(figure, rel=0.15), f"{what}: the page says {told}, the plan {figure:.1f}"


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
