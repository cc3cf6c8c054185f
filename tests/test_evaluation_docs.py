"""docs/evaluation.md lists exactly the tasks that there are, with their metrics, and its recipe section is valid."""

import re
from pathlib import Path

import pytest
import yaml

from qmedtune.recipe import EvaluateSection
from qmedtune.tasks import BUILTIN_TASKS, FILE_TASKS, findings, free_text, safety
from qmedtune.tasks.items import Item

TEXT = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+?) \|", TEXT, re.M))
FREE = {findings.hoc_task, findings.entity_task, free_text.question_task, free_text.summary_task}


def test_every_task_has_its_row():
    assert list(ROWS) == [*BUILTIN_TASKS, *FILE_TASKS]


@pytest.mark.parametrize("name", FILE_TASKS)
def test_metrics_are_those_of_the_task_the_main_one_first(name):
    make = FILE_TASKS[name][1]
    if make is safety.safety_task:
        items = (Item("1", (), "", facet="harmful"), Item("2", (), "", facet="benign"))
    elif make in FREE:
        items = (Item("1", (), "gold"),)
    else:
        items = tuple(Item(str(gold), (), gold, ("no", "yes")) for gold in (0, 1))
    task = make(name, items)
    told = re.findall(r"`(\w+)`", ROWS[name])
    extra = ["bertscore"] if make is free_text.summary_task else []
    assert (told[0], sorted(told)) == (task.metric, sorted([*task.metrics, *extra]))


def test_the_section_shown_is_valid():
    shown = yaml.safe_load(TEXT.split("```yaml\n")[1].split("```")[0])
    assert EvaluateSection.model_validate(shown["evaluate"]).tasks
