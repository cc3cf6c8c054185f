"""The command `ablate`: arms of one recipe, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmedtune.commands.common import (
    JsonOption,
    OfflineOption,
    OutOption,
    RecipeArgument,
    SetOption,
    TimeLimitOption,
    emit,
    load,
    run_folder,
    say,
)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) < 2**32 for part in parts):
        raise typer.BadParameter(f"got {text!r}; allowed: whole numbers with commas between them, such as 17,18,19")
    return list(dict.fromkeys(map(int, parts)))


def ablate(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
    seeds: Annotated[
        Path | None, typer.Option(parser=_numbers, metavar="17,18,19", help="Instead of the recipe's seeds.")
    ] = None,
    offline: OfflineOption = False,
    time_limit: TimeLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the arms of a recipe's `ablate:` section and compare them. Run again to go on."""
    loaded = load(recipe, overrides)
    from qmedtune import ablate as sweep
    from qmedtune import ui
    from qmedtune.ablation import ablation_page

    folder = run_folder(loaded, out)
    result = sweep.ablate(loaded, folder, seeds=seeds, offline=offline, time_limit_s=time_limit)  # type: ignore[arg-type]
    if as_json:
        return emit(result.as_json())
    for table in ablation_page.tables(result):
        if table.rows:
            ui.table(table.title, table.columns, table.rows)
    say("\n".join(str(folder / name) for name in (sweep.REPORT, sweep.TABLE, sweep.DIFFERENCES, sweep.FIGURE)))
