"""Commands about what there is to see: runs, watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmedtune.commands.common import JsonOption, emit, say
from qmedtune.interrupt import Stopped

FolderArgument = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder that holds the runs.")]
RUNS = Path("runs")


def runs(folder: FolderArgument = RUNS, as_json: JsonOption = False) -> None:
    """What is there and how it stands: each run of a folder with status, age and headline."""
    from qmedtune.watching.runs import lines

    found = lines(folder)
    if as_json:
        return emit([line.model_dump() for line in found])
    if not found:
        say(f"{folder}: no runs yet. Make one: qmedtune run recipes/cpt_then_sft.yaml")
        return
    from qmedtune import ui
    from qmedtune.units import duration

    rows = []
    for line in found:
        status = f"{line.status} (killed)" if line.killed else line.status
        rows.append((line.name, status, duration(line.age_s), line.headline))
    ui.table("", ("run", "status", "last sign of life, ago", "headline"), rows)


def watch(
    target: Annotated[
        Path, typer.Argument(metavar="[RUN|FOLDER]", help="A run, or the folder that holds runs.")
    ] = RUNS,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="N", help="0: any free one. Default: 8642, or the next.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Others than 127.0.0.1 need the token.")] = "127.0.0.1",
    clinical_text: Annotated[
        bool, typer.Option("--clinical-text", help="Rows of clinical sources may be shown with text; needs the token.")
    ] = False,
) -> None:
    """The same as a live page on this machine: curves, steps, data, packed rows; base and final side by side."""
    from qmedtune.watching.watch import Watching
    from qmedtune.watching.watch import watch as serve

    try:
        serve(Watching(target, host, port, clinical_text), lambda line: print(line, flush=True))
    except Stopped as stopped:  # Ctrl-C is how it ends
        raise typer.Exit(stopped.exit_code) from None
