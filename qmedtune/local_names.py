"""Names of models that can only mean something on this machine: they are never sent to the Hub.

`chat runs/typo` has the form of a Hub id, `owner/name`. What a mistyped path says (a project, a hospital, a study) is
nobody else's business, and the Hub's "no such model" is no help: the runs that lie nearest are.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from qmedtune.errors import RecipeError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Folders of this project's own commands, and endings that no model of the Hub is asked for with.
OURS = ("runs", "recipes", "data")
FILES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".gguf", ".safetensors", ".html", ".md", ".txt")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.index.json")
NAMED = 4


def is_utf8(name: str) -> bool:
    """Whether a name can be written down: what the system hands over for other bytes are halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def looks_local(name: str) -> bool:
    """Whether a name is a path by its form, its ending, or the folder that it begins with being here."""
    if not HUB_ID.fullmatch(name):
        return True
    parent = name.partition("/")[0]
    return parent in OURS or Path(parent).is_dir() or name.lower().endswith(FILES)


def check(name: str, what: str) -> None:
    """RecipeError where a name that looks local is not there. what: the key or argument that holds it."""
    if Path(name).expanduser().exists() or not looks_local(name):
        return
    lines = [f"{what}: there is no {name!r} here, and what looks like a path is never sent to the Hub"]
    if name.lower().endswith((".yaml", ".yml")):
        lines = [f"{what}: {name} is a recipe, no model, and it is not here"]
    found = nearest_runs(name)
    if found:
        lines.append(f"runs here: {', '.join(found)}")
    lines.append(
        "allowed: a run, a folder with config.json and weights, a *.gguf, builtin:smollm2, or owner/name of the Hub"
    )
    raise RecipeError("\n".join(lines))


def check_folder(folder: Path) -> None:
    """RecipeError for a folder that is here and holds no model at all, with the adapter, run or runs that lie near."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return
    for pattern in WEIGHTS:
        if any(folder.glob(pattern)):
            return
    lines = [f"{folder}: no model in this folder"]
    if (folder / "adapter" / "adapter_config.json").is_file():
        lines.append(f"the adapter of this stage: {folder / 'adapter'}")
    for parent in folder.parents:
        if (parent / "run.json").is_file():
            lines.append(f"the run that it belongs to: {parent}")
            break
    if found := nearest_runs(str(folder / "x")):  # in it, else in runs/
        lines.append(f"runs here: {', '.join(found)}")
    lines.append("allowed: a run, an adapter folder, a folder with config.json and weights")
    raise RecipeError("\n".join(lines))


def nearest_runs(name: str) -> list[str]:
    """Runs beside what was named, else in runs/: those of a similar name first."""
    places = [Path(name).expanduser().parent, Path("runs")]
    found: dict[str, str] = {}
    for place in places:
        for run in sorted(place.glob("*/run.json")):
            found.setdefault(run.parent.name, str(run.parent))
    close = get_close_matches(Path(name).name, list(found), n=NAMED, cutoff=0.5)
    chosen = [*close, *(each for each in found if each not in close)]
    return [found[each] for each in chosen[:NAMED]]
