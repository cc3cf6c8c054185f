"""`qmedtune report RUN --verify`: does every file of a run still hold what was sealed?

Sealed folders are hashed in full against their manifests, run.json and the copies at the root are compared with the
seals they were composed from. Changes nothing. Deliberately not here: repair (`qmedtune run` makes things again).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune import __version__, store, ui
from qmedtune.erase import erased
from qmedtune.errors import RecipeError, RunError
from qmedtune.record import INTERNAL, METRICS, RUN, is_whole, text_sha256
from qmedtune.report import markdown, model_card
from qmedtune.reporting import page as report_html
from qmedtune.reporting.facts import read_metrics

MAX_NAMED = 4
Seals = dict[str, store.Seal]


def check_is_run(folder: Path) -> None:
    """RecipeError where `folder` holds no run."""
    if (folder / RUN).is_file():
        return
    runs = sorted(str(path.parent) for path in Path("runs").glob(f"*/{RUN}"))
    hint = f"runs here: {', '.join(runs[:4])}" if runs else "make one: qmedtune run recipes/cpt_then_sft.yaml"
    raise RecipeError(f"{folder}: no run in this folder (it has no {RUN})\n{hint}")


def verify(folder: Path) -> dict[str, int]:
    """{"folders", "files"}: how many were checked, and, where `erase` removed some, "erased". RunError names what
    differs."""
    seals: Seals = {}
    problems: list[str] = []
    places = sorted(_sealed_folders(folder))
    gone = {name for name in erased(folder) if not (folder / name).exists()}
    with ui.stage("verify", total=len(places), unit="folders") as bar:
        for number, name in enumerate(places, start=1):
            sealed = store.read_seal(folder / name)
            if sealed is None or not _consistent(sealed):
                problems.append(f"{name}/{store.SEAL}: damaged")
            else:
                seals[name] = sealed
                kept = store.without(sealed, {file for file in sealed.files if f"{name}/{file}" in gone})
                problems += [f"{name}/{problem}" for problem in store.damage(folder / name, kept, full=True)]
                problems += [f"{name}/{path}: was added" for path in _added(folder / name, sealed)]
            bar.update(number)
    problems += _root_problems(folder, seals)
    if problems:
        more = [f"... and {len(problems) - MAX_NAMED} more"] if len(problems) > MAX_NAMED else []
        raise RunError("\n".join([f"{folder}: differs from what was sealed", *problems[:MAX_NAMED], *more]))
    listed = {f"{name}/{file}" for name, sealed in seals.items() for file in sealed.files}
    counts = {"folders": len(seals), "files": len(listed - gone)}
    return counts | ({"erased": len(listed & gone)} if listed & gone else {})


def _sealed_folders(folder: Path) -> Iterator[str]:
    for path in folder.rglob(store.SEAL):
        name = path.parent.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):  # .history and .building are not the run
            yield name.as_posix()


def _added(folder: Path, sealed: store.Seal) -> list[str]:
    """Files that the seal does not list: a pickle put beside the weights would be loaded by other tools."""
    there = (path.relative_to(folder).as_posix() for path in store.content_files(folder))
    return [name for name in there if name not in sealed.files and not name.endswith(store.PART)]


def _consistent(sealed: store.Seal) -> bool:
    """The manifest still hashes to the digest beside it."""
    stable = {name: f["sha256"] for name, f in sealed.files.items() if Path(name).name not in store.VOLATILE}
    return store.sha256_json(stable) == sealed.digest


def _root_problems(folder: Path, seals: Seals) -> Iterator[str]:
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        yield from _run_problems(folder, run, seals)
        rendered = _composed(folder, run)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        yield f"{RUN}: unreadable ({type(error).__name__})"
        return
    for name, expected in rendered.items():
        if not (folder / name).is_file():
            yield f"{name}: missing"
            continue
        found = (folder / name).read_bytes()
        begun = name == METRICS and run["status"] != "finished"  # lines of the stage in progress follow
        if found != expected and not (begun and found.startswith(expected)):
            yield f"{name}: not what the sealed steps give"


def _run_problems(folder: Path, run: dict[str, Any], seals: Seals) -> Iterator[str]:
    """Where run.json does not say what the seals say."""
    if text_sha256(run["recipe_text"]) != run["recipe_sha256"]:
        yield f"{RUN}: recipe_text does not hash to recipe_sha256"
    entries = {stage["name"]: stage for stage in run["stages"]}
    entries |= {f"data/{name}": entry for name, entry in run["data"].items()}
    entries |= {"merged": run["merge"] or {}, "evaluation": run["evaluation"] or {}}
    for step in _sealed_steps(run):
        sealed = seals.get(step["name"])
        if sealed is None:
            if _is_gone(folder, step["name"]):
                yield f"{step['name']}: missing"
            continue
        if step["key"] != sealed.key:
            yield f"{RUN}: the key of {step['name']} is not the sealed one"
        entry = entries.get(step["name"], sealed.facts)
        differing = [k for k, v in sealed.facts.items() if k not in INTERNAL and entry.get(k) != v]
        yield from (f"{RUN}: {key} of {step['name']} is not what was sealed" for key in differing)
    if not is_whole(run):
        yield f"{RUN}: sha256 differs"


def _sealed_steps(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Of other steps there may be a folder, of an earlier recipe."""
    return [step for step in run["steps"] if step["status"] == "sealed"]


def _is_gone(folder: Path, name: str) -> bool:
    """A folder without a seal. All of data/ may be taken out of a run that is passed on."""
    place = folder / name
    return not (place / store.SEAL).exists() and (place.parent == folder or place.parent.exists())


def _composed(folder: Path, run: dict[str, Any]) -> dict[str, bytes]:
    """What the files at the root must hold; the reports only if this version rendered them."""
    parts = [path for step in _sealed_steps(run) if (path := folder / step["name"] / METRICS).is_file()]
    expected = {METRICS: b"".join(path.read_bytes() for path in parts)} if parts else {}
    if run["status"] != "finished":  # the other copies are written last
        return expected
    if (folder / "evaluation" / "evaluation.json").is_file():
        expected["evaluation.json"] = (folder / "evaluation" / "evaluation.json").read_bytes()
    if run["provenance"]["qmedtune"] == __version__:
        metrics = read_metrics(folder / METRICS)
        expected["report.html"] = report_html.page(run, metrics).encode()
        expected["report.md"] = markdown(run, metrics).encode()
        if run["merge"]:
            expected[f"merged/{store.RENDERED}"] = model_card(run).encode()
    return expected
