"""The command line: parse, call one function of the module that does the work, print what it returns.

stdout is the result, stderr the progress. Exit codes: 0 ok, 1 run failed, 2 bad usage or recipe, 3 bad data, 4 does not
fit, 130 and 143 signals. Errors are one to six lines without a traceback unless `--debug` is given.
Deliberately absent: logic, and every import that takes time (`--help` answers in under half a second).
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmedtune import __version__
from qmedtune.errors import QmedtuneError

if TYPE_CHECKING:
    from qmedtune.loader import LoadedRecipe

UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer typers carry inside

app = typer.Typer(
    name="qmedtune",
    help="Turn an open LLaMA into a medical one on a single GPU: one recipe, from a 4-bit base to a merged model.",
    epilog="First run, without network or GPU: qmedtune run recipes/cpt_then_sft.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/cpt_then_sft.yaml.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default: runs/<name>.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key: stages[0].cpt.lr=1e-4; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> None:
    """The console script."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; what went wrong is on stderr."""
    from qmedtune.interrupt import stop

    words = [word for word in arguments if word != "--debug"]
    try:
        with stop.watching(None):
            code = app(args=words, prog_name="qmedtune", standalone_mode=False)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `qmedtune schema | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Show an error in at most six lines; its exit code."""
    from qmedtune import ui

    if isinstance(error, QmedtuneError):
        if error.exit_code == 0:  # the time limit: a planned stop
            ui.note(str(error))
            return 0
        ui.error_panel(str(error).splitlines()[:6])
        return error.exit_code
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "qmedtune"
        ui.error_panel([error.format_message(), f"see: {command} --help"])
        return 2
    if isinstance(error, OSError) and error.strerror:
        ui.error_panel([f"{error.filename or 'input/output'}: {error.strerror}", "nothing that was sealed is lost"])
        return 1
    ui.error_panel([f"{type(error).__name__} at {_origin(error)}", "run again with --debug for the traceback"])
    return 1


def _origin(error: Exception) -> str:
    """Where our own code was. Messages of foreign exceptions are not shown: they can quote clinical text."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "qmedtune" in Path(frame.filename).parts] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown place"


def emit(result: Any) -> None:
    """A result for machines, on stdout."""
    print(json.dumps(result, indent=2, ensure_ascii=False))


def load(path: Path, overrides: list[str]) -> LoadedRecipe:
    """The recipe with its warnings shown."""
    from qmedtune import ui
    from qmedtune.loader import load_recipe

    loaded = load_recipe(path, overrides)
    for warning in loaded.warnings:
        ui.warn(warning)
    return loaded


def _seconds(text: str) -> float:
    """`55m`, `2h`, `90s` or plain seconds."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smh]?)", text)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"got {text!r}; allowed: 90s, 55m, 2h")
    return float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qmedtune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; allowed anywhere.")] = False,
) -> None:
    """Options before the command; `invoke` has already taken `--debug` out."""


@app.command()
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this step, e.g. 01-cpt.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection; the base must be here.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Built-in base and data in place of the recipe's.")] = False,
    time_limit: Annotated[
        float | None, typer.Option(parser=_seconds, metavar="55m", help="Seal and stop cleanly after this time.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe from data to merged model and report; run again to resume."""
    loaded = load(recipe, overrides)
    from qmedtune import run as spine

    folder = out or Path("runs") / loaded.recipe.name
    facts = spine.run(
        loaded.recipe, loaded.text, folder, until=until, offline=offline, smoke=smoke, time_limit_s=time_limit
    )
    emit(facts) if as_json else _show_run(facts, folder)


def _show_run(facts: dict[str, Any], folder: Path) -> None:
    from qmedtune import report_tables, ui

    for table in (report_tables.evaluation(facts), report_tables.perplexity(facts)):
        if table.rows:
            ui.table(table.title, table.columns, table.rows)
    print(f"{facts['name']}: {facts['status']}. Report: {folder / 'report.html'}")
    if facts["status"] == "finished":
        print(f"Talk to it: qmedtune chat {folder}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from qmedtune.grammar import json_schema

    emit(json_schema())
