"""The figure of an ablation as an SVG that stands alone: one row per arm, scores left, perplexities right.

Dots are means, bars 95 % intervals, the thin line is chance. Hand-written because it must open in a README, on paper
and in a dark editor without matplotlib. Deliberately does not: know runs, compute, or link to anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qmedtune.reporting.charts import SHARES, Axis, esc, log_axis

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
ROW, HEAD, FOOT, LABEL, PANEL, GAP = 26, 50, 34, 190, 300, 56
STYLE = (  # scoped: inside a page these rules hold for the whole page
    ".arms text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}.arms .b{font-weight:600}"
    ".arms .s{fill:#57606a;font-size:11.5px}.arms .g{stroke:#d0d7de}.arms .c{stroke:#57606a;stroke-dasharray:3 3}"
)


def figure(result: dict[str, Any], chance: float | None = None) -> str:
    """SVG text. Panels without a measure are left out; a score that is the mean of its facets is left to the table."""
    arms = result["arms"]
    scores = _shown_scores(arms)
    texts = list(dict.fromkeys(name for arm in arms for name in arm["perplexity"]))
    panels = [("scores", scores, SHARES)] if scores else []
    if texts:
        values = [v for arm in arms for entry in arm["perplexity"].values() for v in (entry["mean"], *_ends(entry))]
        panels.append(("perplexity", texts, log_axis(values)))
    height, width = HEAD + ROW * len(arms) + FOOT, LABEL + (PANEL + GAP) * len(panels)
    body = [_labels(arms)]
    for place, (kind, names, axis) in enumerate(panels):
        left = LABEL + place * (PANEL + GAP) + 12
        body.append(_panel(arms, kind, names, axis, left, height, chance if kind == "scores" else None))
    return (
        f'<svg class="arms" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{esc(_summary(arms, scores))}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _shown_scores(arms: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for arm in arms for name in arm["scores"]))
    return [name for name in names if not _has_facets(name, names)]


def _has_facets(name: str, names: Sequence[str]) -> bool:
    return any(other.startswith(f"{name}: ") for other in names)


def _summary(arms: Sequence[dict[str, Any]], scores: list[str]) -> str:
    parts = []
    for arm in arms:
        found = [f"{name} {arm['scores'][name]['mean']:.2f}" for name in scores if name in arm["scores"]]
        parts.append(f"{arm['arm']}: {', '.join(found)}" if found else arm["arm"])
    return "; ".join(parts)


def _y(row: int) -> int:
    return HEAD + ROW * row + ROW // 2


def _labels(arms: Sequence[dict[str, Any]]) -> str:
    return "".join(f'<text x="14" y="{_y(row) + 4}">{esc(arm["arm"])}</text>' for row, arm in enumerate(arms))


def _panel(
    arms: Sequence[dict[str, Any]],
    kind: str,
    names: list[str],
    axis: Axis,
    left: int,
    height: int,
    chance: float | None,
) -> str:
    """One panel: legend, grid, and per arm the marks of its measures, each on a line of its own within the row."""
    bottom = height - FOOT
    entries = [arm[kind][name] for arm in arms for name in names if name in arm[kind]]
    parts = [_legend(_title(kind, entries), names, left)]
    for tick in axis.ticks:
        x = _x(axis, left, tick)
        parts.append(f'<path class="g" d="M{x:.1f} {HEAD}V{bottom}"/>')
        parts.append(f'<text class="s" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    if chance is not None:
        x = _x(axis, left, chance)
        parts.append(f'<path class="c" d="M{x:.1f} {HEAD}V{bottom}"/>')
        parts.append(f'<text class="s" x="{x:.1f}" y="{bottom + 30}" text-anchor="middle">chance</text>')
    for row, arm in enumerate(arms):
        for place, name in enumerate(names):
            if entry := arm[kind].get(name):
                y = _y(row) + (place - (len(names) - 1) / 2) * 7
                parts.append(_mark(entry, axis, left, y, COLORS[place % len(COLORS)], f"{arm['arm']}, {name}"))
    return "".join(parts)


def _title(kind: str, entries: Sequence[dict[str, Any]]) -> str:
    """Only accuracies are means over items; other metrics of tasks have no count of them."""
    if kind == "perplexity":
        return "Perplexity (log scale, lower is better)"
    return "Accuracy" if all("items" in entry for entry in entries) else "Score"


def _legend(title: str, names: Iterable[str], left: int) -> str:
    parts, x = [f'<text class="b" x="{left}" y="20">{title}</text>'], left
    for place, name in enumerate(names):
        short = name.rpartition(": ")[2]
        parts.append(f'<circle cx="{x + 5}" cy="35" r="4.5" fill="{COLORS[place % len(COLORS)]}"/>')
        parts.append(f'<text class="s" x="{x + 14}" y="39">{esc(short)}</text>')
        x += 30 + 7 * len(short)
    return "".join(parts)


def _mark(entry: dict[str, Any], axis: Axis, left: int, y: float, color: str, title: str) -> str:
    x, ends = _x(axis, left, entry["mean"]), [_x(axis, left, value) for value in _ends(entry)]
    bar = f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{color}" stroke-width="3" opacity=".4"/>' if ends else ""
    said = f"{title}: {entry['mean']:.3g}"
    if ends:
        said += " (95% interval {:.3g} to {:.3g})".format(*entry["ci95"])
    return f'<g><title>{esc(said)}</title>{bar}<circle cx="{x:.1f}" cy="{y}" r="4" fill="{color}"/></g>'


def _ends(entry: dict[str, Any]) -> list[float]:
    return list(entry["ci95"] or ())


def _x(axis: Axis, left: int, value: float) -> float:
    """A place within the panel; an interval over few seeds can end beyond what a score can be."""
    return left + PANEL * min(100.0, max(0.0, axis.percent(value))) / 100
