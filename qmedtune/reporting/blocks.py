"""What every page is built of: the document, sections, cards, tables. Every value is escaped.

Deliberately does not: know what a run is, read files, or run scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qmedtune.reporting.cells import UNKNOWN, Table
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.style import CSS

PALETTE = 8
LONG_COLUMNS = 8  # from so many on, or from MANY_COLUMNS with long text, a tablet shows rows as blocks too
MANY_COLUMNS, MANY_ROWS = 4, 24  # from so many on, a phone shows rows as blocks; beyond so many rows fold
HEADING = re.compile(r'<section id="(?P<anchor>[^"]*)"><h2>(?P<title>[^<]*)</h2>')
DIGEST = re.compile("[0-9a-f]{12,64}")
DISCLAIMER = (
    "Not a medical device. The model makes mistakes that sound sure; it must not be used for diagnosis or treatment "
    "without a qualified person's check."
)


def document(title: str, sections: Sequence[str], written: str) -> str:
    """Sections as one self-contained page, the first of them its head, with a table of contents and the disclaimer."""
    head, *rest = [part for part in sections if part]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{esc(title)} – qmedtune</title><style>{CSS}</style></head>\n<body><main>"
        + "\n".join([head, contents(rest), *rest])
        + f"\n<footer>{esc(DISCLAIMER)}<br>{esc(written)}</footer>"
        "</main></body></html>\n"
    )


def contents(sections: Sequence[str]) -> str:
    """Links to the sections that `section` made; empty where there are too few to need it."""
    links = ""
    for part in sections:
        if found := HEADING.match(part):
            links += f'<a href="#{found["anchor"]}">{found["title"]}</a>'
    return f'<nav class="contents" aria-label="On this page">{links}</nav>' if len(sections) > 2 else ""


def section(title: str, body: Html) -> Html:
    """A part of the page with a heading that can be linked to."""
    anchor = title.lower().replace(" ", "-")
    return Html(f'<section id="{anchor}"><h2>{esc(title)}</h2>{body}</section>')


def card(title: str, body: Html) -> Html:
    """A box within a section; without a title where there is nothing to tell it from."""
    if title:
        body = Html(f"<h3>{esc(title)}</h3>{body}")
    return Html(f'<div class="card">{body}</div>')


def missing(text: str) -> Html:
    return Html(f'<p class="note">{esc(text)}</p>')


def html_table(table: Table) -> Html:
    """The table, or its note where it has no rows. One of very many rows is folded."""
    if not table.rows:
        return missing(table.note)
    kinds: list[str] = []
    for position in range(len(table.columns)):
        kinds.append(_kind(position, [row[position] for row in table.rows]))
    head = ""
    for column, kind in zip(table.columns, kinds, strict=True):
        head += f'<th scope="col" class="{kind}">{esc(column)}</th>'
    body = "".join(f"<tr>{_cells(row, table.columns, kinds)}</tr>" for row in table.rows)
    name, wide = esc(table.title or table.columns[0]), ""
    if len(table.columns) >= MANY_COLUMNS or (len(table.columns) > 2 and "w" in kinds):
        wide = " many"
    if len(table.columns) >= LONG_COLUMNS or (len(table.columns) >= MANY_COLUMNS and "w" in kinds):
        wide = " many long"
    drawn = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{name}"><table class="table{wide}">'
        f'<caption class="unseen">{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    note = f'<p class="table-note">{esc(table.note)}</p>' if table.note else ""
    if len(table.rows) > MANY_ROWS:
        drawn = f"<details><summary>{name}: {len(table.rows):,} rows</summary>{drawn}</details>"
    return Html(drawn + note)


def _cells(row: Sequence[str], columns: Sequence[str], kinds: Sequence[str]) -> str:
    """The first cell heads its row. On a phone, where each row becomes a block, a cell is named by its column."""
    cells = ""
    for place, (cell, column, kind) in enumerate(zip(row, columns, kinds, strict=True)):
        shown = esc(cell)
        if DIGEST.fullmatch(cell):
            shown = f"<code>{shown}</code>"
        if place == 0:
            cells += f'<th scope="row" class="{kind}">{shown}</th>'
        else:
            cells += f'<td class="{kind}" data-column="{esc(column)}">{shown}</td>'
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
