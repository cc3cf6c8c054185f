"""report.html: one page that needs nothing else, from the facts of a run.

Order of the page: what came out, how sure that is, how it was trained, on what, how it was merged, what it cost, what
to be careful about, and how to do it again. Every value is escaped; a content security policy forbids any request.

Deliberately does not: read files, compute results, or run scripts.
"""

from qmedtune.reporting import calibration, duels, privacy, score_tables, sweeps, tables
from qmedtune.reporting.blocks import MANY_ROWS, PALETTE, card, document, html_table, missing, section
from qmedtune.reporting.charts import (
    Bar,
    Html,
    Mark,
    Series,
    bars,
    dumbbells,
    esc,
    legend,
    line_chart,
    log_axis,
    stacked_bar,
)
from qmedtune.reporting.facts import ALL, Comparison, Curve, Metrics, comparisons, curves, precision_words, warnings_of
from qmedtune.reporting.head import header
from qmedtune.results import HeadToHead, Privacy, Run, Stage
from qmedtune.units import digits3, duration, size

FEW_WARNINGS = 12  # of more the rest is folded


def page(run: Run, metrics: Metrics) -> str:
    """The whole page."""
    sections = [header(run), section("What it learned", _evaluation(run))]
    if drawn := calibration.calibration(run):
        sections.append(section("Calibration", drawn))
    if run.against is not None:
        sections.append(section("Head to head", _head_to_head(run.against)))
    if run.audit is not None:
        sections.append(section("Memorisation", card("", html_table(score_tables.audit(run)))))
    sections += [
        section("Training", _training(run, metrics)),
        section("Data", _data(run)),
        section("Merge", _merge(run)),
        section("Time and memory", _cost(run)),
        section("Warnings and choices", _choices(run)),
    ]
    if run.privacy is not None:
        sections.append(section("Privacy", _privacy(run, run.privacy)))
    sections.append(section("How to do it again", _provenance(run)))
    return document(run.name, sections, "Written by qmedtune from run.json and metrics.jsonl.")


def _merge(run: Run) -> Html:
    """The proof, and before it the search for how much of another model comes in."""
    proof = card("", html_table(tables.merge(run)))
    if run.merge is None or not run.merge.sweep:
        return proof
    searched = Html(sweeps.figure(run.merge) + html_table(sweeps.table(run.merge)))
    return Html(card("How much of the other model", searched) + proof)


def _head_to_head(found: HeadToHead) -> Html:
    said = ""
    for sentence in duels.claims(found):
        said += f"<li>{esc(sentence)}</li>"
    return Html(f"<ul>{said}</ul>" + card("", html_table(duels.head_to_head(found))))


# ---- what it learned -------------------------------------------------------------------------------------------------


def _evaluation(run: Run) -> Html:
    scores = Html(_scores_figure(run) + html_table(score_tables.evaluation(run)))
    texts = Html(_perplexity_figure(run) + html_table(score_tables.perplexity(run)))
    cards = card(_in_precision("Scores", run), scores) + card(_in_precision("Perplexity", run), texts)
    for table in (score_tables.quantisation(run), score_tables.classification(run)):
        if table.rows:
            cards += card(table.title, html_table(table))
    return Html(cards)


def _scores_figure(run: Run) -> str:
    rows: list[tuple[str, list[Mark], str]] = []
    chance_known = False
    found = comparisons(run)
    if len(found) > MANY_ROWS:  # parts of tasks stand in the table
        found = [each for each in found if each.part == ALL]
    for each in found:
        marks = _score_marks(each)
        text = " → ".join(f"{mark.value:.2f}" for mark in marks)
        if each.chance is not None:
            chance_known = True
            marks.insert(0, Mark("chance", each.chance, None, None, 0, tick=True))
        rows.append((each.label, marks, text))
    if not rows:
        return ""
    keys = legend([("base", 0), ("final", 3)], "chance" if chance_known else "")
    return f"{keys}{dumbbells(rows)}<br>"


def _score_marks(each: Comparison) -> list[Mark]:
    marks: list[Mark] = []
    for name, score, color in (("base", each.base, 0), ("final", each.final, 3)):
        if score is not None:
            low, high = score.ci95 or (None, None)
            marks.append(Mark(name, score.value, low, high, color, ring=name == "base"))
    return marks


def _in_precision(title: str, run: Run) -> str:
    words = precision_words(run)
    if not words:
        return title
    return f"{title}, {words}"


def _perplexity_figure(run: Run) -> str:
    rows: list[tuple[str, list[Mark], str]] = []
    values: list[float] = []
    for source, text in run.scored.perplexity.items():
        marks: list[Mark] = []
        for name, value, color in (("base", text.base, 0), ("final", text.final, 3)):
            if value:
                marks.append(Mark(name, value, None, None, color, ring=name == "base"))
                values.append(value)
        rows.append((source, marks, " → ".join(digits3(mark.value) for mark in marks)))
    if not values:
        return ""
    keys = legend([("base", 0), ("final", 3)])
    return f"{keys}{dumbbells(rows, log_axis(values))}<br>"


# ---- training, data, cost --------------------------------------------------------------------------------------------


def _training(run: Run, metrics: Metrics) -> Html:
    drawn = curves(run, metrics)
    charts = "".join(card(name, _loss_chart(run, curve)) for name, curve in drawn.items())
    parts = [_side_by_side(charts)]
    unlogged = [stage.name for stage in run.stages if stage.name not in drawn]
    if unlogged:
        parts.append(missing(f"No loss was logged for {', '.join(unlogged)}."))
    if metrics.left_out:
        parts.append(missing(f"{metrics.left_out:,} lines or losses of metrics.jsonl are unreadable or not finite."))
    parts.append(card("", html_table(tables.stages(run))))
    return Html("".join(parts))


def _side_by_side(cards: str) -> str:
    if not cards:
        return ""
    return f'<div class="pair">{cards}</div>'


def _loss_chart(run: Run, curve: Curve) -> Html:
    series = [Series("training", curve.train, 0)]
    for source, points in curve.validation.items():
        series.append(Series(f"held-out {source}", points, _color(run, source), dots=True))
    return line_chart(series, "optimiser step", "loss, nats per token")


def _color(run: Run, source: str) -> int:
    """The colour of a source is the same wherever it is drawn: its place in `data`."""
    names = [*run.data, source]  # itself last, where it is none of them
    return 1 + names.index(source) % PALETTE


def _data(run: Run) -> Html:
    mixtures = "".join(_mixture_card(run, stage) for stage in run.stages if stage.mixture)
    parts = [_side_by_side(mixtures)]
    for table in (tables.records(run), tables.tokens(run)):
        parts.append(card(table.title, html_table(table)))
    shown = [tables.reading(run), tables.findings(run)]
    if run.privacy is None:  # where it is told, terms stand there
        shown.append(tables.sources(run))
    for table in shown:
        if table.rows:
            parts.append(card(table.title, html_table(table)))
    return Html("".join(parts))


def _mixture_card(run: Run, stage: Stage) -> Html:
    bar: list[tuple[str, float, int]] = []
    labels: list[tuple[str, int]] = []
    for source, part in stage.mixture.items():
        color = _color(run, source)
        bar.append((source, part.share, color))
        labels.append((f"{source} {part.share:.0%}", color))
    table = html_table(tables.mixture_of(stage))
    return card(f"Mixture of {stage.name}", Html(stacked_bar(bar) + legend(labels) + table))


def _cost(run: Run) -> Html:
    times: list[Bar] = []
    for step in run.steps:
        if step.seconds is not None:
            times.append((step.name, step.seconds, duration(step.seconds), 1))
    memory: list[Bar] = []
    for stage in run.stages:
        if stage.peak_memory_bytes:
            memory.append((stage.name, stage.peak_memory_bytes, size(stage.peak_memory_bytes), 7))
    time_card = card("Time per step", _bars_or(times, "No step was timed."))
    memory_card = card("Peak memory per stage", _bars_or(memory, "Not measured."))
    return Html(_side_by_side(time_card + memory_card))


def _bars_or(rows: list[Bar], otherwise: str) -> Html:
    if not rows:
        return missing(otherwise)
    return bars(rows)


# ---- what to be careful about, and how to do it again ----------------------------------------------------------------


def _choices(run: Run) -> Html:
    found = warnings_of(run)
    told = missing("No warnings.")
    if found:
        rest = found[FEW_WARNINGS:]
        folded = f"<details><summary>{len(rest)} more</summary>{_listed(rest)}</details>" if rest else ""
        told = Html(f'<div class="callout">{_listed(found[:FEW_WARNINGS])}{folded}</div>')
    chosen = tables.choices(run)
    if not chosen.rows:
        return told
    return Html(told + card(chosen.title, html_table(chosen)))


def _privacy(run: Run, found: Privacy) -> Html:
    cards = card("", Html(_listed(privacy.summary(found))))
    for table in privacy.tables(run, found):
        cards += card(table.title, html_table(table))
    return Html(cards)


def _listed(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>"


def _provenance(run: Run) -> Html:
    facts = card("Provenance", html_table(tables.provenance(run)))
    if not run.recipe_text:
        return facts
    recipe = Html(f"<details><summary>The recipe</summary><pre>{esc(run.recipe_text)}</pre></details>")
    return Html(facts + card("", recipe))
