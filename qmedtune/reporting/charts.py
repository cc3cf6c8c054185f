"""Charts of the report as inline SVG and plain boxes: line charts, dumbbells with intervals, bars.

Drawn by hand because a report must render in a second, without matplotlib, and must follow light, dark and width. The
SVG is stretched to its box (`preserveAspectRatio="none"`) with strokes that do not scale; text is HTML beside it, so
that letters and dots keep their size on a phone and on paper.

Deliberately does not: run scripts, fetch fonts, or know what a run is.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 400  # per line: more is invisible at 1000 pixels and only makes the page heavy
SMOOTHING_WINDOW = 1 / 25  # of the drawn points: a centred mean, which unlike a running one does not lag

Points = Sequence[tuple[float, float]]
Bar = tuple[str, float, str, int]
"""Label, value, text at the end, color."""


class Html(str):
    """Markup that is already safe. Everything else goes through `esc`."""


def esc(value: object) -> Html:
    """The value as text of a page; `Html` passes through."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value)))


@dataclass(frozen=True)
class Series:
    """One line. `color`: 0 is the quiet grey of training loss, 1 to 8 the palette. `dots`: mark every point."""

    label: str
    points: Points
    color: int
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """One dot of a dumbbell row, with the ends of its interval where known; `tick`: a thin line instead of a dot."""

    label: str
    value: float
    low: float | None
    high: float | None
    color: int
    tick: bool = False
    ring: bool = False  # drawn as a ring, which is seen around a dot of the same value


@dataclass(frozen=True)
class Axis:
    """The figures written under a row of marks; the first and the last are its ends."""

    ticks: Sequence[float]
    log: bool = False

    def percent(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 100."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return 100 * (value - low) / (high - low)


SHARES = Axis((0, 0.25, 0.5, 0.75, 1))


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round figures (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = _round_step(span / wanted)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _round_step(raw: float) -> float:
    """The next of 1, 2, 5 and 10 times a power of ten."""
    power = 10 ** math.floor(math.log10(raw))
    for factor in (1, 2, 5):
        if factor * power >= raw * 0.999:
            return factor * power
    return 10 * power


@dataclass(frozen=True)
class _Plane:
    """Where a value lies in a drawing of 1000 x 1000, the origin above on the left."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return 1000 * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return 1000 * (self.y_high - value) / (self.y_high - self.y_low)

    def places(self, points: Points) -> list[tuple[float, float]]:
        return [(self.x(x), self.y(y)) for x, y in points]


def line_chart(series: Sequence[Series], x_label: str, y_label: str) -> Html:
    """Lines over a common grid, with a legend. Series without points are left out."""
    series = [line for line in series if line.points]
    xs: list[float] = []
    ys: list[float] = []
    for line in series:
        for x, y in line.points:
            xs.append(x)
            ys.append(y)
    x_high = max(*xs, 1)
    y_ticks = nice_ticks(min(ys), max(ys))
    plane = _Plane(0, x_high, y_ticks[0], y_ticks[-1])
    grid, lines, y_text, x_text = "", "", "", ""
    keys: list[tuple[str, int]] = []
    told: list[str] = []
    for tick in y_ticks:
        grid += f'<path class="grid" d="M0 {plane.y(tick):.1f}H1000"/>'
        y_text += f'<span style="top:{plane.y(tick) / 10:.2f}%">{_tick(tick)}</span>'
    for line in series:
        lines += _line(line, plane.places(_thinned(line.points)))
        keys.append((line.label, line.color))
        told.append(f"{line.label} {line.points[0][1]:.3f} to {line.points[-1][1]:.3f}")
    for tick in nice_ticks(0, x_high):
        if 0 <= tick <= x_high and tick == int(tick):
            x_text += f'<span style="left:{plane.x(tick) / 10:.2f}%">{_tick(tick)}</span>'
    summary = ", ".join(told)
    return Html(
        f'<figure class="chart">{legend(keys)}'
        f'<div class="plot"><div class="ys">{y_text}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{esc(y_label)}: '
        f'{esc(summary)}">{grid}{lines}</svg><div class="xs">{x_text}</div></div>'
        f'<div class="axes"><span>{esc(y_label)} ↑</span><span>{esc(x_label)} →</span></div>{_values(series)}</figure>'
    )


def _values(series: Sequence[Series]) -> str:
    """The figures of each line, for those who cannot point at it."""
    rows = ""
    for line in series:
        values = [y for _, y in line.points]
        cells = ""
        for value in (values[0], min(values), max(values), values[-1]):
            cells += f'<td class="n">{_figure(value)}</td>'
        rows += f'<tr><th scope="row">{esc(line.label)}</th><td class="n">{len(values):,}</td>{cells}</tr>'
    head = ""
    for word in ("Points", "First", "Lowest", "Highest", "Last"):
        head += f'<th scope="col" class="n">{word}</th>'
    return (
        f'<details class="values"><summary>Values</summary><table><caption class="unseen">Values of the chart</caption>'
        f'<thead><tr><th scope="col">Line</th>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )


def _figure(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}"


def _line(line: Series, places: list[tuple[float, float]]) -> str:
    drawn = f'<path class="line s{line.color}" d="{_path(places)}"/>'
    if line.dots or len(places) == 1:
        return drawn + _dots(line, places)
    if len(places) < 50:
        return drawn
    smooth = f'<path class="line s{line.color}" d="{_path(_smoothed(places))}"/>'
    return f'<path class="raw s{line.color}" d="{_path(places)}"/>{smooth}'


def _dots(line: Series, places: list[tuple[float, float]]) -> str:
    dots = ""
    for (x, y), (step, value) in zip(places, _thinned(line.points), strict=True):
        title = f"<title>{esc(line.label)}, step {step:g}: {value:.3f}</title>"
        dots += f'<path class="dot s{line.color}" d="M{x:.1f} {y:.1f}h0">{title}</path>'
    return dots


def _smoothed(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over the points around each, fewer of them at the ends."""
    reach = round(len(places) * SMOOTHING_WINDOW / 2)
    smooth: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(places):
        window = places[max(0, index - reach) : index + reach + 1]
        smooth.append((x, _middle(window)[1]))
    return smooth


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _thinned(points: Points) -> Points:
    """At most `MAX_POINTS` means of equal stretches, with the last point kept as it is."""
    stretch = math.ceil(len(points) / MAX_POINTS)
    if stretch == 1:
        return points
    thinned: list[tuple[float, float]] = []
    for start in range(0, len(points) - 1, stretch):
        thinned.append(_middle(points[start : start + stretch]))
    return [*thinned, points[-1]]


def _middle(points: Points) -> tuple[float, float]:
    x_sum, y_sum = 0.0, 0.0
    for x, y in points:
        x_sum += x
        y_sum += y
    return x_sum / len(points), y_sum / len(points)


def _tick(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}"


def legend(labels: Sequence[tuple[str, int]], tick: str = "") -> Html:
    """Coloured keys above a chart; `tick` names the thin line, where there is one."""
    keys = ""
    for label, color in labels:
        keys += f'<span><i class="key c{color}"></i>{esc(label)}</span>'
    if tick:
        keys += f'<span><i class="key tick-key c0"></i>{esc(tick)}</span>'
    return Html(f'<div class="legend">{keys}</div>')


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis with 1, 2, 5, 10 ... around the values."""
    low, high = min(values), max(values)
    ticks: list[float] = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in (1, 2, 5):
            ticks.append(factor * 10.0**power)
    first, last = 0, len(ticks) - 1
    while ticks[first + 1] <= low:
        first += 1
    while ticks[last - 1] >= high:
        last -= 1
    return Axis(ticks[first : max(last, first + 1) + 1], log=True)


def dumbbells(rows: Sequence[tuple[str, Sequence[Mark], str]], axis: Axis = SHARES) -> Html:
    """One row per score, (label, marks, text at the end), on a common axis: dots, with bars for their intervals."""
    body, ticks = "", ""
    for label, marks, text in rows:
        track = ""
        values: list[str] = []
        for mark in marks:
            track += _mark(mark, axis)
            values.append(f"{mark.label} {mark.value:.3g}")
        said = ", ".join(values)
        body += (
            f'<div class="db-row"><span class="db-label">{esc(label)}</span>'
            f'<span class="db-track" role="img" aria-label="{esc(said)}">{track}</span>'
            f'<span class="db-value">{esc(text)}</span></div>'
        )
    for tick in axis.ticks:
        ticks += f'<span style="left:{axis.percent(tick):.2f}%">{_tick(tick)}</span>'
    ruler = f'<div class="db-row db-axis"><span></span><span class="db-ticks">{ticks}</span><span></span></div>'
    return Html(f'<figure class="dumbbells">{body}{ruler}</figure>')


def _mark(mark: Mark, axis: Axis) -> str:
    title = f"{mark.label}: {mark.value:.3f}"
    whisker = ""
    if mark.low is not None and mark.high is not None:
        title += f" (95% interval {mark.low:.3f} to {mark.high:.3f})"
        left, right = axis.percent(mark.low), axis.percent(mark.high)
        whisker = f'<i class="whisker c{mark.color}" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
    place = f"left:{axis.percent(mark.value):.2f}%"
    shape = "mark"
    if mark.tick:
        shape = "tick"
    elif mark.ring:
        shape = "mark ring"
    return f'{whisker}<i class="{shape} c{mark.color}" style="{place}" title="{esc(title)}"></i>'


def stacked_bar(parts: Sequence[tuple[str, float, int]]) -> Html:
    """Shares of a whole: (label, share, color); shares add up to 1."""
    cells = ""
    shares: list[str] = []
    for label, share, color in parts:
        shares.append(f"{label} {share:.1%}")
        cells += f'<i class="c{color}" style="width:{100 * share:.2f}%" title="{esc(label)}: {share:.1%}"></i>'
    return Html(f'<div class="stack" role="img" aria-label="{esc(", ".join(shares))}">{cells}</div>')


def bars(rows: Sequence[Bar]) -> Html:
    """Horizontal bars from zero."""
    longest = max((value for _, value, _, _ in rows), default=0) or 1
    body = ""
    for label, value, text, color in rows:
        body += (
            f'<div class="bar-row"><span class="bar-label">{esc(label)}</span><span class="bar-track">'
            f'<i class="c{color}" style="width:{100 * value / longest:.2f}%"></i></span>'
            f'<span class="bar-value">{esc(text)}</span></div>'
        )
    return Html(f'<figure class="bars">{body}</figure>')
