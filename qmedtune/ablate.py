"""`qmedtune ablate`: every arm of a recipe's `ablate:` section on every seed, and one result with intervals.

An arm is a derived recipe that goes through the ordinary spine into a run folder of its own; steps with equal keys are
taken from the other arms' folders (hard links), so that what arms share is trained once. Run again to go on.
Deliberately absent: anything that a run of the derived recipe alone would do otherwise.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from qmedtune import __version__, claims, record, run, store, ui
from qmedtune.ablation import arms as derive
from qmedtune.ablation import page, results
from qmedtune.ablation.arms import Arm
from qmedtune.ablation.figure import figure
from qmedtune.errors import RecipeError
from qmedtune.interrupt import stop
from qmedtune.parsing import checks
from qmedtune.parsing.loader import LoadedRecipe, show_path
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import Recipe

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
) -> dict[str, Any]:
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
                _write(loaded, arms, wanted, out, "running")
            raise
        return _write(loaded, arms, wanted, out, "finished")


def _run_all(arms: list[Arm], seeds: list[int], out: Path, offline: bool) -> None:
    todo = [(seed, arm) for seed in seeds for arm in arms if arm.recipe]
    for number, (seed, arm) in enumerate(todo, start=1):
        assert arm.recipe is not None
        ui.note(f"{number} of {len(todo)}: {arm.name}, seed {seed} ({arm.change})")
        recipe = derive.with_seed(arm.recipe, seed)
        text = yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True), sort_keys=False)
        folder = results.run_folder(out, arm, seed)
        siblings = [results.run_folder(out, other, seed) for other in arms if other.recipe and other is not arm]
        run.run(recipe, text, folder, offline=offline, siblings=siblings)


def _check(recipe: Recipe, resolved: Recipe, arms: list[Arm]) -> None:
    wish = recipe.ablate
    if wish is None:
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
        if (wish.corpora or wish.replay) and stage.cpt and stage.cpt.tokens == "auto":
            raise RecipeError(
                f"stages[{index}].cpt.tokens: {'epochs' if stage.cpt.epochs else 'auto'} would give each mixture of "
                "`ablate.corpora` and `ablate.replay` another number of tokens\ngive a number, such as tokens: 300000"
            )
    for arm in arms:
        for path, text in checks.contradictions(arm.recipe) if arm.recipe else ():
            raise RecipeError(f"ablate: the arm {arm.name} cannot run: {show_path(path)}: {text}")


def _write(loaded: LoadedRecipe, arms: list[Arm], seeds: list[int], out: Path, status: str) -> dict[str, Any]:
    found = results.collect(out, arms, seeds)
    text = record.shown_text(loaded.text)
    result: dict[str, Any] = {
        "name": loaded.recipe.name,
        "status": status,
        "recipe_sha256": record.text_sha256(text),
        "seeds": seeds,
        **results.summarise(found),
        "chance": _chance(arms, seeds, out),
        "seconds": _seconds(arms, seeds, out),
        "notes": _unequal(found),
        "recipe_text": text,
        "provenance": {"qmedtune": __version__, "versions": record.versions(), "device": record.device_name()},
    }
    store.write_json(out / RESULT, result)
    store.write_atomic(out / TABLE, results.table_csv(result))
    store.write_atomic(out / DIFFERENCES, results.differences_csv(result))
    if result["arms"]:
        store.write_atomic(out / FIGURE, figure(result, result["chance"]))
    store.write_atomic(out / REPORT, page.page(result))
    return result


def _runs(arms: list[Arm], seeds: list[int], out: Path) -> list[dict[str, Any]]:
    folders = [results.run_folder(out, arm, seed) for seed in seeds for arm in arms if arm.recipe]
    return [found for folder in folders if (found := record.read(folder))]


def _seconds(arms: list[Arm], seeds: list[int], out: Path) -> float:
    """Of all steps made, a step that several arms share counted once."""
    steps = {
        step["key"]: step["seconds"] for found in _runs(arms, seeds, out) for step in found["steps"] if "key" in step
    }
    return round(sum(seconds or 0 for seconds in steps.values()), 1)


def _chance(arms: list[Arm], seeds: list[int], out: Path) -> float | None:
    """What guessing gives, where all tasks agree on it."""
    tasks = [t for found in _runs(arms, seeds, out) for t in ((found["evaluation"] or {}).get("tasks") or {}).values()]
    values = {round(task["final"].get("chance", -1), 6) for task in tasks}
    return values.pop() if len(values) == 1 and min(values) >= 0 else None


def _unequal(found: list[results.ArmResult]) -> list[str]:
    """Arms that trained on other numbers of tokens than the rest, where documents or caps did not allow equality."""
    cpt = {result.arm.name: _cpt_tokens(result) for result in found}
    trained = {name: tokens for name, tokens in cpt.items() if tokens}
    if not trained or max(trained.values()) <= (1 + UNEQUAL) * min(trained.values()):
        return []
    return [f"cpt did not see equal numbers of tokens: {', '.join(f'{n} {t:,}' for n, t in trained.items())}"]


def _cpt_tokens(result: results.ArmResult) -> int:
    return sum(tokens for stage, tokens in result.trained_tokens.items() if stage.endswith("-cpt"))
