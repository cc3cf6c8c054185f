"""The arms of an ablation: recipes derived from one recipe, each by a named change.

`arms` times `corpora` make the first ones; every value of the other lists of `ablate:` is one change to the recipe.
A derived recipe is a recipe like any other: validated, runnable alone, and with keys of its own, so that arms which
begin alike share those steps. Deliberately absent: running them (ablate.py), grids over two changes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qmedtune.recipe import AblateSection, Recipe
from qmedtune.resolved import ResolvedRecipe

Tree = dict[str, Any]
Edit = Callable[[Tree], None]

BASE, MERGE = "base", "merge"
WHOLE = "the whole recipe"


@dataclass(frozen=True)
class Arm:
    """`name` is that of its folder, `change` tells it from the recipe; the base alone has no recipe to run."""

    name: str
    change: str
    recipe: Recipe | None

    @property
    def is_reference(self) -> bool:
        return self.change == WHOLE


def arms_of(recipe: Recipe, resolved: ResolvedRecipe) -> list[Arm]:
    """All arms in the order of the table. `resolved` is the recipe without `auto`, which factors need.

    Where single changes are asked for, the whole recipe is an arm too: it is what they are compared with.
    """
    requested = recipe.ablate or AblateSection()
    arms: list[Arm] = []
    if BASE in requested.arms:
        arms.append(Arm(BASE, "no training", None))
    for kinds in requested.arms:
        if kinds == MERGE:
            arms.append(_arm(recipe, MERGE, WHOLE))
        elif kinds != BASE:
            arms += _stage_arms(recipe, kinds, requested.corpora)
    changes = list(_changes(recipe, resolved, requested))
    if changes and not any(arm.is_reference for arm in arms):
        arms.append(_arm(recipe, "recipe", WHOLE))
    for name, change, edit in changes:
        arms.append(_arm(recipe, name, change, edit))
    return arms


def seeds_of(recipe: Recipe, seeds: list[int] | None = None) -> list[int]:
    """`seeds` where they were given on the command line, else those of the recipe."""
    if seeds:
        return seeds
    requested = (recipe.ablate or AblateSection()).seeds
    if isinstance(requested, list):
        return requested
    return list(range(recipe.seed, recipe.seed + requested))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe on another seed. Where items are drawn, by `limit` or for a choice by `development`, all seeds are
    asked those of the recipe's own: scores are compared item by item."""
    evaluate = recipe.evaluate
    draws = bool(recipe.development) or any(section.limit for section in evaluate.tasks)
    if seed != recipe.seed and draws:
        evaluate = evaluate.model_copy(update={"items_seed": recipe.items_seed})
    return recipe.model_copy(update={"seed": seed, "evaluate": evaluate})


def _arm(recipe: Recipe, name: str, change: str, *edits: Edit) -> Arm:
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree |= {"name": f"{recipe.name}-{name}".replace("+", "-")[:80], "ablate": None, "audit": None}
    for edit in edits:
        edit(tree)
    _prune_validation(tree, recipe)
    return Arm(name, change, Recipe.model_validate(tree))


def _stage_arms(recipe: Recipe, kinds: str, corpora: list[str]) -> Iterator[Arm]:
    mixed = recipe.merge.other is not None
    whole = not mixed and not _left_out(kinds) & {stage.kind for stage in recipe.stages}
    if kinds == "sft" or not corpora:
        change = WHOLE if whole else f"{kinds} alone"
        yield _arm(recipe, kinds, change, _stages(kinds), _template_of_training(recipe), _unmixed(recipe))
        return
    for corpus in corpora:
        changes: list[str] = []
        edits: list[Edit] = []
        if corpus != "both":
            changes.append(f"cpt on {corpus} alone")
            edits.append(_corpus(recipe, corpus))
        if not whole:
            changes.append(f"{kinds} alone")
        name, change = kinds.replace("cpt", f"cpt-{corpus}"), ", ".join(changes) or WHOLE
        yield _arm(recipe, name, change, *edits, _stages(kinds), _template_of_training(recipe), _unmixed(recipe))


def _changes(recipe: Recipe, resolved: ResolvedRecipe, requested: AblateSection) -> Iterator[tuple[str, str, Edit]]:
    for share in requested.replay:
        yield f"replay-{share:g}", f"{share:.0%} replay", _replay(recipe, share)
    for way in requested.adapter:
        yield f"adapter-{way}", f"adapter: {way}", _continuity(way, frozen_embeddings="new" in requested.adapter)
    for r in requested.r:
        yield f"r-{r}", f"rank {r}", _rank(r)
    for factor in requested.lr_factor:
        yield f"lr-x{factor:g}", f"learning rates x {factor:g}", _rates(resolved, factor)
    for template in requested.template:
        yield f"template-{_word(template)}", f"asked with {template}", _asked_with(template)


def _word(template: str) -> str:
    return template.rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


# ---- edits of the recipe's tree --------------------------------------------------------------------------------------


def _kind(stage: Tree) -> str:
    for kind, section in stage.items():
        if section is not None:
            return kind
    raise AssertionError("a stage has a kind")


def _left_out(kinds: str) -> set[str]:
    return {"cpt", "sft"} - set(kinds.split("+"))


def _stages(kinds: str) -> Edit:
    """Drop the cpt stages or the sft stages."""

    def edit(tree: Tree) -> None:
        dropped = _left_out(kinds)
        for stage in list(tree["stages"]):
            if _kind(stage) in dropped:
                tree["stages"].remove(stage)
        first = tree["stages"][0]
        if first[_kind(first)].get("adapter") in ("new", "merge_then_new"):  # nothing is left to go on from
            first[_kind(first)]["adapter"] = "continue"

    return edit


def _unmixed(recipe: Recipe) -> Edit:
    """Without another model, and scored on the items of the arm that has one."""

    def edit(tree: Tree) -> None:
        for key in ("with", "method", "lambda", "sweep"):
            tree["merge"].pop(key, None)
        if recipe.development:
            tree["evaluate"]["development"] = recipe.development

    return edit


def _template_of_training(recipe: Recipe) -> Edit:
    """Ask every arm with one template: an arm without sft would else be asked with the default."""

    def edit(tree: Tree) -> None:
        tuned = [stage.sft for stage in recipe.stages if stage.sft]
        kinds = [_kind(stage) for stage in tree["stages"]]
        if tuned and "sft" not in kinds:
            tree["evaluate"]["template"] = recipe.evaluate.template or recipe.data[tuned[-1].sources[0]].template

    return edit


def _corpora(recipe: Recipe, mix: dict[str, float]) -> list[str]:
    """The sources of a mixture that are no replay."""
    names: list[str] = []
    for name, weight in mix.items():
        if weight > 0 and recipe.data[name].kind != "general":
            names.append(name)
    return names


def _pretraining(tree: Tree) -> Iterator[Tree]:
    """The sections of the cpt stages."""
    for stage in tree["stages"]:
        if _kind(stage) == "cpt":
            yield stage["cpt"]


def _total(mix: dict[str, float], names: list[str]) -> float:
    return sum(mix[name] for name in names)


def _corpus(recipe: Recipe, corpus: str) -> Edit:
    """One corpus takes the share of all: the same tokens, the same replay."""

    def edit(tree: Tree) -> None:
        for section in _pretraining(tree):
            mix = section["mix"]
            names = _corpora(recipe, mix)
            one = {corpus: _total(mix, names)}
            for name, weight in mix.items():
                if name not in names:
                    one[name] = weight
            section["mix"] = one

    return edit


def _replay(recipe: Recipe, share: float) -> Edit:
    def edit(tree: Tree) -> None:
        for section in _pretraining(tree):
            mix = section["mix"]
            names = _corpora(recipe, mix)
            replayed = [name for name in mix if name not in names]
            before = _total(mix, replayed)
            total = _total(mix, names) * share / (1 - share)
            for name in replayed:
                part = mix[name] / before if before else 1 / len(replayed)
                mix[name] = total * part

    return edit


def _continuity(way: str, frozen_embeddings: bool) -> Edit:
    """How later stages go on. A stack (`new`) cannot train embeddings; compared with it, nobody does."""

    def edit(tree: Tree) -> None:
        for stage in tree["stages"][1:]:
            stage[_kind(stage)]["adapter"] = way
        if frozen_embeddings:
            tree["adapter"]["train_embeddings"] = False

    return edit


def _rank(r: int) -> Edit:
    def edit(tree: Tree) -> None:
        adapter = tree["adapter"]
        adapter |= {"r": r, "alpha": adapter["alpha"] * r / adapter["r"]}

    return edit


def _rates(resolved: ResolvedRecipe, factor: float) -> Edit:
    def edit(tree: Tree) -> None:
        for stage, known in zip(tree["stages"], resolved.stages, strict=True):
            if known.kind != "pretrain":
                lr, embedding_lr = known.section.lr, known.section.embedding_lr
                stage[known.kind] |= {"lr": lr * factor, "embedding_lr": embedding_lr * factor}

    return edit


def _asked_with(template: str) -> Edit:
    def edit(tree: Tree) -> None:
        tree["evaluate"]["template"] = template

    return edit


def _prune_validation(tree: Tree, recipe: Recipe) -> None:
    """Validate on nothing that this arm alone does not train on: its best weights are those for what it learns. The
    audit and the head-to-head belong to the recipe's own run."""
    tree["evaluate"].pop("against", None)
    dropped: set[str] = set()
    for stage in recipe.stages:
        dropped.update(stage.sources)
    for stage in tree["stages"]:
        dropped.difference_update(_read(stage[_kind(stage)]))
    tree["validate"]["on"] = [name for name in tree["validate"]["on"] if name not in dropped]
    taught = all(_kind(stage) == "sft" for stage in tree["stages"])  # its instructions are added by themselves
    tree["validate"]["keep_best"] &= taught or bool(tree["validate"]["on"])


def _read(section: Tree) -> list[str]:
    if "mix" in section:
        return [name for name, weight in section["mix"].items() if weight > 0]
    if isinstance(section["data"], str):
        return [section["data"]]
    return section["data"]
