"""Lines on the terminal: the only file that imports rich, and only once something is drawn.

A terminal that can redraw gets colours and a live region, drawn four times a second by rich's own thread;
anything else (a pipe, a log file, TERM=dumb, a Colab cell, which cannot move its cursor up) gets plain text.

Deliberately does not: know what a run or a stage is (see ui.py). A terminal that goes away (a hang-up,
`| head`) silences the display and nothing else: hours of training must not end because nobody is looking.
"""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

REDRAWS_PER_S = 4
# Of text that is not ours: control characters (an escape sequence can rename a window or hide a line), marks that turn
# the direction of writing, and what a file name holds that is no UTF-8.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Span = tuple[str, str]  # text, rich style
Line = list[Span]


class _Screen:
    """The one display of the process."""

    region: "Live | None" = None
    gone = False  # what was behind stderr is closed, or this is a forked worker


def is_live() -> bool:
    """True when stderr is a terminal that can redraw lines."""
    # A notebook's `!` gives its commands a terminal, and shows what redraws a line as text. ipykernel sets the first.
    notebook = "JPY_PARENT_PID" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    dumb = os.environ.get("TERM") == "dumb" or notebook
    return not dumb and not _Screen.gone and is_terminal(sys.stderr)


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def width() -> int:
    """Columns of the terminal behind stderr."""
    return _console().width


def write(text: str) -> None:
    """One plain line on stderr, flushed."""
    if not _Screen.gone and sys.stderr is not None and not sys.stderr.closed:
        with _terminal_may_go():
            print(printable(text), file=sys.stderr, flush=True)


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of a sentence for stdout: as wide as the terminal, at most 100 columns, less `indent`."""
    columns = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(text, columns - indent, break_long_words=False, break_on_hyphens=False)


def printable(text: str) -> str:
    """Text that does nothing to a terminal but show itself: each control character becomes a middle dot."""
    return CONTROLS.sub("\u00b7", text)


def draw(line: Line) -> None:
    """One styled line on stderr, above the live region. Long lines are not broken, so that paths copy whole."""
    with _terminal_may_go():
        _console().print(_text(line), soft_wrap=True)


@contextmanager
def live_region(lines: Callable[[], list[Line]]) -> Iterator[None]:
    """Keep what `lines` returns at the bottom of the terminal for the block; the outermost region wins.

    `lines` is called from rich's thread: it reads state that is replaced, never mutated.
    """
    if _Screen.region is not None or not is_live():
        yield
        return
    from rich.live import Live

    _forget_in_forks()
    _Screen.region = Live(
        get_renderable=lambda: _group(lines()),
        console=_console(),
        refresh_per_second=REDRAWS_PER_S,
        transient=True,
        # stdout may be a file beside a terminal on stderr: only a terminal's own stdout is woven in
        redirect_stdout=is_terminal(sys.stdout),
    )
    try:
        _Screen.region.start()
        yield
    finally:
        region, _Screen.region = _Screen.region, None
        with _terminal_may_go():
            region.stop()


def draw_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """A table on stdout, which is a terminal. `right`: which columns are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=SIMPLE_HEAD)
    for column, is_right in zip(columns, right, strict=True):
        table.add_column(Text(column), justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


@cache
def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _text(line: Line) -> "Text":
    from rich.text import Text

    return Text.assemble(*((printable(text), style) for text, style in line))


def _group(lines: list[Line]) -> "Group":
    from rich.console import Group

    texts = [_text(line) for line in lines]
    for text in texts:
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*texts)


@contextmanager
def _terminal_may_go() -> Iterator[None]:
    try:
        yield
    except OSError:  # EPIPE, or EIO after a hang-up
        _Screen.gone = True


@cache
def _forget_in_forks() -> None:
    """A forked data worker must not wait for the lock of a drawing thread that was not forked with it."""

    def forget() -> None:
        _Screen.region, _Screen.gone, sys.stderr = None, True, sys.__stderr__

    os.register_at_fork(after_in_child=forget)
