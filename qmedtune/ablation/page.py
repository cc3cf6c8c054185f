"""report.html of an ablation: the figure, the table, which differences are within noise, how to repeat it.

Deliberately does not: read runs or compute (results.py); the arms' own reports stand in their folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmedtune.ablation.figure import figure
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.page import card, document, html_table, section
from qmedtune.reporting.tables import Table
from qmedtune.units import digits3, duration

METHOD = (
    "Scores are means over seeds and items. Their 95% intervals hold both sources of chance: the variances over items "
    "and over seeds add up, with Student's t and Wilson's form. Perplexities are geometric means, with t intervals "
    "over seeds alone. A difference between two arms is within noise when a sign-flip test over items (each item's "
    "difference averaged over the seeds) gives p ≥ 0.05 after Holm's correction over all pairs of arms."
)


def tables(result: dict[str, Any]) -> list[Table]:
    """The table of arms and the differences from the whole recipe."""
    return [_arms_table(result), *([_noise_table(result)] if result["reference"] else [])]


def _arms_table(result: dict[str, Any]) -> Table:
    arms = result["arms"]
    scores = list(dict.fromkeys(name for arm in arms for name in arm["scores"]))
    texts = list(dict.fromkeys(name for arm in arms for name in arm["perplexity"]))
    rows = [_arm_row(arm, scores, texts) for arm in arms]
    columns = ("Arm", *scores, *(f"perplexity {name}" for name in texts), "Seeds", "What differs")
    return Table("Arms", columns, rows, METHOD if rows else "No arm has finished yet.")


def _arm_row(arm: dict[str, Any], scores: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    cells = [_cell(arm["scores"].get(name), "{:.2f}".format) for name in scores]
    cells += [_cell(arm["perplexity"].get(name), digits3) for name in texts]
    return (arm["arm"], *cells, str(len(arm["seeds"])), arm["change"])


def _cell(entry: dict[str, Any] | None, shown: Any) -> str:
    if entry is None:
        return "–"
    interval = f" ({shown(entry['ci95'][0])}–{shown(entry['ci95'][1])})" if entry["ci95"] else ""
    return shown(entry["mean"]) + interval


def _noise_table(result: dict[str, Any]) -> Table:
    reference = result["reference"]
    rows = []
    for entry in result["differences"]:
        if reference in (entry["first"], entry["second"]):
            sign = 1 if entry["first"] == reference else -1
            other = entry["second"] if sign == 1 else entry["first"]
            change = f"{round(sign * entry['difference'], 2) + 0.0:+.2f}".replace("-", "−")  # no −0.00
            p = "p < 0.001" if entry["p_holm"] < 0.001 else f"p = {entry['p_holm']:.3f}"
            rows.append((other, entry["score"], change, p, "within noise" if entry["within_noise"] else "beyond noise"))
    for entry in result["perplexity_ratios"]:
        interval = " ({:.2f}–{:.2f})".format(*entry["ci95"]) if entry["ci95"] else ""
        noise = "within noise" if entry["within_noise"] else "beyond noise"
        rows.append((entry["arm"], f"perplexity {entry['text']}", f"× {entry['ratio']:.2f}", interval.strip(), noise))
    note = (
        f"Against {reference}, the whole recipe; a perplexity is beyond noise when its interval over seeds, not "
        "corrected for the number of arms, leaves out 1. All pairs of arms are in differences.csv."
    )
    return Table("Differences", ("Arm", "Measure", "Change", "Evidence", "Reading"), rows, note)


def page(result: dict[str, Any]) -> str:
    """The whole page of an ablation."""
    arms, *rest = tables(result)
    seconds = duration(result["seconds"])
    seeds = ", ".join(map(str, result["seeds"]))
    words = f"{len(result['arms'])} arms, seeds {seeds}; {seconds} of work, steps that arms share counted once."
    header = Html(
        f'<header><div class="eyebrow">qmedtune ablate <span class="status {esc(result["status"])}">'
        f"{esc(result['status'])}</span></div><h1>{esc(result['name'])}</h1>"
        f'<p class="outcome">{esc(words)}</p></header>'
    )
    notes = "".join(f"<li>{esc(note)}</li>" for note in result["notes"])
    recipe = Html(f"<details><summary>The recipe</summary><pre>{esc(result['recipe_text'])}</pre></details>")
    drawn = Html(f'<div class="scroll">{figure(result, result["chance"])}</div>') if result["arms"] else Html("")
    sections = (
        header,
        Html(f'<div class="callout"><ul>{notes}</ul></div>') if notes else "",
        section("Arms", card("", Html(drawn + html_table(arms)))),
        *(section(table.title, card("", html_table(table))) for table in rest),
        section("How to do it again", card("", recipe)),
    )
    return document(result["name"], sections, "Written by qmedtune from ablation.json.")
