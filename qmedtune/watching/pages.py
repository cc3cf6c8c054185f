"""The documents that the watcher serves: the list, and of each run its live page, its rows, its question box.

Each is whole without its script, which only keeps it up to date and streams answers.
"""

from __future__ import annotations

from urllib.parse import urlencode

from qmedtune.reporting.blocks import DISCLAIMER
from qmedtune.reporting.charts import Html, esc
from qmedtune.watching.live import Parts
from qmedtune.watching.packed_rows import RequestedRows
from qmedtune.watching.parts import address, pill
from qmedtune.watching.runs import Seen

TABS = (("", "Now"), ("rows", "Packed rows"), ("ask", "Ask"), ("report", "Report"))


def document(title: str, navigation: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{esc(title)} – qmedtune watch</title><link rel="icon" href="/icon.svg">'
        '<link rel="stylesheet" href="/watch.css"><script src="/watch.js" defer></script></head>\n'
        f'<body>{navigation}<main>{body}<p class="gone" id="gone" role="alert" hidden></p>'
        f"<footer>{esc(DISCLAIMER)}<br>Served by qmedtune watch on this machine; nothing leaves it.</footer>"
        "</main></body></html>\n"
    )


def _tabs(seen: Seen, here: str) -> str:
    links = '<a href="/">All runs</a>'
    for page, word in TABS:
        current = ' aria-current="page"' if page == here else ""
        links += f'<a href="{esc(address(seen, page))}"{current}>{word}</a>'
    return f'<nav aria-label="Pages of this run">{links}</nav>'


def _live(address: str, parts: Parts, order: str = "") -> str:
    """The parts in place, with where to ask for new ones."""
    inner = "".join(f'<div data-part="{esc(name)}">{html}</div>' for name, html in parts.items())
    return f'<div data-live="{esc(address)}">{inner}</div>{order}'


def list_page(folder: str, parts: Parts) -> str:
    head = f'<header><div class="eyebrow">qmedtune watch</div><h1>{esc(folder)}</h1></header>'
    button = '<p><button type="submit">Compare what is ticked</button></p>'
    return document(folder, "", f'{head}<form action="/compare">{_live("/parts", parts)}{button}</form>')


def run_page(seen: Seen, parts: Parts) -> str:
    return document(seen.run.name, _tabs(seen, ""), _live(address(seen, "parts"), parts))


def _title(seen: Seen, what: str) -> str:
    return f'<header><div class="eyebrow">{esc(what)} {pill(seen)}</div><h1>{esc(seen.run.name)}</h1></header>'


def rows_page(seen: Seen, stages: list[str], requested: RequestedRows, drawn: Html) -> str:
    """The page of packed rows.

    `drawn`: the rows, or why there are none.
    """
    options = ""
    for stage in stages:
        chosen = " selected" if stage == requested.stage else ""
        options += f"<option{chosen}>{esc(stage)}</option>"
    ticked = " checked" if requested.text else ""
    form = (
        f'<form class="line"><label>Stage <select name="stage">{options}</select></label>'
        f'<label>From row <input type="number" name="row" min="1" value="{requested.first + 1}"></label>'
        f'<label><input type="checkbox" name="text" value="yes"{ticked}> with text</label>'
        '<button type="submit">Show</button></form>'
    )
    return document(seen.run.name, _tabs(seen, "rows"), _title(seen, "packed rows") + (form if stages else "") + drawn)


def ask_page(seen: Seen, why_not: str | None) -> str:
    if why_not:
        body = f'<p class="note">{esc(why_not)}</p>'
    else:
        body = (
            f'<form id="ask" data-to="{esc(address(seen, "ask"))}"><label for="question">Your question, asked of both '
            "in the template of the training. Answers are greedy; nothing is kept.</label>"
            '<textarea id="question" rows="3" required maxlength="20000"></textarea>'
            '<p><button type="submit">Ask both</button> <span class="note" id="asking" role="status"></span></p></form>'
            '<div class="sides">'
            '<section class="card"><h2>Base</h2><p class="answer" id="base" aria-live="polite"></p></section>'
            '<section class="card"><h2>Final</h2><p class="answer" id="final" aria-live="polite"></p></section></div>'
        )
    return document(seen.run.name, _tabs(seen, "ask"), _title(seen, "base and final side by side") + body)


def message_page(title: str, text: str) -> str:
    body = f'<header><h1>{esc(title)}</h1></header><p>{esc(text)}</p><p><a href="/">All runs</a></p>'
    return document(title, "", body)


def compare_address(names: list[str]) -> str:
    return "/compare?" + urlencode([("run", name) for name in names])
