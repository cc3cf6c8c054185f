"""`qmedtune ablate`: every arm of a recipe's `ablate:` section on every seed, and one result with intervals.

An arm is a derived recipe that goes through the ordinary spine into a run folder of its own; steps with equal keys are
taken from the other arms' folders (hard links), so that what arms share is trained once. Run again to go on.
Deliberately absent: anything that a run of the derived recipe alone would do otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from qmedtune import __version__, claims, record, run, store, ui
from qmedtune.ablation import ablation_page, arm_scores
from qmedtune.ablation import arms as derive
from qmedtune.ablation.arms import Arm
from qmedtune.ablation.figure import figure
from qmedtune.errors import RecipeError
from qmedtune.interrupt import stop
from qmedtune.parsing import checks
from qmedtune.parsing.loader import LoadedRecipe, show_path
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import Recipe
from qmedtune.reporting.facts import precision_words
from qmedtune.results import Ablation, Number, Provenance, Run

RESULT, TABLE, DIFFERENCES = "ablation.json", "ablation.csv", "differences.csv"
FIGURE, REPORT = "ablation.svg", "report.html"
UNEQUAL = 0.01  # arms whose cpt tokens differ by more than this share are told


def ablate(
    loaded: LoadedRecipe,
    out: Path,
    *,
    seeds: list[int] | None = None,
    offline: bool = False,
    time_limit_s: float | None = None,
) -> Ablation:
    """Run (or go on with) all arms below `out`; returns the content of ablation.json.

    Seeds come one after the other, all arms on each, so that an interrupted sweep compares whole arms; the folders
    arms/<arm>/seed-<n> of several calls with `seeds` can be put together before a last one. Writes
    ablation.json, ablation.csv, differences.csv, ablation.svg and report.html, also when it is interrupted. Raises
    RecipeError before anything is run where an arm cannot be.
    """
    claims.check(out)
    recipe = loaded.recipe
    resolved, _ = resolve(recipe)
    claims.check_inputs(resolved, out)
    arms = derive.arms_of(recipe, resolved)
    _check(recipe, resolved, arms)
    wanted = derive.seeds_of(recipe, seeds)
    with store.lock(out), stop.watching(time_limit_s):
        claims.mark(out)
        try:
            _run_all(arms, wanted, out, offline)
        except BaseException:
            with suppress(OSError):  # on a full disk; what happened is raised all the same
                _write(loaded, arms, wanted, out, status="running")
            raise
        return _write(loaded, arms, wanted, out, status="finished")


def _run_all(arms: list[Arm], seeds: list[int], out: Path, offline: bool) -> None:
    trained: list[tuple[Arm, Recipe]] = []
    for arm in arms:
        if arm.recipe is not None:
            trained.append((arm, arm.recipe))
    number, total = 0, len(seeds) * len(trained)
    for seed in seeds:
        for arm, untouched in trained:
            number += 1
            ui.note(f"{number} of {total}: {arm.name}, seed {seed} ({arm.change})")
            recipe = derive.with_seed(untouched, seed)
            tree = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            folder = arm_scores.run_folder(out, arm, seed)
            siblings = [arm_scores.run_folder(out, other, seed) for other, _ in trained if other is not arm]
            run.run(recipe, yaml.safe_dump(tree, sort_keys=False), folder, offline=offline, siblings=siblings)


def _check(recipe: Recipe, resolved: Recipe, arms: list[Arm]) -> None:
    requested = recipe.ablate
    if requested is None:
        raise RecipeError(
            f"{recipe.name}: this recipe has no `ablate:` section\n"
            "add one, for example: ablate: {arms: [base, sft, cpt, cpt+sft], seeds: 3}"
        )
    if not any(arm.recipe for arm in arms):
        raise RecipeError("ablate.arms: the base alone is nothing to compare\nallowed: base, sft, cpt, cpt+sft")
    if not recipe.evaluate.tasks and not recipe.evaluate.perplexity:
        raise RecipeError(
            "ablate: nothing is measured\nname tasks or texts: evaluate: {tasks: [...], perplexity: [...]}"
        )
    for index, stage in enumerate(resolved.stages):
        if (requested.corpora or requested.replay) and stage.cpt and stage.cpt.budget is None:
            given = "epochs" if stage.cpt.epochs else "auto"
            raise RecipeError(
                f"stages[{index}].cpt.tokens: {given} would give each mixture of "
                "`ablate.corpora` and `ablate.replay` another number of tokens\ngive a number, such as tokens: 300000"
            )
    for arm in arms:
        if arm.recipe is not None:
            for path, text in checks.contradictions(arm.recipe):
                raise RecipeError(f"ablate: the arm {arm.name} cannot run: {show_path(path)}: {text}")


def _write(loaded: LoadedRecipe, arms: list[Arm], seeds: list[int], out: Path, *, status: str) -> Ablation:
    found = arm_scores.collect(out, arms, seeds)
    runs = _runs(arms, seeds, out)
    text = record.shown_text(loaded.text)
    compared = arm_scores.summarise(found)
    result = Ablation(
        name=loaded.recipe.name,
        status=status,
        recipe_sha256=record.text_sha256(text),
        seeds=seeds,
        reference=compared.reference,
        arms=compared.arms,
        differences=compared.differences,
        perplexity_ratios=compared.perplexity_ratios,
        chance=_chance(runs),
        majority=_majority(runs),
        seconds=_seconds(runs),
        notes=_unequal(found),
        precision=_precision(runs),
        recipe_text=text,
        provenance=Provenance(qmedtune=__version__, versions=record.versions(), device=record.device_name()),
    )
    store.write_json(out / RESULT, result.as_json())
    store.write_atomic(out / TABLE, arm_scores.table_csv(result))
    store.write_atomic(out / DIFFERENCES, arm_scores.differences_csv(result))
    if result.arms:
        store.write_atomic(out / FIGURE, figure(result, result.chance, result.precision))
    store.write_atomic(out / REPORT, ablation_page.page(result))
    return result


def _runs(arms: list[Arm], seeds: list[int], out: Path) -> list[Run]:
    """Those that are there, finished or not."""
    runs: list[Run] = []
    for seed in seeds:
        for arm in arms:
            found = record.read(arm_scores.run_folder(out, arm, seed)) if arm.recipe else None
            if found is not None:
                runs.append(found)
    return runs


def _seconds(runs: list[Run]) -> float:
    """Of all steps made, a step that several arms share counted once."""
    steps: dict[str, float] = {}
    for found in runs:
        for step in found.steps:
            if step.key is not None:
                steps[step.key] = step.seconds or 0
    return round(sum(steps.values()), 1)


def _precision(runs: Sequence[Run]) -> str:
    """In which precision the arms were scored; several where machines of different size ran them."""
    return ", ".join(sorted({precision_words(run) for run in runs} - {""}))


def _chance(runs: list[Run]) -> float | None:
    """What guessing gives, where all tasks agree on it."""
    values: set[float | None] = set()
    for found in runs:
        for task in found.scored.tasks.values():
            chance = task.final.chance if task.final else None
            values.add(None if chance is None else round(chance, 6))
    return values.pop() if len(values) == 1 else None


def _majority(runs: list[Run]) -> dict[str, Number]:
    """By task, what always its commonest answer scores."""
    shares: dict[str, Number] = {}
    for found in runs:
        for name, task in found.scored.tasks.items():
            if task.final is not None and task.final.majority is not None:
                shares[name] = task.final.majority
    return shares


def _unequal(found: list[arm_scores.ArmResult]) -> list[str]:
    """Arms that trained on other numbers of tokens than the rest, where documents or caps did not allow equality."""
    trained: dict[str, int] = {}
    for result in found:
        tokens = _cpt_tokens(result)
        if tokens:
            trained[result.arm.name] = tokens
    if not trained or max(trained.values()) <= (1 + UNEQUAL) * min(trained.values()):
        return []
    told = ", ".join(f"{name} {tokens:,}" for name, tokens in trained.items())
    return [f"cpt did not see equal numbers of tokens: {told}"]


def _cpt_tokens(result: arm_scores.ArmResult) -> int:
    return sum(tokens for stage, tokens in result.trained_tokens.items() if stage.endswith("-cpt"))
