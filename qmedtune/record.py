"""run.json, metrics.jsonl and the reports: composed from the seals of the steps, never written by a step itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from qmedtune import __version__, privacy, store
from qmedtune.disk import read_plain
from qmedtune.errors import MergeRefused, QmedtuneError, RecipeError
from qmedtune.model_files import read_json
from qmedtune.planning.plan_facts import Decision
from qmedtune.recipe import Recipe
from qmedtune.results import (
    AdapterEntry,
    Audit,
    AutoChoice,
    Evaluation,
    Facts,
    HeadToHead,
    Merge,
    Provenance,
    Run,
    Source,
    Stage,
    StepEntry,
    Told,
)
from qmedtune.versions import installed

if TYPE_CHECKING:
    from qmedtune.base import Base
    from qmedtune.run import Step

Found = TypeVar("Found", bound=Facts)

RUN, METRICS, REPORTS = "run.json", "metrics.jsonl", ("report.html", "report.md")
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "numpy")
INTERNAL = ("section",)
SCORING = ("torch", "triton", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class RefusedMerge:
    """A merge that was not published: why, and the name of the folder that holds what was written, if all of it was."""

    error: MergeRefused
    path: str | None


@dataclass(frozen=True)
class Notes:
    """What a run knows of itself: the resolved recipe, its text, the choices made for `auto`, its base and its steps,
    with the seals of those that are done. And what no seal tells: the merge that was refused."""

    recipe: Recipe
    text: str
    choices: Sequence[Decision]
    offline: bool
    source: Base
    steps: list[Step]
    done: dict[str, store.Seal]
    refused: RefusedMerge | None = None

    def facts(self, name: str) -> dict[str, Any]:
        """Of a step that is done, without what only keys are explained from."""
        facts = dict(self.done[name].facts)
        for key in INTERNAL:
            facts.pop(key, None)
        return facts


def code_versions() -> dict[str, str | None]:
    """What an answer or a score can depend on besides model, data and options: in keys of what is resumed."""
    found: dict[str, str | None] = {"qmedtune": __version__}
    for name, version in versions().items():
        if name in SCORING:
            found[name] = version
    return found


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


def read(out: Path) -> Run | None:
    """run.json, or None where there is none or it was damaged (it is composed again from the seals)."""
    try:
        return Run.model_validate(json.loads(read_plain(out / RUN)))
    except (OSError, ValueError, RecursionError):
        return None


def load(folder: Path) -> Run:
    """run.json of a folder that a user names. RecipeError where it is none, or was damaged."""
    path = folder / RUN
    try:
        return Run.model_validate(read_json(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_fault(error)}\n`qmedtune run` composes it again from its steps") from None


def recipe_of(run: Run, folder: Path) -> Recipe:
    """The resolved recipe of a run. RecipeError where it is none."""
    try:
        return Recipe.model_validate(run.recipe)
    except ValidationError as error:
        raise RecipeError(
            f"{folder / RUN}: recipe: {_fault(error)}\n`qmedtune run` composes it again from its steps"
        ) from None


def _fault(error: ValidationError) -> str:
    """The first, by its place: without the value, which can be text."""
    fault = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place}: {fault['msg']}"


def write(out: Path, notes: Notes, status: str, error: BaseException | None = None) -> Run:
    """Compose run.json from what is sealed so far."""
    run = compose(notes, status)
    if "against" in notes.done:
        run = run.model_copy(update={"against": HeadToHead.model_validate(notes.facts("against"))})
    if error is not None and status == "failed":
        # Only our own messages are known to hold no text of a record.
        said = str(error) if isinstance(error, QmedtuneError) else type(error).__name__
        run = run.model_copy(update={"error": said})
    _write_metrics(out, notes)
    return write_with_privacy(out, run)


def write_with_privacy(out: Path, run: Run) -> Run:
    """Write run.json with what the folder holds of text by now, and its hash."""
    run = run.model_copy(update={"privacy": privacy.of(out, run)})
    run = run.model_copy(update={"sha256": own_sha256(run)})
    store.write_json(out / RUN, run.as_json())
    return run


def own_sha256(run: Run) -> str:
    """Of run.json without its last entry, which is this hash."""
    content = run.as_json()
    content.pop("sha256", None)
    return store.sha256_json(content)


def is_whole(run: Run) -> bool:
    """Whether run.json holds what was written."""
    return run.sha256 == own_sha256(run)


def finish(out: Path, notes: Notes, status: str) -> Run:
    """The last write: run.json, evaluation.json, report.html, report.md and the model card of merged/."""
    from qmedtune.report import model_card

    for name in REPORTS:  # of an earlier recipe: killed below, a run must not pass for finished with them
        (out / name).unlink(missing_ok=True)
    run = write(out, notes, status)
    if "evaluation" in notes.done:
        scores = (out / "evaluation" / "evaluation.json").read_text(encoding="utf-8")
        store.write_atomic(out / "evaluation.json", scores)
    if "merged" in notes.done:
        store.write_atomic(out / "merged" / store.RENDERED, model_card(run))
    render(out)
    return run


def render(out: Path) -> None:
    from qmedtune.report import write_report

    write_report(out)


def compose(notes: Notes, status: str) -> Run:
    """All but `privacy`, which hangs on the folder, and the last two entries, `error` and `sha256`."""
    recipe, text = notes.recipe, shown_text(notes.text)
    return Run(
        name=recipe.name,
        status=status,
        recipe_sha256=text_sha256(text),
        seed=recipe.seed,
        offline=notes.offline,
        stages=[_stage(notes, name) for name in recipe.stage_names()],
        data=_data(notes),
        merge=_merge(notes),
        audit=_of_step(notes, "audit", Audit),
        evaluation=_of_step(notes, "evaluation", Evaluation),
        steps=[_step(notes, step) for step in notes.steps],
        warnings=list(_warnings(notes)),
        resolved=[AutoChoice.model_validate(choice) for choice in notes.choices],
        recipe=recipe.model_dump(mode="json", by_alias=True),
        recipe_text=text,
        provenance=_provenance(notes.source),
    )


def _of_step(notes: Notes, name: str, model: type[Found]) -> Found | None:
    """What a step has found, None where it is not done."""
    if name not in notes.done:
        return None
    return model.model_validate(notes.facts(name))


def _data(notes: Notes) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name, source in notes.recipe.data.items():
        if f"data/{name}" in notes.done:
            # Licence and terms change no byte of the data, so a source that is sealed may have been given others since.
            stated = {"license": source.license, "terms": source.terms}
            found[name] = Source.model_validate({**notes.facts(f"data/{name}"), **stated})
    return found


def _merge(notes: Notes) -> Merge | None:
    if "merged" in notes.done:
        return Merge.model_validate({"path": "merged", "status": "sealed", **notes.facts("merged")})
    if notes.refused is None:
        return None
    section, refused = notes.recipe.merge, notes.refused
    known = {"path": refused.path, "status": "refused", "base": section.base, "dtype": section.dtype}
    return Merge.model_validate({**known, "error": str(refused.error), **refused.error.facts})


def _stage(notes: Notes, name: str) -> Stage:
    kind = next(step.kind for step in notes.steps if step.name == name)
    if name not in notes.done:
        return Stage(name=name, kind=kind, status="to do")
    sealed = notes.done[name]
    entry = {**notes.facts(name), "name": name, "kind": kind, "status": "sealed", "key": sealed.key}
    weights = "adapter/adapter_model.safetensors"
    if weights in sealed.files:
        entry["adapter"] = AdapterEntry(path=f"{name}/adapter", sha256=sealed.files[weights]["sha256"])
    return Stage.model_validate(entry)


def _step(notes: Notes, step: Step) -> StepEntry:
    sealed = notes.done.get(step.name)
    if sealed is None:
        return StepEntry(name=step.name, kind=step.kind, status="to do")
    seconds = Told.model_validate(sealed.facts).seconds
    return StepEntry(name=step.name, kind=step.kind, status="sealed", seconds=seconds, key=sealed.key)


def _warnings(notes: Notes) -> Iterator[str]:
    """Of all steps, in the order in which they were done."""
    for name in notes.done:
        for warning in Told.model_validate(notes.facts(name)).warnings:
            yield f"{name}: {warning}"


def _provenance(source: Base) -> Provenance:
    system = os.uname()
    return Provenance(
        qmedtune=__version__,
        versions=versions(),
        python=platform.python_version(),
        # platform.platform() would start `uname -p`: a run starts no child process.
        platform=f"{system.sysname}-{system.release}-{system.machine}",
        device=device_name(),
        base=source.name,
        base_revision=source.revision,
        base_sha256=source.digest,
        git=_git(),
    )


def versions() -> dict[str, str | None]:
    return installed(PACKAGES)


def device_name() -> str:
    """The GPU's name, or the processor's; torch is asked only if a step has loaded it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return "cpu"
    for line in info.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "cpu"


def _git() -> str | None:
    """The commit of this source tree; None for an installed package. Read from .git, no child process."""
    head = Path(__file__).parent.parent / ".git" / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    ref = head.parent / text.removeprefix("ref: ")
    if not ref.is_file():
        return None
    return ref.read_text().strip()


def _write_metrics(out: Path, notes: Notes) -> None:
    """metrics.jsonl of the run: the stages' own, in order, with a stage in progress as far as it is."""
    parts: list[str] = []
    for step in notes.steps:
        folder = out / step.name
        if step.name not in notes.done:
            folder = store.building_of(folder, out)
        if (folder / METRICS).is_file():
            parts.append((folder / METRICS).read_text(encoding="utf-8", errors="replace"))
    if parts:
        store.write_atomic(out / METRICS, "".join(parts))
