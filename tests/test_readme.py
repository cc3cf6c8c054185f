"""The README tells the truth: its commands exist, its recipe is the flagship, its two-line change gives a sane plan."""

import csv
import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from stand_ins import jats

from qmedtune import cli
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGSHIP = ROOT / "recipes" / "cpt_then_sft.yaml"


def block(language):
    found = re.search(rf"```{language}\n(.*?)```", README, re.S)
    assert found is not None
    return found[1]


def test_the_two_commands():
    assert "pip install -c constraints.txt -e . && qmedtune run recipes/cpt_then_sft.yaml" in README
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in README
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_shown_is_the_flagship(tmp_path):
    path = tmp_path / "shown.yaml"
    path.write_text(block("yaml"))
    assert load_recipe(path).recipe == load_recipe(FLAGSHIP).recipe


def options_of(command):
    """All options of a command and of the commands below it."""
    below = [option for child in getattr(command, "commands", {}).values() for option in options_of(child)]
    return {option for parameter in command.params for option in parameter.opts} | set(below)


def test_the_table_lists_exactly_the_commands_and_no_option_that_is_absent():
    table = README[README.index("| command |") : README.index("stdout is the result")]
    program = typer.main.get_command(cli.app)
    assert set(re.findall(r"^\| `qmedtune (\w+)", table, re.M)) == set(program.commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z][a-z-]+", table)) <= options_of(program)


def test_every_recipe_is_in_the_table():
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    named = set(re.findall(r"^\|.*?`(recipes/[^`*]+)`", README, re.M))
    assert shipped - {"recipes/cpt_then_sft.yaml"} == named - {"recipes/cpt_then_sft.yaml"}


def test_the_two_line_change_plans_sanely_for_8b(tmp_path):
    text = block("yaml")
    lines = block("diff").splitlines()
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line[1:] for line in lines if line.startswith("+")]
    assert len(removed) == len(added) == 2
    for old, new in zip(removed, added, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    articles = tmp_path / "pmc" / "heart"
    articles.mkdir(parents=True)
    for number in range(40):
        (articles / f"PMC{number}.nxml").write_text(jats(number))
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("/data/pmc", str(tmp_path / "pmc")))
    plan = make_plan(load_recipe(path, ["memory=24"]).recipe, tmp_path / "run")
    assert 7e9 < plan["base"]["parameters"] < 9e9
    assert plan["data"][0]["source"] == "literature" and plan["data"][0]["missing"] == ""
    for number, stage in enumerate(plan["stages"]):
        assert 5e-5 <= stage["lr"] <= 5e-4
        assert stage["seq_len"] in (1024, 2048, 4096)
        largest = next(d["value"] for d in plan["decisions"] if d["key"] == f"stages[{number}].{stage['kind']}.batch")
        assert 8_192 <= stage["seq_len"] * largest <= 131_072
        assert 8 * 2**30 < stage["peak_bytes"] <= 24 * 2**30
        there = sum(source["tokens"] for source in plan["data"])
        assert 0 < stage["trained"] <= 20 * there, "a budget that the data can give"
        assert stage["trained"] <= stage["steps"] * stage["seq_len"] * stage["batch"]
    assert plan["host"]["needed_bytes"] < 32 * 2**30
    assert 16 * 2**30 < plan["disk"]["needed_bytes"] < 80 * 2**30


def test_links_and_named_files_exist():
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)[)\"]", README):
        assert "://" in target or (ROOT / target).is_file(), target


def test_the_ablation_told_is_the_one_that_was_measured():
    with (ROOT / "docs" / "ablation" / "ablation.csv").open(encoding="utf-8") as file:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}
    told = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", README, re.M)
    assert len(told) == 6
    for arm, *cells in told:
        for cell, measure in zip(cells, ("facts: treats", "facts: adverse"), strict=True):
            row = rows[arm, measure]
            mean, low, high = (float(row[name]) for name in ("mean", "ci95_low", "ci95_high"))
            assert cell == f"{mean:.2f} ({low:.2f}–{high:.2f})", (arm, measure)
    general = [f"{float(rows[arm, 'general']['mean']):.2f}" for arm in ("base", "replay-0", "replay-0.2")]
    flat = " ".join(README.split())
    assert "rises from {} to {}, with a fifth of replay to {}".format(*general) in flat


def test_the_real_run_told_is_the_one_that_was_measured():
    measured = json.loads((ROOT / "docs" / "real" / "real_small.json").read_text(encoding="utf-8"))
    section = README[README.index("### On a real model") :]
    cells = {row[0]: row[1:] for row in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section, re.M)}
    task = measured["tasks"]["pubmedqa"]
    chosen = cells["PubMedQA, 500 expert questions"]
    assert chosen == (scored(task["base"]), scored(task["final"]), changed(task))
    written = {label: task[label]["generation"] for label in ("base", "final")}
    generated = cells["the same, generated answers"]
    assert generated == (scored(written["base"]), scored(written["final"]), changed(task["generation"]))
    texts = {"held-out abstracts": "literature", "held-out notes": "notes", "a novel's paragraphs": "general"}
    for told, source in texts.items():
        found = measured["perplexity"][source]
        shift = found["final"] / found["base"] - 1
        assert cells[f"perplexity of {told}"] == (
            f"{found['base']:.1f}",
            f"{found['final']:.1f}",
            f"−{-shift * 100:.0f} %",
        )
    assert f"scores {task['base']['majority']:.2f}" in section


def test_the_ablation_of_the_real_model_is_the_one_that_was_measured():
    with (ROOT / "docs" / "real" / "ablation.csv").open(encoding="utf-8") as file:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}
    arms = {
        "nothing": "base",
        "instructions alone": "sft",
        "literature, then instructions": "cpt-literature+sft",
        "notes, then instructions": "cpt-notes+sft",
        "both, then instructions": "cpt-both+sft",
    }
    page = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    for name, arm in arms.items():
        task = rows[arm, "pubmedqa"]
        mean, low, high = (float(task[column]) for column in ("mean", "ci95_low", "ci95_high"))
        texts = " | ".join(f"{float(rows[arm, text]['mean']):.1f}" for text in ("literature", "notes", "general"))
        line = f"| {name} | {mean:.2f} ({low:.2f}–{high:.2f}) | {texts} |\n"
        assert line in README and line in page


def scored(result):
    low, high = result["ci95"]
    return f"{result['accuracy']:.2f} ({low:.2f}–{high:.2f})"


def changed(result):
    low, high = result["difference"]["ci95"]
    p_value = result["paired"]["p_value"]
    p_words = f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"
    return f"{result['difference']['value']:+.2f} ({low:+.2f} to {high:+.2f}), {p_words}"


def test_every_example_is_in_the_table():
    shipped = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert shipped == set(re.findall(r"^\| \[([^\]]+)\]\(examples/", README, re.M))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_documents_promise_only_tests_that_exist(name):
    for path in re.findall(r"(?:kernels/)?tests/\w+\.py", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path


def test_the_pre_commit_file_is_yaml_with_local_hooks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
