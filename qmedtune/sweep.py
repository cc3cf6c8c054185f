"""`merge.sweep`: the trained model mixed with another at several shares, each merged with its proof and measured on
development items, and the share that the recipe's rule chooses.

A point is measured as it would be delivered and then deleted; what was measured is kept, so that a killed sweep goes on
at the next point. Deliberately not here: the rule (evaluation/choosing.py), the items (evaluation/halves.py), and the
final score, which is taken on others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qmedtune import store, ui
from qmedtune.data.packing.pack import WholeDocuments
from qmedtune.evaluate import (
    Contender,
    EvaluatedModels,
    check_prompts,
    contenders,
    delivered_dtype,
    document_window,
    open_contender,
    settings_of,
)
from qmedtune.evaluation import choosing, halves
from qmedtune.evaluation.measure import MeasuredModel, ModelToMeasure, Settings, measure_model
from qmedtune.evaluation.scoring import Perplexity
from qmedtune.evaluation.summary import write_items
from qmedtune.merge import merge
from qmedtune.merging.sibling import Mixing
from qmedtune.mixed_merge import SWEEP, job_of, sibling_of
from qmedtune.model import load_tokenizer
from qmedtune.model_stack import ModelStack
from qmedtune.planning import precision
from qmedtune.recipe import SweepSection
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Sweep, SweepPoint, scored_in
from qmedtune.tasks import Task

BASE = "base"


@dataclass(frozen=True)
class Measuring:
    """How each point is measured, and where what was measured is kept."""

    recipe: ResolvedRecipe
    trained: ModelStack
    mixing: Mixing
    inputs: EvaluatedModels
    tasks: list[Task]
    texts: Mapping[str, WholeDocuments]
    settings: Settings
    taken: precision.Precision
    folder: Path

    def of(self, contender: Contender) -> dict[str, Any]:
        """What `_measured` reads."""
        model, tokenizer = open_contender(self.recipe, contender)
        label = contender.label
        asked = ModelToMeasure(model, tokenizer, label, self.settings, self.folder / label)
        return asdict(measure_model(asked, self.tasks, self.texts))

    def base(self) -> MeasuredModel:
        first = contenders(self.inputs, self.taken)[0]
        return _measured(store.kept(self.folder / f"{BASE}.json", lambda: self.of(first)))

    def at(self, share: float) -> MeasuredModel:
        """The mix at one share."""
        label = label_of(share)

        def work() -> dict[str, Any]:
            merged = self.folder / f"{label}-merged"
            shutil.rmtree(merged, ignore_errors=True)  # of an attempt that was killed
            merged.mkdir(parents=True)
            mixing = replace(self.mixing, share=share)
            merge(job_of(self.recipe, self.trained, mixing, self.inputs.validation), merged)
            try:
                return self.of(Contender(label, ModelStack(merged), self.taken))
            finally:
                shutil.rmtree(merged)

        return _measured(store.kept(self.folder / f"{label}.json", work))


def label_of(share: float) -> str:
    """Of a point, in file names and items."""
    return f"lambda-{repr(float(share)).removesuffix('.0')}"


def _measured(kept: Mapping[str, Any]) -> MeasuredModel:
    texts: dict[str, Perplexity] = {}
    for source, found in kept["perplexity"].items():
        texts[source] = Perplexity(**found)
    return MeasuredModel(kept["tasks"], texts)


def sweep_step(recipe: ResolvedRecipe, sweep: SweepSection, inputs: EvaluatedModels, out: Path) -> Sweep:
    """The step of a run. inputs: `trained` with the adapters that the merge reads. Writes sweep.json and
    <task>.items.jsonl below `out`, where an interrupted sweep goes on."""
    trained = inputs.trained
    tasks = halves.development_tasks(recipe)
    texts: dict[str, WholeDocuments] = {}
    if inputs.validation is not None:
        texts = halves.texts_of(recipe, inputs.validation, document_window(trained.base), "development")
    settings = settings_of(recipe, trained)
    check_prompts(load_tokenizer(trained.base), settings.template, tasks)
    taken = precision.decide(recipe, delivered_dtype(trained))
    mixing = sibling_of(recipe, inputs.origin or trained.base, 0.0)
    measuring = Measuring(
        recipe, trained, mixing, inputs, tasks, texts, settings, taken, out / store.SCRATCH
    )  # fmt: skip
    rule = choosing.rule_of(recipe, sweep, tasks)
    measured = {BASE: measuring.base()}
    points: list[SweepPoint] = []
    for share in sweep.shares:
        found = measuring.at(share)
        measured[label_of(share)] = found
        point = choosing.point_of(rule, found, measured[BASE], share)
        ui.note(f"merge.sweep: {_told(point)}")
        points.append(point)
    chosen, warnings = choosing.choose(points)
    best = measured[label_of(_share(chosen))]
    judged: list[SweepPoint] = []
    for point in points:
        noise = choosing.within_noise(rule, measured[label_of(_share(point))], best)
        judged.append(point.model_copy(update={"within_noise": noise}))
    result = Sweep(
        sweep=judged,
        sweep_base=choosing.point_of(rule, measured[BASE], None, None),
        chosen=_share(chosen),
        rule=rule.words,
        development=recipe.development,
        scored_in=scored_in(taken.name, taken.weights),
        warnings=warnings,
    )
    for task in tasks:
        rows = {label: each.tasks[task.name] for label, each in measured.items()}
        write_items(out / f"{task.name}.items.jsonl", task, rows)
    store.write_json(out / SWEEP, result.as_json())
    return result


def _share(point: SweepPoint) -> float:
    assert point.share is not None, "only the base has none"
    return float(point.share)


def _told(point: SweepPoint) -> str:
    """A line of progress."""
    assert point.gain is not None
    told = f"lambda {_share(point):g}: gain {point.gain:+.4f}"
    if point.general_loss is None:
        return told
    return f"{told}, general perplexity {point.general_loss:+.2%}"
