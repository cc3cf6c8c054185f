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

Tree = dict[str, Any]
Edit = Callable[[Tree], None]

BASE = "base"
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


def arms_of(recipe: Recipe, resolved: Recipe) -> list[Arm]:
    """All arms in the order of the table. `resolved` is the recipe without `auto`, which factors need.

    Where single changes are asked for, the whole recipe is an arm too: it is what they are compared with.
    """
    wish = recipe.ablate or AblateSection()
    arms = [Arm(BASE, "no training", None)] if "base" in wish.arms else []
    arms += [arm for kinds in wish.arms if kinds != "base" for arm in _stage_arms(recipe, kinds, wish.corpora)]
    changes = list(_changes(recipe, resolved, wish))
    if changes and not any(arm.is_reference for arm in arms):
        arms.append(_arm(recipe, "recipe", WHOLE))
    return arms + [_arm(recipe, name, change, edit) for name, change, edit in changes]


def seeds_of(recipe: Recipe, seeds: list[int] | None = None) -> list[int]:
    """`seeds` where they were given on the command line, else those of the recipe."""
    wish = (recipe.ablate or AblateSection()).seeds
    return seeds or (wish if isinstance(wish, list) else [recipe.seed + offset for offset in range(wish)])


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed})


def _arm(recipe: Recipe, name: str, change: str, *edits: Edit) -> Arm:
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree |= {"name": f"{recipe.name}-{name}".replace("+", "-")[:80], "ablate": None, "audit": None}
    for edit in edits:
        edit(tree)
    _prune_validation(tree, recipe)
    return Arm(name, change, Recipe.model_validate(tree))


def _stage_arms(recipe: Recipe, kinds: str, corpora: list[str]) -> Iterator[Arm]:
    whole = not _left_out(kinds) & {stage.kind for stage in recipe.stages}
    if kinds == "sft" or not corpora:
        change = WHOLE if whole else f"{kinds} alone"
        yield _arm(recipe, kinds, change, _stages(kinds), _template_of_training(recipe))
        return
    for corpus in corpora:
        alone = "" if corpus == "both" else f"cpt on {corpus} alone"
        change = ", ".join(part for part in (alone, "" if whole else f"{kinds} alone") if part) or WHOLE
        name = kinds.replace("cpt", f"cpt-{corpus}")
        edits = [_corpus(recipe, corpus)] if alone else []
        yield _arm(recipe, name, change, *edits, _stages(kinds), _template_of_training(recipe))


def _changes(recipe: Recipe, resolved: Recipe, wish: AblateSection) -> Iterator[tuple[str, str, Edit]]:
    for share in wish.replay:
        yield f"replay-{share:g}", f"{share:.0%} replay", _replay(recipe, share)
    for way in wish.adapter:
        yield f"adapter-{way}", f"adapter: {way}", _continuity(way, frozen_embeddings="new" in wish.adapter)
    for r in wish.r:
        yield f"r-{r}", f"rank {r}", _rank(r)
    for factor in wish.lr_factor:
        yield f"lr-x{factor:g}", f"learning rates x {factor:g}", _rates(resolved, factor)
    for template in wish.template:
        yield f"template-{_word(template)}", f"asked with {template}", _asked_with(template)


def _word(template: str) -> str:
    return template.rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


# ---- edits of the recipe's tree --------------------------------------------------------------------------------------


def _kind(stage: Tree) -> str:
    return next(kind for kind, section in stage.items() if section is not None)


def _left_out(kinds: str) -> set[str]:
    return {"cpt", "sft"} - set(kinds.split("+"))


def _stages(kinds: str) -> Edit:
    """Drop the cpt stages or the sft stages."""

    def edit(tree: Tree) -> None:
        dropped = _left_out(kinds)
        tree["stages"] = [stage for stage in tree["stages"] if _kind(stage) not in dropped]
        first = tree["stages"][0]
        if first[_kind(first)].get("adapter") in ("new", "merge_then_new"):  # nothing is left to go on from
            first[_kind(first)]["adapter"] = "continue"

    return edit


def _template_of_training(recipe: Recipe) -> Edit:
    """Ask every arm with one template: an arm without sft would else be asked with the default."""

    def edit(tree: Tree) -> None:
        tuned = [stage.sft for stage in recipe.stages if stage.sft]
        if tuned and not any(_kind(stage) == "sft" for stage in tree["stages"]):
            tree["evaluate"]["template"] = recipe.evaluate.template or recipe.data[tuned[-1].sources[0]].template

    return edit


def _corpora(recipe: Recipe, mix: dict[str, float]) -> list[str]:
    return [name for name, weight in mix.items() if weight > 0 and recipe.data[name].kind != "general"]


def _corpus(recipe: Recipe, corpus: str) -> Edit:
    """One corpus takes the share of all: the same tokens, the same replay."""

    def edit(tree: Tree) -> None:
        for stage in tree["stages"]:
            if _kind(stage) == "cpt":
                mix = stage["cpt"]["mix"]
                names = _corpora(recipe, mix)
                total = sum(mix[name] for name in names)
                rest = {name: weight for name, weight in mix.items() if name not in names}
                stage["cpt"]["mix"] = {corpus: total, **rest}

    return edit


def _replay(recipe: Recipe, share: float) -> Edit:
    def edit(tree: Tree) -> None:
        for stage in tree["stages"]:
            if _kind(stage) == "cpt":
                mix = stage["cpt"]["mix"]
                names = _corpora(recipe, mix)
                replayed = [name for name in mix if name not in names]
                weights = [mix[name] for name in replayed]
                parts = [w / sum(weights) if sum(weights) else 1 / len(weights) for w in weights]
                total = sum(mix[name] for name in names) * share / (1 - share)
                mix |= {name: total * part for name, part in zip(replayed, parts, strict=True)}

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


def _rates(resolved: Recipe, factor: float) -> Edit:
    def edit(tree: Tree) -> None:
        for stage, known in zip(tree["stages"], resolved.stages, strict=True):
            if known.kind != "pretrain":
                lr, embedding_lr = known.section.lr, known.section.embedding_lr
                assert not isinstance(lr, str) and not isinstance(embedding_lr, str)
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
    trained = {name for stage in tree["stages"] for name in _read(stage[_kind(stage)])}
    dropped = {name for stage in recipe.stages for name in stage.sources} - trained
    tree["validate"]["on"] = [name for name in tree["validate"]["on"] if name not in dropped]
    taught = all(_kind(stage) == "sft" for stage in tree["stages"])  # its instructions are added by themselves
    tree["validate"]["keep_best"] &= taught or bool(tree["validate"]["on"])


def _read(section: Tree) -> list[str]:
    if "mix" in section:
        return [name for name, weight in section["mix"].items() if weight > 0]
    return [section["data"]] if isinstance(section["data"], str) else section["data"]
