"""The list of steps that a recipe becomes, in order; run.py runs it.

    data/<source> ... -> data/NN-kind ... -> NN-kind ... -> audit -> merged -> evaluation -> against

All data comes before the first training step: what is wrong with it must not show after days.
Each step names what it needs, what its key depends on (keys.py) and the function that does it. No torch is imported
here: a step brings what it needs. Deliberately absent: running, sealing, resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmedtune import keys, store
from qmedtune.lineage import StackInRun, final_model, lineage_of, parts_of
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.training.shared_base import SharedBase

WITHOUT_BASE = ("fold", "merge", "audit", "evaluation", "against")
Inputs = dict[str, Path]
Found = Mapping[str, object]
"""What a step found out, as its seal keeps it: plain JSON."""
Work = Callable[[ResolvedRecipe, Inputs, Path], Found]


@dataclass(frozen=True)
class Step:
    """`needs` maps what the work calls an input to `step` or `step/subfolder`; `base` is the model folder.
    With `resumes` an interrupted attempt is continued instead of thrown away."""

    name: str
    kind: str
    section: keys.MadeFrom
    needs: dict[str, str]
    work: Work
    resumes: bool = False


def steps_of(recipe: ResolvedRecipe, asked: Recipe, hashes: store.HashCache) -> list[Step]:
    """The list. `recipe` is resolved, `asked` is what the user wrote (keys must not depend on the machine)."""
    steps: list[Step] = []
    for name in recipe.used_sources():
        steps.append(_source_step(recipe, name, hashes))
    steps += _validation_step(recipe) + _planting_step(recipe)
    for index in range(len(recipe.stages)):
        steps.append(_tokens_step(recipe, index))
    shared = SharedBase()
    trained: dict[str, StackInRun] = {}
    for index, stage in enumerate(lineage_of(recipe)):
        if stage.folds_into is not None:
            steps.append(_fold_step(recipe, stage.folds_into, stage.before))
        steps.append(_training_step(recipe, asked, index, stage.start, shared))
        if recipe.stages[index].kind != "classify":
            trained[stage.name] = stage.after
    final = final_model(recipe)
    steps += _audit_steps(recipe, trained)
    if final.adapters:
        steps.append(_merge_step(recipe, final))
    if recipe.evaluate.tasks or recipe.evaluate.perplexity:
        steps.append(_evaluation_step(recipe, final, hashes))
    if recipe.evaluate.against:
        steps.append(_against_step(recipe, final, hashes))
    for place, step in enumerate(steps):
        if step.kind in WITHOUT_BASE:
            steps[place] = _without_base(step, shared)
    return steps


def key_of(step: Step, model_digest: str, done: dict[str, store.Seal]) -> str:
    """What the step's folder depends on, as one hash."""
    digests = inputs_of(step, model_digest, done)
    return store.sha256_json({"step": step.name, "section": step.section, "inputs": digests, "code": keys.CODE})


def inputs_of(step: Step, model_digest: str, done: dict[str, store.Seal]) -> dict[str, str]:
    """The digest of everything that the step reads."""
    digests: dict[str, str] = {}
    for name, path in step.needs.items():
        owner = owner_of(path)
        digests[name] = model_digest if owner == "base" else done[owner].digest
    return digests


def owner_of(path: str) -> str:
    """`01-cpt/adapter` is made by the step `01-cpt`, `data/notes` by `data/notes`."""
    parts = path.split("/")
    if parts[0] == "data":
        return "/".join(parts[:2])
    return parts[0]


def upstream_of(step: Step) -> set[str]:
    """The steps whose folders it reads."""
    return {owner_of(path) for path in step.needs.values()} - {"base"}


def _without_base(step: Step, shared: SharedBase) -> Step:
    """The step, begun when the base that training shares is given up: it needs the room."""

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        shared.drop()
        return step.work(recipe, inputs, out)

    return replace(step, work=work)


def _source_step(recipe: ResolvedRecipe, name: str, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.data.prepare import prepare_source

        return prepare_source(recipe, name, inputs, out)

    earlier = keys.sources_compared_with(recipe, name)
    section = keys.source_section(recipe, name, hashes)
    needs = {other: f"data/{other}" for other in earlier}
    return Step(f"data/{name}", "data", section, needs, work, resumes=True)


def _validation_step(recipe: ResolvedRecipe) -> list[Step]:
    needs = {"base": "base"}
    for name in recipe.data:
        if name in recipe.validation.on or name in recipe.evaluate.perplexity:
            needs[name] = f"data/{name}"
    if len(needs) == 1:
        return []

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.data.packing.pack import pack_validation

        return pack_validation(recipe, inputs["base"], inputs, out)

    return [Step("data/validation", "data", keys.validation_section(recipe), needs, work, resumes=True)]


def _planting_step(recipe: ResolvedRecipe) -> list[Step]:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.data.synthetic.canaries import plant

        return plant(recipe, inputs, out)

    if recipe.audit is None:
        return []
    needs: dict[str, str] = {}
    for name in (recipe.audit.source, recipe.audit.prompts):
        if name:
            needs[name] = f"data/{name}"
    return [Step("data/planted", "data", keys.audit_section(recipe), needs, work)]


def _audit_steps(recipe: ResolvedRecipe, trained: dict[str, StackInRun]) -> list[Step]:
    """What the canaries give away after each stage, and, where there are limits, whether that is too much."""

    def measure(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.audit import audit_stage

        return audit_stage(recipe, inputs, out)

    def judge(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.audit import check_limits

        return check_limits(recipe, inputs, out)

    if recipe.audit is None:
        return []
    needs = {"planted": "data/planted"}
    for name, model in trained.items():
        needs |= {name: name, f"{name}:base": model.base}
        for number, path in enumerate(model.adapters, start=1):
            needs[f"{name}:{number}"] = path
    steps = [Step("audit", "audit", keys.audit_section(recipe), needs, measure, resumes=True)]
    limits = recipe.audit.model_dump(mode="json", include={"max_exposure", "max_extracted"}, exclude_none=True)
    if limits:
        steps.append(Step("audit-limits", "audit", limits, {"audit": "audit"}, judge))
    return steps


def _tokens_step(recipe: ResolvedRecipe, index: int) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.data.packing.classes import pack_classes
        from qmedtune.data.packing.pack import pack_stage

        pack = pack_classes if recipe.stages[index].classify else pack_stage
        return pack(recipe, index, inputs["base"], inputs, out)

    planted: set[str | None] = set()
    if recipe.audit:
        planted = {recipe.audit.source, recipe.audit.prompts}
    needs: dict[str, str] = {}
    for name in recipe.stages[index].sources:
        needs[name] = f"data/planted/{name}" if name in planted else f"data/{name}"
    needs["base"] = "base"  # for its tokenizer, which no stage changes
    section = keys.tokens_section(recipe, index)
    return Step(f"data/{recipe.stage_names()[index]}", "data", section, needs, work, resumes=True)


def _training_step(recipe: ResolvedRecipe, asked: Recipe, index: int, start: StackInRun, shared: SharedBase) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.train import train_stage

        return train_stage(recipe, index, inputs, out, shared=shared)

    name = recipe.stage_names()[index]
    needs = {"base": start.base, "tokens": f"data/{name}", **_numbered(start.adapters)}
    if recipe.validation.on and not recipe.stages[index].classify:
        needs["validation"] = "data/validation"
    section = keys.training_section(recipe, asked, index)
    return Step(name, recipe.stages[index].kind, section, needs, work, resumes=True)


def _fold_step(recipe: ResolvedRecipe, name: str, model: StackInRun) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.merge import merge_stage

        return merge_stage(recipe, inputs, out)

    return Step(name, "fold", keys.fold_section(recipe), {"base": model.base, **_numbered(model.adapters)}, work)


def _merge_step(recipe: ResolvedRecipe, model: StackInRun) -> Step:
    def weighed(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.merge import weighed_merge_stage

        return weighed_merge_stage(recipe, inputs, out)

    step = _fold_step(recipe, "merged", model)
    needs, work = dict(step.needs), step.work
    if recipe.merge.weights:  # every stage's adapter counts, also those that a later one continues
        parts = tuple(part.adapter for part in parts_of(recipe))
        needs, work = {"base": model.base, **_numbered(parts)}, weighed
    if model.template:
        needs["template"] = model.template
    if recipe.evaluate.perplexity or recipe.validation.on:
        needs["validation"] = "data/validation"
    return Step("merged", "merge", keys.merge_section(recipe), needs, work)


def _evaluation_step(recipe: ResolvedRecipe, model: StackInRun, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.evaluate import evaluate_stage

        return evaluate_stage(recipe, inputs, out)

    needs = _compared(recipe, model)
    if recipe.evaluate.perplexity:
        needs["validation"] = "data/validation"
    if recipe.hygiene.contaminated == "split":
        for name in recipe.used_sources():
            needs[f"data-{name}"] = f"data/{name}"
    return Step("evaluation", "evaluation", keys.evaluation_section(recipe, hashes), needs, work, resumes=True)


def _against_step(recipe: ResolvedRecipe, model: StackInRun, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Found:
        from qmedtune.against import against_stage

        return against_stage(recipe, inputs, out)

    needs = _compared(recipe, model)
    return Step("against", "against", keys.against_section(recipe, hashes), needs, work, resumes=True)


def _compared(recipe: ResolvedRecipe, model: StackInRun) -> dict[str, str]:
    """What base and result of the run are made of."""
    origin = "base"
    if recipe.stages[0].kind == "pretrain":
        origin = f"{recipe.stage_names()[0]}/model"
    needs = {"base": model.base, "merged": model.base, **_numbered(model.adapters)}
    if model.adapters:
        needs["merged"] = "merged"
    if model.base == origin and not model.adapters:  # from scratch, and nothing after it: compared is what it began as
        needs["untrained"] = "base"
    elif model.base != origin:  # a folded base has learnt already: compared is the first
        needs["origin"] = origin
    if model.template:
        needs["template"] = model.template
    return needs


def _numbered(adapters: Sequence[str]) -> dict[str, str]:
    """The inputs that model_stack.adapters_in reads."""
    needs: dict[str, str] = {}
    for number, path in enumerate(adapters, start=1):
        needs[f"adapter-{number}"] = path
    return needs
