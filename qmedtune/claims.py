"""Whose folder is `--out`? A run writes, replaces and retires only in a folder that is new, empty or its own.

Its own are folders with the mark that a run leaves (`.qmedtune`), and run folders of version 0.1, which had no mark and
are known by what they hold. A folder of the user's is refused before anything is written there, and so is a source
that lies where a run would write. Deliberately not here: locks (disk.py) and what is retired (store.py).
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from qmedtune import store
from qmedtune.disk import below
from qmedtune.errors import RecipeError
from qmedtune.local_names import is_utf8
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.results import Json

MARK = ".qmedtune"
MADE_BY = {"made_by": "qmedtune", "folder": "run", "format": 1}
# What a run leaves that is killed before its first step: nothing of anyone's is lost beside it.
BEFORE_FIRST_STEP = {".lock", ".hashes.json", MARK, "heartbeat.json"}
# Entries that run.json and ablation.json of every version have, and nobody else's file of that name.
SIGNS = {"run.json": ("recipe_sha256", "stages", "provenance"), "ablation.json": ("recipe_sha256", "seeds", "arms")}
STEPS = ("*/seal.json", "data/*/seal.json", ".building/*/.attempt", ".history/*/seal.json", "arms/*/seed-*/.lock")
OUR_NAMES = re.compile(r"\.building|\.history|\.lock|data|base|merged|evaluation|\d\d-[a-z]+")
# Names of files that a run writes: a pattern that finds one of them would read the run's own output.
WRITTEN = ("train.jsonl", "rejects.jsonl", "run.json", "report.md", "report.html", "evaluation.json", "tokenizer.txt")


def check(out: Path) -> None:
    """RecipeError where `out` holds files and is no run folder. Changes nothing."""
    if not is_utf8(str(out)):
        raise RecipeError(f"--out: {ascii(str(out))} is not UTF-8\ngive a folder whose name is")
    if not out.is_dir():
        return
    others = sorted(path.name for path in out.iterdir() if not _is_neutral(path))
    if not others or is_ours(out) or _is_link_among_ours(out, others):
        return
    raise RecipeError(
        f"--out: {out} holds files that no run made ({len(others)}, such as {others[0]!r})\n"
        "a run replaces what stands in its folder, so it takes a new or empty one, or one of its own\n"
        f"nothing was changed there; give another folder, such as --out {out / 'run'}"
    )


def _is_link_among_ours(out: Path, others: list[str]) -> bool:
    """Nothing but names that a run uses, and a link behind one of them: capacity.check_writable names the link."""
    return all(OUR_NAMES.fullmatch(name) for name in others) and any(path.is_symlink() for path in below(out))


def _is_neutral(path: Path) -> bool:
    named = path.name in BEFORE_FIRST_STEP or (path.name.startswith(".") and path.name.endswith(store.PART))
    return named and not path.is_dir()


def is_ours(out: Path) -> bool:
    """Whether a run made this folder: it carries the mark, or holds what a run of version 0.1 left."""
    if _read(out / MARK).get("made_by") == MADE_BY["made_by"]:
        return True
    for name, keys in SIGNS.items():
        if _read(out / name).keys() >= set(keys):
            return True
    # A damaged run.json, or none yet: the lock tells a run folder from one that finished models were copied into.
    return (out / ".lock").is_file() and any(next(out.glob(pattern), None) for pattern in STEPS)


def _read(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def mark(out: Path) -> None:
    """Leave the mark, under the lock of `out`."""
    if _read(out / MARK) != MADE_BY:
        store.write_json(out / MARK, MADE_BY)


def check_steps(out: Path, names: list[str]) -> None:
    """RecipeError where something without a stamp of ours stands in the place of a step."""
    for name in names:
        store.check_stamped(out / name)


def check_inputs(recipe: Recipe, out: Path) -> None:
    """RecipeError where the run would write over, or read back, one of its own inputs."""
    folder = out.resolve()
    for key, text in _inputs(recipe):
        start = _fixed_part(text)
        if start.is_relative_to(folder):
            raise RecipeError(
                f"{key}: {text} lies inside the run folder {out}\n"
                "a run replaces what stands in its folder: keep inputs elsewhere, or give another --out"
            )
        if folder.is_relative_to(start) and _reads_below(text):
            raise RecipeError(
                f"{key}: {text} would read what the run writes to {out}\n"
                "give --out a folder outside of it, or name the files or a narrower pattern"
            )


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, path) of everything local that a recipe reads."""
    for name in recipe.used_sources():
        source = recipe.data[name]
        for path in _paths(source):
            yield f"data.{name}.path", path
        if source.template and Path(source.template).is_file():
            yield f"data.{name}.template", source.template
    for number, task in enumerate(recipe.evaluate.tasks):
        if task.path:
            yield f"evaluate.tasks[{number}].path", task.path
        if task.shots_from:
            yield f"evaluate.tasks[{number}].shots_from", task.shots_from
    if Path(recipe.model.base).exists():
        yield "model.base", recipe.model.base


def _paths(source: SourceSection) -> list[str]:
    from qmedtune.data.reading.sources import BUILTIN, hub_dataset, with_variables

    if hub_dataset(source):
        return []
    return [with_variables(path) for path in source.paths if not path.startswith(BUILTIN)]


def _fixed_part(path: str) -> Path:
    """The folder above the first wildcard; the path itself where it has none."""
    here = Path(path)
    while glob.has_magic(str(here)) and not here.exists():
        here = here.parent
    return here.resolve()


def _reads_below(path: str) -> bool:
    """Whether a source takes files at any depth, those of a run among them."""
    if Path(path).is_dir():
        return True
    name = Path(path).name
    return "**" in path and any(fnmatch(written, name) for written in WRITTEN)
