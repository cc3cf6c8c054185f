"""Writes the page of items beside a run's report.

For its owner alone (mode 0600), because it may hold text. `qmedtune erase RUN --text` removes it.
"""

from __future__ import annotations

from pathlib import Path

from qmedtune import disk, privacy, record
from qmedtune.errors import RunError
from qmedtune.evaluation.open_model import check_intact
from qmedtune.item_page.answers import read_task
from qmedtune.item_page.items_page import ShownTask, page
from qmedtune.item_page.question_texts import RequestedItems, questions
from qmedtune.reporting.unfinished import read_run
from qmedtune.results import Facts

PAGE = "items.html"


class WrittenPage(Facts):
    """Where the page is, and what it leaves out."""

    path: str
    bytes: int
    items: dict[str, int]
    left_out: list[str]


def write_items_page(run_dir: Path, requested: RequestedItems) -> WrittenPage:
    """RUN/items.html. RunError where the run has scored no items, or they are not as they were sealed."""
    run = read_run(run_dir)
    folder = run_dir / "evaluation"
    if not privacy.erased(run_dir).files:
        check_intact(folder, full=True)
    recipe = record.recipe_of(run, run_dir)
    sections = {section.label: section for section in recipe.evaluate.tasks}
    tasks: list[ShownTask] = []
    for name, scores in run.scored.tasks.items():
        path = folder / f"{name}.items.jsonl"
        scored = scores.final or scores.model or scores.base
        inside = path.parent == folder and not path.is_symlink()  # run.json may be anybody's
        if not inside or not path.is_file() or scored is None or name not in sections:
            continue
        asked = read_task(path, name, scored.metric)
        tasks.append(ShownTask(asked, questions(recipe, sections[name], asked.items, requested)))
    if not tasks:
        raise RunError(
            f"{run_dir}: no items were scored, or their answers were erased\n"
            "name tasks in the recipe (`evaluate: {tasks: [...]}`) and give the same `qmedtune run` again"
        )
    text, notes = page(run, tasks, requested)
    target = run_dir / PAGE
    with disk.owner_only():
        disk.write_atomic(target, text)
    counts = {each.asked.name: len(each.asked.items) for each in tasks}
    return WrittenPage(
        path=str(target), bytes=len(text.encode(errors="backslashreplace")), items=counts, left_out=notes
    )
