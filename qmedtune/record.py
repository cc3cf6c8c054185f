"""run.json, metrics.jsonl and the reports: composed from the seals of the steps, never written by a step itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune import __version__, store
from qmedtune.errors import MergeRefused, QmedtuneError
from qmedtune.recipe import Recipe

if TYPE_CHECKING:
    from qmedtune.base import Base
    from qmedtune.run import Step

RUN, METRICS, REPORTS = "run.json", "metrics.jsonl", ("report.html", "report.md")
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "numpy")
INTERNAL = ("section",)
SCORING = ("torch", "triton", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Refused:
    """A merge that was not published: why, and the name of the folder that holds what was written, if all of it was."""

    error: MergeRefused
    path: str | None

    @property
    def facts(self) -> dict[str, Any]:
        return {"path": self.path, "status": "refused", "error": str(self.error), **self.error.facts}


@dataclass(frozen=True)
class Notes:
    """What is known before the first step: the resolved recipe, its text, the choices made for `auto`. And of the run
    so far what no seal tells: the merge that was refused."""

    recipe: Recipe
    text: str
    choices: list[dict[str, Any]]
    offline: bool
    refused: Refused | None = None


def code_versions() -> dict[str, str | None]:
    """What an answer or a score can depend on besides model, data and options: in keys of what is resumed."""
    return {"qmedtune": __version__, **{name: found for name, found in versions().items() if name in SCORING}}


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shown_text(recipe_text: str) -> str:
    """The recipe as run.json and the reports hold it: without comments, in which people note names and passwords."""
    from yaml import YAMLError

    from qmedtune.parsing.strict_yaml import without_comments

    try:
        return without_comments(recipe_text)
    except YAMLError:  # of a caller that gave no YAML: there are no comments in it
        return recipe_text


def read(out: Path) -> dict[str, Any] | None:
    """run.json, or None where there is none or it was damaged (it is composed again from the seals)."""
    try:
        found = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(
    out: Path,
    notes: Notes,
    steps: list[Step],
    done: dict[str, store.Seal],
    source: Base,
    status: str,
    error: BaseException | None = None,
) -> dict[str, Any]:
    """Compose run.json from what is sealed so far."""
    result = compose(out, notes, steps, done, source, status)
    if error is not None and status == "failed":
        # Only our own messages are known to hold no text of a record.
        result["error"] = str(error) if isinstance(error, QmedtuneError) else type(error).__name__
    _write_metrics(out, steps, done)
    result = json.loads(json.dumps(result))  # as it is read again: lists for tuples
    result |= {"sha256": store.sha256_json(result)}
    store.write_json(out / RUN, result)
    return result


def is_whole(run: Any) -> bool:
    """Whether run.json holds what was written: its own hash is the last entry."""
    if not isinstance(run, dict):
        return False
    return run.get("sha256") == store.sha256_json({key: value for key, value in run.items() if key != "sha256"})


def finish(
    out: Path, notes: Notes, steps: list[Step], done: dict[str, store.Seal], source: Base, status: str
) -> dict[str, Any]:
    """The last write: run.json, evaluation.json, report.html, report.md and the model card of merged/."""
    from qmedtune.report import model_card

    for name in REPORTS:  # of an earlier recipe: killed below, a run must not pass for finished with them
        (out / name).unlink(missing_ok=True)
    result = write(out, notes, steps, done, source, status)
    if "evaluation" in done:
        scores = (out / "evaluation" / "evaluation.json").read_text(encoding="utf-8")
        store.write_atomic(out / "evaluation.json", scores)
    if "merged" in done:
        store.write_atomic(out / "merged" / store.RENDERED, model_card(result))
    render(out)
    return result


def render(out: Path) -> None:
    from qmedtune.report import write_report

    write_report(out)


def compose(
    out: Path, notes: Notes, steps: list[Step], done: dict[str, store.Seal], source: Base, status: str
) -> dict[str, Any]:
    facts = {name: _facts(sealed) for name, sealed in done.items()}
    recipe, text = notes.recipe, shown_text(notes.text)
    stages = recipe.stage_names()
    return {
        "name": recipe.name,
        "status": status,
        "recipe_sha256": text_sha256(text),
        "seed": recipe.seed,
        "offline": notes.offline,
        "stages": [_stage(name, steps, done, facts, out) for name in stages],
        "data": {n: facts[f"data/{n}"] for n in recipe.data if f"data/{n}" in done},
        "merge": _merge(notes, facts),
        "audit": facts.get("audit"),
        "evaluation": facts.get("evaluation"),
        **({"against": facts["against"]} if "against" in facts else {}),
        "steps": [_step(step, done) for step in steps],
        "warnings": [f"{name}: {w}" for name, f in facts.items() for w in f.get("warnings", [])],
        "resolved": notes.choices,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "recipe_text": text,
        "provenance": _provenance(source, facts),
    }


def _facts(sealed: store.Seal) -> dict[str, Any]:
    """The facts of a step without what only keys are explained from."""
    return {key: value for key, value in sealed.facts.items() if key not in INTERNAL}


def _merge(notes: Notes, facts: dict[str, dict]) -> dict[str, Any] | None:
    if "merged" in facts:
        return {"path": "merged", "status": "sealed", **facts["merged"]}
    if notes.refused is None:
        return None
    section = notes.recipe.merge
    return {"base": section.base, "dtype": section.dtype, **notes.refused.facts}


def _stage(
    name: str, steps: list[Step], done: dict[str, store.Seal], facts: dict[str, dict], out: Path
) -> dict[str, Any]:
    kind = next(step.kind for step in steps if step.name == name)
    if name not in done:
        return {"name": name, "kind": kind, "status": "to do"}
    sealed = done[name]
    entry = {"name": name, "kind": kind, "status": "sealed", "key": sealed.key, **facts[name]}
    weights = "adapter/adapter_model.safetensors"
    if weights in sealed.files:
        entry["adapter"] = {"path": f"{name}/adapter", "sha256": sealed.files[weights]["sha256"]}
    return entry


def _step(step: Step, done: dict[str, store.Seal]) -> dict[str, Any]:
    sealed = done.get(step.name)
    if sealed is None:
        return {"name": step.name, "kind": step.kind, "status": "to do"}
    seconds = sealed.facts.get("seconds")
    return {"name": step.name, "kind": step.kind, "status": "sealed", "seconds": seconds, "key": sealed.key}


def _provenance(source: Base, facts: dict[str, dict]) -> dict[str, Any]:
    return {
        "qmedtune": __version__,
        "versions": versions(),
        "python": platform.python_version(),
        # platform.platform() would start `uname -p`: a run starts no child process.
        "platform": "-".join((os.uname().sysname, os.uname().release, os.uname().machine)),
        "device": device_name(),
        "base": source.name,
        "base_revision": source.revision,
        "base_sha256": source.digest,
        "git": _git(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name() -> str:
    """The GPU's name, or the processor's; torch is asked only if a step has loaded it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _git() -> str | None:
    """The commit of this source tree; None for an installed package. Read from .git, no child process."""
    head = Path(__file__).parent.parent / ".git" / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    ref = head.parent / text.removeprefix("ref: ")
    return ref.read_text().strip() if ref.is_file() else None


def _write_metrics(out: Path, steps: list[Step], done: dict[str, store.Seal]) -> None:
    """metrics.jsonl of the run: the stages' own, in order, with a stage in progress as far as it is."""
    parts = []
    for step in steps:
        folder = out / step.name if step.name in done else store.building_of(out / step.name, out)
        if (folder / METRICS).is_file():
            parts.append((folder / METRICS).read_text(encoding="utf-8"))
    if parts:
        store.write_atomic(out / METRICS, "".join(parts))
