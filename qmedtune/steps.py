"""The list of steps that a recipe becomes, in order; run.py runs it.

    data/<source> ... -> data/NN-kind ... -> NN-kind ... -> audit -> sweep -> merged -> evaluation -> against

All data comes before the first training step: what is wrong with it must not show after days.
Each step names what it needs, what its key depends on (keys.py) and the function that does it. No torch is imported
here: a step brings what it needs. Deliberately absent: running, sealing, resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmedtune import keys, store
from qmedtune.lineage import BASE, StackInRun, final_model, lineage_of, parts_of, place_in
from qmedtune.model_stack import ModelStack
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Facts
from qmedtune.training.shared_base import SharedBase

if TYPE_CHECKING:
    from qmedtune.evaluate import EvaluatedModels

WITHOUT_BASE = ("fold", "sweep", "merge", "audit", "evaluation", "against")
MODEL = ""  # names the one model of a step among `Step.models`


@dataclass(frozen=True)
class Inputs:
    """What a step reads, as it lies on the disk: by the names of its `folders`, `models` and `sources`."""

    folders: dict[str, Path]
    models: dict[str, ModelStack]
    sources: dict[str, Path]

    @property
    def model(self) -> ModelStack:
        return self.models[MODEL]


Work = Callable[[ResolvedRecipe, Inputs, Path], Facts]
"""Writes below the folder and returns what it found out."""


@dataclass(frozen=True)
class Step:
    """`folders` maps what the work calls an input to `step` or `step/subfolder`, `base` being the recipe's base;
    `models` are read as wholes; `sources` are data that is asked about, by their names. With `resumes` an interrupted
    attempt is continued instead of thrown away."""

    name: str
    kind: str
    section: keys.MadeFrom
    folders: dict[str, str]
    work: Work
    resumes: bool = False
    models: Mapping[str, StackInRun] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def needs(self) -> dict[str, str]:
        """Every folder that is read, under the name that it has in the step's key and in its seal."""
        found = dict(self.folders)
        for name in self.sources:
            found[f"data-{name}"] = f"data/{name}"
        for name, model in self.models.items():
            found |= _in_key(name, model)
        return found

    def located(self, out: Path, base: Callable[[], Path]) -> Inputs:
        """The inputs of a run in the folder `out`; `base` gives the recipe's base, and is asked only where needed."""
        folders: dict[str, Path] = {}
        for name, path in self.folders.items():
            folders[name] = place_in(out, path, base)
        models: dict[str, ModelStack] = {}
        for name, model in self.models.items():
            models[name] = model.located(out, base)
        sources = {name: place_in(out, f"data/{name}", base) for name in self.sources}
        return Inputs(folders, models, sources)


def _in_key(name: str, model: StackInRun) -> dict[str, str]:
    """Keys of finished runs hold these names, as those of sources; nothing reads a model from them."""
    base, adapter = f"{name}:base", f"{name}:"
    if name == MODEL:
        base, adapter = "base", "adapter-"
    found = {base: model.base}
    for number, path in enumerate(model.adapters, start=1):
        found[f"{adapter}{number}"] = path
    if model.template:
        found["template"] = model.template
    return found


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
        steps.append(_training_step(recipe, asked, index, shared))
        if recipe.stages[index].kind != "classify":
            trained[stage.name] = stage.after
    final = final_model(recipe)
    steps += _audit_steps(recipe, trained)
    if final.adapters:
        steps += _sweep_step(recipe, final, hashes)
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

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        shared.drop()
        return step.work(recipe, inputs, out)

    return replace(step, work=work)


def _source_step(recipe: ResolvedRecipe, name: str, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.data.prepare import prepare_source

        return prepare_source(recipe, name, inputs.folders, out)

    earlier = recipe.compared_with(name)
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

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.data.packing.pack import pack_validation

        return pack_validation(recipe, inputs.folders["base"], inputs.folders, out)

    return [Step("data/validation", "data", keys.validation_section(recipe), needs, work, resumes=True)]


def _planting_step(recipe: ResolvedRecipe) -> list[Step]:
    audit = recipe.audit
    if audit is None:
        return []

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.data.synthetic.canaries import plant

        return plant(recipe, audit, inputs.folders, out)

    needs: dict[str, str] = {}
    for name in (audit.source, audit.prompts):
        if name:
            needs[name] = f"data/{name}"
    return [Step("data/planted", "data", keys.audit_section(audit, recipe.seed), needs, work)]


def _audit_steps(recipe: ResolvedRecipe, trained: dict[str, StackInRun]) -> list[Step]:
    """What the canaries give away after each stage, and, where there are limits, whether that is too much."""
    audit = recipe.audit
    if audit is None:
        return []

    def measure(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.audit import Auditing, StageToAudit, audit_step

        stages: dict[str, StageToAudit] = {}
        for name, model in inputs.models.items():
            stages[name] = StageToAudit(inputs.folders[name], model)
        return audit_step(Auditing(recipe, audit, stages), inputs.folders["planted"], out)

    def judge(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.audit import check_limits

        return check_limits(audit, inputs.folders["audit"])

    folders = {"planted": "data/planted"}
    models: dict[str, StackInRun] = {}
    for name, model in trained.items():
        folders[name] = name
        models[name] = replace(model, template=None)  # the audit writes its prompts as its recipe says
    section = keys.audit_section(audit, recipe.seed)
    steps = [Step("audit", "audit", section, folders, measure, resumes=True, models=models)]
    limits = audit.model_dump(mode="json", include={"max_exposure", "max_extracted"}, exclude_none=True)
    if limits:
        steps.append(Step("audit-limits", "audit", limits, {"audit": "audit"}, judge))
    return steps


def _tokens_step(recipe: ResolvedRecipe, index: int) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.data.packing.classes import pack_classes
        from qmedtune.data.packing.pack import StageToPack, pack_stage

        pack = pack_classes if recipe.stages[index].classify else pack_stage
        return pack(StageToPack(recipe, index, inputs.folders["base"], inputs.folders), out)

    planted: set[str | None] = set()
    if recipe.audit:
        planted = {recipe.audit.source, recipe.audit.prompts}
    needs: dict[str, str] = {}
    for name in recipe.stages[index].sources:
        needs[name] = f"data/planted/{name}" if name in planted else f"data/{name}"
    needs["base"] = "base"  # for its tokenizer, which no stage changes
    section = keys.tokens_section(recipe, index)
    return Step(f"data/{recipe.stage_names()[index]}", "data", section, needs, work, resumes=True)


def _training_step(recipe: ResolvedRecipe, asked: Recipe, index: int, shared: SharedBase) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.train import StageInputs, train_stage

        folders = inputs.folders
        reads = StageInputs(inputs.model, folders["tokens"], folders.get("validation"))
        return train_stage(recipe, index, reads, out, shared=shared)

    name = recipe.stage_names()[index]
    folders = {"tokens": f"data/{name}"}
    if recipe.validation.on and not recipe.stages[index].classify:
        folders["validation"] = "data/validation"
    section = keys.training_section(recipe, asked, index)
    start = lineage_of(recipe)[index].start
    models = {MODEL: replace(start, template=None)}  # its own template comes with the tokens
    return Step(name, recipe.stages[index].kind, section, folders, work, resumes=True, models=models)


def _fold_step(recipe: ResolvedRecipe, name: str, model: StackInRun) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.merge import merge_step

        return merge_step(recipe, inputs.model, out, inputs.folders.get("validation"))

    models = {MODEL: replace(model, template=None)}  # a base to train on, which nobody speaks to
    return Step(name, "fold", keys.fold_section(recipe), {}, work, models=models)


def _sweep_step(recipe: ResolvedRecipe, model: StackInRun, hashes: store.HashCache) -> list[Step]:
    sweep = recipe.merge.sweep
    if sweep is None:
        return []

    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.sweep import sweep_step

        return sweep_step(recipe, sweep, _compared(recipe, inputs), out)

    folders = _beside_the_model(recipe, model)
    del folders["merged"]  # which is made of what the sweep chooses
    if recipe.evaluate.perplexity or recipe.validation.on:
        folders["validation"] = "data/validation"
    models = {MODEL: replace(model, adapters=_adapters_merged(recipe, model))}
    section = keys.sweep_section(recipe, sweep, hashes)
    return [Step("sweep", "sweep", section, folders, work, resumes=True, models=models)]


def _adapters_merged(recipe: ResolvedRecipe, model: StackInRun) -> tuple[str, ...]:
    """Those that the merge reads: where it weighs the stages, each one's, also what a later one continues."""
    if not recipe.merge.weighs:
        return model.adapters
    return tuple(part.adapter for part in parts_of(recipe))


def _merge_step(recipe: ResolvedRecipe, model: StackInRun) -> Step:
    def weighed(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.merge import weighed_merge_step

        return weighed_merge_step(recipe, inputs.model, out, inputs.folders.get("validation"))

    def mixed(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.mixed_merge import mixed_merge_step

        return mixed_merge_step(recipe, inputs.model, out, inputs.folders)

    step = replace(_fold_step(recipe, "merged", model), kind="merge", section=keys.merge_section(recipe))
    if recipe.evaluate.perplexity or recipe.validation.on:
        step = replace(step, folders={"validation": "data/validation"})
    step = replace(step, models={MODEL: replace(model, adapters=_adapters_merged(recipe, model))})
    if recipe.merge.other is None:
        return replace(step, work=weighed) if recipe.merge.weighs else step
    folders = {**_beside_the_model(recipe, model), **step.folders}
    del folders["merged"]
    if recipe.merge.sweep is not None:
        folders["sweep"] = "sweep"
    return replace(step, folders=folders, work=mixed)


def _evaluation_step(recipe: ResolvedRecipe, model: StackInRun, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.evaluate import evaluate_step

        return evaluate_step(recipe, _compared(recipe, inputs), out)

    folders = _beside_the_model(recipe, model)
    if recipe.evaluate.perplexity:
        folders["validation"] = "data/validation"
    step = Step("evaluation", "evaluation", keys.evaluation_section(recipe, hashes), folders, work, resumes=True)
    if recipe.hygiene.contaminated == "split":
        step = replace(step, sources=tuple(recipe.used_sources()))
    return replace(step, models={MODEL: model})


def _against_step(recipe: ResolvedRecipe, model: StackInRun, hashes: store.HashCache) -> Step:
    def work(recipe: ResolvedRecipe, inputs: Inputs, out: Path) -> Facts:
        from qmedtune.against import against_step

        return against_step(recipe, _compared(recipe, inputs), out)

    section, folders = keys.against_section(recipe, hashes), _beside_the_model(recipe, model)
    return Step("against", "against", section, folders, work, resumes=True, models={MODEL: model})


def _compared(recipe: ResolvedRecipe, inputs: Inputs) -> EvaluatedModels:
    """The folders of `_beside_the_model` and the model that they lie beside."""
    from qmedtune.evaluate import EvaluatedModels

    folders = inputs.folders
    return EvaluatedModels(
        trained=inputs.model,
        merged=folders.get("merged"),
        mixed=recipe.merge.other is not None or recipe.merge.weighs,
        origin=folders.get("origin"),
        untrained=folders.get("untrained"),
        validation=folders.get("validation"),
        sources=list(inputs.sources.values()),
    )


def _beside_the_model(recipe: ResolvedRecipe, model: StackInRun) -> dict[str, str]:
    """What the trained model and its beginning are scored as, where that is not `model` itself."""
    origin = BASE
    if recipe.stages[0].kind == "pretrain":
        origin = f"{recipe.stage_names()[0]}/model"
    folders = {"merged": model.base}
    if model.adapters:
        folders["merged"] = "merged"
    if model.base == origin and not model.adapters:  # from scratch, and nothing after it: compared is what it began as
        folders["untrained"] = BASE
    elif model.base != origin:  # a folded base has learnt already: compared is the first
        folders["origin"] = origin
    return folders
