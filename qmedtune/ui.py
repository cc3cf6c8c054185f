"""What a person sees while qmedtune works: progress and notes on stderr, result tables on stdout.

A terminal shows at most two moving lines, one for the run and one for its innermost progress bar, and one line
stays for each finished step. Log files get plain lines: at the start, at the end, and every `PLAIN_EVERY_S`.

Deliberately does not: draw (see terminal.py), read files, or hold results. Callers never pass text of records
here: names, counts and figures only.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from qmedtune import terminal
from qmedtune.terminal import Line
from qmedtune.units import clock, count, duration

PLAIN_EVERY_S = 10.0
RATE_SMOOTHING = 0.2  # weight of the newest interval in the moving average behind "left"
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
MARKS = {"done": ("✓", "green"), "stopped": ("✗", "bold red"), "cached": ("·", "dim")}


def _now() -> float:
    return time.monotonic()


@dataclass
class ProgressBar:
    """One bar: `completed` of `total` in `unit`, losses in nats. Made by `progress_bar()`, fed by `update()`."""

    title: str
    total: float | None
    unit: str
    completed: float
    first_loss: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    lr: float | None = None
    note: str | None = None
    units_per_s: float | None = None  # smoothed
    started_s: float = field(default_factory=_now)
    updated_s: float = field(default_factory=_now)
    printed_s: float = field(default_factory=_now)

    def update(
        self,
        completed: float,
        *,
        loss: float | None = None,
        tokens_per_s: float | None = None,
        lr: float | None = None,
        note: str | None = None,
    ) -> None:
        """Say how far the work is. A field left out keeps its last value. Cheap: draws nothing."""
        now = _now()
        if completed > self.completed:
            latest = (completed - self.completed) / max(now - self.updated_s, 1e-6)
            before = latest if self.units_per_s is None else self.units_per_s
            self.units_per_s = before + RATE_SMOOTHING * (latest - before)
            self.updated_s = now
        self.completed = completed
        if loss is not None:
            self.loss = loss
        if self.first_loss is None:
            self.first_loss = loss
        if tokens_per_s is not None:
            self.tokens_per_s = tokens_per_s
        if lr is not None:
            self.lr = lr
        if note is not None:
            self.note = note
        if now - self.printed_s >= PLAIN_EVERY_S and not terminal.is_live():
            self.printed_s = now
            terminal.write(f"    {self.title}: " + ", ".join(self.figures()))

    def elapsed_s(self) -> float:
        return _now() - self.started_s

    def left_s(self) -> float | None:
        """Seconds to go at the smoothed rate, counting down between updates; None while unknown."""
        if self.total is None or not self.units_per_s:
            return None
        since_update_s = _now() - self.updated_s
        return max((self.total - self.completed) / self.units_per_s - since_update_s, 0.0)

    def figures(self) -> list[str]:
        """What the moving line says, most important first: a narrow terminal drops the last ones."""
        parts: list[str] = []
        if self.total:
            parts.append(f"{min(self.completed / self.total, 1.0):.0%}")
        if self.note:
            parts.append(self.note)
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        left = self.left_s()
        if left is None:
            parts.append(clock(self.elapsed_s()))
        else:
            parts.append(f"{clock(left)} left")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.total:
            parts.append(f"{count(self.completed)} of {count(self.total)} {self.unit}")
        elif self.completed:
            parts.append(f"{count(self.completed)} {self.unit}")
        if self.lr is not None:
            parts.append(f"lr {self.lr:.1e}")
        return parts

    def summary(self) -> str:
        """What stays when it has ended: `500k tokens, loss 3.214 → 1.234, 8,700 tokens/s`."""
        parts: list[str] = []
        if self.completed:
            parts.append(f"{count(self.completed)} {self.unit}")
        if self.loss is not None:
            parts.append(f"loss {self.first_loss:.3f} → {self.loss:.3f}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


@dataclass
class StepProgress:
    """The step of a run that is active. Set `summary` to say in a few words what came out of it."""

    name: str
    summary: str = ""
    started_s: float = field(default_factory=_now)
    longest: tuple[float, str] = (0.0, "")  # seconds and summary of its longest bar


@dataclass
class RunProgress:
    """An ordered list of steps, of which at most one is active. Made by `run_progress()`."""

    steps: tuple[str, ...]
    expected_s: Mapping[str, float]
    finished: frozenset[str] = frozenset()
    active: StepProgress | None = None
    started_s: float = field(default_factory=_now)
    tokens: Mapping[str, float] = field(default_factory=dict)  # to train in each step, once they are known

    @contextmanager
    def step(self, name: str) -> Iterator[StepProgress]:
        """`name` is active for the length of the block; its summary stays, else its longest bar's."""
        active = self.active = StepProgress(name)
        if not terminal.is_live():
            terminal.write(f"{self.label(name)}: started")
        ended = "stopped"
        try:
            yield active
            ended = "done"
            self.finished |= {name}
        finally:
            self.active = None
            seconds = _now() - active.started_s
            self._leave(name, ended, seconds, active.summary or active.longest[1])

    def cached(self, name: str, why: str = "unchanged") -> None:
        """`name` needs no work; leaves one line."""
        self.finished |= {name}
        self._leave(name, "cached", None, why)

    def _leave(self, name: str, ended: str, seconds: float | None, summary: str) -> None:
        _leave_line(_Ended(name, self.label(name), max(map(len, self.steps)), ended, seconds, summary))

    def _training_left_s(self, waiting: list[str]) -> float | None:
        """Of the step that trains now and those after it, at its speed; None where none trains."""
        bars = _shown.bars
        if self.active is None or self.active.name not in self.tokens or not bars or not bars[0].units_per_s:
            return None
        later = sum(self.tokens.get(name, 0.0) for name in waiting if name != self.active.name)
        return (bars[0].left_s() or 0.0) + later / bars[0].units_per_s

    def label(self, name: str) -> str:
        """`3/7 01-cpt`"""
        return f"{self.steps.index(name) + 1}/{len(self.steps)} {name}"

    def left_s(self) -> float | None:
        """Seconds to the end, by the active bar's rate and `expected_s` of the rest; None while unknown."""
        waiting = [name for name in self.steps if name not in self.finished]
        if not self.expected_s:
            return self._training_left_s(waiting)
        if self.active is None or any(name not in self.expected_s for name in waiting):
            return None
        active_left = self.expected_s[self.active.name] - (_now() - self.active.started_s)
        bars = _shown.bars
        measured = bars[0].left_s() if bars else None
        later = sum(self.expected_s[name] for name in waiting if name != self.active.name)
        return max(active_left, measured or 0.0, 0.0) + later


@dataclass(frozen=True)
class Progress:
    """What is on now, in names and figures, for another process to show. Seconds; None: not known, or nothing is."""

    steps: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    step: str | None = None
    step_s: float | None = None
    title: str | None = None
    completed: float = 0.0
    total: float | None = None
    unit: str | None = None
    note: str | None = None
    left_s: float | None = None
    run_left_s: float | None = None


class _Shown:
    """What is on now. `bars` is replaced, never mutated: the drawing thread reads it."""

    run: RunProgress | None = None
    bars: tuple[ProgressBar, ...] = ()


_shown = _Shown()
_warned: set[str] = set()


def progress() -> Progress:
    """What is on now. May be called from any thread: what it reads is replaced, never mutated."""
    run, bars = _shown.run, _shown.bars
    found = Progress()
    if run:
        found = replace(found, steps=run.steps, finished=tuple(sorted(run.finished)))
    if run and (step := run.active):
        found = replace(found, step=step.name, step_s=_now() - step.started_s, run_left_s=run.left_s())
    if not bars:
        return found
    innermost = bars[-1]
    return replace(
        found,
        title=innermost.title,
        completed=innermost.completed,
        total=innermost.total,
        unit=innermost.unit,
        note=innermost.note,
        left_s=innermost.left_s(),
    )


@contextmanager
def run_progress(steps: Sequence[str], expected_s: Mapping[str, float] | None = None) -> Iterator[RunProgress]:
    """Show which step of a run is active.

    expected_s: seconds per step, from a plan; without it no overall time left is shown.

    with ui.run_progress(["data", "01-cpt"], {"data": 4, "01-cpt": 60}) as run:
        run.cached("data")
        with run.step("01-cpt") as step:
            step.summary = "500k tokens"
    """
    outer, _shown.run = _shown.run, RunProgress(tuple(steps), expected_s or {})
    with terminal.live_region(_moving_lines):
        try:
            yield _shown.run
        finally:
            _shown.run = outer


@contextmanager
def progress_bar(
    title: str, total: float | None = None, unit: str = "tokens", completed: float = 0.0
) -> Iterator[ProgressBar]:
    """Show one piece of work for the length of the block; call `.update()` on what it yields. Bars nest.

    total: amount of work in `unit`, None when unknown (then only a clock is shown).
    completed: where resumed work begins, so that the rate counts only new work.
    Within a run a bar leaves no line on a terminal: the step's line tells the longest bar's figures.
    """
    handle = ProgressBar(title, total, unit, completed)
    outermost, lone = not _shown.bars, not _shown.bars and _shown.run is None
    indent = "" if lone else "    "
    if not terminal.is_live():
        terminal.write(f"{indent}{title}: started")
    with terminal.live_region(_moving_lines):
        _shown.bars = (*_shown.bars, handle)
        ended = "stopped"
        try:
            yield handle
            ended = "done"
        finally:
            _shown.bars = tuple(other for other in _shown.bars if other is not handle)
            step = _shown.run.active if _shown.run else None
            if outermost and step is not None:
                step.longest = max(step.longest, (handle.elapsed_s(), handle.summary()))
            if lone or not terminal.is_live():
                _leave_line(_Ended(title, indent + title, len(title), ended, handle.elapsed_s(), handle.summary()))


def note(text: str) -> None:
    """One line of information."""
    _say(text, "", "", "")


def forget_warnings() -> None:
    """What was warned of is warned of again: a new command begins in this process."""
    _warned.clear()


def warn(text: str) -> None:
    """One yellow line; the same text is shown once per command."""
    if text not in _warned:
        _warned.add(text)
        _say(text, "yellow", "! ", "warning: ")


def error_panel(lines: Sequence[str]) -> None:
    """One to six lines for the user: first what went wrong and where, then what is allowed and what to do."""
    _say(lines[0], "bold red", "✗ ", "error: ")
    for line in lines[1:]:
        _say(line, "", "  ", "  ")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A result on stdout: drawn on a terminal, plain aligned text elsewhere. Figures are right-aligned."""
    cells: list[list[str]] = []
    right = [False] + [True] * (len(columns) - 1)
    for row in rows:
        texts: list[str] = []
        for place, cell in enumerate(row):
            text = "" if cell is None else str(cell)
            texts.append(text)
            right[place] = right[place] and _is_figure(text)
        cells.append(texts)
    if terminal.is_terminal(sys.stdout):
        terminal.draw_table(title, columns, cells, right)
    else:
        print(terminal.printable("\n".join(_plain_table(title, columns, cells, right))))


def _is_figure(cell: str) -> bool:
    return cell == "" or cell[0].isdigit() or cell[0] in "+-−±~.–—<≤"


def _plain_table(title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> list[str]:
    widths = [0] * len(columns)
    for row in (columns, *cells):
        for place, cell in enumerate(row):
            widths[place] = max(widths[place], len(cell))
    rulers = ["-" * wide for wide in widths]
    shown = [_aligned(columns, widths, right), "  ".join(rulers)]
    for row in cells:
        shown.append(_aligned(row, widths, right))
    return [title, *shown] if title else shown


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts: list[str] = []
    for cell, wide, is_right in zip(row, widths, right, strict=True):
        parts.append(cell.rjust(wide) if is_right else cell.ljust(wide))
    return "  ".join(parts).rstrip()


def _say(text: str, style: str, mark: str, plain_mark: str) -> None:
    if terminal.is_live():
        terminal.draw([(mark + text, style)])
    else:
        terminal.write(plain_mark + text)


@dataclass(frozen=True)
class _Ended:
    """A step or a lone bar that is over. A terminal shows `name` in a column of `name_width`, plain text `label`."""

    name: str
    label: str
    name_width: int
    how: str  # a key of MARKS
    seconds: float | None
    summary: str


def _leave_line(ended: _Ended) -> None:
    """The line that stays."""
    took = ""
    if ended.seconds is not None:
        took = duration(ended.seconds)
    if not terminal.is_live():
        line = f"{ended.label}: {ended.how}"
        if took:
            line += f" {'in' if ended.how == 'done' else 'after'} {took}"
        if ended.summary:
            line += f", {ended.summary}"
        terminal.write(line)
        return
    mark, style = MARKS[ended.how]
    quiet = "dim" if ended.how == "cached" else ""
    named = (f"{ended.name:<{ended.name_width}}", quiet or "bold")
    terminal.draw([(f"{mark} ", style), named, (f"  {took:>11}  ", "dim"), (ended.summary, quiet)])


def _moving_lines() -> list[Line]:
    """The live region: the run and its innermost bar. Called by the drawing thread: changes nothing."""
    run, bars = _shown.run, _shown.bars
    step = run.active if run else None
    lines: list[Line] = []
    if run and step:
        lines.append(_run_line(run, step))
    if not bars:
        return lines
    title = bars[-1].title + "  "
    if not lines:
        lead = f"{_spinner()}{title}"
    elif step and step.name == bars[-1].title:
        lead = "  "
    else:
        lead = f"  {title}"
    return [*lines, _bar_line(bars[-1], lead)]


def _spinner() -> str:
    return SPINNER[int(_now() * terminal.REDRAWS_PER_S) % len(SPINNER)] + " "


def _run_line(run: RunProgress, step: StepProgress) -> Line:
    line: Line = [(_spinner(), "cyan"), (f"{run.label(step.name)}  ", "bold")]
    for name in run.steps:
        if name in run.finished:
            line.append(("● ", "green"))
        elif name == step.name:
            line.append(("◉ ", "cyan"))
        else:
            line.append(("○ ", "dim"))
    line.append((f" {clock(_now() - run.started_s)} elapsed", "dim"))
    left = run.left_s()
    if left is not None:
        what = "left" if run.expected_s else "of training left"  # evaluation and merge are not in it
        line.append((f", about {clock(left)} {what}", "dim"))
    return line


def _bar_line(bar: ProgressBar, lead: str) -> Line:
    line: Line = [(lead, "")]
    figures, room = bar.figures(), terminal.width() - len(line[0][0]) - 1
    if bar.total:
        cells = min(30, max(room - len("  ".join(figures)) - 2, 10))
        done = round(cells * min(bar.completed / bar.total, 1.0))
        line += [("━" * done, "cyan"), ("─" * (cells - done) + "  ", "dim")]
        room -= cells + 2
    for position, figure in enumerate(figures):
        room -= len(figure) + 2 * (position > 0)
        if room < 0:
            break
        line += [("  ", "")] * (position > 0)
        line.append((figure, "" if position < 2 else "dim"))
    return line
