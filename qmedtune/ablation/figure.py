"""The figure of an ablation as an SVG that stands alone: one row per arm, scores left, perplexities right.

Dots are means, bars 95 % intervals, the thin line is chance. Hand-written because it must open in a README, on paper
and in a dark editor without matplotlib. Deliberately does not: know runs, compute, or link to anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmedtune.reporting.charts import SHARES, Axis, esc, log_axis
from qmedtune.results import ArmEntry, Comparisons, Measure

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
ROW, HEAD, FOOT, CAPTION, LABEL, PANEL, GAP = 26, 50, 34, 18, 190, 300, 56
STYLE = (  # scoped: inside a page these rules hold for the whole page
    ".arms text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}.arms .b{font-weight:600}"
    ".arms .s{fill:#57606a;font-size:11.5px}.arms .g{stroke:#d0d7de}.arms .c{stroke:#57606a;stroke-dasharray:3 3}"
)


@dataclass(frozen=True)
class _Panel:
    """A part of the figure: which measures it shows, on which axis, and where it begins and ends, in pixels."""

    kind: str  # "scores" or "perplexity"
    names: list[str]
    axis: Axis
    left: int
    bottom: int

    def x(self, value: float) -> float:
        """A place within the panel; an interval over few seeds can end beyond what a score can be."""
        return self.left + PANEL * min(100.0, max(0.0, self.axis.percent(value))) / 100


def figure(result: Comparisons, chance: float | None = None, precision: str = "") -> str:
    """SVG text. Panels without a measure are left out; a score that is the mean of its facets is left to the table.
    precision: what the arms were scored in, in words."""
    arms = result.arms
    foot = HEAD + ROW * len(arms) + FOOT
    panels = _panels(arms, foot - FOOT)
    height = foot
    caption = ""
    if precision:
        height += CAPTION
        caption = f'<text class="s" x="12" y="{height - 8}">Scored in {esc(precision)}.</text>'
    width = LABEL + (PANEL + GAP) * len(panels)
    body = _labels(arms)
    for panel in panels:
        body += _drawn(panel, arms)
        if chance is not None and panel.kind == "scores":
            body += _chance(panel, chance)
        body += _marks(panel, arms)
    return (
        f'<svg class="arms" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{esc(_summary(arms))}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>{body}{caption}</svg>\n'
    )


def names_of(arms: Sequence[ArmEntry], kind: str) -> list[str]:
    """All measures of a kind that some arm has, in the order of their first."""
    names: dict[str, None] = {}
    for arm in arms:
        names |= dict.fromkeys(arm.measures(kind))
    return list(names)


def _panels(arms: Sequence[ArmEntry], bottom: int) -> list[_Panel]:
    panels: list[_Panel] = []
    scores, texts = _shown_scores(arms), names_of(arms, "perplexity")
    if scores:
        panels.append(_Panel("scores", scores, SHARES, LABEL + 12, bottom))
    if texts:
        left = LABEL + len(panels) * (PANEL + GAP) + 12
        panels.append(_Panel("perplexity", texts, log_axis(_perplexities(arms)), left, bottom))
    return panels


def _perplexities(arms: Sequence[ArmEntry]) -> list[float]:
    """All that the axis has to hold: means and the ends of intervals."""
    values: list[float] = []
    for arm in arms:
        for measure in arm.perplexity.values():
            values += [measure.mean, *(measure.ci95 or ())]
    return values


def _shown_scores(arms: Sequence[ArmEntry]) -> list[str]:
    names = names_of(arms, "scores")
    return [name for name in names if not _has_facets(name, names)]


def _has_facets(name: str, names: Sequence[str]) -> bool:
    return any(other.startswith(f"{name}: ") for other in names)


def _summary(arms: Sequence[ArmEntry]) -> str:
    names = _shown_scores(arms)
    parts: list[str] = []
    for arm in arms:
        found = [f"{name} {arm.scores[name].mean:.2f}" for name in names if name in arm.scores]
        parts.append(f"{arm.arm}: {', '.join(found)}" if found else arm.arm)
    return "; ".join(parts)


def _y(row: int) -> int:
    return HEAD + ROW * row + ROW // 2


def _labels(arms: Sequence[ArmEntry]) -> str:
    labels = ""
    for row, arm in enumerate(arms):
        labels += f'<text x="14" y="{_y(row) + 4}">{esc(arm.arm)}</text>'
    return labels


def _drawn(panel: _Panel, arms: Sequence[ArmEntry]) -> str:
    """Legend and grid of a panel."""
    drawn = _legend(_title(panel, arms), panel.names, panel.left)
    for tick in panel.axis.ticks:
        x = panel.x(tick)
        drawn += f'<path class="g" d="M{x:.1f} {HEAD}V{panel.bottom}"/>'
        drawn += f'<text class="s" x="{x:.1f}" y="{panel.bottom + 17}" text-anchor="middle">{tick:g}</text>'
    return drawn


def _chance(panel: _Panel, chance: float) -> str:
    x = panel.x(chance)
    return (
        f'<path class="c" d="M{x:.1f} {HEAD}V{panel.bottom}"/>'
        f'<text class="s" x="{x:.1f}" y="{panel.bottom + 30}" text-anchor="middle">chance</text>'
    )


def _marks(panel: _Panel, arms: Sequence[ArmEntry]) -> str:
    """Per arm the marks of its measures, each on a line of its own within the row."""
    marks = ""
    for row, arm in enumerate(arms):
        measures = arm.measures(panel.kind)
        for place, name in enumerate(panel.names):
            if name in measures:
                y = _y(row) + (place - (len(panel.names) - 1) / 2) * 7
                marks += _mark(panel, measures[name], y, color=COLORS[place % len(COLORS)], title=f"{arm.arm}, {name}")
    return marks


def _title(panel: _Panel, arms: Sequence[ArmEntry]) -> str:
    """Only accuracies are means over items; other metrics of tasks have no count of them."""
    if panel.kind == "perplexity":
        return "Perplexity (log scale, lower is better)"
    for arm in arms:
        for name in panel.names:
            if name in arm.scores and arm.scores[name].items is None:
                return "Score"
    return "Accuracy"


def _legend(title: str, names: Iterable[str], left: int) -> str:
    parts, x = [f'<text class="b" x="{left}" y="20">{title}</text>'], left
    for place, name in enumerate(names):
        short = name.rpartition(": ")[2]
        parts.append(f'<circle cx="{x + 5}" cy="35" r="4.5" fill="{COLORS[place % len(COLORS)]}"/>')
        parts.append(f'<text class="s" x="{x + 14}" y="39">{esc(short)}</text>')
        x += 30 + 7 * len(short)
    return "".join(parts)


def _mark(panel: _Panel, measure: Measure, y: float, *, color: str, title: str) -> str:
    x, said, bar = panel.x(measure.mean), f"{title}: {measure.mean:.3g}", ""
    if measure.ci95 is not None:
        low, high = measure.ci95
        said += f" (95% interval {low:.3g} to {high:.3g})"
        path = f"M{panel.x(low):.1f} {y}H{panel.x(high):.1f}"
        bar = f'<path d="{path}" stroke="{color}" stroke-width="3" opacity=".4"/>'
    return f'<g><title>{esc(said)}</title>{bar}<circle cx="{x:.1f}" cy="{y}" r="4" fill="{color}"/></g>'
