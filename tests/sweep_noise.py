"""Whether the rule of a sweep picked well: every share of finished runs measured once more, on the items of the final
score, which the rule has not seen.

    python tests/sweep_noise.py RUN ...

Prints a Markdown table: per run and share the score on both parts, the chosen one, and whether it is within noise of
the best on the items that it was not chosen by (bootstrap over items, 95 %).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qmedtune import base as bases
from qmedtune import record
from qmedtune.evaluate import EvaluatedModels, settings_of
from qmedtune.evaluation import choosing, halves
from qmedtune.evaluation.measure import MeasuredModel
from qmedtune.lineage import final_model
from qmedtune.mixed_merge import sibling_of
from qmedtune.planning import precision
from qmedtune.process import prepare
from qmedtune.results import SweepPoint
from qmedtune.sweep import Measuring


def scored(run: Path, scratch: Path) -> tuple[choosing.Rule, dict[float | None, MeasuredModel]]:
    """What each share, and the base (None), reaches on the items of the final score."""
    recipe = record.recipe_of(record.load(run), run)
    trained = final_model(recipe).located(run, lambda: bases.identify(recipe.model, offline=True).make())
    tasks = halves.scored_tasks(recipe)
    measuring = Measuring(
        recipe, trained, sibling_of(recipe, trained.base, 0.0), EvaluatedModels(trained), tasks, {},
        settings_of(recipe, trained), precision.decide(recipe), scratch,
    )  # fmt: skip
    assert recipe.merge.sweep is not None
    rule = replace(choosing.rule_of(recipe, recipe.merge.sweep, tasks), domain=(), general=())
    found: dict[float | None, MeasuredModel] = {None: measuring.base()}
    for share in recipe.merge.sweep.shares:
        found[share] = measuring.at(share)
    return rule, found


def rows(run: Path) -> list[str]:
    told = record.load(run).merge
    assert told is not None and told.chosen is not None
    with TemporaryDirectory() as scratch:
        rule, measured = scored(run, Path(scratch))
    points: dict[float, SweepPoint] = {}
    for share, found in measured.items():
        if share is not None:
            points[share] = choosing.point_of(rule, found, measured[None], share)
    best = max(points, key=lambda share: points[share].gain or 0.0)
    lines = []
    for tried in told.sweep:
        share = float(tried.share or 0.0)
        mark = "chosen" if share == told.chosen else ""
        if share == best:
            mark += " best on the others"
        noise = choosing.within_noise(rule, measured[share], measured[best])
        cells = [run.name, f"{share:g}", figures(tried), figures(points[share]), mark.strip(), "yes" if noise else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figures(point: SweepPoint) -> str:
    """Scores by likelihood and as written."""
    told = []
    for score in point.tasks.values():
        written = score.generation
        told.append(f"{score.value:.3f}" + (f", {written.value:.3f}" if written else ""))
    return "; ".join(told)


if __name__ == "__main__":
    prepare()
    print("| run | lambda | chosen by: likelihood, written | the others: likelihood, written | | noise of the best |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        print("\n".join(rows(Path(name))), flush=True)
