"""report.html: one page that needs nothing else, from the facts of a run.

Order of the page: what came out, how sure that is, how it was trained, on what, how it was merged, what it cost, what
to be careful about, and how to do it again. Every value is escaped; a content security policy forbids any request.

Deliberately does not: read files, compute results, or run scripts.
"""

import re
from collections.abc import Iterator, Sequence

from qmedtune.reporting import duels, score_tables, tables
from qmedtune.reporting.cells import UNKNOWN, Table
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
from qmedtune.reporting.facts import (
    Comparison,
    Curve,
    Metrics,
    base_name,
    comparisons,
    curves,
    interval_text,
    outcome,
    precision_words,
    wholes,
)
from qmedtune.reporting.style import CSS
from qmedtune.results import HeadToHead, Number, Run, Score, Stage
from qmedtune.units import count, digits3, duration, size

PALETTE = 8
DIGEST = re.compile("[0-9a-f]{12,64}")
DISCLAIMER = (
    "Not a medical device. The model makes mistakes that sound sure; it must not be used for diagnosis or treatment "
    "without a qualified person's check."
)


def page(run: Run, metrics: Metrics) -> str:
    """The whole page."""
    sections = [_header(run), section("What it learned", _evaluation(run))]
    if run.against is not None:
        sections.append(section("Head to head", _head_to_head(run.against)))
    if run.audit is not None:
        sections.append(section("Memorisation", card("", html_table(score_tables.audit(run)))))
    sections += [
        section("Training", _training(run, metrics)),
        section("Data", _data(run)),
        section("Merge", card("", html_table(tables.merge(run)))),
        section("Time and memory", _cost(run)),
        section("Warnings and choices", _choices(run)),
        section("How to do it again", _provenance(run)),
    ]
    return document(run.name, sections, "Written by qmedtune from run.json and metrics.jsonl.")


def _head_to_head(found: HeadToHead) -> Html:
    said = ""
    for sentence in duels.claims(found):
        said += f"<li>{esc(sentence)}</li>"
    return Html(f"<ul>{said}</ul>" + card("", html_table(duels.head_to_head(found))))


def document(title: str, sections: Sequence[str], written: str) -> str:
    """Sections as one self-contained page, with the disclaimer below."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{esc(title)} – qmedtune</title><style>{CSS}</style></head>\n<body><main>"
        + "\n".join(filter(None, sections))
        + f"\n<footer>{esc(DISCLAIMER)}<br>{esc(written)}</footer>"
        "</main></body></html>\n"
    )


# ---- head ------------------------------------------------------------------------------------------------------------


def _header(run: Run) -> Html:
    status = esc(run.status)
    meta = " ".join(f"<span>{esc(fact)}</span>" for fact in _meta(run))
    return Html(
        f'<header><div class="eyebrow">qmedtune run <span class="status {status}">{status}</span></div>'
        f'<h1>{esc(run.name)}</h1><p class="outcome">{_together(outcome(run))}</p><div class="meta">{meta}</div>'
        f"{_warning_callout(run)}{_tiles(run)}</header>"
    )


def _meta(run: Run) -> Iterator[str]:
    yield f"base {base_name(run)}"
    for stage in run.stages:
        yield stage.name
    if run.provenance.device is not None:
        yield run.provenance.device
    seconds = sum(step.seconds or 0 for step in run.steps)
    if seconds:
        yield duration(seconds)
    if run.seed is not None:
        yield f"seed {run.seed}"


def _together(text: str) -> Html:
    """Arrows stay in the line of both their ends."""
    return esc(text.replace(" → ", "\u00a0→\u00a0"))


def _warning_callout(run: Run) -> str:
    number = len(run.warnings)
    if not number:
        return ""
    word = "1 warning" if number == 1 else f"{number} warnings"
    return (
        f'<div class="callout"><a href="#warnings-and-choices">{word}</a> to read before these figures are used.</div>'
    )


def _tiles(run: Run) -> str:
    cells = list(_tile_cells(run))
    if not cells:
        return ""
    columns = {5: 5, 6: 3, 9: 3}.get(len(cells), min(len(cells), 4))  # rows without gaps, as far as that goes
    return f'<div class="tiles" style="--columns:{columns}">{"".join(cells)}</div>'


def _tile_cells(run: Run) -> Iterator[Html]:
    words = precision_words(run)
    for whole, final in wholes(run):
        yield _score_tile(whole, final, words)
    for source, text in run.scored.perplexity.items():
        if text.final is not None:
            yield _perplexity_tile(source, text.base, text.final, words)
    trained = sum(stage.tokens.trained or 0 for stage in run.stages)
    if trained:
        yield _tile("Tokens trained", esc(count(trained)), _stage_words(run))


def _stage_words(run: Run) -> str:
    parts: list[str] = []
    for stage in run.stages:
        if stage.tokens.trained:
            parts.append(f"{count(stage.tokens.trained)} {stage.kind}")
    return ", ".join(parts)


def _score_tile(whole: Comparison, final: Score, words: str) -> Html:
    task, _, metric = whole.task.removesuffix(")").partition(" (")
    small = [metric or "accuracy", words]
    if final.n:
        small[0] += f", {final.n:,} items"
    if final.ci95 is None:
        small.append("no interval")
    else:
        small.append(f"95% {interval_text(final.ci95)}")
    chance = _chance(whole)
    if chance is not None:
        small.append(f"chance {chance:.2f}")
    if final.majority is not None:
        small.append(f"commonest answer {final.majority:.2f}")
    tone = {"better": "good", "worse": "poor", "noise": "quiet"}.get(whole.verdict, "")
    big = f'<span class="{tone}">{final.value:.2f}</span>'
    if whole.base is not None:
        big = f'<span class="from">{whole.base.value:.2f} → </span>{big}'
    return _tile(task, Html(big), *small)


def _perplexity_tile(source: str, base: Number | None, final: Number, words: str) -> Html:
    if base is None:
        return _tile(source, esc(f"{final:.2f}"), "perplexity", words, "base not measured")
    tone = "good" if final < base else "quiet"
    big = Html(f'<span class="from">{digits3(base)} → </span><span class="{tone}">{digits3(final)}</span>')
    return _tile(source, big, f"perplexity, {score_tables.change(base, final)}", words, "lower is better")


def _tile(name: str, big: Html, *small: str) -> Html:
    lines = "<br>".join(esc(line) for line in small if line)
    return Html(
        f'<div class="tile"><div class="name">{esc(name)}</div><div class="big">{big}</div>'
        f'<div class="small">{lines}</div></div>'
    )


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
    for each in comparisons(run):
        marks = _score_marks(each)
        text = " → ".join(f"{mark.value:.2f}" for mark in marks)
        chance = _chance(each)
        if chance is not None:
            chance_known = True
            marks.insert(0, Mark("chance", chance, None, None, 0, tick=True))
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
            marks.append(Mark(name, score.value, low, high, color))
    return marks


def _in_precision(title: str, run: Run) -> str:
    words = precision_words(run)
    if not words:
        return title
    return f"{title}, {words}"


def _chance(each: Comparison) -> Number | None:
    """Of the first score that is known, the final one first."""
    if not each.scores:
        return None
    return each.scores[0].chance


def _perplexity_figure(run: Run) -> str:
    rows: list[tuple[str, list[Mark], str]] = []
    values: list[float] = []
    for source, text in run.scored.perplexity.items():
        marks: list[Mark] = []
        for name, value, color in (("base", text.base, 0), ("final", text.final, 3)):
            if value:
                marks.append(Mark(name, value, None, None, color))
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
    missing = [stage.name for stage in run.stages if stage.name not in drawn]
    if missing:
        parts.append(_missing(f"No loss was logged for {', '.join(missing)}."))
    if metrics.left_out:
        parts.append(_missing(f"{metrics.left_out:,} lines or losses of metrics.jsonl are unreadable or not finite."))
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
    for table in (tables.reading(run), tables.findings(run), tables.sources(run)):
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


def _bars_or(rows: list[Bar], missing: str) -> Html:
    if not rows:
        return _missing(missing)
    return bars(rows)


# ---- what to be careful about, and how to do it again ----------------------------------------------------------------


def _choices(run: Run) -> Html:
    told = _missing("No warnings.")
    if run.warnings:
        lines = "".join(f"<li>{esc(text)}</li>" for text in run.warnings)
        told = Html(f'<div class="callout"><ul>{lines}</ul></div>')
    chosen = tables.choices(run)
    if not chosen.rows:
        return told
    return Html(told + card(chosen.title, html_table(chosen)))


def _provenance(run: Run) -> Html:
    facts = card("Provenance", html_table(tables.provenance(run)))
    if not run.recipe_text:
        return facts
    recipe = Html(f"<details><summary>The recipe</summary><pre>{esc(run.recipe_text)}</pre></details>")
    return Html(facts + card("", recipe))


# ---- parts of a page -------------------------------------------------------------------------------------------------


def section(title: str, body: Html) -> Html:
    """A part of the page with a heading that can be linked to."""
    anchor = title.lower().replace(" ", "-")
    return Html(f'<section id="{anchor}"><h2>{esc(title)}</h2>{body}</section>')


def card(title: str, body: Html) -> Html:
    """A box within a section; without a title where there is nothing to tell it from."""
    if title:
        body = Html(f"<h3>{esc(title)}</h3>{body}")
    return Html(f'<div class="card">{body}</div>')


def _missing(text: str) -> Html:
    return Html(f'<p class="note">{esc(text)}</p>')


def html_table(table: Table) -> Html:
    """The table, or its note where it has no rows."""
    if not table.rows:
        return _missing(table.note)
    kinds: list[str] = []
    for position in range(len(table.columns)):
        kinds.append(_kind(position, [row[position] for row in table.rows]))
    head = _cells(table.columns, kinds, "th")
    body = "".join(f"<tr>{_cells(row, kinds, 'td')}</tr>" for row in table.rows)
    note = f'<p class="table-note">{esc(table.note)}</p>' if table.note else ""
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}')


def _cells(row: Sequence[str], kinds: Sequence[str], tag: str) -> str:
    cells = ""
    for cell, kind in zip(row, kinds, strict=True):
        shown = esc(cell)
        if DIGEST.fullmatch(cell):
            shown = f"<code>{shown}</code>"
        cells += f'<{tag} class="{kind}">{shown}</{tag}>'
    return cells


def _kind(position: int, cells: list[str]) -> str:
    """How a column is set: n figures to the right, s short words in one line, w wide text, t other text."""
    longest = max(map(len, cells))
    if position > 0 and longest < 40 and _are_figures(cells):
        return "n"
    if longest <= 16:
        return "s"
    return "w" if longest > 30 else "t"


def _are_figures(cells: list[str]) -> bool:
    """Cells that begin with a digit, a sign or the dash of what is not known; not dashes alone."""
    if set(cells) == {UNKNOWN}:
        return False
    return all(cell[:1].isdigit() or cell[:1] in "+-−–" for cell in cells)
