"""`qmedtune compare`: runs by what they hold, or models by asking them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmedtune.commands.common import JsonOption, OfflineOption, emit, say
from qmedtune.commands.model import QuantizationOption

if TYPE_CHECKING:
    from qmedtune.results import HeadToHead


def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN|MODEL...", help="The first is what the others are held against.")
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B=FILE", help="Ask models: pubmedqa=FILE, medqa=FILE, facts ...")
    ] = None,
    shots: Annotated[str, typer.Option(metavar="0,3", help="Numbers of examples that each model may choose.")] = "0",
    templates: Annotated[
        str, typer.Option(metavar="A,B", help="Templates that each model may choose besides its own.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=16, help="At most this many items of each task.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep compare.json, and the page or the items, here.")
    ] = None,
    quantization: QuantizationOption = "none",
    seed: Annotated[int, typer.Option(min=0, help="Draws the development items and the examples.")] = 17,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Runs: what differs, curves, paired tests. With --tasks models: each asked in the prompt that suits it."""
    if tasks is None:
        return _compare_runs([Path(name) for name in names], out, as_json)
    from qmedtune.compare import ComparisonJob, compare_models
    from qmedtune.evaluate import named_file
    from qmedtune.recipe import TaskSection

    sections = []
    for entry in tasks.split(","):
        name, path = named_file(entry, None)
        sections.append(TaskSection(task=name, path=path, limit=limit))
    if not re.fullmatch(r"\d{1,2}(,\d{1,2})*", shots):
        raise typer.BadParameter(f"--shots: got {shots!r}; allowed: numbers with commas between, 0,3")
    numbers = tuple(int(number) for number in shots.split(","))
    named = tuple(name for name in templates.split(",") if name)
    asked = ComparisonJob(tuple(names), tuple(sections), numbers, named, seed, quantization, offline)
    found = compare_models(asked, out)
    emit(found.as_json()) if as_json else _show_duels(found)


def _compare_runs(folders: list[Path], out: Path | None, as_json: bool) -> None:
    from qmedtune import store, ui
    from qmedtune.compare_runs import compare as compare_runs
    from qmedtune.compare_runs import sides
    from qmedtune.watching import compare_page as page

    runs = sides(folders)
    result = compare_runs(runs)
    facts = result.model_dump(mode="json")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        store.write_json(out / "compare.json", facts)
        store.write_atomic(out / "compare.html", page.page(result, runs))
    if as_json:
        return emit(facts)
    tables = [
        page.settings_table("Settings that differ", result.settings, result, ""),
        page.settings_table("Made with", result.made_with, result, ""),
        page.training_table(result),
        page.perplexity_table(result),
        page.scores_table(result),
        page.tests_table(result),
    ]
    for table in tables:
        if table.rows:
            ui.table(table.title, table.columns, table.rows)
    say("\n".join(page.sentences(result)))
    if out is not None:
        say(f"The page, with curves: {out / 'compare.html'}")


def _show_duels(found: HeadToHead) -> None:
    from qmedtune import ui
    from qmedtune.compare import precision_of
    from qmedtune.reporting.cells import three_decimals

    rows: list[tuple[str, ...]] = []
    for duel in found.duels:
        low, high = duel.ci95
        scores = [found.models[name][duel.task] for name in (found.reference, duel.model)]
        asked = " / ".join(f"{score.template}, {score.shots} shots" for score in scores)
        both = " → ".join(f"{score.accuracy:.3f}" for score in scores)
        change = f"{duel.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        figures = (both, three_decimals(scores[0].majority), change, f"{duel.p_holm:.3f}")
        rows.append((duel.model, duel.task, *figures, duel.verdict, asked))
    measures = ("accuracy", "commonest answer", "difference, 95 %", "p (Holm)")
    title = f"against {found.reference}, scored in {precision_of(found.models, list(found.models))}"
    ui.table(title, ("model", "task", *measures, "verdict", "asked with"), rows)
    for sentence in found.claims:
        ui.note(sentence)
