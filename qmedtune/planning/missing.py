"""What a run needs and this machine does not have yet: variables that are not set, files, the base.

Deliberately not here: the sentences that say so (plan.py, plan_screen.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qmedtune.data.reading.listing import unset_variables
from qmedtune.errors import DataError
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning.estimate import Estimate
from qmedtune.planning.plan_facts import Missing
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.tasks.shots import split_files


def what_is_missing(
    recipe: Recipe, facts: BaseFacts, estimates: Mapping[str, Estimate], unseen: Iterable[str]
) -> list[Missing]:
    """The base, sources and benchmarks that are not here, in this order. `unseen`: benchmarks that were not parsed."""
    found: list[Missing] = []
    if not facts.builtin and facts.folder is None:
        found.append({"what": "the base", "name": facts.name, "variables": []})
    for name, estimate in estimates.items():
        if estimate.missing:
            found.append({"what": "source", "name": name, "variables": _unset(recipe.data[name].paths)})
    unlooked = set(unseen)
    for task in recipe.evaluate.tasks:
        if task.label in unlooked and not _is_here(task):
            found.append({"what": "benchmark", "name": task.label, "variables": _unset([task.path or ""])})
    return found


def _is_here(task: TaskSection) -> bool:
    """Benchmarks that are here and yet were not looked at are large."""
    if task.path is None:  # built in
        return True
    try:
        split_files(str(task.path), task.split)
    except DataError:
        return False
    return True


def _unset(paths: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for path in paths:
        for name in unset_variables(path):
            names[name] = None
    return list(names)
