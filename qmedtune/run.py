"""The spine: a run is an ordered list of steps, each a plain function that writes one folder.

    base -> data/<source> ... -> data/NN-kind ... -> NN-kind ... -> merged -> evaluation -> report    (steps.py)

A step is skipped when its folder is sealed with the key that it would be built with now; the key is taken before the
step runs, from the recipe sections it reads, the digests of its inputs and the code version. Running again resumes;
a finished run does nothing. No torch is imported here: a step brings what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from qmedtune import base, claims, heartbeat, hub, keys, peak, peers, preflight, record, store, track, ui
from qmedtune.data.hygiene import secret
from qmedtune.data.hygiene.per_record import phi_mode
from qmedtune.disk import owner_only
from qmedtune.errors import MergeRefused, QmedtuneError, RecipeError, RunError
from qmedtune.interrupt import Stopped, stop
from qmedtune.planning import capacity, precision
from qmedtune.planning.machine import this_machine
from qmedtune.planning.resolve import refuse_half_on_cpu, resolve
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Packing, Run
from qmedtune.smoke import smoke as smoked
from qmedtune.steps import Step, inputs_of, key_of, steps_of, upstream_of


def run(
    recipe: Recipe,
    recipe_text: str,
    out: Path,
    *,
    until: str | None = None,
    offline: bool = False,
    smoke: bool = False,
    time_limit_s: float | None = None,
    siblings: Sequence[Path] = (),
) -> Run:
    """Run (or resume) a recipe in the folder `out`; returns the content of run.json.

    `until` names the last step or stage to run. Steps with equal keys are taken from `siblings`, other run folders.
    Raises QmedtuneError or Stopped; what is sealed by then stays and is reused.
    """
    claims.check(out)
    asked = smoked(recipe) if smoke else recipe
    machine = None
    if (cards := peers.number()) > 1:
        machine = replace(this_machine(), cards=cards, cards_here=peers.number_here())
    resolved, choices = resolve(asked, machine)
    claims.check_inputs(resolved, out)
    redacts = any(phi_mode(resolved, name) == "redact" for name in resolved.used_sources())
    if redacts:
        secret.check(out)
    hashes = store.HashCache(out / ".hashes.json")
    steps = steps_of(resolved, asked, hashes)
    chosen = _chosen(steps, until)
    source = base.of_recipe(resolved, offline=offline)
    sealed = _sealed(steps, source.digest, out)
    if len(sealed) == len(steps) and (finished := _finished(recipe_text, out)):
        return finished
    to_do = [step for step in chosen if step.name not in sealed]
    names = [step.name for step in to_do]
    source.check()
    claims.check_steps(out, names)
    track.check(resolved)
    _check_start(resolved, source, to_do, offline)
    capacity.check_writable(out)
    capacity.check(resolved, out, names)
    with _told("run", out), _private(resolved, out), store.lock(out), stop.watching(time_limit_s):
        _take_over(out, redacts)
        hashes.save()
        notes = record.Notes(resolved, recipe_text, choices, offline, source, steps, done={})
        with (
            ui.run_progress([*(step.name for step in chosen), "report"]) as shown,
            heartbeat.beating(out),
            track.following(resolved, out),
        ):
            record.write(out, replace(notes, done=sealed), "running")  # whatever the attempt before has said
            attempt = Attempt(resolved, notes, out, siblings, shown)
            with _end_recorded(attempt):
                for step in chosen:
                    try:
                        with _told(step.name, out):
                            attempt.done[step.name] = _do(step, attempt)
                    except QmedtuneError as error:
                        attempt.notes = replace(attempt.notes, refused=_refused(error, step, resolved, out))
                    shown.tokens = _tokens_to_train(chosen, attempt.done)
                    with _told(step.name, out):
                        record.write(out, attempt.notes, "running")
                return _report(chosen, attempt)


@dataclass
class Attempt:
    """One call of `run`: `notes` grow step by step, `siblings` are other run folders to take steps from."""

    recipe: ResolvedRecipe
    notes: record.Notes
    out: Path
    siblings: Sequence[Path]
    shown: ui.RunProgress

    @property
    def done(self) -> dict[str, store.Seal]:
        return self.notes.done


@contextmanager
def _end_recorded(attempt: Attempt) -> Iterator[None]:
    """run.json and the report tell of an attempt that ends before its time, too."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # on a full disk; what happened is raised all the same
            status = "stopped" if isinstance(error, Stopped) else "failed"
            record.write(attempt.out, attempt.notes, status, error)
            record.render(attempt.out)
        raise


def _report(chosen: Sequence[Step], attempt: Attempt) -> Run:
    """What the steps came to. A refused merge is raised here: what the steps after it found out is not lost."""
    notes = attempt.notes
    if notes.refused:
        raise notes.refused.error
    with _told("report", attempt.out), attempt.shown.step("report"):
        status = "finished" if len(chosen) == len(notes.steps) else "stopped"
        return record.finish(attempt.out, notes, status)


def _take_over(out: Path, redacts: bool) -> None:
    """Mark the folder as a run's, and clear what writes that were killed have left in it."""
    claims.mark(out)
    if redacts:
        secret.note(out)
    for place in (out, out / "merged"):
        for leftover in place.glob(f".*{store.PART}"):
            leftover.unlink()


def _tokens_to_train(chosen: Sequence[Step], done: dict[str, store.Seal]) -> dict[str, float]:
    """By training step, as far as its rows are packed: what the time left is told from."""
    found: dict[str, float] = {}
    for step in chosen:
        packed = done.get(f"data/{step.name}")
        if packed is None:
            continue
        tokens = Packing.model_validate(packed.facts).tokens.trained
        if tokens:
            found[step.name] = tokens
    return found


def _private(recipe: Recipe, out: Path) -> AbstractContextManager[None]:
    """Where a source can name patients, what the run writes is its owner's alone."""
    if not any(recipe.data[name].may_identify for name in recipe.used_sources()):
        return nullcontext()
    with suppress(FileNotFoundError):
        out.chmod(0o700)
    return owner_only()


def _without(step: Step, name: str) -> Step:
    """The step without one of its inputs: base + adapters can be scored where there is no merged model."""
    folders = dict(step.folders)
    folders.pop(name, None)
    return replace(step, folders=folders)


def _refused(error: QmedtuneError, step: Step, recipe: Recipe, out: Path) -> record.RefusedMerge:
    """A merge that is not published costs nothing else: what it wrote is kept, the steps after it go on without it, and
    the error is raised at the end. That of any other step is raised now."""
    lines, kept = [str(error)], None
    if isinstance(error, MergeRefused):
        kept = store.keep_refused(store.building_of(out / step.name, out), out / step.name, str(error))
        lines.append(f"not published: what was written is kept as {kept}")
    if step.kind != "merge":
        raise (RunError("\n".join(lines)) if kept else error)
    dtype = "bfloat16" if "not finite in float16" in str(error) else recipe.merge.dtype
    lines.append("the adapters are as they were, and scores and report are made all the same; to merge again:")
    lines.append(f"qmedtune merge {out} --out {out}-merged --onto {recipe.merge.base} --dtype {dtype}")
    ui.warn(lines[0])
    told = MergeRefused("\n".join(lines), error.facts if isinstance(error, MergeRefused) else {})
    told.exit_code = error.exit_code
    return record.RefusedMerge(told, kept.name if kept else None)


def _check_start(recipe: ResolvedRecipe, source: base.Base, to_do: Sequence[Step], offline: bool) -> None:
    """What must be right before the first step, ahead of writing anything. A built-in base is right by itself."""
    names: set[str] = set()
    kinds: set[str] = set()
    for step in to_do:
        names.add(step.name)
        kinds.add(step.kind)
    beyond_data = bool(kinds - {"data"})
    if beyond_data:
        refuse_half_on_cpu(recipe, this_machine())
        precision.refuse_unscorable(recipe, this_machine())
    scored = "evaluation" in names
    if "against" in names:
        from qmedtune import against

        against.check(recipe, offline)
    if recipe.merge.other is not None and any(step.kind in ("sweep", "merge") for step in to_do):
        from qmedtune import mixed_merge

        mixed_merge.check(recipe, recipe.merge.other, source.make(), offline=offline)
    if base_facts(recipe.model).builtin:
        if scored:
            preflight.check_evaluation(recipe, None)
    elif beyond_data:
        preflight.check_start(recipe, source.make(), scored=scored)


def _do(step: Step, attempt: Attempt) -> store.Seal:
    """One step: skipped when its sealed folder carries the key, brought back from history or a sibling, or run."""
    out, model, done, shown = attempt.out, attempt.notes.source, attempt.done, attempt.shown
    if attempt.notes.refused:
        step = _without(step, "merged")
    folder, key = out / step.name, key_of(step, model.digest, done)
    if sealed := store.intact(folder, key):
        shown.cached(step.name)
        return sealed
    if sealed := store.complete(folder, out, key) or store.recall(folder, out, key):
        shown.cached(step.name, "kept from an earlier run")
        return sealed
    if sealed := store.borrow(folder, out, key, attempt.siblings):
        shown.cached(step.name, "the same as in another run")
        return sealed
    made_from = {**step.section, "inputs": inputs_of(step, model.digest, done)}
    _explain(step, made_from, key, out)
    # A built-in base is made for the first step that reads one: sources come before, and a fault in a file is told
    # before minutes of pretraining.
    inputs = step.located(out, model.make)
    _check_inputs(step, done, out)
    stop.raise_if_requested()
    building = store.begin(folder, out, key, made_from, keep_partial=step.resumes)
    with shown.step(step.name), stop.limited():
        started = time.monotonic()
        peak.reset()
        with hub.closed() if step.kind != "data" else nullcontext():  # datasets of the Hub are read by data steps
            found = step.work(attempt.recipe, inputs, building)
        took = {"seconds": round(time.monotonic() - started, 2), "host_peak_bytes": peak.resident_bytes()}
        return store.publish(building, folder, out, key, {**found.as_json(), **took, "section": made_from})


@contextmanager
def _told(what: str, out: Path) -> Iterator[None]:
    """What the system refuses (no room, no permission) becomes an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = f"{getattr(error, 'strerror', None) or error} ({getattr(error, 'filename', None) or out})"
        raise RunError(
            f"{what}: {said}\nwhat is sealed stays; free space or fix the permission, then give the same command again"
        ) from error


def _check_inputs(step: Step, done: dict[str, store.Seal], out: Path) -> None:
    """Hash what is about to be consumed: a flipped bit upstream must not train on silently."""
    for upstream in upstream_of(step):
        if problems := store.damage(out / upstream, done[upstream], full=True):
            raise RunError(
                f"{out / upstream}: damaged since it was sealed ({problems[0]})\n"
                f"move that folder away; the same command then makes it again"
            )


def _explain(step: Step, made_from: Mapping[str, object], key: str, out: Path) -> None:
    """Say why a sealed folder, or an interrupted attempt, is not good enough any more; both are kept in .history/."""
    folder = out / step.name
    begun = store.attempt_of(store.building_of(folder, out))
    if begun and begun[0] != key:
        ui.note(f"{step.name} begins anew, its interrupted attempt is put aside: "
                f"{keys.difference(begun[1], made_from)}")  # fmt: skip
    sealed = store.read_seal(folder)
    if sealed is None:
        return
    if problems := store.damage(folder, sealed, full=False):
        ui.warn(f"{step.name}: {problems[0]}; made again, the damaged folder is kept in .history/")
        store.retire(folder, out)
        return
    ui.note(f"{step.name} is made again: {keys.difference(sealed.section, made_from)}")


def _sealed(steps: list[Step], model_digest: str, out: Path) -> dict[str, store.Seal]:
    """The steps that are sealed with the key that they would be made with now."""
    done: dict[str, store.Seal] = {}
    for step in steps:
        if not upstream_of(step) <= done.keys():
            continue
        if sealed := store.intact(out / step.name, key_of(step, model_digest, done)):
            done[step.name] = sealed
    return done


def _finished(recipe_text: str, out: Path) -> Run | None:
    """run.json of a run that ended with this recipe and has its reports."""
    found = record.read(out)
    if found is None or not record.is_whole(found) or not found.finished:
        return None
    # Version 0.1 kept the text with its comments.
    if found.recipe_sha256 not in (record.text_sha256(record.shown_text(recipe_text)), record.text_sha256(recipe_text)):
        return None
    for name in record.REPORTS:
        if not (out / name).is_file():
            return None
    return found


def _chosen(steps: list[Step], until: str | None) -> list[Step]:
    """All steps up to `until`; for `data` the data steps alone (but those that need a model trained before them)."""
    if until is None:
        return steps
    if until == "data":
        data = {step.name for step in steps if step.kind == "data"}
        return [step for step in steps if step.name in data and upstream_of(step) <= data]
    wanted = {"merge": "merged", "eval": "evaluation", "evaluate": "evaluation"}.get(until, until)
    last = None
    for number, step in enumerate(steps, start=1):
        if wanted in (step.name, step.kind, step.name.partition("-")[2]):
            last = number
    if last is None:
        names = {"data": None}
        for step in steps:
            if step.kind != "data":
                names[step.name] = None
        raise RecipeError(f"--until: no step {until!r} in this recipe\nallowed: {', '.join(names)}")
    return steps[:last]
