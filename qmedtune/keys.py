"""What each step depends on, as plain data: these sections are hashed into its key and kept in its seal.

A step lists only what changes its result. What the machine decides (micro-batch, checkpointing, kernels, dtypes left
on `auto`) enters as the user wrote it, so that a sealed stage stays valid on another card.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmedtune import store
from qmedtune.errors import DataError
from qmedtune.recipe import PACKED_AS, AuditSection, Recipe, SourceSection, StageSection, SweepSection, TaskSection
from qmedtune.versions import CODE as CODE

# Raise when scores of the same models would differ: 2 = perplexity over whole documents, heads in fp32; 3 =
# answers that state exactly one option; 4 = asked with the tokens of training, end marks apart from perplexity; 5 =
# bins of calibration, answers in more tags and keys; 6 = more openings of an answer, species are no letters, JSON of
# several keys, what is denied or asked.
EVALUATION_FORMAT = 6
# How items are parted where choices are made on some of them: 2 = each by what it is, not by its rank in the task.
PARTS = 2

MadeFrom = Mapping[str, object]
"""Plain JSON: what a step is made from."""

PACKING = ("mix", "unit", "tokens", "epochs", "max_repeats", "data", "loss_on", "seq_len", "max_truncated_fraction")
PACKING += ("packing", "multi_label", "validation")
# Keys that came later, with the value that means what stages did before: runs made then stay finished.
SINCE_0_2 = {"adam_eps": 1e-8, "lora": None, "class_weights": "none", "min_steps": 1}
# Where a model folder, and a run, keep the model that is asked; what is read or copied of it.
MODEL_PLACES = ("", "merged/", "[0-9][0-9]-*/model/", "[0-9][0-9]-*/")
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json")
MODEL_FILES += ("*template.json", "*.jinja")
BY_MACHINE = ("micro_batch", "gradient_checkpointing", "optimizer")
MODEL_BY_MACHINE = ("compute_dtype", "kernels", "attention")


def source_section(recipe: Recipe, name: str, hashes: store.HashCache) -> MadeFrom:
    from qmedtune.data.hygiene.per_record import identifier_marks

    source = recipe.data[name]
    result: dict[str, object] = {
        "source": source.model_dump(mode="json", exclude={"license", "terms", *PACKED_AS}),
        "hygiene": recipe.hygiene.model_dump(mode="json"),
        "seed": recipe.seed,
        "files": fingerprint(source, hashes),
        **identifier_marks(recipe, name),
    }
    if recipe.hygiene.decontaminate != "off":
        from qmedtune.data.hygiene.benchmarks import chosen_tasks

        result["benchmarks"] = benchmarks(chosen_tasks(recipe), hashes)
    return result


def fingerprint(source: SourceSection, hashes: store.HashCache) -> list[list[str]]:
    """[name, sha256] of every file of a source; of the generator for built-in ones; the commit of a Hub dataset.

    Names are relative to the folder that all files share: in MIMIC-CXR's tree a report's folder is its patient.
    """
    from qmedtune.data.reading.sources import hub_dataset, source_files

    marks: list[list[str]] = []
    if any(path.startswith("builtin:") for path in source.paths):
        made_by = ["world.py"]
        if any(path.endswith("outcomes") for path in source.paths):
            made_by.append("outcomes.py")
        for name in made_by:
            marks.append(["builtin", hashes.sha256(Path(__file__).parent / "data" / "synthetic" / name)])
        return marks
    if dataset := hub_dataset(source):
        return [[dataset, _commit(dataset, hashes)]]
    files = source_files(source)
    shared = os.path.commonpath([path.absolute().parent for path in files])
    for path in files:
        marks.append([path.absolute().relative_to(shared).as_posix(), hashes.sha256(path)])
    return marks


def _commit(dataset: str, hashes: store.HashCache) -> str:
    """Where the Hub has a dataset now; offline, where it had it last: a finished run stays finished."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, _, revision = dataset.partition("@")
    try:
        commit = HfApi().dataset_info(name.partition(":")[0], revision=revision or None, timeout=10).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return hashes.remembered(dataset) or "unknown"
    hashes.remember(dataset, commit or "unknown")
    return commit or "unknown"


def benchmarks(tasks: list[TaskSection], hashes: store.HashCache) -> list[list[str]]:
    """[task, sha256 of each of its files] of what corpora are checked against, or models are scored on."""
    rows: list[list[str]] = []
    for task in tasks:
        row = [task.task]
        if task.path is None:  # built in, or a public benchmark, which the code names with its split
            made_by = "synthetic/world.py" if task.task == "facts" else "hygiene/benchmarks.py"
            row.append(hashes.sha256(Path(__file__).parent / "data" / made_by))
        else:
            files = _benchmark_files(task.path)
            if task.shots_from:
                files = files + _benchmark_files(task.shots_from)
            for file in files:
                row.append(hashes.sha256(file))
        rows.append(row)
    return rows


def _benchmark_files(path: str) -> list[Path]:
    """Files of a task's `path`; none where they are not there yet: the step that reads them says so."""
    from qmedtune.data.reading.sources import source_files

    try:
        return source_files(SourceSection(path=path, kind="instructions"))
    except DataError:
        return []


def _template_files(recipe: Recipe, names: list[str]) -> dict[str, str]:
    """sha256 of the templates that are files, by source."""
    found: dict[str, str] = {}
    for name in names:
        path = Path(recipe.data[name].template or "")
        if path.is_file():
            found[name] = store.sha256_file(path)
    return found


def validation_section(recipe: Recipe) -> MadeFrom:
    names = sorted({*recipe.validation.on, *recipe.evaluate.perplexity})
    readers: list[object] = []
    for stage in recipe.stages:
        readers.append([stage.section.seq_len, sorted(stage.sources), _loss_on(stage)])
    sources: dict[str, object] = {}
    for name in names:
        sources[name] = recipe.data[name].model_dump(mode="json", include={"template", "chunking"})
    return {
        "max_tokens": recipe.validation.max_tokens,
        "sources": sources,
        "stages": readers,
        "templates": _template_files(recipe, names),
    }


def _loss_on(stage: StageSection) -> str | float | None:
    return stage.sft.loss_on if stage.sft else None


def tokens_section(recipe: Recipe, index: int) -> MadeFrom:
    stage = recipe.stages[index]
    packing: dict[str, object] = {}
    for key, value in stage.section.model_dump(mode="json").items():
        if key in PACKING:
            packing[key] = value
    if stage.sft and not stage.sft.packing:
        packing |= {"batch": stage.sft.batch, "min_steps": stage.sft.min_steps}  # which records share one
    sources: dict[str, object] = {}
    for name in stage.sources:
        sources[name] = recipe.data[name].model_dump(mode="json", include=PACKED_AS)
    templates = _template_files(recipe, stage.sources)
    return {"packing": packing, "sources": sources, "templates": templates, "seed": recipe.seed}


def training_section(recipe: Recipe, asked: Recipe, index: int) -> MadeFrom:
    stage, requested = recipe.stages[index].section, asked.stages[index].section
    training: dict[str, object] = {}
    for key, value in stage.model_dump(mode="json").items():
        if key in BY_MACHINE:
            value = getattr(requested, key)
        if key not in PACKING and SINCE_0_2.get(key, ...) != value:
            training[key] = value
    model: dict[str, object] = {}
    for key, value in recipe.model.model_dump(mode="json", exclude={"base", "revision"}).items():
        model[key] = getattr(asked.model, key) if key in MODEL_BY_MACHINE else value
    return {
        "training": training,
        "model": model,
        "adapter": recipe.adapter_of(index).model_dump(mode="json"),
        "validate": recipe.validation.model_dump(mode="json"),
        "seed": recipe.seed,
        "deterministic": recipe.deterministic,
    }


def audit_section(audit: AuditSection, seed: int) -> MadeFrom:
    """Limits judge what was measured; they do not change it."""
    measured = audit.model_dump(mode="json", exclude={"max_exposure", "max_extracted"})
    return {"audit": measured, "seed": seed}


def merge_section(recipe: Recipe) -> MadeFrom:
    """The rule of a sweep is not in it: what it chose is the sweep's, which the merge then reads."""
    model = recipe.model.model_dump(mode="json", include={"quantization", "double_quantization"})
    merge = recipe.merge.model_dump(mode="json", exclude={"sweep"})
    if not recipe.merge.weighs:
        merge.pop("weights", None)
    made_from: dict[str, object] = {"merge": merge, "model": model, "seed": recipe.seed}
    if recipe.merge.other is not None:
        made_from["with"] = _model_marks(Path(recipe.merge.other).expanduser())
    return made_from


def fold_section(recipe: Recipe) -> MadeFrom:
    """Of a fold between stages, which no weight and no other model of the last merge changes."""
    model = recipe.model.model_dump(mode="json", include={"quantization", "double_quantization"})
    merge = recipe.merge.model_dump(mode="json", exclude={"weights", "other", "method", "share", "sweep"})
    return {"merge": merge, "model": model, "seed": recipe.seed}


def sweep_section(recipe: Recipe, sweep: SweepSection, hashes: store.HashCache) -> MadeFrom:
    """What the merge and the evaluation are made from, and what is tried."""
    tried = sweep.model_dump(mode="json")
    return {**merge_section(recipe), **evaluation_section(recipe, hashes), "sweep": tried}


def evaluation_section(recipe: Recipe, hashes: store.HashCache) -> MadeFrom:
    section = recipe.evaluate.model_dump(mode="json", exclude={"batch", "against", "development"})
    section |= {"format": EVALUATION_FORMAT, "merge_dtype": recipe.merge.dtype} | _left_for_choices(recipe)
    return {"evaluate": section, "seed": recipe.seed, "benchmarks": benchmarks(recipe.evaluate.tasks, hashes)}


def _left_for_choices(recipe: Recipe) -> dict[str, object]:
    """The share of items that are not scored; nothing where all are, as before there was one."""
    if not recipe.development:
        return {}
    return {"development": recipe.development, "parts": PARTS}


def against_section(recipe: Recipe, hashes: store.HashCache) -> MadeFrom:
    section = recipe.evaluate.model_dump(mode="json", include={"tasks", "precision", "template", "items_seed"})
    models: list[list[object]] = []
    for name in recipe.evaluate.against:
        models.append([name, *_model_marks(Path(name).expanduser())])
    section |= {"format": EVALUATION_FORMAT, "against": models, "merge_dtype": recipe.merge.dtype}
    section |= _left_for_choices(recipe) | {"parts": PARTS}
    return {"evaluate": section, "seed": recipe.seed, "benchmarks": benchmarks(recipe.evaluate.tasks, hashes)}


def _model_marks(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a model's files, of a run those of the model that it ends with; of a GGUF its own.
    Nothing for what lies elsewhere (a Hub id): its name stands for it."""
    if path.is_file():
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns]]
    found = []
    for place in MODEL_PLACES:
        for pattern in MODEL_FILES:
            for file in sorted(path.glob(place + pattern)):
                found.append([str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns])
    return found


def difference(old: Any, new: Any, where: str = "") -> str:
    """The first thing that differs between two sections, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                return difference(old.get(name), new.get(name), f"{where}.{name}" if where else name)
        return "what it is made from changed"
    if where.startswith("inputs."):
        return f"the {where.removeprefix('inputs.')} that it is made from changed"
    if "sha256" in where or "files" in where or "benchmarks" in where:
        return f"{where} changed"
    return f"{where} was {old}, is {new}"
