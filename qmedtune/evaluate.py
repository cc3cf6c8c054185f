"""The evaluation step of a run: base against final on the same items, and perplexity of held-out text by domain.

A killed evaluation goes on where it was; a task is summed up only when all of its items are there.
Deliberately absent: scoring (measure.py, scoring.py), intervals (compare.py), benchmarks (tasks/).
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qmedtune import model as models
from qmedtune import store
from qmedtune.compare import task_result, write_items
from qmedtune.data import templates
from qmedtune.data.pack import PackedRows
from qmedtune.data.world import locate
from qmedtune.measure import Measured, Settings, measure_model
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.tasks import Task, load_task

PARTIAL = "partial"


def evaluate_stage(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Base against final of a resolved recipe.

    `inputs`: `base`, `adapter-1` ..., `merged`, and where there are any `template` (folder with template.json) and
    `validation` (folder of packed held-out rows per source). With precision `nf4` the final model is the base as it was
    trained plus its adapters, with `full16` the merged folder. Writes <task>.items.jsonl and evaluation.json below
    `out`, where an interrupted evaluation is continued; returns the content of evaluation.json.
    """
    tasks = [load_task(section, recipe.seed, _world(recipe)) for section in task_sections(recipe)]
    held_out = {source: PackedRows(inputs["validation"] / source) for source in recipe.evaluate.perplexity}
    settings = _settings(recipe, inputs)
    measured = {
        label: measure_model(model, tokenizer, label, tasks, held_out, settings, out / PARTIAL)
        for label, model, tokenizer in _base_and_final(recipe, inputs)
    }
    result = write_results(tasks, measured, recipe.seed, out)
    result |= {"precision": recipe.evaluate.precision, "template": settings.template.name}
    store.write_json(out / "evaluation.json", result)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return result


def write_results(tasks: list[Task], measured: dict[str, Measured], seed: int, out: Path) -> dict[str, Any]:
    """Write <task>.items.jsonl below `out`; {"tasks": scores per task, "perplexity": per source}."""
    scores = {}
    for task in tasks:
        rows = {label: found.tasks[task.name] for label, found in measured.items()}
        write_items(out / f"{task.name}.items.jsonl", task, rows)
        scores[task.name] = task_result(task, rows, seed)
    first = next(iter(measured.values())).perplexity
    texts = {
        source: {**{label: m.perplexity[source].perplexity for label, m in measured.items()}, "tokens": found.tokens}
        for source, found in first.items()
    }
    return {"tasks": scores, "perplexity": texts}


def task_sections(recipe: Recipe) -> list[TaskSection]:
    return [TaskSection(task=task) if isinstance(task, str) else task for task in recipe.evaluate.tasks]


def _world(recipe: Recipe) -> str:
    """The built-in world that the recipe's data come from; `tiny` for recipes on other data."""
    paths = [p for s in recipe.data.values() for p in ([s.path] if isinstance(s.path, str) else s.path)]
    return next((locate(path)[0].name for path in paths if path.startswith("builtin:")), "tiny")


def _settings(recipe: Recipe, inputs: dict[str, Path]) -> Settings:
    template = templates.load(inputs["template"]) if "template" in inputs else templates.default(None, inputs["base"])
    rows, seq_len = recipe.evaluate.batch, recipe.stages[-1].section.seq_len
    assert isinstance(rows, int) and isinstance(seq_len, int), "evaluate_stage takes a resolved recipe"
    return Settings(template, recipe.evaluate.generate, rows * seq_len)


def _base_and_final(recipe: Recipe, inputs: dict[str, Path]) -> Iterator[tuple[str, Any, Any]]:
    """("base" | "final", model in eval mode, tokenizer), one at a time in memory."""
    section = recipe.model.model_copy(update={"attention": "sdpa"})
    full16 = recipe.evaluate.precision == "full16"
    tokenizer = models.load_tokenizer(inputs["base"])
    model: Any = models.load_base(inputs["base"], section, quantize=False if full16 else None)
    models.install_kernels(model, section.kernels)
    yield "base", model.eval(), tokenizer
    if full16:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        tokenizer = models.load_tokenizer(inputs["merged"])
        model = models.load_base(inputs["merged"], section, quantize=False)
    else:
        adapters = sorted(name for name in inputs if name.startswith("adapter-"))
        model = models.load_adapters(model, [inputs[name] for name in adapters])
    models.install_kernels(model, section.kernels)
    yield "final", model.eval(), tokenizer
