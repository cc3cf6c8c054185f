"""Whether a model is right as often as it is sure: reliability diagrams, and the calibration error as a table.

A point is all answers of like confidence; on the diagonal they are right as often as they are sure, below it they are
too sure. Deliberately does not: compute bins (evaluation/statistics.py), know the file of a run.
"""

from __future__ import annotations

from qmedtune.reporting.blocks import card, html_table
from qmedtune.reporting.cells import Row, Table, three_decimals
from qmedtune.reporting.charts import Html, esc, legend
from qmedtune.reporting.facts import MINUS, precision_words
from qmedtune.results import Bin, Run, Score, TaskScores

MODELS = (("base", 0), ("final", 3), ("model", 3))
MANY_TASKS = 4  # of more the diagrams are folded, and the table tells
SMALLEST, LARGEST = 6.0, 20.0  # pixels across of a point, by its share of the answers
FEW_ANSWERS = 10  # in a bin: its point says little, and is drawn hollow
DEFINITION = (
    "Confidence: the share of the chosen option in the probability that the model gives to all options. Ten bins of "
    "equal width from 0 to 1. ECE, the expected calibration error (Guo et al. 2017): the mean over all answers of how "
    "far the accuracy of their bin is from its mean confidence; 0 is perfect. Too sure: mean confidence less accuracy."
)


def calibration(run: Run) -> Html:
    """A diagram of each task whose options were compared, and the table; empty where there is none."""
    cards = ""
    shown = 0
    for name, task in run.scored.tasks.items():
        curves = _curves(task)
        if curves:
            shown += 1
            cards += card(name, _diagram(name, curves))
    if not shown:
        return Html("")
    words = precision_words(run)
    told = f'<p class="note">Scored in {esc(words)}.</p>' if words else ""
    drawn = f'<div class="pair">{cards}</div>'
    if shown > MANY_TASKS:
        drawn = f"<details><summary>{shown} reliability diagrams</summary>{drawn}</details>"
    return Html(told + drawn + card("", html_table(calibration_table(run))))


def _curves(task: TaskScores) -> list[tuple[str, int, list[Bin]]]:
    """(model, colour, its bins) of each model whose bins are known."""
    found: list[tuple[str, int, list[Bin]]] = []
    for label, color in MODELS:
        score = task.of(label)
        if score is not None and score.calibration:
            found.append((label, color, score.calibration))
    return found


def calibration_table(run: Run) -> Table:
    rows: list[Row] = []
    for name, task in run.scored.tasks.items():
        for label, _ in MODELS:
            score = task.of(label)
            if score is not None and score.calibration and score.ece is not None:
                rows.append(_row(name, label, score))
    columns = ("Task", "Model", "ECE", "Mean confidence", "Accuracy", "Too sure", "Answers")
    words = precision_words(run)
    title = f"Calibration, {words}" if words else "Calibration"
    return Table(title, columns, rows, DEFINITION)


def _row(name: str, label: str, score: Score) -> Row:
    n = 0
    confidence = accuracy = 0.0
    for each in score.calibration or []:
        n += each.n
        confidence += each.n * each.confidence
        accuracy += each.n * each.accuracy
    confidence, accuracy = confidence / n, accuracy / n
    sure = f"{confidence - accuracy:+.3f}".replace("-", MINUS)
    return (name, label, three_decimals(score.ece), f"{confidence:.3f}", f"{accuracy:.3f}", sure, f"{n:,}")


def _diagram(name: str, curves: list[tuple[str, int, list[Bin]]]) -> Html:
    """Confidence to the right, accuracy upwards, both from 0 to 1; the size of a point is its share of the answers."""
    lines, points, told = "", "", ""
    keys: list[tuple[str, int]] = []
    for label, color, bins in curves:
        keys.append((label, color))
        total = sum(each.n for each in bins)
        path = "L".join(f"{1000 * each.confidence:.0f} {1000 - 1000 * each.accuracy:.0f}" for each in bins)
        lines += f'<path class="line s{color}" d="M{path}"/>'
        for each in bins:
            points += _point(label, color, each, total)
            told += f"{label} {each.confidence:.2f}: right {each.accuracy:.2f} of {each.n}; "
    grid = ""
    ticks = ""
    for tick in (0, 0.25, 0.5, 0.75, 1):
        grid += f'<path class="grid" d="M0 {1000 - 1000 * tick:.0f}H1000"/>'
        ticks += f'<span style="left:{100 * tick:g}%">{tick:g}</span>'
    up = ""
    for tick in (0, 0.25, 0.5, 0.75, 1):
        up += f'<span style="top:{100 - 100 * tick:g}%">{tick:g}</span>'
    known = legend(keys, "right as often as sure")
    return Html(
        f'<figure class="chart">{known}<div class="plot square"><div class="ys">{up}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="Accuracy of {esc(name)} by '
        f'confidence: {esc(told)}">{grid}<path class="line ideal" d="M0 1000L1000 0"/>{lines}</svg>{points}'
        f'<div class="xs">{ticks}</div></div><div class="axes"><span>share that is right ↑</span>'
        "<span>confidence →</span></div></figure>"
    )


def _point(label: str, color: int, each: Bin, total: int) -> str:
    across = SMALLEST + (LARGEST - SMALLEST) * (each.n / total) ** 0.5
    hollow = " few" if each.n < FEW_ANSWERS else ""
    title = f"{label}: {each.n:,} answers, confidence {each.confidence:.2f}, right {each.accuracy:.2f}"
    place = f"left:{100 * each.confidence:.1f}%;top:{100 - 100 * each.accuracy:.1f}%"
    size = f"width:{across:.0f}px;height:{across:.0f}px"
    return f'<i class="bubble c{color}{hollow}" style="{place};{size}" title="{esc(title)}"></i>'
