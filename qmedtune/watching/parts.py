"""What the live page of a run and the list of runs are made of, as HTML parts.

All text goes through `esc`; names, counts and figures only, never text of a record.
"""

from __future__ import annotations

import time
from urllib.parse import quote

from qmedtune.reporting import tables
from qmedtune.reporting.blocks import PALETTE, card, html_table, section
from qmedtune.reporting.cells import Table
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.facts import base_name, outcome, warnings_of
from qmedtune.reporting.head import tiles
from qmedtune.reporting.headline import headline
from qmedtune.ui import Progress
from qmedtune.units import clock, count, duration
from qmedtune.watching.curves import StageCurves, loss_chart, small_charts
from qmedtune.watching.live import Parts
from qmedtune.watching.runs import Seen


def address(seen: Seen, page: str = "") -> str:
    return f"/run/{quote(seen.name, safe='')}/{page}"


def pill(seen: Seen) -> Html:
    word = "killed" if seen.life.killed else seen.status
    return Html(f'<span class="status {esc(seen.status)}">{esc(word)}</span>')


def ago(seconds: float) -> str:
    """How long ago, in words.

    Coarse: a page that changes every second is no calm page.
    """
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    return f"{duration(seconds)} ago"


# ---- the list --------------------------------------------------------------------------------------------------------


def runs_parts(found: list[Seen]) -> Parts:
    if not found:
        return {"runs": '<p class="note">No runs here yet. This page shows them as they begin.</p>'}
    rows = ""
    for number, seen in enumerate(found):
        name, since = esc(seen.name), ago(time.time() - seen.changed_at)
        link = f'<a href="{esc(address(seen))}">{name}</a>{pill(seen)}'
        rows += (
            f'<li><input type="checkbox" name="run" value="{name}" id="pick-{number}" aria-label="compare {name}">'
            f'<div><div>{link} <span class="note">{esc(since)}</span></div>'
            f'<p class="note">{esc(headline(seen.run, seen.life))}</p></div></li>'
        )
    return {"runs": f'<ul class="runs card">{rows}</ul>'}


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_parts(seen: Seen, stages: dict[str, StageCurves]) -> Parts:
    result = tiles(seen.run) if seen.status == "finished" else ""
    return {
        "head": _head(seen),
        "result": result,
        "curves": _curves(seen, stages),
        "steps": section("Steps", card("", _steps(seen))),
        "warnings": section("Warnings", _warnings(seen, stages)),
        "data": _data(seen),
    }


def _head(seen: Seen) -> str:
    run = seen.run
    facts = [f"base {base_name(run)}"]
    facts += [run.provenance.device] if run.provenance.device else []
    facts += [f"changed {ago(time.time() - seen.changed_at)}"] if seen.status != "running" else []
    meta = " ".join(f"<span>{esc(fact)}</span>" for fact in facts)
    said = outcome(run.model_copy(update={"status": seen.status})).replace(" → ", "\u00a0→\u00a0")
    if seen.life.killed:
        said = f"The process is gone without a word (killed, or the machine went down). {said}"
    progress = _progress(seen.life.beat.progress) if seen.status == "running" and seen.life.beat else ""
    return (
        f'<header><div class="eyebrow">run {pill(seen)}</div><h1>{esc(run.name)}</h1>'
        f'<p class="outcome">{esc(said)}</p><div class="meta">{meta}</div>{progress}</header>'
    )


def _progress(progress: Progress) -> str:
    """Where the run is: a dot per step, the bar of what is under way, time left."""
    if progress.step is None:
        return '<p class="note">Checking what is there already.</p>'
    dots = ""
    for name in progress.steps:
        state = "done" if name in progress.finished else "now" if name == progress.step else "next"
        dots += f'<i class="{state}" title="{esc(name)}"></i>'
    place = f"step {progress.steps.index(progress.step) + 1} of {len(progress.steps)}"
    figures = [f"{clock(progress.step_s or 0.0)} so far"]
    bar = ""
    if progress.total:
        share = min(progress.completed / progress.total, 1.0)
        figures.insert(0, f"{count(progress.completed)} of {count(progress.total)} {progress.unit}")
        named = esc(progress.title or progress.step)
        bar = (
            f'<div class="bar" role="progressbar" aria-label="{named}" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div>'
        )
    figures += [progress.note] if progress.note else []
    figures += [f"{clock(progress.left_s)} left"] if progress.left_s is not None else []
    title = "" if progress.title in (None, progress.step) else f" · {progress.title}"
    return (
        f'<div class="progress"><div class="dots" aria-hidden="true">{dots}</div>'
        f"<div><b>{esc(progress.step)}</b>{esc(title)} <span>{esc(place)}</span></div>{bar}"
        f'<div class="note">{esc(" · ".join(figures))}</div></div>'
    )


def _curves(seen: Seen, stages: dict[str, StageCurves]) -> str:
    """The stage that logged last is open, earlier ones are folded behind it."""
    colors = source_colors(seen)
    names = list(stages)
    if not names:
        return section("Curves", Html('<p class="note">No stage has begun to train yet.</p>'))
    body = ""
    for name in reversed(names):
        charts = card("Loss", loss_chart(stages[name], colors))
        small = "".join(card(title, chart) for title, chart in small_charts(stages[name]))
        opened = " open" if name == names[-1] else ""
        body += (
            f'<details class="stage" id="stage-{esc(name)}"{opened}><summary>{esc(name)}</summary>'
            f'{charts}<div class="small">{small}</div></details>'
        )
    return section("Curves", Html(body))


def source_colors(seen: Seen) -> dict[str, int]:
    """As in the report: a source's place in `data` is its colour."""
    return {name: 1 + place % PALETTE for place, name in enumerate(seen.run.data)}


def _steps(seen: Seen) -> Html:
    progress = seen.life.beat.progress if seen.life.beat and seen.status == "running" else Progress()
    rows = []
    for step in seen.run.steps:
        took = duration(step.seconds) if step.seconds is not None else "–"
        if step.name == progress.step:
            left = "–" if progress.left_s is None else clock(progress.left_s)
            rows.append((step.name, "under way", clock(progress.step_s or 0.0), left))
        elif step.is_sealed:
            rows.append((step.name, "sealed", took, "–"))
        else:
            rows.append((step.name, "to do", "–", "–"))
    return html_table(Table("Steps", ("Step", "Status", "Time", "Left"), rows, "" if rows else "No step yet."))


def _warnings(seen: Seen, stages: dict[str, StageCurves]) -> Html:
    told = dict.fromkeys(warnings_of(seen.run))
    for name, stage in stages.items():
        told |= dict.fromkeys(f"{name}: {warning}" for warning in stage.warnings)
    if not told:
        return Html('<p class="note">None so far.</p>')
    lines = "".join(f"<li>{esc(warning)}</li>" for warning in told)
    return Html(f'<div class="callout"><ul>{lines}</ul></div>')


def _data(seen: Seen) -> str:
    cards = ""
    for table in (tables.records(seen.run), tables.tokens(seen.run), tables.findings(seen.run)):
        if table.rows:
            cards += card(table.title, html_table(table))
    return section("Data ledger", Html(cards or '<p class="note">No source is read yet.</p>'))
