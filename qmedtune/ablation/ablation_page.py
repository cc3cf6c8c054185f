"""report.html of an ablation: the figure, the table, which differences are within noise, how to repeat it.

Deliberately does not: read runs or compute (arm_scores.py); the arms' own reports stand in their folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qmedtune.ablation import figure
from qmedtune.reporting.blocks import card, document, html_table, section
from qmedtune.reporting.cells import UNKNOWN, Table
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.facts import MINUS
from qmedtune.results import Ablation, ArmDifference, ArmEntry, Measure, Ratio
from qmedtune.units import digits3, duration

METHOD = (
    "Scores are means over seeds and items. Their 95% intervals hold both sources of chance: the variances over items "
    "and over seeds add up, with Student's t and Wilson's form. Perplexities are geometric means, with t intervals "
    "over seeds alone. A difference between two arms is within noise when a sign-flip test over items (each item's "
    "difference averaged over the seeds) gives p ≥ 0.05 after Holm's correction over all pairs of arms."
)


def tables(result: Ablation) -> list[Table]:
    """The table of arms and the differences from the whole recipe."""
    arms = _arms_table(result)
    if result.reference is None:
        return [arms]
    return [arms, _noise_table(result, result.reference)]


def _arms_table(result: Ablation) -> Table:
    scores = figure.names_of(result.arms, "scores")
    texts = figure.names_of(result.arms, "perplexity")
    rows = [_arm_row(arm, scores, texts) for arm in result.arms]
    columns = ("Arm", *scores, *(f"perplexity {name}" for name in texts), "Seeds", "What differs")
    if not rows:
        return Table("Arms", columns, rows, "No arm has finished yet.")
    note = METHOD + _scored_in(result)
    if result.majority:
        commonest = [f"{name} {share:.2f}" for name, share in result.majority.items()]
        note += f" What always the commonest answer scores: {', '.join(commonest)}."
    return Table("Arms", columns, rows, note)


def _scored_in(result: Ablation) -> str:
    """A sentence behind others; nothing where no run says."""
    if not result.precision:
        return ""
    return f" Scored in {result.precision}."


def _arm_row(arm: ArmEntry, scores: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    cells = [arm.arm]
    for name in scores:
        cells.append(_cell(arm.scores.get(name), _two_decimals))
    for name in texts:
        cells.append(_cell(arm.perplexity.get(name), digits3))
    return (*cells, str(len(arm.seeds)), arm.change)


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _cell(measure: Measure | None, shown: Callable[[float], str]) -> str:
    if measure is None:
        return UNKNOWN
    if measure.ci95 is None:
        return shown(measure.mean)
    low, high = measure.ci95
    return f"{shown(measure.mean)} ({shown(low)}–{shown(high)})"


def _noise_table(result: Ablation, reference: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for each in result.differences:
        if each.first == reference:
            rows.append(_difference_row(each, each.second, each.difference))
        elif each.second == reference:
            rows.append(_difference_row(each, each.first, -each.difference))
    for ratio in result.perplexity_ratios:
        rows.append(_ratio_row(ratio))
    note = (
        f"Against {reference}, the whole recipe; a perplexity is beyond noise when its interval over seeds, not "
        "corrected for the number of arms, leaves out 1. All pairs of arms are in differences.csv."
    )
    note += _scored_in(result)
    return Table("Differences", ("Arm", "Measure", "Change", "Evidence", "Reading"), rows, note)


def _difference_row(each: ArmDifference, other: str, difference: float) -> tuple[str, ...]:
    change = f"{round(difference, 2) + 0.0:+.2f}".replace("-", MINUS)  # no −0.00
    p = "p < 0.001" if each.p_holm < 0.001 else f"p = {each.p_holm:.3f}"
    return (other, each.score, change, p, _reading(each.within_noise))


def _ratio_row(ratio: Ratio) -> tuple[str, ...]:
    interval = "({:.2f}–{:.2f})".format(*ratio.ci95) if ratio.ci95 else ""
    return (ratio.arm, f"perplexity {ratio.text}", f"× {ratio.ratio:.2f}", interval, _reading(ratio.within_noise))


def _reading(within_noise: bool) -> str:
    return "within noise" if within_noise else "beyond noise"


def page(result: Ablation) -> str:
    """The whole page of an ablation."""
    arms, *rest = tables(result)
    sections = [_header(result)]
    if result.notes:
        notes = "".join(f"<li>{esc(note)}</li>" for note in result.notes)
        sections.append(Html(f'<div class="callout"><ul>{notes}</ul></div>'))
    drawn = html_table(arms)
    if result.arms:
        drawn = Html(f'<div class="scroll">{figure.figure(result, result.chance, result.precision)}</div>{drawn}')
    sections.append(section("Arms", card("", drawn)))
    for table in rest:
        sections.append(section(table.title, card("", html_table(table))))
    recipe = Html(f"<details><summary>The recipe</summary><pre>{esc(result.recipe_text)}</pre></details>")
    sections.append(section("How to do it again", card("", recipe)))
    return document(result.name, sections, "Written by qmedtune from ablation.json.")


def _header(result: Ablation) -> Html:
    seeds = ", ".join(str(seed) for seed in result.seeds)
    work = f"{duration(result.seconds)} of work, steps that arms share counted once.{_scored_in(result)}"
    status = esc(result.status)
    return Html(
        f'<header><div class="eyebrow">qmedtune ablate <span class="status {status}">{status}</span></div>'
        f"<h1>{esc(result.name)}</h1>"
        f'<p class="outcome">{len(result.arms)} arms, seeds {seeds}; {esc(work)}</p></header>'
    )
