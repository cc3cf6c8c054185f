"""What `qmedtune plan` prints first: the verdict, on one screen of 80 x 24 whatever the recipe."""

import re
from pathlib import Path

import pytest

from qmedtune import cli
from qmedtune.planning import plan_screen
from qmedtune.units import roughly

RECIPES = Path(__file__).parent.parent / "recipes"
PAGE = RECIPES.parent / "docs" / "plan.md"
FRAME_LINES = 2  # that a terminal's table has beyond a plain one


@pytest.fixture
def screen(monkeypatch, capsys):
    """Lines of `plan` on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("DATA", "EVAL", "TEXT", "MIMIC"):
        monkeypatch.delenv(name, raising=False)

    def lines(*arguments):
        code = cli.invoke(["plan", *map(str, arguments)])
        return code, capsys.readouterr().out.splitlines()

    return lines


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_judged_within_the_first_screen(path, screen, tmp_path):
    code, lines = screen(path, "--out", tmp_path / "run")
    assert code == 0
    assert re.match(rf"{path.stem} fits: [\d.,]+ (\wi?B )?of [\d.]+ GiB; (about|at least) [\d.]+ \w+[;,] ", lines[0])
    assert len(lines) + FRAME_LINES + 1 <= 24, "the verdict has scrolled away"
    assert all(len(line) <= 80 for line in lines[:-1]) and lines[-1].endswith("--full")


def test_what_is_missing_is_told_by_the_variable(screen, tmp_path):
    _, lines = screen(RECIPES / "llama3_8b_24gb.yaml")
    text = " ".join(lines)
    told = re.search(r"^llama3_8b_24gb fits: .*$", PAGE.read_text(encoding="utf-8"), re.M)
    assert told is not None and text.startswith(told[0])
    assert "missing: the base, DATA" in text
    assert "DATA is not set (literature, notes, general, instructions, pubmedqa): export DATA=FOLDER" in text


def test_what_is_missing_is_told_by_its_name_where_no_variable_is_to_blame(screen, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", str(tmp_path))
    _, lines = screen(RECIPES / "llama3_8b_24gb.yaml")
    text = " ".join(lines)
    assert "missing: the base, literature, notes, general, instructions, pubmedqa" in text
    assert "not found here: literature, notes, general, instructions, pubmedqa" in text


def test_eight_stages_still_fit_the_screen(screen, tmp_path):
    text = (RECIPES / "micro.yaml").read_text(encoding="utf-8")
    start = text.index("stages:")
    end = text.index("\n", text.rindex("- sft")) + 1
    recipe = tmp_path / "micro.yaml"
    recipe.write_text(text[:end] + 6 * "  - sft: {data: instructions}\n" + text[end:], encoding="utf-8")
    assert start < end
    code, lines = screen(recipe)
    assert code == 0 and len(lines) + FRAME_LINES + 1 <= 24
    assert any(line.startswith("4 more stages") for line in lines)


def test_micro_takes_time(screen, tmp_path):
    _, lines = screen(RECIPES / "micro.yaml", "--out", tmp_path / "run")
    assert int(re.search(r"about (\d+) s[;,]", lines[0])[1]) >= 3  # type: ignore[index]
    shown = "\n".join(lines)
    assert " 0.0 s" not in shown and "loading" in shown and "evaluation" in shown


def test_what_a_base_takes_to_be_made_is_part_of_the_verdict(screen, monkeypatch, tmp_path):
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path / "empty"))
    _, lines = screen(RECIPES / "cpt_then_sft.yaml", "--out", tmp_path / "run")
    assert re.search(r"; about \d+ \w+, and \d+ \w+ once for the base; ", " ".join(lines[:2]))


def test_full_opens_with_the_verdict_too(screen, tmp_path):
    _, lines = screen(RECIPES / "micro.yaml", "--out", tmp_path / "run", "--full")
    assert lines[0].startswith("micro fits: ")
    assert any("`auto` became" in line for line in lines) and len(lines) > 40


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "1 s"), (42, "42 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (9.6 * 3600, "9.5 h"),
     (11.55 * 3600, "12 h"), (47.9 * 3600, "48 h"), (50 * 3600, "2 days")],
)  # fmt: skip
def test_times_are_told_roughly(seconds, told):
    assert roughly(seconds) == told


def test_memory_in_two_units_keeps_both():
    assert plan_screen._of(500 * 2**20, 24 * 2**30) == "500 MiB of 24.0 GiB"
    assert plan_screen._of(int(21.5 * 2**30), 24 * 2**30) == "21.5 of 24.0 GiB"


def test_done_is_only_what_is_done(screen):
    """Steps without a predicted time count too."""
    from qmedtune.parsing.loader import load_recipe
    from qmedtune.plan import make_plan

    plan = make_plan(load_recipe(RECIPES / "micro.yaml").recipe)
    done = [{"name": name, "status": "cached", "why": ""} for name in ("01-cpt", "02-sft", "evaluation")]
    left = {"name": "against", "status": "to do", "why": ""}
    assert "all steps are done" in plan_screen.verdict({**plan, "seconds": 0.0, "steps": done})
    assert "what is left is not timed" in plan_screen.verdict({**plan, "seconds": 0.0, "steps": [*done, left]})
    assert "; at least " in plan_screen.verdict({**plan, "steps": [*done, left]})
