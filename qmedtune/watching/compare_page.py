"""compare.html and the tables of `qmedtune compare RUN RUN`: a colour per run, the first run is the measure.

Deliberately does not: read folders, test anything (compare_runs.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from qmedtune.compare_runs import ComparedScore, DifferingKey, RunComparison, Side, held_out_sources, stage_names
from qmedtune.reporting.blocks import PALETTE, card, document, html_table, section
from qmedtune.reporting.cells import Row, Table
from qmedtune.reporting.charts import Axis, Html, Mark, Series, dumbbells, esc, legend, line_chart, log_axis
from qmedtune.results import Number
from qmedtune.units import digits3, duration, size

SHARES = Axis((0, 0.25, 0.5, 0.75, 1))
WORDS = {"win": "better", "lose": "worse", "tie": "no difference shown"}


def color(place: int) -> int:
    return 1 + place % PALETTE


def page(result: RunComparison, runs: Sequence[Side]) -> str:
    """The whole page."""
    sections = (
        _header(result),
        section("Scores", _scores(result)),
        section("Training", _curves(runs, result)),
        section("Settings that differ", _settings(result)),
    )
    names = ", ".join(run.name for run in result.runs)
    return document(f"Compared: {names}", sections, "Written by qmedtune from run.json, metrics.jsonl and items.")


def _header(result: RunComparison) -> Html:
    lines = ""
    for place, run in enumerate(result.runs):
        key = f'<i class="key c{color(place)}"></i>'
        lines += (
            f'<li>{key}<b>{esc(run.name)}</b><span class="status {esc(run.status)}">{esc(run.status)}</span> '
            f"{esc(run.headline)}</li>"
        )
    told = ""
    for line in sentences(result):
        told += f'<p class="outcome">{esc(line)}</p>'
    return Html(
        f'<header><div class="eyebrow">qmedtune compare</div><h1>{len(result.runs)} runs</h1>{told}'
        f'<ul class="legend-list">{lines}</ul></header>'
    )


def sentences(result: RunComparison) -> Iterator[str]:
    """One per other run: `b against a: better on facts; no difference shown on pubmedqa.`"""
    for run in result.runs[1:]:
        by_verdict: dict[str, list[str]] = {}
        for duel in result.duels:
            if duel.model == run.name:
                by_verdict.setdefault(duel.verdict, []).append(duel.task)
        parts: list[str] = []
        for verdict, words in WORDS.items():
            if verdict in by_verdict:
                parts.append(f"{words} on {', '.join(by_verdict[verdict])}")
        if parts:
            yield f"{run.name} against {result.reference}: {'; '.join(parts)}."
        else:
            yield f"{run.name} against {result.reference}: no task whose items both answered."


def scored_in(result: RunComparison) -> str:
    """The precision that the runs were scored in; of each run where they differ."""
    found = dict.fromkeys(run.scored_in or "an unknown precision" for run in result.runs)
    if len(found) == 1:
        return f"scored in {next(iter(found))}"
    each = [f"{run.name} in {run.scored_in or 'an unknown precision'}" for run in result.runs]
    return f"scored in several precisions, which moves scores too ({'; '.join(each)})"


# ---- tables, for the terminal too ------------------------------------------------------------------------------------


def scores_table(result: RunComparison) -> Table:
    """Scores as each run reports them; the tests are on the items that all runs answered."""
    rows: list[Row] = []
    for scored in result.scores:
        values = [_share(value) for value in scored.values]
        shared = "–"
        if scored.items is not None:
            shared = f"{scored.items:,}"
        rows.append((_titled(scored), *values, _share(scored.majority), shared))
    note = "No task was scored."
    if rows:
        note = (
            f"Final models, {scored_in(result)}. Shared: items that all runs answered, with the same gold answer; the "
            "tests below are on those."
        )
    return Table("Scores", ("Task", *_names(result), "Commonest answer", "Shared items"), rows, note)


def tests_table(result: RunComparison) -> Table:
    rows: list[Row] = []
    for duel in result.duels:
        low, high = duel.ci95
        change = f"{duel.difference:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
        changed = f"{duel.gained:,} / {duel.lost:,}"
        rows.append((duel.model, duel.task, change, changed, f"{duel.p_holm:.3f}", WORDS[duel.verdict]))
    columns = ("Run", "Task", "Difference, 95%", "Gained / lost", "p (Holm)", "Reading")
    note = "No items are shared: nothing can be tested."
    if rows:
        note = (
            f"Against {result.reference}, paired on the shared items: Tango's interval, exact McNemar test (where "
            "items share a note or premise: resampled groups, exact sign flips), Holm's correction over all rows. No "
            "difference shown is no proof of equality."
        )
    return Table("Paired tests", columns, rows, note)


def perplexity_table(result: RunComparison) -> Table:
    rows: list[Row] = []
    for scored in result.perplexity:
        values = [_perplexity_of(value) for value in scored.values]
        rows.append((scored.name, *values))
    return Table(
        "Perplexity", ("Text", *_names(result)), rows, f"Of the final models, {scored_in(result)}; lower is better."
    )


def training_table(result: RunComparison) -> Table:
    rows: list[Row] = []
    for each in result.training:
        values = [_figure(each.what, value) for value in each.values]
        rows.append((each.stage, each.what, *values))
    note = ""
    if not rows:
        note = "No stage was trained."
    return Table("Training", ("Stage", "What", *_names(result)), rows, note)


def settings_table(title: str, found: Sequence[DifferingKey], result: RunComparison, same: str) -> Table:
    rows: list[Row] = []
    for setting in found:
        values = [written(value) for value in setting.values]
        rows.append((setting.key, *values))
    note = ""
    if not rows:
        note = same
    return Table(title, ("Key", *_names(result)), rows, note)


def _names(result: RunComparison) -> list[str]:
    return [run.name for run in result.runs]


def written(value: JsonValue) -> str:
    """As a recipe would have it; hashes by their beginning."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    parts: list[str] = []
    if isinstance(value, list):
        for inner in value:
            parts.append(written(inner))
        return ", ".join(parts)
    if isinstance(value, dict):
        for key, inner in value.items():
            parts.append(f"{key} {written(inner)}")
        return ", ".join(parts)
    text = str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):  # a SHA-256
        return text[:12]
    return text


def _titled(scored: ComparedScore) -> str:
    if scored.metric in ("", "accuracy"):
        return scored.name
    return f"{scored.name} ({scored.metric})"


def _share(value: Number | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}"


def _perplexity_of(value: Number | None) -> str:
    if value is None:
        return "–"
    return digits3(value)


def _figure(what: str, value: Number | None) -> str:
    if value is None:
        return "–"
    if what == "seconds":
        return duration(value)
    if what == "peak memory":
        return size(value)
    if "loss" in what:
        return f"{value:.3f}"
    return f"{value:,.0f}"


# ---- figures ---------------------------------------------------------------------------------------------------------


def _scores(result: RunComparison) -> Html:
    rows: list[tuple[str, list[Mark], str]] = []
    for scored in result.scores:
        rows.append((_titled(scored), _marks(result, scored), ""))
    figure = ""
    if rows:
        figure = f"{_legend(result)}{dumbbells(rows, SHARES)}<br>"
    scores = card("Scores", Html(figure + html_table(scores_table(result))))
    tests = card("Paired tests", html_table(tests_table(result)))
    return Html(scores + tests + _perplexity(result))


def _marks(result: RunComparison, scored: ComparedScore) -> list[Mark]:
    found: list[Mark] = []
    intervals = scored.ci95 or [None] * len(scored.values)
    for place, (value, interval) in enumerate(zip(scored.values, intervals, strict=True)):
        if value is not None:
            low, high = interval or (None, None)
            found.append(Mark(result.runs[place].name, value, low, high, color(place)))
    return found


def _perplexity(result: RunComparison) -> str:
    rows: list[tuple[str, list[Mark], str]] = []
    values: list[Number] = []
    for scored in result.perplexity:
        marks = _marks(result, scored)
        values += [mark.value for mark in marks]
        rows.append((scored.name, marks, ""))
    if not values:
        return ""
    figure = f"{_legend(result)}{dumbbells(rows, log_axis(values))}<br>"
    return card("Perplexity", Html(figure + html_table(perplexity_table(result))))


def _legend(result: RunComparison) -> Html:
    return legend([(run.name, color(place)) for place, run in enumerate(result.runs)])


def _curves(runs: Sequence[Side], result: RunComparison) -> Html:
    """Training losses of a stage in one chart; then held-out losses, a chart per source."""
    cards = ""
    for name in stage_names(runs):
        lines: list[Series] = []
        for place, side in enumerate(runs):
            lines.append(Series(side.name, side.curve(name).train, color(place)))
        cards += _chart(f"{name}: training", lines)
        for source in held_out_sources(runs, name):
            dots: list[Series] = []
            for place, side in enumerate(runs):
                points = side.curve(name).validation.get(source, [])
                dots.append(Series(side.name, points, color(place), True))
            cards += _chart(f"{name}: held-out {source}", dots)
    if cards:
        cards = f'<div class="pair">{cards}</div>'
    return Html(cards + card("", html_table(training_table(result))))


def _chart(title: str, lines: list[Series]) -> str:
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    return card(title, line_chart(drawn, "optimiser step", "loss, nats per token"))


def _settings(result: RunComparison) -> Html:
    recipe = settings_table("Recipe", result.settings, result, "The recipes say the same.")
    made = settings_table("Made with", result.made_with, result, "Machine, versions, base and data are the same.")
    return Html(card(recipe.title, html_table(recipe)) + card(made.title, html_table(made)))
