"""Commands about recipes and runs: run, plan, data, report, schema, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmedtune.commands.common import (
    JsonOption,
    OfflineOption,
    OutOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    TimeLimitOption,
    emit,
    load,
    run_folder,
    say,
    wants_colour,
    warn_of_neighbour,
)

if TYPE_CHECKING:
    from qmedtune.parsing.loader import LoadedRecipe
    from qmedtune.reporting.cells import Table
    from qmedtune.results import Run


def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this step, e.g. 01-cpt.")] = None,
    offline: OfflineOption = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Built-in base and data, in runs/<name>-smoke.")] = False,
    time_limit: TimeLimitOption = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="N|auto", help="Train with so many GPUs; default: one.")
    ] = None,
    on_end: Annotated[
        str | None, typer.Option("--on-end", metavar="CMD", help="Run this at the end, told by $QMEDTUNE_STATUS ...")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """From data to merged model and report. Run again to resume."""
    from qmedtune import peers

    if peers.under_torchrun() and peers.torchrun_rank() > 0:
        from qmedtune import follower

        raise typer.Exit(follower.follow_torchrun())
    loaded = load(recipe, overrides)
    from qmedtune import run as spine
    from qmedtune.on_end import telling

    folder = out or (Path("runs") / f"{loaded.recipe.name}-smoke" if smoke else run_folder(loaded, out))
    if out is not None:
        warn_of_neighbour(out, loaded.recipe.name)
    with telling(on_end, loaded.recipe.name, folder) as end, peers.called(gpus):
        found = spine.run(
            loaded.recipe, loaded.text, folder, until=until, offline=offline, smoke=smoke, time_limit_s=time_limit
        )
        end.told(found)
    emit(found.as_json()) if as_json else _show_run(found, folder)


def _show_run(found: Run, folder: Path) -> None:
    from qmedtune.reporting import duels, score_tables

    _show(score_tables.evaluation(found), score_tables.perplexity(found), score_tables.classification(found))
    if found.against is not None:
        _show(duels.head_to_head(found.against))
    say(f"{found.name}: {found.status}. Report: {folder / 'report.html'}")
    if not found.finished:
        return
    if found.merge is not None:
        say(f"Talk to it: qmedtune chat {folder}")
        return
    models = [stage.model.path for stage in found.stages if stage.model is not None]
    if models:
        say(f"No adapter was trained, so nothing was merged: the model is {folder / models[-1]}")


def _show(*tables: Any) -> None:
    from qmedtune import ui

    for table in tables:
        if table.rows:
            ui.table(table.title, table.columns, table.rows)


def plan(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = [],  # noqa: B006
    full: Annotated[bool, typer.Option("--full", help="Every figure, and why each `auto` became what it did.")] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="N|auto", help="Plan for so many GPUs like this one; default: one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run will take, before anything runs: fits or not, time, disk. Exit code 4: it cannot fit."""
    loaded = load(recipe, overrides)
    from qmedtune.plan import make_plan
    from qmedtune.planning import plan_screen
    from qmedtune.planning.machine import planned_cards
    from qmedtune.planning.view import render_plan
    from qmedtune.terminal import wrapped

    facts = make_plan(loaded.recipe, run_folder(loaded, out), cards=planned_cards(gpus))
    if as_json:
        return emit(facts)
    say("\n".join(wrapped(f"{facts['recipe']} {plan_screen.verdict(facts)}")))
    if full:
        tables, closing = render_plan(facts)
        _show(*tables)
        return say("\n".join(closing))
    steps, lines = plan_screen.screen(facts)
    _show(steps)
    say("\n".join([*lines, f"everything else: qmedtune plan {recipe} --full"]))


def data(
    words: Annotated[list[str], typer.Argument(metavar="[show] RECIPE", help="`show` prints packed rows.")],
    out: OutOption = None,
    overrides: SetOption = [],  # noqa: B006
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="show: rows of this stage; default: first.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="show: so many rows.")] = 3,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """The data steps alone, with their ledger; `data show` prints what is trained on."""
    *show, recipe = words
    if show not in ([], ["show"]) or (words == ["show"] and not Path(recipe).exists()):
        raise typer.BadParameter(f"got {' '.join(words)!r}; allowed: data RECIPE, data show RECIPE")
    loaded = load(Path(recipe), overrides)
    folder = run_folder(loaded, out)
    if show:
        return _show_packed(loaded, folder, ShownRows(stage, count, offline, as_json))
    from qmedtune import run as spine
    from qmedtune.reporting import tables as report_tables

    found = spine.run(loaded.recipe, loaded.text, folder, until="data", offline=offline)
    if as_json:
        ledgers = {name: source.as_json() for name, source in found.data.items()}
        return emit(ledgers)
    _show(report_tables.records(found), report_tables.reading(found), report_tables.findings(found))
    _show(*_packed_tables(folder, loaded.recipe.stage_names()))


def _packed_tables(folder: Path, stages: list[str]) -> Iterator[Table]:
    from qmedtune import store
    from qmedtune.reporting import tables as report_tables
    from qmedtune.results import Packing

    for name in stages:
        sealed = store.read_seal(folder / "data" / name)
        if sealed is not None:
            yield report_tables.packing(name, Packing.model_validate(sealed.facts).mixture)


@dataclass(frozen=True)
class ShownRows:
    """What `data show` prints: so many rows of a stage (default: the first), as text or as JSON."""

    stage: str | None
    count: int
    offline: bool
    as_json: bool


def _stage_named(asked: str | None, stages: list[str]) -> str:
    """A stage by its name (`02-sft`), its number or its kind where it is the only one of it; default: the first."""
    if asked is None:
        return stages[0]
    found: list[str] = []
    for stage in stages:
        number, _, kind = stage.partition("-")
        if asked in (stage, number, number.lstrip("0"), kind):
            found.append(stage)
    if len(found) != 1:
        raise typer.BadParameter(f"--stage: got {asked!r}; allowed: {', '.join(found or stages)}")
    return found[0]


def _show_packed(loaded: LoadedRecipe, folder: Path, asked: ShownRows) -> None:
    from qmedtune import base, store
    from qmedtune.data.packing import borders
    from qmedtune.data.packing.pack import PackedRows
    from qmedtune.data.packing.show import documents, show
    from qmedtune.data.packing.tokens import load_codec
    from qmedtune.errors import RecipeError
    from qmedtune.results import Packing

    recipe = loaded.recipe
    packed = folder / "data" / _stage_named(asked.stage, recipe.stage_names())
    sealed = store.read_seal(packed)
    if sealed is None:
        given = "" if folder == run_folder(loaded, None) else f" --out {folder}"
        raise RecipeError(f"{packed}: nothing is packed here\nmake it with: qmedtune data {loaded.path}{given}")
    rows = PackedRows(packed)
    source = base.identify(recipe.model, offline=asked.offline)
    codec = load_codec(source.make())
    template, told_borders = Packing.model_validate(sealed.facts).template, borders.described(codec)
    if asked.as_json:
        planted = {recipe.audit.source, recipe.audit.prompts} if recipe.audit else set()
        folders = {name: folder / "data" / ("planted" if name in planted else "") / name for name in rows.sources}
        shown = documents(rows, folders, asked.count)
        return emit({"template": template, "borders": told_borders, "rows": shown})
    print(f"conversations in template {template}" if template else f"documents: {told_borders['why']}")
    print(show(rows, codec.backend, asked.count, color=wants_colour()))


def report(
    run_dir: RunArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every sealed file; name what differs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Render the report again, or verify every hash of a run."""
    from qmedtune import verify as checking
    from qmedtune.report import write_report

    checking.check_is_run(run_dir)
    facts = checking.verify(run_dir) if verify else write_report(run_dir)
    if as_json:
        return emit(facts)
    if verify:
        print(f"{facts['files']} files in {facts['folders']} sealed folders are as they were sealed")
        if "erased" in facts:
            say(f"erased: {facts['erased']} files with text, by `qmedtune erase`")
    else:
        say("\n".join(str(run_dir / name) for name in facts))


def items(
    run_dir: RunArgument,
    whole: Annotated[bool, typer.Option("--whole", help="All of every text, however large the page is.")] = False,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Questions and options as they were asked.")] = True,
    clinical_text: Annotated[
        bool, typer.Option("--clinical-text", help="Also of benchmarks that may hold patients' words.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """A local page of the items: gained, lost, near ties, confidence; readable by you alone."""
    from qmedtune import verify as checking
    from qmedtune.item_page.make import write_items_page
    from qmedtune.item_page.question_texts import RequestedItems

    checking.check_is_run(run_dir)
    written = write_items_page(run_dir, RequestedItems(text, clinical_text, whole))
    if as_json:
        return emit(written.as_json())
    for note in written.left_out:
        say(note)
    say(written.path)


def erase(
    run_dir: RunArgument,
    text: Annotated[bool, typer.Option("--text", help="Remove all text of the sources.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove all text from a run folder; weights, figures and seals stay and can still be verified."""
    if not text:
        raise typer.BadParameter(f"say what is to be erased: qmedtune erase {run_dir} --text")
    from qmedtune import erase as erasing
    from qmedtune import ui
    from qmedtune import verify as checking

    for run in erasing.runs_in(run_dir):
        checking.check_is_run(run)
    facts = erasing.erase(run_dir)
    if facts["elsewhere"]:
        ui.warn(f"{facts['elsewhere']} of these files have another name outside of {run_dir}: their text stays there")
    if as_json:
        return emit(facts)
    say(f"{run_dir}: {facts['files']} files with text erased ({facts['bytes']:,} bytes), .history and .building too")


def selftest(as_json: JsonOption = False) -> None:
    """Prove on this machine that kernels, packing, accumulation and merge give equal results."""
    from qmedtune import selftest as proofs
    from qmedtune import ui

    found = []
    with ui.progress_bar("selftest", total=len(proofs.CHECKS), unit="checks") as shown:
        for row in proofs.selftest():
            found.append(row)
            shown.update(len(found), note=row["check"])
    if as_json:
        emit({"checks": found})
    else:
        lines = [(r["check"], f"{r['measured']:.1e}", f"{r['limit']:.1e}", "yes" if r["ok"] else "NO") for r in found]
        ui.table(f"Equal on this machine, in {found[0]['dtype']}", ("check", "differs by", "allowed", "equal"), lines)
    proofs.raise_if_failed(found)


def schema() -> None:
    """The JSON Schema of recipes, for editors."""
    from qmedtune.parsing.grammar import json_schema

    emit(json_schema())


def doctor(as_json: JsonOption = False) -> None:
    """What this machine has, and which kernel path is taken and why."""
    from qmedtune import doctor as examiner
    from qmedtune import ui

    facts = examiner.examine()
    if as_json:
        return emit(facts)
    ui.table("This machine", ("what", "found"), examiner.rows(facts))
    say("\n".join(f"- {line}" for line in facts["advice"]))
