"""A sweep of `merge.with` in words and as a figure: what each share of the other model gains on the domain and loses on
general text.

Deliberately does not: choose, compute, or know runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmedtune.reporting.cells import UNKNOWN, Row, Table, shown
from qmedtune.reporting.charts import Html, esc, nice_ticks
from qmedtune.results import Merge, Number, SweepPoint

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 360, 74, 30, 24, 52
# Scoped, as rules inside a page hold for the whole page. Colours: Okabe and Ito's, on paper and in dark pages alike.
STYLE = (
    ".sweep text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}.sweep .s{fill:#57606a}"
    ".sweep .g{stroke:#d0d7de}.sweep .p{fill:none;stroke:#56b4e9;stroke-width:2}.sweep .d{fill:#0072b2}"
    ".sweep .r{fill:none;stroke:#d55e00;stroke-width:3}"
)


def table(found: Merge) -> Table:
    """Each share with its scores and perplexities on development items, the base first."""
    columns = ["Lambda", "Gain", "General loss"]
    if not found.sweep:
        return Table("Sweep", tuple(columns), [], "No share was searched for.")
    first = found.sweep[0]
    columns += _score_columns(first) + [f"{source}, perplexity" for source in first.perplexity] + [""]
    rows: list[Row] = []
    if found.sweep_base is not None:
        rows.append(("the base", UNKNOWN, UNKNOWN, *_figures(found.sweep_base), ""))
    for point in found.sweep:
        told = _told(point, found.chosen)
        row = (shown(point.share, "g"), shown(point.gain, "+.4f"), shown(point.general_loss, "+.2%"))
        rows.append((*row, *_figures(point), told))
    return Table("Sweep", tuple(columns), rows, _note(found))


def _note(found: Merge) -> str:
    share = found.development or 0.0
    precision = ""
    if found.scored_in:
        precision = f" in {found.scored_in}"
    return (
        f"Rule: {found.rule}. Measured{precision} on {share:.0%} of the items and held-out texts; the scores of this "
        "run are taken on the others."
    )


def _score_columns(point: SweepPoint) -> list[str]:
    columns: list[str] = []
    for task, score in point.tasks.items():
        columns.append(task)
        if score.generation is not None:
            columns.append(f"{task}, written")
    return columns


def _figures(point: SweepPoint) -> Row:
    figures: list[str] = []
    for score in point.tasks.values():
        figures.append(shown(score.value, ".3f"))
        if score.generation is not None:
            figures.append(shown(score.generation.value, ".3f"))
    for perplexity in point.perplexity.values():
        figures.append(shown(perplexity, ".3g"))
    return tuple(figures)


def _told(point: SweepPoint, chosen: Number | None) -> str:
    if point.share == chosen:
        return "chosen"
    if point.allowed is False:
        return "beyond the limit"
    if point.within_noise:
        return "within noise of the chosen"
    return ""


# ---- the figure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Values between the first and the last tick, and the pixels of these."""

    ticks: Sequence[float]
    first: float
    last: float

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.first + (self.last - self.first) * (value - low) / (high - low)


def figure(found: Merge) -> Html:
    """Scatter plot of a sweep.

    SVG: general loss to the right, gain upward, a dot per share; nothing where a share has no general loss.
    """
    places: list[tuple[SweepPoint, float, float]] = []
    for point in found.sweep:
        if point.gain is not None and point.general_loss is not None:
            places.append((point, float(point.general_loss), float(point.gain)))
    if not places:
        return Html("")
    x = _Axis(nice_ticks(*_range([loss for _, loss, _ in places])), LEFT, WIDTH - RIGHT)
    y = _Axis(nice_ticks(*_range([gain for _, _, gain in places])), HEIGHT - BOTTOM, TOP)
    drawn = _grid(x, y)
    told: list[str] = []
    line = "L".join(f"{x.at(loss):.1f} {y.at(gain):.1f}" for _, loss, gain in places)
    drawn += f'<path class="p" d="M{line}"/>'
    for point, loss, gain in places:
        drawn += _dot(point, x.at(loss), y.at(gain), chosen=point.share == found.chosen)
        told.append(f"lambda {point.share:g}: gain {gain:+.3f}, general loss {loss:+.1%}")
    return Html(
        f'<figure><svg class="sweep" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="max-width:100%;height:auto" width="{WIDTH}" role="img" aria-label="{esc("; ".join(told))}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>{drawn}</svg></figure>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """0, where the base stands, is always in it."""
    return min(0.0, *values), max(0.0, *values)


def _grid(x: _Axis, y: _Axis) -> str:
    drawn = ""
    for tick in x.ticks:
        drawn += f'<path class="g" d="M{x.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        drawn += (
            f'<text class="s" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.3g}</text>'
        )
    for tick in y.ticks:
        drawn += f'<path class="g" d="M{LEFT} {y.at(tick):.1f}H{WIDTH - RIGHT}"/>'
        drawn += f'<text class="s" x="{LEFT - 8}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn += f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">general loss (rise of perplexity) →</text>'
    return f'{drawn}<text x="8" y="16">domain gain ↑</text>'


def _dot(point: SweepPoint, x: float, y: float, *, chosen: bool) -> str:
    ring = f'<circle class="r" cx="{x:.1f}" cy="{y:.1f}" r="9"/>' if chosen else ""
    label = f"λ {point.share:g}" + (", chosen" if chosen else "")
    anchor, beside = ("end", -12) if x > WIDTH * 0.75 else ("start", 12)
    return (
        f'{ring}<circle class="d" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{x + beside:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">{esc(label)}</text>'
    )
