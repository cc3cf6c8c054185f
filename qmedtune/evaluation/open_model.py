"""From what a user names (a run, an adapter folder, a model folder, a Hub id) to a loaded model with its template.

Evaluation, prediction and chat open models here, so that all three use the template the model was trained with: it is
looked for beside the weights. Deliberately absent: choosing between several runs, loading parts of an adapter stack (a
run is opened as its merged model, which holds all of them).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qmedtune import base as bases
from qmedtune import hub, local_names, record, store, ui
from qmedtune.allowed import Quantization
from qmedtune.data.packing import templates
from qmedtune.errors import DataError, RecipeError, RunError
from qmedtune.model_stack import ModelStack, named_base, read_adapter, read_model
from qmedtune.planning.machine import this_machine
from qmedtune.recipe import ModelSection
from qmedtune.results import Run
from qmedtune.tasks import world_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Location:
    """A model folder, or a base with adapters, that was found by its name.

    Where a model lies. `adapters` are applied to `base` in order; `kind` is what the user named.

    world: the built-in world whose facts the model may know (only runs on built-in data know one).
    """

    name: str
    kind: Literal["run", "adapter", "model"]
    base: Path
    adapters: tuple[Path, ...]
    template: templates.Template
    world: str = "tiny"

    @property
    def stack(self) -> ModelStack:
        return ModelStack(self.base, self.adapters)


@dataclass(frozen=True)
class OpenModel:
    """A model in eval mode on this machine's device, its tokenizer and the template to speak to it."""

    location: Location
    model: Any
    tokenizer: PreTrainedTokenizerBase
    quantization: Quantization
    computed_in: str

    @property
    def template(self) -> templates.Template:
        return self.location.template


def locate(name: str, *, base: str | None = None, template: str | None = None, offline: bool = False) -> Location:
    """Find a model without loading it.

    `base` is the base of an adapter folder (default: what its config names); `template` overrides the saved one.
    Raises RecipeError where there is no such model or no template of that name.
    """
    path = Path(os.path.expanduser(name))
    if (path / record.RUN).is_file():
        found = _of_run(name, path)
    elif (path / "adapter_config.json").is_file():
        found = _of_adapter(name, path, base, offline)
    else:
        local_names.check_folder(path)
        folder = _base_folder(name, offline)
        if store.read_seal(folder):  # a merged model, named by its own folder
            check_intact(folder, full=True)
        found = Location(name, "model", folder, (), _template_beside(folder))
    if template is None:
        return found
    asked = templates.load(template, found.base)
    if found.kind == "model" and not (found.base / templates.FILE).is_file():
        asked = templates.for_base(asked)
    if found.kind != "model" and asked.name != found.template.name:
        ui.warn(f"{name} was trained with the template {found.template.name} and is asked with {asked.name}")
    return replace(found, template=asked)


def check_template(location: Location) -> None:
    """A tokenizer's own template is rendered once: what it cannot do is said with its folder, before weights are read.
    RecipeError or DataError."""
    if not location.template.source:
        return
    try:
        location.template.render([{"role": "user", "content": "?"}])
    except (RecipeError, DataError) as error:
        raise type(error)(f"{location.base}: its chat template cannot be used\n{error}") from error


def _of_run(name: str, folder: Path) -> Location:
    run = record.load(folder)
    merged = _whole_model(folder, run)
    if not (merged / "config.json").is_file():
        raise RecipeError(
            f"{folder}: this run has no merged model yet\n"
            "finish it with `qmedtune run`, or name the adapter folder of a finished stage"
        )
    # In full: the weights are read anyway, and a bit that flipped under an unchanged time is seen by nothing else.
    check_intact(merged if merged.name == "merged" else merged.parent, full=True)
    saved = sorted(folder.glob(f"[0-9][0-9]-*/{templates.FILE}"))
    template = templates.load(saved[-1].parent) if saved else _template_beside(merged)
    return Location(name, "run", merged, (), template, world_of(record.recipe_of(run, folder)))


def _whole_model(folder: Path, run: Run) -> Path:
    """`merged`, or the last stage's own model where a finished run trained no adapter that could be merged."""
    own: list[str] = []
    for stage in run.stages:
        if stage.model is not None:
            own.append(stage.model.path)
    if not own or not run.finished or run.merge is not None:
        return folder / "merged"
    found = folder / own[-1]
    if not found.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{folder / record.RUN}: its model {own[-1][:80]!r} lies outside of the run\ncopy it again")
    return found


def check_intact(folder: Path, *, full: bool) -> None:
    """RunError where a sealed folder of a run is not what was sealed: by sizes and times, or `full` by hashes."""
    sealed = store.read_seal(folder)
    problems = store.damage(folder, sealed, full=full) if sealed else [f"{store.SEAL}: damaged"]
    if problems and (folder / store.SEAL).is_file():
        raise RunError(f"{folder}: damaged since it was sealed ({problems[0]})\n`qmedtune run` makes it again")


def _of_adapter(name: str, folder: Path, base: str | None, offline: bool) -> Location:
    named = base or named_base(folder)
    below = (None if base else bases.base_in_run(folder, named)) or _base_of(folder, named, base is not None, offline)
    bases.check_base(folder, below)
    if store.read_seal(folder.parent):  # the adapter of a run's stage
        check_intact(folder.parent, full=True)
    return Location(name, "adapter", below, (folder,), _template_of_adapter(folder, below))


def _template_of_adapter(folder: Path, base: Path) -> templates.Template:
    """What it was trained with: beside it, or beside its stage; else the base's."""
    for place in (folder, folder.parent):
        if (place / templates.FILE).is_file():
            return templates.load(place)
    return _template_beside(base)


def _base_of(adapter: Path, named: str, given: bool, offline: bool) -> Path:
    """The base that an adapter names, or that --base gives for it. RecipeError names the adapter too."""
    try:
        return _base_folder(named, offline)
    except RecipeError as error:
        if given:
            raise
        raise RecipeError(
            f"{adapter}: its base {named[:80]!r} is not here\n{error}\nor give it: --base MODEL"
        ) from error


def _base_folder(name: str, offline: bool) -> Path:
    if not name.startswith(bases.BUILTIN):
        local_names.check(name, "model")
        if Path(name).suffix in (".yaml", ".yml"):
            raise RecipeError(
                f"{name}: is a recipe, no model\ngive the run that it made, such as runs/{Path(name).stem}"
            )
    return bases.locate_folder(ModelSection(base=name), offline=offline)


def _template_beside(folder: Path) -> templates.Template:
    """The saved template, else the tokenizer's own chat template, else `plain` as a base is asked in it."""
    if (folder / templates.FILE).is_file():
        return templates.load(folder)
    return templates.for_base(templates.default(None, folder))


def fingerprint(path: Path) -> list[Any]:
    """Names, sizes and times of a file or of a model folder's files: a changed model is another evaluation."""
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file())
    found = []
    for file in files:
        stat = file.stat()
        found.append([str(file), stat.st_size, stat.st_mtime_ns])
    return found


def open_model(location: Location, quantization: Quantization | None = None) -> OpenModel:
    """Load it for scoring. Default precision: `bases.quantization_of`."""
    from qmedtune import model as models
    from qmedtune.modeling.quiet import quiet_libraries

    check_template(location)
    quiet_libraries()
    dtype = this_machine().compute_dtype
    precision = quantization or bases.quantization_of(location.stack)
    section = ModelSection(base=str(location.base), quantization=precision, compute_dtype=dtype)
    for adapter in location.adapters:  # before the base is read, which takes minutes for a large one
        read_adapter(adapter, read_model(location.base).shapes)
    with hub.closed():
        tokenizer = models.load_tokenizer(location.base)
        model = models.load_stack(location.stack, section)
        models.check_tokenizer(tokenizer, model, location.base)
    return OpenModel(location, model, tokenizer, precision, dtype)
