"""What a run folder already holds of a recipe: each step as cached, stale (and why) or to do, for `qmedtune plan`.

Takes keys as run.py does. Deliberately does not: load a model, write, or make anything.
"""

from __future__ import annotations

from pathlib import Path

from qmedtune import base, keys, store
from qmedtune.planning.machine import Machine
from qmedtune.planning.plan_facts import PlannedStep
from qmedtune.planning.resolve import resolve
from qmedtune.recipe import Recipe
from qmedtune.steps import Step, inputs_of, key_of, steps_of, upstream_of


def status(recipe: Recipe, out: Path, *, offline: bool = True, machine: Machine | None = None) -> list[PlannedStep]:
    """For `plan`: each step as {name, status: cached | stale | to do, why}. Loads nothing, writes nothing to `out`."""
    resolved, _ = resolve(recipe, machine)
    hashes = store.HashCache(out / ".hashes.json")
    steps = steps_of(resolved, recipe, hashes)
    digest = base.of_recipe(resolved, offline=offline).digest
    done: dict[str, store.Seal] = {}
    found: list[PlannedStep] = []
    for step in steps:
        status, why = _state(step, digest, done, out)
        found.append({"name": step.name, "status": status, "why": why})
    return found


def _state(step: Step, model_digest: str, done: dict[str, store.Seal], out: Path) -> tuple[str, str]:
    """The status and why; notes in `done` what is cached."""
    waiting = sorted(upstream_of(step) - done.keys())
    old = store.read_seal(out / step.name)
    if waiting:
        return "stale" if old else "to do", f"after {waiting[0]}"
    if sealed := store.intact(out / step.name, key_of(step, model_digest, done)):
        done[step.name] = sealed
        return "cached", "unchanged"
    if old is None:
        return "to do", "not made yet"
    made_from = {**step.section, "inputs": inputs_of(step, model_digest, done)}
    return "stale", keys.difference(old.section, made_from)
