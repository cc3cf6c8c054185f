"""What the commands share: their common options, loading a recipe, printing for machines."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmedtune.terminal import CONTROLS, printable

if TYPE_CHECKING:
    from qmedtune.parsing.loader import LoadedRecipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/cpt_then_sft.yaml.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/cpt_then_sft.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default: runs/<name>.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key: stages[0].cpt.lr=1e-4; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Open no connection; the base must be here.")]


def say(text: str) -> None:
    """Lines for a person on stdout: a folder that somebody passed on may be named by control characters."""
    print(printable(text))


def emit(result: Any) -> None:
    """A result for machines, on stdout."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def load(path: Path, overrides: list[str]) -> LoadedRecipe:
    """The recipe, with its warnings shown."""
    from qmedtune import ui
    from qmedtune.parsing.loader import load_recipe

    loaded = load_recipe(path, overrides)
    for warning in loaded.warnings:
        ui.warn(warning)
    return loaded


def run_folder(loaded: LoadedRecipe, out: Path | None) -> Path:
    return out or Path("runs") / loaded.recipe.name


def warn_of_neighbour(out: Path, name: str) -> None:
    """A new run folder whose name is a slip of the hand away from an unfinished run of the same recipe, `name`: it
    would begin anew instead of going on. Names that differ in numbers are no slip."""
    from qmedtune import record, ui
    from qmedtune.parsing.grammar import nearest

    if out.exists():
        return
    beside: dict[str, Path] = {}
    for place in (out.parent, Path("runs")):
        for file in place.glob(f"*/{record.RUN}"):
            beside.setdefault(file.parent.name, file.parent)
    for near in nearest(out.name, beside):
        run = record.read(beside[near])
        if run is None or run.finished or run.name != name or _without_digits(near) == _without_digits(out.name):
            continue
        ui.warn(
            f"{out} is new, so all begins anew; {beside[near]} is there and unfinished: to go on, --out {beside[near]}"
        )


def _without_digits(name: str) -> str:
    return re.sub(r"\d", "", name)


def seconds(text: str) -> float:
    """`55m`, `2h`, `90s` or plain seconds."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smh]?)", text)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"got {text!r}; allowed: 90s, 55m, 2h")
    return float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]]


TimeLimitOption = Annotated[
    float | None, typer.Option(parser=seconds, metavar="55m", help="Seal and stop cleanly after this time.")
]


def wants_colour() -> bool:
    """Whether stdout is a terminal that shows colours, and nobody asked for none."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
