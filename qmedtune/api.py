"""The Python interface: a recipe, a run, scores and a merge, as four functions that return plain data.

    import qmedtune

    recipe = qmedtune.load_recipe("recipes/cpt_then_sft.yaml")
    facts = qmedtune.run_recipe(recipe, "runs/cpt_then_sft")

Each is what the command of the same verb calls. `load_recipe` and `evaluate_model` are those of parsing/loader.py and
evaluate.py; `import qmedtune` brings none of them until it is used. Deliberately not here: anything a recipe can say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qmedtune.parsing.loader import LoadedRecipe


def run_recipe(
    recipe: LoadedRecipe,
    out: Path | str,
    *,
    until: str | None = None,
    offline: bool = False,
    smoke: bool = False,
    time_limit_s: float | None = None,
) -> dict[str, Any]:
    """Run (or resume) a recipe in the folder `out`; nothing is done where nothing is left to do.

    until: name of the last step or stage, `01-cpt` for example.
    offline: open no connection. Libraries read HF_HUB_OFFLINE=1 once, at their import: set it before Python starts.
    smoke: built-in base and data in place of the recipe's.
    time_limit_s: seconds after which what is done is sealed and `interrupt.TimeLimit` raised.
    Returns the content of run.json. Raises QmedtuneError (a ValueError) with one to six lines. Belongs in the main
    thread: Ctrl-C and SIGTERM end a run at a sealed checkpoint with `interrupt.Interrupted`, like KeyboardInterrupt no
    Exception.
    """
    from qmedtune import run

    found = run.run(
        recipe.recipe, recipe.text, Path(out), until=until, offline=offline, smoke=smoke, time_limit_s=time_limit_s
    )
    return found.as_json()


def plan_recipe(recipe: LoadedRecipe, out: Path | str | None = None) -> dict[str, Any]:
    """What a run would cost: stages, tokens, steps, bytes of memory and disk, seconds; loads no weights.

    out: a run folder, whose finished steps cost nothing. Raises DoesNotFit where memory or disk cannot do.
    """
    from qmedtune.plan import make_plan

    return make_plan(recipe.recipe, Path(out) if out else None)


def merge_adapters(
    model: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    onto: Literal["full16", "nf4"] = "full16",
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    rounding: Literal["auto", "nearest", "stochastic"] = "auto",
    max_kl: float | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Fold the adapters of a run, or of an adapter folder, into its base: `out` appears once the proof has passed.

    base: of an adapter folder, where its config does not name it. onto: the 16-bit base, or its dequantised NF4 values.
    rounding: to the nearest number, or seeded stochastic; auto: that, where nearest loses over 1 % of the change.
    max_kl: a limit in nats per token between merged and base + adapters, for those who want one: the proof has none.
    Returns {"path", "modules", "kl", "lost", "violations", "rounding", "sha256", ...}. Raises RecipeError where `out`
    is there already or `model` has no adapter, RunError where the proof fails: what was written is then in
    `<out>.refused`.
    """
    from qmedtune.commands.merge import merge_into
    from qmedtune.recipe import MergeSection, VerifySection

    section = MergeSection(base=onto, dtype=dtype, rounding=rounding, verify=VerifySection(max_kl=max_kl))
    return merge_into(str(model), Path(out), section, base=base, offline=offline)
