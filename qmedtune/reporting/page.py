"""report.html: one page that needs nothing else, from the facts of a run.

Order of the page: what came out, how sure that is, how it was trained, on what, how it was merged, what it cost, what
to be careful about, and how to do it again. Every value is escaped; a content security policy forbids any request.

Deliberately does not: read files, compute results, or run scripts.
"""

import re
from collections.abc import Sequence

from qmedtune.reporting import duels, tables
from qmedtune.reporting.charts import (
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
    ALL,
    Comparison,
    Curve,
    Metrics,
    base_name,
    comparisons,
    curves,
    outcome,
    perplexities,
    precision_words,
)
from qmedtune.reporting.style import CSS
from qmedtune.reporting.tables import Table
from qmedtune.units import count, digits3, duration, size

PALETTE = 8
DIGEST = re.compile("[0-9a-f]{12,64}")
DISCLAIMER = (
    "Not a medical device. The model makes mistakes that sound sure; it must not be used for diagnosis or treatment "
    "without a qualified person's check."
)


def page(run: dict, metrics: Metrics) -> str:
    """The whole page."""
    sections = (
        _header(run),
        section("What it learned", _evaluation(run)),
        section("Head to head", _head_to_head(run)) if run.get("against") else "",
        section("Memorisation", card("", html_table(tables.audit(run)))) if run.get("audit") else "",
        section("Training", _training(run, metrics)),
        section("Data", _data(run)),
        section("Merge", card("", html_table(tables.merge(run)))),
        section("Time and memory", _cost(run)),
        section("Warnings and choices", _choices(run)),
        section("How to do it again", _provenance(run)),
    )
    return document(run["name"], sections, "Written by qmedtune from run.json and metrics.jsonl.")


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


def _head_to_head(run: dict) -> Html:
    said = "".join(f"<li>{esc(sentence)}</li>" for sentence in duels.claims(run))
    return Html(f"<ul>{said}</ul>" + card("", html_table(duels.head_to_head(run))))


def _header(run: dict) -> Html:
    status = esc(run["status"])
    facts = [f"base {base_name(run)}", *(stage["name"] for stage in run.get("stages", []))]
    facts += [run["provenance"]["device"]] if "device" in run.get("provenance", {}) else []
    seconds = sum(step.get("seconds") or 0 for step in run.get("steps", []))
    facts += [duration(seconds)] if seconds else []
    facts += [f"seed {run['seed']}"] if "seed" in run else []
    meta = " ".join(f"<span>{esc(fact)}</span>" for fact in facts)
    return Html(
        f'<header><div class="eyebrow">qmedtune run <span class="status {status}">{status}</span></div>'
        f'<h1>{esc(run["name"])}</h1><p class="outcome">{_together(outcome(run))}</p><div class="meta">{meta}</div>'
        f"{_warning_callout(run)}{_tiles(run)}</header>"
    )


def _together(text: str) -> Html:
    """Arrows stay in the line of both their ends."""
    return esc(text.replace(" → ", "\u00a0→\u00a0"))


def _warning_callout(run: dict) -> str:
    number = len(run.get("warnings", []))
    if not number:
        return ""
    word = "1 warning" if number == 1 else f"{number} warnings"
    return (
        f'<div class="callout"><a href="#warnings-and-choices">{word}</a> to read before these figures are used.</div>'
    )


def _tiles(run: dict) -> str:
    words = precision_words(run)
    cells = [_score_tile(c, words) for c in comparisons(run) if c.part == ALL and c.final is not None]
    for source, (base, final) in perplexities(run).items():
        if final is not None:
            cells.append(_perplexity_tile(source, base, final, words))
    trained = sum(stage.get("tokens", {}).get("trained") or 0 for stage in run.get("stages", []))
    if trained:
        cells.append(_tile("Tokens trained", esc(count(trained)), _stage_words(run)))
    columns = {5: 5, 6: 3, 9: 3}.get(len(cells), min(len(cells), 4))  # rows without gaps, as far as that goes
    return f'<div class="tiles" style="--columns:{columns}">{"".join(cells)}</div>' if cells else ""


def _stage_words(run: dict) -> str:
    parts = ((stage["kind"], stage.get("tokens", {}).get("trained")) for stage in run.get("stages", []))
    return ", ".join(f"{count(tokens)} {kind}" for kind, tokens in parts if tokens)


def _score_tile(c: Comparison, words: str) -> Html:
    assert c.final is not None
    before = f'<span class="from">{c.base.value:.2f} → </span>' if c.base else ""
    tone = {"better": "good", "worse": "poor", "noise": "quiet"}.get(c.verdict, "")
    task, _, metric = c.task.removesuffix(")").partition(" (")
    items = f", {c.final.n:,} items" if c.final.n else ""
    sure = f"95% {c.final.interval()}" if c.final.low is not None else "no interval"
    chance = "" if (at := _chance(c)) is None else f"chance {at:.2f}"
    common = "" if c.final.majority is None else f"commonest answer {c.final.majority:.2f}"
    small = (f"{metric or 'accuracy'}{items}", words, sure, chance, common)
    return _tile(task, Html(f'{before}<span class="{tone}">{c.final.value:.2f}</span>'), *small)


def _perplexity_tile(source: str, base: float | None, final: float, words: str) -> Html:
    if base is None:
        return _tile(source, esc(f"{final:.2f}"), "perplexity", words, "base not measured")
    tone = "good" if final < base else "quiet"
    big = Html(f'<span class="from">{digits3(base)} → </span><span class="{tone}">{digits3(final)}</span>')
    return _tile(source, big, f"perplexity, {tables.change(base, final)}", words, "lower is better")


def _tile(name: str, big: Html, *small: str) -> Html:
    lines = Html("<br>".join(esc(line) for line in small if line))
    return Html(
        f'<div class="tile"><div class="name">{esc(name)}</div><div class="big">{big}</div>'
        f'<div class="small">{lines}</div></div>'
    )


def _evaluation(run: dict) -> Html:
    rows = []
    for c in comparisons(run):
        scores = (("base", c.base, 0), ("final", c.final, 3))
        marks = [Mark(name, score.value, score.low, score.high, color) for name, score, color in scores if score]
        text = " → ".join(f"{mark.value:.2f}" for mark in marks)
        chance = [] if (at := _chance(c)) is None else [Mark("chance", at, None, None, 0, tick=True)]
        rows.append((c.label, [*chance, *marks], text))
    known = any(_chance(c) is not None for c in comparisons(run))
    keys = legend([("base", 0), ("final", 3)], "chance" if known else "")
    figure = f"{keys}{dumbbells(rows)}<br>" if rows else ""
    scores = card(_in_precision("Scores", run), Html(figure + html_table(tables.evaluation(run))))
    classes = tables.classification(run)
    classified = card(classes.title, html_table(classes)) if classes.rows else ""
    texts = _perplexity_figure(run) + html_table(tables.perplexity(run))
    perplexity = card(_in_precision("Perplexity", run), Html(texts))
    lost = tables.quantisation(run)
    quantised = card(lost.title, html_table(lost)) if lost.rows else ""
    return Html(scores + perplexity + quantised + classified)


def _in_precision(title: str, run: dict) -> str:
    return f"{title}, {words}" if (words := precision_words(run)) else title


def _chance(c: Comparison) -> float | None:
    return next((score.chance for score in (c.final, c.base) if score is not None), None)


def _perplexity_figure(run: dict) -> str:
    rows = []
    for source, (base, final) in perplexities(run).items():
        found = [(name, value, color) for name, value, color in (("base", base, 0), ("final", final, 3)) if value]
        marks = [Mark(name, value, None, None, color) for name, value, color in found]
        rows.append((source, marks, " → ".join(digits3(mark.value) for mark in marks)))
    values = [mark.value for _, marks, _ in rows for mark in marks]
    keys = legend([("base", 0), ("final", 3)])
    return f"{keys}{dumbbells(rows, log_axis(values))}<br>" if values else ""


def _training(run: dict, metrics: Metrics) -> Html:
    drawn = curves(run, metrics)
    charts = [card(name, _loss_chart(run, curve)) for name, curve in drawn.items()]
    missing = [stage["name"] for stage in run.get("stages", []) if stage["name"] not in drawn]
    said = f'<p class="note">No loss was logged for {esc(", ".join(missing))}.</p>' if missing else ""
    if metrics.left_out:
        said += (
            f'<p class="note">{metrics.left_out:,} lines or losses of metrics.jsonl are unreadable or not finite.</p>'
        )
    charts_html = f'<div class="pair">{"".join(charts)}</div>' if charts else ""
    return Html(charts_html + said + card("", html_table(tables.stages(run))))


def _loss_chart(run: dict, curve: Curve) -> Html:
    series = [Series("training", curve.train, 0)]
    for source, points in curve.validation.items():
        series.append(Series(f"held-out {source}", points, _color(run, source), dots=True))
    return line_chart(series, "optimiser step", "loss, nats per token")


def _color(run: dict, source: str) -> int:
    """The colour of a source is the same wherever it is drawn: its place in `data`."""
    names = list(run.get("data", {}))
    return 1 + (names.index(source) if source in names else len(names)) % PALETTE


def _data(run: dict) -> Html:
    cards = []
    for stage in run.get("stages", []):
        parts = stage.get("mixture") or {}
        if parts:
            labels = [(f"{source} {part['share']:.0%}", _color(run, source)) for source, part in parts.items()]
            bar = stacked_bar([(source, part["share"], _color(run, source)) for source, part in parts.items()])
            cards.append(card(f"Mixture of {stage['name']}", Html(bar + legend(labels) + _mixture(run, stage))))
    mixtures = f'<div class="pair">{"".join(cards)}</div>' if cards else ""
    ledgers = [tables.records(run), tables.tokens(run)]
    ledgers += [table for table in (tables.reading(run), tables.findings(run), tables.sources(run)) if table.rows]
    return Html(mixtures + "".join(card(table.title, html_table(table)) for table in ledgers))


def _mixture(run: dict, stage: dict) -> Html:
    whole = tables.mixture({"stages": [stage]})
    return html_table(Table(whole.title, whole.columns[1:], [row[1:] for row in whole.rows], whole.note))


def _cost(run: dict) -> Html:
    timed = [step for step in run.get("steps", []) if step.get("seconds") is not None]
    rows = [(step["name"], step["seconds"], duration(step["seconds"]), 1) for step in timed]
    memory = [
        (stage["name"], stage["peak_memory_bytes"], size(stage["peak_memory_bytes"]), 7)
        for stage in run.get("stages", [])
        if stage.get("peak_memory_bytes")
    ]
    time_card = card("Time per step", bars(rows) if rows else _missing("No step was timed."))
    memory_card = card("Peak memory per stage", bars(memory) if memory else _missing("Not measured."))
    return Html(f'<div class="pair">{time_card}{memory_card}</div>')


def _choices(run: dict) -> Html:
    warnings = "".join(f"<li>{esc(text)}</li>" for text in run.get("warnings", []))
    told = f'<div class="callout"><ul>{warnings}</ul></div>' if warnings else '<p class="note">No warnings.</p>'
    chosen = tables.choices(run)
    return Html(told + (card(chosen.title, html_table(chosen)) if chosen.rows else ""))


def _provenance(run: dict) -> Html:
    text = run.get("recipe_text", "")
    recipe = f"<details><summary>The recipe</summary><pre>{esc(text)}</pre></details>"
    facts = card("Provenance", html_table(tables.provenance(run)))
    return Html(facts + (card("", Html(recipe)) if text else ""))


def section(title: str, body: Html) -> Html:
    """A part of the page with a heading that can be linked to."""
    anchor = title.lower().replace(" ", "-")
    return Html(f'<section id="{anchor}"><h2>{esc(title)}</h2>{body}</section>')


def card(title: str, body: Html) -> Html:
    """A box within a section; without a title where there is nothing to tell it from."""
    return Html(f'<div class="card">{f"<h3>{esc(title)}</h3>" if title else ""}{body}</div>')


def _missing(text: str) -> Html:
    return Html(f'<p class="note">{esc(text)}</p>')


def html_table(table: Table) -> Html:
    """The table, or its note where it has no rows."""
    if not table.rows:
        return _missing(table.note)
    kinds = []
    for position in range(len(table.columns)):
        kinds.append(_kind(position, [row[position] for row in table.rows]))

    def cells(row: Sequence[str], tag: str) -> str:
        shown = (Html(f"<code>{esc(cell)}</code>") if DIGEST.fullmatch(cell) else cell for cell in row)
        return "".join(f'<{tag} class="{kind}">{esc(cell)}</{tag}>' for cell, kind in zip(shown, kinds, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    note = f'<p class="table-note">{esc(table.note)}</p>' if table.note else ""
    head = f"<thead><tr>{cells(table.columns, 'th')}</tr></thead>"
    return Html(f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>{note}')


def _kind(position: int, cells: list[str]) -> str:
    """How a column is set: n figures to the right, s short words in one line, w wide text, t other text."""
    longest = max(map(len, cells))
    if (
        position > 0
        and longest < 40
        and set(cells) != {"–"}
        and all(cell[:1].isdigit() or cell[:1] in "+-−–" for cell in cells)
    ):
        return "n"
    return "s" if longest <= 16 else "w" if longest > 30 else "t"
