"""`qmedtune report RUN --verify`: does every file of a run still hold what was sealed?

Sealed folders are hashed in full against their manifests, run.json and the copies at the root are compared with the
seals they were composed from. Changes nothing. Deliberately not here: repair (`qmedtune run` makes things again).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qmedtune import __version__, privacy, store, ui
from qmedtune.errors import RecipeError, RunError
from qmedtune.local_names import nearest_runs
from qmedtune.record import INTERNAL, METRICS, RUN, is_whole, text_sha256
from qmedtune.report import markdown, model_card
from qmedtune.reporting import page as report_html
from qmedtune.reporting.facts import read_metrics
from qmedtune.results import Json, Merge, Run
from qmedtune.results.privacy import HELD

MAX_NAMED = 4
Seals = dict[str, store.Seal]


def check_is_run(folder: Path) -> None:
    """RecipeError where `folder` holds no run."""
    if (folder / RUN).is_file():
        return
    hint = "make one: qmedtune run recipes/cpt_then_sft.yaml"
    if inside := [parent for parent in folder.parents if (parent / RUN).is_file()]:
        hint = f"it lies in a run; give that: {inside[0]}"
    elif near := nearest_runs(str(folder)):
        hint = f"runs here: {', '.join(near)}"
    what = "a file, no run" if folder.is_file() else f"no run in this folder (it has no {RUN})"
    raise RecipeError(f"{folder}: {what}\n{hint}")


def verify(folder: Path) -> dict[str, int]:
    """{"folders", "files"}: how many were checked, and, where `erase` removed some, "erased". RunError names what
    differs."""
    gone = {name for name in privacy.erased(folder).files if not (folder / name).exists()}
    seals, problems = _check_folders(folder, gone)
    problems += _root_problems(folder, seals)
    if problems:
        lines = [f"{folder}: differs from what was sealed", *problems[:MAX_NAMED]]
        if len(problems) > MAX_NAMED:
            lines.append(f"... and {len(problems) - MAX_NAMED} more")
        raise RunError("\n".join(lines))
    listed: set[str] = set()
    for name, sealed in seals.items():
        listed |= _listed(name, sealed)
    counts = {"folders": len(seals), "files": len(listed - gone)}
    if listed & gone:
        counts["erased"] = len(listed & gone)
    return counts


def _listed(name: str, sealed: store.Seal) -> set[str]:
    """The files of a sealed folder, by their paths below the run."""
    return {f"{name}/{file}" for file in sealed.files}


def _check_folders(folder: Path, gone: set[str]) -> tuple[Seals, list[str]]:
    """The seals that can be read, and what differs from them. gone: files that were erased on purpose."""
    seals: Seals = {}
    problems: list[str] = []
    places = sorted(_sealed_folders(folder))
    with ui.progress_bar("verify", total=len(places), unit="folders") as bar:
        for number, name in enumerate(places, start=1):
            sealed = store.read_seal(folder / name)
            if sealed is None or not _consistent(sealed):
                problems.append(f"{name}/{store.SEAL}: damaged")
            else:
                seals[name] = sealed
                problems += _folder_problems(folder / name, name, sealed, gone)
            bar.update(number)
    return seals, problems


def _folder_problems(place: Path, name: str, sealed: store.Seal, gone: set[str]) -> Iterator[str]:
    missing = {file for file in sealed.files if f"{name}/{file}" in gone}
    for problem in store.damage(place, store.without(sealed, missing), full=True):
        yield f"{name}/{problem}"
    for path in _added(place, sealed):
        yield f"{name}/{path}: was added"


def _sealed_folders(folder: Path) -> Iterator[str]:
    for path in folder.rglob(store.SEAL):
        name = path.parent.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):  # .history and .building are not the run
            yield name.as_posix()


def _added(folder: Path, sealed: store.Seal) -> Iterator[str]:
    """Files that the seal does not list: a pickle put beside the weights would be loaded by other tools."""
    for path in store.content_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in sealed.files and not name.endswith(store.PART):
            yield name


def _consistent(sealed: store.Seal) -> bool:
    """The manifest still hashes to the digest beside it."""
    stable: Json = {}
    for name, entry in sealed.files.items():
        if Path(name).name not in store.VOLATILE:
            stable[name] = entry["sha256"]
    return store.sha256_json(stable) == sealed.digest


def _root_problems(folder: Path, seals: Seals) -> Iterator[str]:
    try:
        run = Run.model_validate(json.loads(store.read_plain(folder / RUN)))
        yield from _run_problems(folder, run, seals)
        rendered = _composed(folder, run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        yield f"{RUN}: unreadable ({type(error).__name__})"
        return
    for name, expected in rendered.items():
        if not (folder / name).is_file():
            yield f"{name}: missing"
            continue
        found = (folder / name).read_bytes()
        begun = name == METRICS and not run.finished  # lines of the stage in progress follow
        if found != expected and not (begun and found.startswith(expected)):
            yield f"{name}: not what the sealed steps give"


def _run_problems(folder: Path, run: Run, seals: Seals) -> Iterator[str]:
    """Where run.json does not say what the seals say."""
    if text_sha256(run.recipe_text) != run.recipe_sha256:
        yield f"{RUN}: recipe_text does not hash to recipe_sha256"
    entries = _entries(run)
    for step in run.sealed_steps:
        sealed = seals.get(step.name)
        if sealed is None:
            if _is_gone(folder, step.name):
                yield f"{step.name}: missing"
            continue
        if step.key != sealed.key:
            yield f"{RUN}: the key of {step.name} is not the sealed one"
        if step.name in entries:
            for key in _differing(entries[step.name], sealed):
                yield f"{RUN}: {key} of {step.name} is not what was sealed"
    if not is_whole(run):
        yield f"{RUN}: sha256 differs"
    if run.privacy is not None and run.privacy.text != HELD:
        for held in privacy.of(folder, run).files:
            yield f"{held.folder}: holds text, and {RUN} says that none is there"


def _entries(run: Run) -> dict[str, Json]:
    """What run.json tells of each step, by the name of the step."""
    found: dict[str, Json] = {}
    for stage in run.stages:
        found[stage.name] = stage.as_json()
    for name, source in run.data.items():
        found[f"data/{name}"] = source.as_json()
    found["merged"] = (run.merge or Merge()).as_json()
    found["evaluation"] = run.scored.as_json()
    return found


def _differing(entry: Json, sealed: store.Seal) -> Iterator[str]:
    for key, value in sealed.facts.items():
        if key not in INTERNAL and entry.get(key) != value:
            yield key


def _is_gone(folder: Path, name: str) -> bool:
    """A folder without a seal. All of data/ may be taken out of a run that is passed on."""
    place = folder / name
    return not (place / store.SEAL).exists() and (place.parent == folder or place.parent.exists())


def _composed(folder: Path, run: Run) -> dict[str, bytes]:
    """What the files at the root must hold; the reports only if this version rendered them."""
    expected: dict[str, bytes] = {}
    for step in run.sealed_steps:
        part = folder / step.name / METRICS
        if part.is_file():
            expected[METRICS] = expected.get(METRICS, b"") + part.read_bytes()
    if not run.finished:  # the other copies are written last
        return expected
    scores = folder / "evaluation" / "evaluation.json"
    if scores.is_file():
        expected[scores.name] = scores.read_bytes()
    if run.provenance.qmedtune == __version__:
        metrics = read_metrics(folder / METRICS)
        expected["report.html"] = report_html.page(run, metrics).encode(errors="backslashreplace")
        expected["report.md"] = markdown(run, metrics).encode(errors="backslashreplace")
        if run.merge is not None:
            expected[f"merged/{store.RENDERED}"] = model_card(run).encode(errors="backslashreplace")
    return expected
