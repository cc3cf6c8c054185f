"""What a run folder already holds of a recipe: each step as cached, stale (and why) or to do, for `qmedtune plan`.

Takes keys as run.py does. Deliberately does not: load a model, write, or make anything.
"""

from __future__ import annotations

from pathlib import Path

from qmedtune import base, keys, store
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import Recipe
from qmedtune.steps import Step, inputs_of, key_of, steps_of, upstream_of


def status(recipe: Recipe, out: Path, *, offline: bool = True) -> list[dict[str, str]]:
    """For `plan`: each step as {name, status: cached | stale | to do, why}. Loads nothing, writes nothing to `out`."""
    resolved, _ = resolve(recipe)
    hashes = store.HashCache(out / ".hashes.json")
    steps = steps_of(resolved, recipe, hashes)
    digest = base.of_recipe(resolved, offline=offline).digest
    done: dict[str, store.Seal] = {}
    return [{"name": step.name, **_state(step, digest, done, out)} for step in steps]


def _state(step: Step, model_digest: str, done: dict[str, store.Seal], out: Path) -> dict[str, str]:
    waiting = sorted(upstream_of(step) - done.keys())
    old = store.read_seal(out / step.name)
    if waiting:
        return {"status": "stale" if old else "to do", "why": f"after {waiting[0]}"}
    if sealed := store.intact(out / step.name, key_of(step, model_digest, done)):
        done[step.name] = sealed
        return {"status": "cached", "why": "unchanged"}
    if old is None:
        return {"status": "to do", "why": "not made yet"}
    made_from = {**step.section, "inputs": inputs_of(step, model_digest, done)}
    return {"status": "stale", "why": keys.difference(old.facts["section"], made_from)}
