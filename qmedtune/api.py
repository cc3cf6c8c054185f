"""The Python interface: a recipe, a run, scores and a merge, as functions that return plain data.

    import qmedtune

    recipe = qmedtune.load_recipe("recipes/cpt_then_sft.yaml")
    facts = qmedtune.run_recipe(recipe, "runs/cpt_then_sft")

Each is what the command of the same verb calls, in a process prepared as the command's is (process.py). `load_recipe`
is that of parsing/loader.py; `import qmedtune` brings none of them until it is used. Deliberately not here: anything a
recipe can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmedtune.allowed import FloatDtype, MergeBase, MergeMethod, Quantization, RoundingMode
from qmedtune.parsing.loader import LoadedRecipe
from qmedtune.planning.plan_facts import Plan
from qmedtune.process import prepare
from qmedtune.recipe import TaskSection


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

    prepare()
    found = run.run(
        recipe.recipe, recipe.text, Path(out), until=until, offline=offline, smoke=smoke, time_limit_s=time_limit_s
    )
    return found.as_json()


def plan_recipe(recipe: LoadedRecipe, out: Path | str | None = None) -> Plan:
    """What a run would cost: stages, tokens, steps, bytes of memory and disk, seconds; loads no weights.

    out: a run folder, whose finished steps cost nothing. Raises DoesNotFit where memory or disk cannot do.
    """
    from qmedtune.plan import make_plan

    prepare()
    return make_plan(recipe.recipe, Path(out) if out else None)


def evaluate_model(
    name: str,
    tasks: Sequence[str | TaskSection],
    *,
    data: Path | None = None,
    base: str | None = None,
    template: str | None = None,
    out: Path | None = None,
    limit: int | None = None,
    generate: bool = True,
    batch_tokens: int | None = None,
    quantization: Quantization | None = None,
    seed: int = 17,
    offline: bool = False,
) -> dict[str, Any]:
    """Score a base, a finished run, an adapter folder (with `base`) or a merged model.

    tasks: each `task` (read from `data` unless built in), `task=FILE`, or a TaskSection with a split, a metric or
        examples of its own; `perplexity` takes a file of texts. `limit` and `data` are for the tasks that are strings.
    out: folder for <out>/evaluation/; with it a killed evaluation is continued and a finished one is not repeated.
    Returns {"model", "template", "quantization", "tasks": {name: {"model": scores}}, "perplexity": {file: ...}}; texts
    also in bits per byte, which unlike perplexity compares models of different tokenizers.
    """
    prepare()
    from qmedtune import evaluate

    job = evaluate.ModelJob(
        name, tasks, data, base, template, out, limit, generate, batch_tokens, quantization, seed, offline
    )  # fmt: skip
    return evaluate.evaluate_model(job).as_json()


def merge_adapters(
    model: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    onto: MergeBase = "full16",
    dtype: FloatDtype = "bfloat16",
    rounding: RoundingMode = "auto",
    max_kl: float | None = None,
    other: str | None = None,
    method: MergeMethod | None = None,
    share: float | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Fold the adapters of a run, or of an adapter folder, into its base: `out` appears once the proof has passed.

    base: of an adapter folder, where its config does not name it. onto: the 16-bit base, or its dequantised NF4 values.
    rounding: to the nearest number, or seeded stochastic; auto: that, where nearest loses over 1 % of the change.
    max_kl: a limit in nats per token between merged and base + adapters, for those who want one: the proof has none.
    other, method, share: a model of the same base that the result is mixed with, how (linear), and how much (.5).
    Returns {"path", "modules", "kl", "lost", "violations", "rounding", "sha256", ...}. Raises RecipeError where `out`
    is there already or `model` has no adapter, RunError where the proof fails: what was written is then in
    `<out>.refused`.
    """
    prepare()
    from qmedtune.merge_folder import merge_into
    from qmedtune.recipe import MergeSection, VerifySection

    section = MergeSection(base=onto, dtype=dtype, rounding=rounding, verify=VerifySection(max_kl=max_kl))
    section = section.model_copy(update={"other": other, "method": method, "share": share})
    return merge_into(str(model), Path(out), section, base=base, offline=offline).as_json()
