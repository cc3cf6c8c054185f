"""The command line: parse, call one function of the module that does the work, print what it returns.

stdout is the result, stderr the progress. Exit codes: 0 ok, 1 run failed, 2 bad usage or recipe, 3 bad data, 4 does not
fit, 129, 130 and 143 signals. Errors are one to six lines without a traceback unless `--debug` is given.
Deliberately absent: logic, and every import that takes time (`--help` answers in under half a second).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qmedtune import __version__
from qmedtune.commands import ablate as cli_ablate
from qmedtune.commands import bench as cli_bench
from qmedtune.commands import compare as cli_compare
from qmedtune.commands import export as cli_export
from qmedtune.commands import fetch as cli_fetch
from qmedtune.commands import model as cli_model
from qmedtune.commands import recipe as cli_recipe
from qmedtune.commands import run as cli_run
from qmedtune.commands import watch as cli_watch
from qmedtune.commands.examples import epilog
from qmedtune.commands.mistakes import usage_lines
from qmedtune.errors import QmedtuneError
from qmedtune.local_names import is_utf8

FULL = (errno.ENOSPC, errno.EDQUOT)
LIBRARIES = (
    "transformers",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "peft",
    "trl",
    "torch",
    "lm_eval",
    "bitsandbytes",
)
UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer typers carry inside

app = typer.Typer(
    help="Turn an open LLaMA into a medical one on a single GPU: one recipe, from a 4-bit base to a merged model.",
    epilog="First run, without network or GPU: qmedtune run recipes/cpt_then_sft.yaml",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure against the limit and against installed peers.", rich_markup_mode=None)
COMMANDS = {
    "run": cli_run.run,
    "plan": cli_run.plan,
    "data": cli_run.data,
    "report": cli_run.report,
    "items": cli_run.items,
    "runs": cli_watch.runs,
    "watch": cli_watch.watch,
    "erase": cli_run.erase,
    "ablate": cli_ablate.ablate,
    "eval": cli_model.evaluate,
    "compare": cli_compare.compare,
    "predict": cli_model.predict,
    "chat": cli_model.chat,
    "merge": cli_model.merge,
    "export": cli_export.export,
    "fetch": cli_fetch.fetch,
    "doctor": cli_run.doctor,
    "selftest": cli_run.selftest,
    "recipe": cli_recipe.recipe,
    "schema": cli_run.schema,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=epilog(name))(command)
for measurement in (cli_bench.kernels, cli_bench.train, cli_bench.load, cli_bench.data, cli_bench.merge):
    bench.command()(measurement)
bench.command("export")(cli_bench.export)
bench.command("eval")(cli_bench.evaluation)
app.add_typer(bench, name="bench")


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


def main() -> None:
    """The console script."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; what went wrong is on stderr."""
    from qmedtune import ui
    from qmedtune.interrupt import Stopped, stop
    from qmedtune.process import prepare

    prepare()
    ui.forget_warnings()
    words = [word for word in arguments if word != "--debug"] or ["--help"]
    if "--offline" in words:  # read once, when huggingface_hub is imported: nothing here has done so yet
        os.environ["HF_HUB_OFFLINE"] = "1"
    if unreadable := [word for word in words if not is_utf8(word)]:
        ui.error_panel([f"{ascii(unreadable[0])}: this name is not UTF-8", "rename the file or folder, then again"])
        return 2
    try:
        with _library_noise_off("--debug" in arguments), stop.watching(None):
            code = app(args=words, prog_name="qmedtune", standalone_mode=False)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `qmedtune schema | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Stopped) as error:
        if "--debug" in arguments:
            _show_traceback()
        return _report(error, words)


@contextmanager
def _library_noise_off(debug: bool) -> Iterator[None]:
    """What libraries warn of about their own future, or about what is set here on purpose, is none of a user's
    business; what a user should know is said by `ui.warn`. `--debug` shows it."""
    if debug:
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of processes that clean text
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _show_traceback() -> None:
    from qmedtune import ui
    from qmedtune.terminal import printable

    ui.warn("a traceback can quote text of your data: read it before you pass it on")
    sys.stderr.write(printable(traceback.format_exc()))


def _report(error: Any, words: Sequence[str]) -> int:
    """Show an error in at most six lines; its exit code."""
    from qmedtune import ui
    from qmedtune.interrupt import Stopped

    if isinstance(error, (QmedtuneError, Stopped)):
        if error.exit_code == 0:  # the time limit: a planned stop
            ui.note(str(error))
        else:
            ui.error_panel(str(error).splitlines()[:6])
        return error.exit_code
    if isinstance(error, UsageError):
        ui.error_panel(usage_lines(error.format_message(), words, [*COMMANDS, "bench"])[:6])
        return 2
    if isinstance(error, OSError) and error.strerror:
        advice = "nothing that was sealed is lost"
        if error.errno in FULL:
            advice = f"make room, then give the same command again; {advice}"
        ui.error_panel([f"{error.filename or 'input/output'}: {error.strerror}", advice])
        return 1
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # of NumPy, of weights: no error number
        where = f"a file could not be read or written ({type(error).__name__} at {_origin(error)})"
        ui.error_panel([where, "is the disk full? nothing that was sealed is lost: give the same command again"])
        return 1
    ui.error_panel([f"{type(error).__name__} at {_origin(error)}", "run again with --debug for the traceback"])
    return 1


def _origin(error: BaseException) -> str:
    """Where our own code was. Messages of foreign exceptions are not shown: they can quote clinical text."""
    package = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown place"
