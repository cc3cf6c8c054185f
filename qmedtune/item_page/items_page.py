"""The page of items: figures of each task, its calibration, and the items themselves, which an inline script lists.

One file that opens from the disk and asks nobody for anything: the policy in its head allows this one script, known by
its hash, and no request. All text is data to that script, which shows it as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from qmedtune.item_page.answers import OUTCOMES, Answered, AnsweredTask, ModelAnswer
from qmedtune.item_page.question_texts import RequestedItems, Shortener, TaskQuestions
from qmedtune.reporting.blocks import DISCLAIMER, card, html_table, section
from qmedtune.reporting.calibration import calibration
from qmedtune.reporting.cells import Row, Table
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.facts import precision_words
from qmedtune.reporting.style import CSS
from qmedtune.results import Run

COMMAND = re.compile("`([^`]*)`")
MOST_ITEMS = 800  # on a page: their figures take 120 bytes each, beside PAGE_BYTES of text
FEWEST_ITEMS = 40  # of each task
ORDER = {name: place for place, name in enumerate((*OUTCOMES[:2], "wrong", "both wrong", "both right", "right"))}


@dataclass(frozen=True)
class ShownTask:
    """A task with its questions."""

    asked: AnsweredTask
    questions: TaskQuestions


def page(run: Run, tasks: Sequence[ShownTask], requested: RequestedItems) -> tuple[str, list[str]]:
    """(the page, what was left out of it and how it is got)."""
    notes = [f"{each.asked.name}: {each.questions.why}" for each in tasks if each.questions.why]
    all_items = sum(len(each.asked.items) for each in tasks)
    listed: list[list[Answered]] = []
    for each in tasks:
        items = each.asked.items
        if all_items > MOST_ITEMS and not requested.whole:
            items = _first(items, max(FEWEST_ITEMS, MOST_ITEMS * len(items) // all_items))
        if len(items) < len(each.asked.items):
            notes.append(
                f"{each.asked.name}: {len(items):,} of {len(each.asked.items):,} items are listed, what changed first; "
                "the figures are of all. `qmedtune items RUN --whole` lists all of them."
            )
        listed.append(items)
    shortener = Shortener(_different(listed), whole=requested.whole)
    data = [_data(each, items, shortener) for each, items in zip(tasks, listed, strict=True)]
    if shortener.left_out or shortener.cut:
        shortened = [f"of {shortener.cut:,} items are cut"] if shortener.cut else []
        if shortener.left_out:
            shortened.append(f"of {shortener.left_out:,} are left out")
        notes.append(
            f"Texts {' and '.join(shortened)}, so that the page stays small; `qmedtune items RUN --whole` shows all."
        )
    head = (
        f'<header><div class="eyebrow">items, one by one</div><h1>{esc(run.name)}</h1>'
        '<p class="outcome">What the scores are made of. Gained: only the result answers rightly; lost: only the base '
        f"does.</p>{_precision(run)}</header>"
    )
    told = ""
    for note in notes:
        shown = COMMAND.sub(r"<code>\1</code>", esc(note))
        told += f'<p class="note left-out">{shown}</p>'
    summary = section("In all", Html(card("", html_table(summary_table(tasks))) + told))
    sections = [head, summary, section("Items", _browser())]
    if drawn := calibration(run):
        sections.append(section("Calibration", drawn))
    return _document(run.name, sections, data), notes


def _first(items: list[Answered], count: int) -> list[Answered]:
    """So many of them in their order: gained and lost ones, then those that no model answers rightly."""
    places = sorted(range(len(items)), key=lambda place: ORDER[items[place].outcome])
    return [items[place] for place in sorted(places[:count])]


def _different(listed: Sequence[Sequence[Answered]]) -> int:
    """Items by their ids: with examples each is there once per draw."""
    found = 0
    for items in listed:
        found += len({item.id for item in items})
    return found


def _precision(run: Run) -> str:
    words = precision_words(run)
    if not words:
        return ""
    return f'<p class="meta">Base and result were scored in {esc(words)}.</p>'


def summary_table(tasks: Sequence[ShownTask]) -> Table:
    """How many items of each task were gained, lost, and so on. With examples, each draw of an item counts."""
    names = list(OUTCOMES)
    if tasks and len(tasks[0].asked.labels) == 1:
        names = ["right", "wrong"]
    columns = ("Task", "Items", *(name.capitalize() for name in names), "Near ties", "Unread")
    rows: list[Row] = []
    for each in tasks:
        found = each.asked.outcomes
        ties = unread = 0
        for item in each.asked.items:
            ties += item.tie
            unread += item.unread
        figures = [f"{found[name]:,}" for name in names]
        rows.append((each.asked.name, f"{len(each.asked.items):,}", *figures, f"{ties:,}", f"{unread:,}"))
    note = (
        "Near ties: the best two options of a model are nearer than its precision can tell. Unread: an answer in words "
        "that states no one option."
    )
    return Table("", columns, rows, note)


def _data(each: ShownTask, items: Sequence[Answered], shortener: Shortener) -> dict[str, object]:
    """A task for the script, in short lists: an item is [id, facet, draw, gold, options or 0, answers], an answer
    [value, chosen, shares, tie, written, value of that]."""
    facets: list[str] = []
    rows: list[object] = []
    common = _common_options(each)
    for item in items:
        if item.facet and item.facet not in facets:
            facets.append(item.facet)
        options = common or _options(each, item)
        rows.append(
            [
                item.id,
                facets.index(item.facet) if item.facet else -1,
                item.draw,
                _place(options, item.gold),
                0 if options is common else options,
                [_answer(answer, options) for answer in item.answers],
            ]
        )
    return {
        "name": each.asked.name,
        "measure": each.asked.measure,
        "labels": list(each.asked.labels),
        "options": common,
        "facets": facets,
        "rows": rows,
        "texts": _texts(each, items, shortener),
    }


def _common_options(each: ShownTask) -> list[str]:
    """Options that all items of a task share; empty where they differ or there are none."""
    found = {item.options for item in each.questions.by_id.values()}
    if len(found) == 1:
        return list(found.pop())
    return []


def _options(each: ShownTask, item: Answered) -> list[str]:
    """Their names: as asked, else those that were preferred or are right, else numbers."""
    known = each.questions.by_id.get(item.id)
    if known is not None:
        return list(known.options)
    count = max((len(answer.shares) for answer in item.answers), default=0)
    if item.gold and len(item.gold) == 1 and "A" <= item.gold <= "Z":
        return [chr(ord("A") + place) for place in range(count)]
    names = [f"option {place + 1}" for place in range(count)]
    for answer in item.answers:
        if answer.chosen is not None:
            names[answer.shares.index(max(answer.shares))] = answer.chosen
    if item.gold and item.gold not in names:
        names.append(item.gold)
    return names


def _place(options: Sequence[str], name: str | None) -> int:
    if name in options:
        return options.index(name)
    return -1


def _answer(answer: ModelAnswer, options: Sequence[str]) -> list[object]:
    written: object = answer.written
    if written in options:
        written = options.index(str(written))
    chosen = _place(options, answer.chosen)
    return [answer.value, chosen, list(answer.shares), int(answer.tie), written, answer.written_value]


def _texts(each: ShownTask, items: Sequence[Answered], shortener: Shortener) -> dict[str, list[list[str]]]:
    """[question and passages, texts of the options] by id; what changed comes first, in case not all fit."""
    found: dict[str, list[list[str]]] = {}
    if not each.questions.texts:
        return found
    for item in sorted(items, key=lambda item: ORDER[item.outcome]):
        if item.id in found:
            continue
        known = each.questions.by_id[item.id]
        if (parts := shortener.of(known)) is not None:
            found[item.id] = [parts, list(known.texts)]
    return found


# ---- the document ----------------------------------------------------------------------------------------------------


def _browser() -> Html:
    """The controls, which the script fills, and the place where it lists items."""
    return Html(
        '<noscript><p class="callout">Items are listed by a script within this page, which this browser does not run. '
        "The figures above stand without it.</p></noscript>"
        '<form class="card controls" id="controls" aria-label="Which items are listed" hidden>'
        '<div class="fields"><label>Task <select id="task"></select></label>'
        '<label id="by-label">Judged by <select id="by"></select></label>'
        '<label id="facet-label">Facet <select id="facet"></select></label>'
        '<label>Order <select id="order"></select></label>'
        '<label class="search">Search <input id="search" type="search" autocomplete="off"></label></div>'
        '<fieldset class="outcomes"><legend class="unseen">Outcome</legend><div id="outcomes"></div></fieldset>'
        '<div class="marks"><label><input type="checkbox" id="ties"> near ties only</label>'
        '<label><input type="checkbox" id="unread"> unread answers only</label></div></form>'
        '<p class="told" id="told" role="status"></p><div id="list"></div>'
        '<nav class="pager" id="pager" aria-label="Pages of items" hidden><button type="button" id="before">'
        'Earlier</button><span id="where"></span><button type="button" id="after">Later</button></nav>'
    )


def _document(title: str, sections: Sequence[str], data: Sequence[object]) -> str:
    here = files("qmedtune.item_page")
    script = (here / "items.js").read_text(encoding="utf-8")
    style = CSS + (here / "items.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{esc(title)}: items – qmedtune</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(sections)
        + f"\n<footer>{esc(DISCLAIMER)}<br>Written by qmedtune items; it may hold text of benchmarks: keep it where "
        f'their terms allow.</footer></main>\n<script type="application/json" id="data">{_embedded(data)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _embedded(data: Sequence[object]) -> str:
    """JSON that no text in it can end: `<` is written as an escape, and so are the two separators that old engines take
    for line ends."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
