"""What the schema alone cannot say: references between sections, and values that are legal but surely not meant.

`references` works on the plain tree, so that an absent source is named together with every schema error;
`contradictions` and `doubts` need a valid recipe. At most file names are looked at; contents are for the steps.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.lineage import BASE, final_model, parts_of
from qmedtune.parsing.grammar import did_you_mean
from qmedtune.parsing.strict_yaml import KeyPath, Tree
from qmedtune.recipe import ClassifySection, Recipe, SftSection, SweepSection, TaskSection

Finding = tuple[KeyPath, str]
FULL_TUNING_LR = 5e-5  # below it LoRA starves: MedAlpaca's 2e-5 did, Clinical LLaMA's 3e-4 worked
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/\x00-\x1f]|\\\\")  # "C:\notes" in double quotes holds a newline

WINDOWS_HINT = "a Windows path; under WSL drive C: is /mnt/c, with forward slashes; elsewhere give the folder there"


def references(tree: Tree) -> Iterator[Finding]:
    """Every use of a source name that `data:` does not have, whatever else is wrong with the recipe."""
    known = list(_mapping(tree.get("data")))
    for path, name in _named_sources(tree):
        if isinstance(name, str) and name not in known:
            sources = ", ".join(known[:6]) or "none"
            yield path, f'no source "{name}" in `data`{did_you_mean(name, known)} (sources: {sources})'


def _named_sources(tree: Tree) -> Iterator[tuple[KeyPath, Any]]:
    stages = tree.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        for kind, section in _mapping(stage).items():
            here: KeyPath = ("stages", index, kind)
            for name in _mapping(_mapping(section).get("mix")):
                yield (*here, "mix", name), name
            yield from _items((*here, "data"), _mapping(section).get("data"))
    yield from _items(("validate", "on"), _mapping(tree.get("validate")).get("on"))
    yield from _items(("evaluate", "perplexity"), _mapping(tree.get("evaluate")).get("perplexity"))
    for key in ("source", "prompts"):
        yield ("audit", key), _mapping(tree.get("audit")).get(key)
    for path, name in _items(("ablate", "corpora"), _mapping(tree.get("ablate")).get("corpora")):
        if name != "both":
            yield path, name


def _mapping(value: Any) -> Tree:
    return value if isinstance(value, dict) else {}


def _items(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield (*path, index), item
    elif value is not None:
        yield path, value


def _merging(recipe: Recipe) -> Iterator[Finding]:
    section, quantization = recipe.merge, recipe.model.quantization
    if section.base == "nf4" and quantization != "nf4":
        yield ("merge", "base"), f"got nf4, but model.quantization is {quantization}; allowed with it: full16"
    if section.rounding == "stochastic" and section.dtype == "float32":
        yield ("merge", "rounding"), "got stochastic; float32 keeps every update: allowed with it: auto, nearest"
    allowed = [part.stage for part in parts_of(recipe)]
    for name in section.weights:
        if name in allowed:
            continue
        folded = "is folded into the base that later stages are trained on, or " if name in recipe.stage_names() else ""
        yield (
            ("merge", "weights", name),
            f"{folded}is no stage whose adapter is merged; allowed: {', '.join(allowed) or 'none'}",
        )
    if section.weights and recipe.evaluate.precision == "nf4":
        yield ("evaluate", "precision"), "nf4 scores the adapters as trained, without merge.weights: allowed: delivered"
    if section.other is None:
        yield from _without_another_model(recipe)
    else:
        yield from _mixing(recipe)
    if section.sweep is not None:
        yield from _sweep(recipe, section.sweep)


def _without_another_model(recipe: Recipe) -> Iterator[Finding]:
    section = recipe.merge
    for key, value in (("method", section.method), ("lambda", section.share), ("sweep", section.sweep)):
        if value is not None:
            yield ("merge", key), "says how another model is mixed in, and none is named; add `with: MODEL`"


def _mixing(recipe: Recipe) -> Iterator[Finding]:
    """What cannot be mixed with another model, or could not be scored."""
    section, final = recipe.merge, final_model(recipe)
    if not final.adapters:
        yield ("merge", "with"), "the last stage leaves a whole model, and nothing is merged; leave the key out"
    if section.base == "nf4":
        yield ("merge", "base"), "got nf4; models are mixed in 16 bit: allowed with `with`: full16"
    if recipe.evaluate.precision == "nf4":
        yield ("evaluate", "precision"), "nf4 scores the adapters as trained, without merge.with: allowed: delivered"
    if section.method == "task_arithmetic" and final.base != BASE:
        yield (
            ("merge", "method"),
            "task_arithmetic adds changes of one base, and an earlier stage is folded into another; "
            "allowed: linear, slerp, or `adapter: continue`",
        )
    if section.share is not None and section.sweep is not None:
        yield ("merge", "lambda"), "the sweep chooses it; keep one of `lambda` and `sweep`"


def _sweep(recipe: Recipe, sweep: SweepSection) -> Iterator[Finding]:
    """What the rule of a sweep could not be applied to."""
    evaluate = recipe.evaluate
    here: KeyPath = ("merge", "sweep")
    for index, share in enumerate(sweep.shares):
        if share in sweep.shares[:index]:
            yield (*here, "lambda", index), f"{share:g} is there twice"
    kinds = {recipe.data[source].kind for source in evaluate.perplexity}
    if sweep.choose == "perplexity":
        if not kinds - {"general"}:
            yield (*here, "choose"), "needs held-out text that is not general; name sources in evaluate.perplexity"
    elif not evaluate.tasks:
        yield (*here, "choose"), f"got {sweep.choose}; there are none: name evaluate.tasks, or choose by perplexity"
    if sweep.choose == "answers" and not evaluate.generate:
        yield (*here, "choose"), "got answers; evaluate.generate is off: allowed: tasks, perplexity"
    if sweep.max_general_loss is not None and "general" not in kinds:
        yield (*here, "max_general_loss"), "needs a source of kind: general in evaluate.perplexity"


def contradictions(recipe: Recipe) -> Iterator[Finding]:
    """What cannot run: each finding is an error at its key."""
    for index, stage in enumerate(recipe.stages):
        yield from _stage_contradictions(recipe, ("stages", index, stage.kind), index)
    yield from _held_out(recipe)
    yield from _taken_names(recipe)
    yield from _unknown_names(recipe)
    yield from _paths(recipe)
    yield from _merging(recipe)
    yield from _ablation(recipe)
    yield from _audit(recipe)


def _stage_contradictions(recipe: Recipe, here: KeyPath, index: int) -> Iterator[Finding]:
    section = recipe.stages[index].section
    if isinstance(section, SftSection):
        for name in section.sources:
            if (kind := recipe.data[name].kind) != "instructions":
                yield (*here, "data"), f'"{name}" is of kind {kind}; an sft stage learns from kind: instructions'
    elif isinstance(section, ClassifySection):
        yield from _classify(recipe, here, section)
    elif section.epochs is not None and section.tokens != "auto":
        yield (*here, "epochs"), "`tokens` is given too; keep one of the two"
    if section.horizon_steps is not None and section.horizon_ratio is not None:
        yield (*here, "horizon_ratio"), "`horizon_steps` is given too; keep one of the two"
    if section.batch != "auto" and section.min_steps != "auto":
        yield (*here, "min_steps"), "`batch` is given too, which says the steps; keep one of the two"
    if isinstance(section.batch, int) and isinstance(section.micro_batch, int) and section.batch % section.micro_batch:
        yield (*here, "micro_batch"), f"got {section.micro_batch}; allowed: a divisor of batch ({section.batch})"
    if section.adapter == "frozen" and recipe.stages[index].kind != "classify":
        yield (*here, "adapter"), "got frozen; only a classify stage trains nothing but its head"
    if section.adapter not in ("continue", "none") and index == 0:
        yield (*here, "adapter"), f"got {section.adapter}; the first stage has no adapter before it: leave the key out"
    if section.lora is not None and index and section.adapter not in ("new", "merge_then_new"):
        yield (
            (*here, "lora"),
            f"adapter {section.adapter} makes no new adapter; allowed with `new` and `merge_then_new`",
        )
    if section.adapter == "new" and recipe.adapter.train_embeddings is not False:
        yield (*here, "adapter"), "a stack of adapters cannot train embeddings; set adapter.train_embeddings: false"
    if recipe.model.shape is not None and recipe.stages[0].kind != "pretrain" and index == 0:
        yield (
            ("model", "shape"),
            "weights that exist have their shape; only a recipe that begins with `pretrain` sets it",
        )
    if recipe.stages[index].kind == "pretrain" and index > 0:
        yield here, "pretrain starts from scratch: it can only be the first stage"


def _classify(recipe: Recipe, here: KeyPath, section: ClassifySection) -> Iterator[Finding]:
    if section.adapter in ("merge_then_new", "none"):
        yield (*here, "adapter"), f"got {section.adapter}; allowed: continue, new, frozen"
    if "label" not in recipe.data[section.data].columns:
        yield ("data", section.data, "columns"), "classify needs the column of the labels: `columns: {label: NAME}`"
    if section.train_earlier and section.adapter != "new":
        yield (*here, "train_earlier"), f"adapter {section.adapter} leaves nothing earlier to train; allowed with `new`"
    if recipe.data[section.data].kind == "instructions":
        yield (*here, "data"), f"{section.data} is of kind instructions; classify reads texts"
    if recipe.data[section.data].holdout == 0:
        yield (
            (*here, "data"),
            f"nothing of {section.data} is held out to score on; set data.{section.data}.holdout above 0",
        )


def _held_out(recipe: Recipe) -> Iterator[Finding]:
    uses: dict[KeyPath, list[str]] = {
        ("validate", "on"): recipe.validation.on,
        ("evaluate", "perplexity"): recipe.evaluate.perplexity,
    }
    for path, names in uses.items():
        for index, name in enumerate(names):
            if recipe.data[name].holdout == 0:
                yield (*path, index), f"nothing of {name} is held out; set data.{name}.holdout above 0"
    if recipe.validation.keep_best:
        yield from _judged(recipe)
    if recipe.evaluate.against and not recipe.evaluate.tasks:
        yield ("evaluate", "against"), "there is nothing to compare on; name tasks: evaluate: {tasks: [...]}"


def _judged(recipe: Recipe) -> Iterator[Finding]:
    """With `keep_best` every stage needs held-out loss of what it is for. Instructions are added to validate.on."""
    here: KeyPath = ("validate", "keep_best")
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        if stage.sft and all(recipe.data[source].holdout == 0 for source in stage.sources):
            which = stage.sources[0]
            yield here, f"{name} goes by held-out instructions; set data.{which}.holdout above 0"
        elif stage.kind in ("cpt", "pretrain") and not recipe.judged_by(index):
            yield here, f"no loss to choose {name}'s step by; name sources in validate.on that hold texts"


def _taken_names(recipe: Recipe) -> Iterator[Finding]:
    """Names that would share a folder or a file: sources with the run's own data/ steps, tasks with each other."""
    for name in recipe.data.keys() & {"validation", "planted", *recipe.stage_names()}:
        yield ("data", name), f'"{name}" is the name of a folder that the run makes in data/; call the source otherwise'
    taken: set[str] = set()
    for index, task in enumerate(recipe.evaluate.tasks):
        name = task.label
        if name in taken:
            yield ("evaluate", "tasks", index), f"{name} is there twice; give all its files as one path or pattern"
        taken.add(name)


def _unknown_names(recipe: Recipe) -> Iterator[Finding]:
    from qmedtune.data.packing.templates import TEMPLATES
    from qmedtune.tasks import BUILTIN_TASKS, FILE_TASKS

    templates = [*TEMPLATES, "chat"]
    for path, template in _named_templates(recipe):
        if template is not None and template not in templates and not template.endswith(".json"):
            hint = did_you_mean(template, templates)
            listed = f"(templates: {', '.join(templates)}, or a template.json)"
            yield path, f'no template "{template}"{hint} {listed}'
    for index, task in enumerate(recipe.evaluate.tasks):
        yield from _task(("evaluate", "tasks", index), task, list(BUILTIN_TASKS), list(FILE_TASKS))


def _named_templates(recipe: Recipe) -> Iterator[tuple[KeyPath, str | None]]:
    for name, source in recipe.data.items():
        yield ("data", name, "template"), source.template
    yield ("evaluate", "template"), recipe.evaluate.template
    if recipe.ablate:
        for index, template in enumerate(recipe.ablate.template):
            yield ("ablate", "template", index), template


def _ablation(recipe: Recipe) -> Iterator[Finding]:
    """Arms that this recipe cannot have."""
    if recipe.ablate is None:
        return
    mixes = [stage.cpt for stage in recipe.stages if stage.cpt]
    kinds = {stage.kind for stage in recipe.stages}
    for index, arm in enumerate(recipe.ablate.arms):
        if arm == "merge" and recipe.merge.other is None:
            yield ("ablate", "arms", index), "got merge; this recipe names no model to mix with (`merge.with`)"
        if missing := {"cpt", "sft"} & set(arm.split("+")) - kinds:
            yield ("ablate", "arms", index), f"got {arm}; this recipe has no {missing.pop()} stage"
    for key in ("corpora", "replay"):
        if getattr(recipe.ablate, key) and (len(mixes) != 1 or mixes[0].unit != "tokens"):
            yield ("ablate", key), "needs exactly one cpt stage, with `unit: tokens`"
            return
    corpora: list[str] = []
    has_general = False
    for mix in mixes:
        for name, weight in mix.mix.items():
            if recipe.data[name].kind != "general" and weight > 0:
                corpora.append(name)
            else:
                has_general = True
    for index, name in enumerate(recipe.ablate.corpora):
        if name not in [*corpora, "both"]:
            yield ("ablate", "corpora", index), f"got {name}; allowed: {', '.join(corpora)} (of the cpt mix) or both"
    if any(recipe.ablate.replay) and not has_general:
        yield ("ablate", "replay"), "no source of kind: general in the cpt mix to replay"


def _audit(recipe: Recipe) -> Iterator[Finding]:
    """Canaries that would not be trained on as they are meant to."""
    audit = recipe.audit
    planted = [("source", audit.source, ("cpt", "pretrain")), ("prompts", audit.prompts, ("sft",))] if audit else []
    for key, name, kinds in planted:
        if name is None:
            continue
        if not any(name in stage.sources for stage in recipe.stages if stage.kind in kinds):
            yield ("audit", key), f"got {name}; no {kinds[0]} stage trains on it"
        elif recipe.data[name].max_tokens is not None:
            yield ("audit", key), f"data.{name}.max_tokens leaves out a part, maybe canaries; drop that key"
        elif (recipe.data[name].kind == "instructions") != (key == "prompts"):
            yield ("audit", key), f"{name} is of kind {recipe.data[name].kind}"


def _task(here: KeyPath, task: TaskSection, builtin: list[str], from_file: list[str]) -> Iterator[Finding]:
    known = builtin + from_file
    if task.task not in known:
        yield here, f'no task "{task.task}"{did_you_mean(task.task, known)} (tasks: {", ".join(known)})'
    elif task.task in from_file and task.path is None:
        yield here, f"{task.task} is read from a file; write {{task: {task.task}, path: FILE}}"


def _paths(recipe: Recipe) -> Iterator[Finding]:
    """Paths that cannot be right wherever the recipe runs; whether files are there is for the data steps to say."""
    if problem := _unusable(recipe.model.base):
        yield ("model", "base"), problem
        return
    yield from _pickled(Path(os.path.expanduser(recipe.model.base)))
    for name, source in recipe.data.items():
        for path in source.paths:
            problem = _unusable(path) or _builtin(path) or _extension(path, source.format)
            if problem:
                yield ("data", name, "path"), problem


def _pickled(base: Path) -> Iterator[Finding]:
    """A folder of pickled weights alone would pass for a bare shape to pretrain from."""
    from qmedtune.model_files import PICKLED

    if not base.is_dir() or any(base.glob("*.safetensors")):
        return
    found: list[str] = []
    for pattern in PICKLED:
        found += [path.name for path in base.glob(pattern)]
    if found:
        text = (
            f"weights are pickled ({min(found)}); loading them could run code "
            "(allowed: *.safetensors; convert the model)"
        )
        yield ("model", "base"), text


def _unusable(path: str) -> str:
    """What no file system takes, and homes of users who are not here."""
    if "\0" in path:
        return "a path cannot hold a zero byte"
    if path.startswith("~") and os.path.expanduser(path) == path:
        return f"there is no user {path[1:].partition('/')[0]!r} here (write the whole path)"
    return WINDOWS_HINT if _is_windows(path) else ""


def _is_windows(path: str) -> bool:
    return sys.platform != "win32" and WINDOWS_PATH.match(path) is not None


def _builtin(path: str) -> str:
    from qmedtune.data.synthetic.outcomes import CORPORA
    from qmedtune.data.synthetic.world import SIZES

    known = [f"builtin:{corpus}" for corpus in CORPORA]
    for world in SIZES:
        known += [f"builtin:{world}/{corpus}" for corpus in CORPORA]
    if not path.startswith("builtin:") or path in known:
        return ""
    listed = ", ".join(known[: len(CORPORA)])
    return f'no built-in source "{path}"{did_you_mean(path, known)} (built in: {listed}, and builtin:micro/... of each)'


def _extension(path: str, format: str) -> str:
    """A last part such as `notes.docx` that no reader claims. Patterns and names without a dot may be anything."""
    from qmedtune.data.reading.files import plain_suffix
    from qmedtune.data.reading.sources import SUFFIXES

    suffix = plain_suffix(Path(path))
    if format != "auto" or path.startswith("builtin:") or not re.fullmatch(r"\.\w+", suffix) or suffix in SUFFIXES:
        return ""
    if Path(os.path.expanduser(path)).is_dir():
        return ""
    allowed = ", ".join(SUFFIXES)
    return f"no reader for {suffix} files (allowed: {allowed}, also .gz and .zst); convert, or name the `format`"


def doubts(recipe: Recipe) -> Iterator[Finding]:
    """What runs but is probably a slip: each finding is a warning at its key."""
    for index, stage in enumerate(recipe.stages):
        lr = stage.section.lr
        if not stage.full and isinstance(lr, float) and lr < FULL_TUNING_LR:
            text = f"{lr:g} is a rate for full tuning; adapters starve below {FULL_TUNING_LR:g} (usual: 1e-4 to 3e-4)"
            yield ("stages", index, stage.kind, "lr"), text
    for name in recipe.data.keys() - set(recipe.used_sources()):
        yield ("data", name), "no stage, validation or perplexity uses this source; it will not be read"
