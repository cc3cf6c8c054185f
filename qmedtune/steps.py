"""The list of steps that a recipe becomes, in order; run.py runs it.

    data/<source> ... -> data/NN-kind ... -> NN-kind ... -> audit -> merged -> evaluation -> against

All data comes before the first training step: what is wrong with it must not show after days.
Each step names what it needs, what its key depends on (keys.py) and the function that does it. No torch is imported
here: a step brings what it needs. Deliberately absent: running, sealing, resuming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmedtune import keys, store
from qmedtune.recipe import Recipe, StageSection
from qmedtune.training.shared_base import SharedBase

WITHOUT_BASE = ("fold", "merge", "audit", "evaluation", "against")
Work = Callable[[Recipe, dict[str, Path], Path], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """`needs` maps what the work calls an input to `step` or `step/subfolder`; `base` is the model folder.
    With `resumes` an interrupted attempt is continued instead of thrown away."""

    name: str
    kind: str
    section: dict[str, Any]
    needs: dict[str, str]
    work: Work
    resumes: bool = False


def steps_of(recipe: Recipe, asked: Recipe, hashes: store.HashCache) -> list[Step]:
    """The list. `recipe` is resolved, `asked` is what the user wrote (keys must not depend on the machine)."""
    sources = recipe.used_sources()
    steps = [_source_step(recipe, name, hashes) for name in sources]
    steps += _validation_step(recipe) + _planting_step(recipe)
    steps += [_tokens_step(recipe, index) for index in range(len(recipe.stages))]
    start, adapters, template, shared = "base", [], None, SharedBase()
    trained: dict[str, tuple[str, list[str]]] = {}
    for index, name in enumerate(recipe.stage_names()):
        stage = recipe.stages[index]
        if folds(stage, adapters):
            steps.append(_fold_step(recipe, f"{name}-base", start, adapters))
            start, adapters = f"{name}-base", []
        steps.append(_training_step(recipe, asked, index, start, adapters, shared))
        start, adapters = after(stage, name, start, adapters)
        trained |= {name: (start, adapters)} if stage.kind != "classify" else {}
        template = name if stage.kind == "sft" else template
    steps += _audit_steps(recipe, trained)
    if adapters:
        steps.append(_merge_step(recipe, start, adapters, template))
    if recipe.evaluate.tasks or recipe.evaluate.perplexity:
        steps.append(_evaluation_step(recipe, start, adapters, template, hashes))
    if recipe.evaluate.against:
        steps.append(_against_step(recipe, start, adapters, template, hashes))
    return [_without_base(step, shared) if step.kind in WITHOUT_BASE else step for step in steps]


def folds(stage: StageSection, adapters: list[str]) -> bool:
    """Whether the earlier adapters are folded into a 16-bit base, named `<stage>-base`, before this stage."""
    return stage.section.adapter in ("merge_then_new", "none") and bool(adapters)


def after(stage: StageSection, name: str, start: str, adapters: list[str]) -> tuple[str, list[str]]:
    """The base and the adapters, in order, that make up the model after this stage, as `step/subfolder`. A classify
    stage is a branch: what follows goes on from before it."""
    if stage.kind == "classify":
        return start, adapters
    if stage.full:
        return f"{name}/model", []
    kept = adapters[:-1] if stage.section.adapter == "continue" else adapters
    return start, [*kept, f"{name}/adapter"]


def _without_base(step: Step, shared: SharedBase) -> Step:
    """The step, begun when the base that training shares is given up: it needs the room."""

    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        shared.drop()
        return step.work(recipe, inputs, out)

    return replace(step, work=work)


def _source_step(recipe: Recipe, name: str, hashes: store.HashCache) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.data.prepare import prepare_source

        return prepare_source(recipe, name, inputs, out)

    earlier = keys.sources_compared_with(recipe, name)
    section = keys.source_section(recipe, name, hashes)
    needs = {other: f"data/{other}" for other in earlier}
    return Step(f"data/{name}", "data", section, needs, work, resumes=True)


def _validation_step(recipe: Recipe) -> list[Step]:
    names = [n for n in recipe.data if n in {*recipe.validation.on, *recipe.evaluate.perplexity}]

    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.data.packing.pack import pack_validation

        return pack_validation(recipe, inputs["base"], inputs, out)

    section = keys.validation_section(recipe)
    needs = {"base": "base", **{name: f"data/{name}" for name in names}}
    return [Step("data/validation", "data", section, needs, work, resumes=True)] if names else []


def _planting_step(recipe: Recipe) -> list[Step]:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.data.synthetic.canaries import plant

        return plant(recipe, inputs, out)

    if recipe.audit is None:
        return []
    needs = {name: f"data/{name}" for name in (recipe.audit.source, recipe.audit.prompts) if name}
    return [Step("data/planted", "data", keys.audit_section(recipe), needs, work)]


def _audit_steps(recipe: Recipe, trained: dict[str, tuple[str, list[str]]]) -> list[Step]:
    """What the canaries give away after each stage, and, where there are limits, whether that is too much."""

    def measure(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.audit import audit_stage

        return audit_stage(recipe, inputs, out)

    def judge(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.audit import check_limits

        return check_limits(recipe, inputs, out)

    if recipe.audit is None:
        return []
    needs = {"planted": "data/planted"}
    for name, (start, adapters) in trained.items():
        needs |= {name: name, f"{name}:base": start}
        needs |= {f"{name}:{number}": path for number, path in enumerate(adapters, start=1)}
    steps = [Step("audit", "audit", keys.audit_section(recipe), needs, measure, resumes=True)]
    limits = recipe.audit.model_dump(mode="json", include={"max_exposure", "max_extracted"}, exclude_none=True)
    return steps + ([Step("audit-limits", "audit", limits, {"audit": "audit"}, judge)] if limits else [])


def _tokens_step(recipe: Recipe, index: int) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.data.packing.classes import pack_classes
        from qmedtune.data.packing.pack import pack_stage

        pack = pack_classes if recipe.stages[index].classify else pack_stage
        return pack(recipe, index, inputs["base"], inputs, out)

    planted = {recipe.audit.source, recipe.audit.prompts} if recipe.audit else set()
    sources = recipe.stages[index].sources
    needs = {name: f"data/planted/{name}" if name in planted else f"data/{name}" for name in sources}
    needs["base"] = "base"  # for its tokenizer, which no stage changes
    section = keys.tokens_section(recipe, index)
    return Step(f"data/{recipe.stage_names()[index]}", "data", section, needs, work, resumes=True)


def _training_step(
    recipe: Recipe, asked: Recipe, index: int, start: str, adapters: list[str], shared: SharedBase
) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.train import train_stage

        return train_stage(recipe, index, inputs, out, shared)

    name = recipe.stage_names()[index]
    needs = {"base": start, "tokens": f"data/{name}", **_numbered(adapters)}
    if recipe.validation.on and not recipe.stages[index].classify:
        needs["validation"] = "data/validation"
    section = keys.training_section(recipe, asked, index)
    return Step(name, recipe.stages[index].kind, section, needs, work, resumes=True)


def _fold_step(recipe: Recipe, name: str, start: str, adapters: list[str]) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.merge import merge_stage

        return merge_stage(recipe, inputs, out)

    return Step(name, "fold", keys.merge_section(recipe), {"base": start, **_numbered(adapters)}, work)


def _merge_step(recipe: Recipe, start: str, adapters: list[str], template: str | None) -> Step:
    step = _fold_step(recipe, "merged", start, adapters)
    needs = {**step.needs, **({"template": template} if template else {})}
    if recipe.evaluate.perplexity or recipe.validation.on:
        needs["validation"] = "data/validation"
    return Step("merged", "merge", step.section, needs, step.work)


def _evaluation_step(
    recipe: Recipe, start: str, adapters: list[str], template: str | None, hashes: store.HashCache
) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.evaluate import evaluate_stage

        return evaluate_stage(recipe, inputs, out)

    needs = _compared(recipe, start, adapters, template)
    needs |= {"validation": "data/validation"} if recipe.evaluate.perplexity else {}
    if recipe.hygiene.contaminated == "split":
        needs |= {f"data-{name}": f"data/{name}" for name in recipe.used_sources()}
    return Step("evaluation", "evaluation", keys.evaluation_section(recipe, hashes), needs, work, resumes=True)


def _against_step(
    recipe: Recipe, start: str, adapters: list[str], template: str | None, hashes: store.HashCache
) -> Step:
    def work(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        from qmedtune.against import against_stage

        return against_stage(recipe, inputs, out)

    needs = _compared(recipe, start, adapters, template)
    return Step("against", "against", keys.against_section(recipe, hashes), needs, work, resumes=True)


def _compared(recipe: Recipe, start: str, adapters: list[str], template: str | None) -> dict[str, str]:
    """What base and result of the run are made of."""
    origin = f"{recipe.stage_names()[0]}/model" if recipe.stages[0].kind == "pretrain" else "base"
    needs = {"base": start, "merged": "merged" if adapters else start, **_numbered(adapters)}
    if start == origin and not adapters:  # from scratch, and nothing after it: compared is what it began as
        needs["untrained"] = "base"
    elif start != origin:  # a folded base has learnt already: compared is the first
        needs["origin"] = origin
    return needs | ({"template": template} if template else {})


def _numbered(adapters: list[str]) -> dict[str, str]:
    return {f"adapter-{number}": path for number, path in enumerate(adapters, start=1)}


def adapters_in(inputs: dict[str, Path]) -> list[Path]:
    """Back from `_numbered`: the adapters among a step's inputs, in the order of training."""
    count = sum(name.startswith("adapter-") for name in inputs)
    return [inputs[f"adapter-{number}"] for number in range(1, count + 1)]
