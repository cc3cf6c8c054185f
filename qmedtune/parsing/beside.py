"""Relative paths that lead nowhere from here and somewhere from the recipe's own folder.

Paths of a recipe start in the folder where qmedtune is run, as a shell's do. Whoever runs it from elsewhere is told
what to write instead of "no such file". Deliberately not here: guessing which of the two was meant.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from qmedtune.parsing.strict_yaml import KeyPath
from qmedtune.recipe import Recipe


def beside(recipe: Recipe, file: Path) -> Iterator[tuple[KeyPath, str]]:
    """Each such path of `recipe`, which was read from `file`."""
    folder = file.parent
    if folder.resolve() == Path.cwd():
        return
    for key, written in _paths(recipe):
        if _is_there(Path(), written) or not _is_there(folder, written):
            continue
        yield (
            key,
            f"no {written} in {Path.cwd()}, where paths start, but one beside the recipe; "
            f"write {folder / written}, or run in its folder: cd {folder}",
        )


def _paths(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Relative paths of sources that are used, of benchmarks and of the base."""
    named: list[tuple[KeyPath, str]] = [(("model", "base"), recipe.model.base)]
    for name in recipe.used_sources():
        for path in recipe.data[name].paths:
            named.append((("data", name, "path"), path))
    for index, task in enumerate(recipe.evaluate.tasks):
        for key, path in (("path", task.path), ("shots_from", task.shots_from)):
            if path is not None:
                named.append((("evaluate", "tasks", index, key), path))
    for key, path in named:
        if not path.startswith(("/", "~", "builtin:")) and "$" not in path:
            yield key, path


def _is_there(folder: Path, written: str) -> bool:
    place = folder / written
    try:
        return place.exists() or next(glob.iglob(str(place), recursive=True), None) is not None
    except OSError:  # a name that no file system takes
        return False
