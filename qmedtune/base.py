"""Where a run starts: a local or Hub base, a GGUF file, a base that was fetched, or a tiny one pretrained on first use.

A tiny base is itself a run of this project (builtin_base.py), in the user's cache folder. Its identity is the hash of
what makes it (generator, shape, constants), so a finished run stays finished when the cache is emptied. Deliberately
not here: making one. That is a run, which stands floors above, and is handed in through makers.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from qmedtune import fetch, gguf_folder, gguf_header, makers, store, ui
from qmedtune.allowed import Quantization
from qmedtune.errors import RecipeError
from qmedtune.model_files import read_json
from qmedtune.model_stack import ADAPTER_TENSORS, ModelStack
from qmedtune.recipe import ModelSection, Recipe
from qmedtune.results import Facts

BUILTIN = "builtin:"
TRAINED_ON = "trained_on.json"


@dataclass(frozen=True)
class Base:
    """A base model, found but not yet loaded.

    `digest` goes into keys; `make()` gives the local folder, building or unpacking it if need be;
    `check()` raises what `make` would raise for a base that was never fetched."""

    name: str
    digest: str
    make: Callable[[], Path]
    revision: str | None = None
    check: Callable[[], object] = lambda: None


def identify(section: ModelSection, *, offline: bool, shape_only: bool = False) -> Base:
    """Find the base and name its content. Downloads a Hub id that is not cached, unless `offline`. With `shape_only` (a
    recipe that begins with `pretrain`) a folder with config.json and a tokenizer is enough."""
    if source := fetch.packed(section.base):
        return _fetched(section.base, source)
    if section.base.startswith(BUILTIN):
        return _builtin(section.base)
    if gguf_folder.is_gguf(section.base):
        return _gguf(section.base)
    folder = _folder(section, offline=offline, shape_only=shape_only)
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".model", ".jinja"))
    found = _hashed(files)
    for path, value in found.items():
        blob = path.resolve()  # in the Hub's cache large files are named by their sha256
        if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != value:
            raise RecipeError(f"{path}: damaged since it was fetched\ndelete {blob} and fetch it again")
    digest = store.sha256_json({path.name: value for path, value in found.items()})
    revision = section.revision or (folder.name if folder.parent.name == "snapshots" else None)
    return Base(section.base, digest, lambda: folder, revision)


def locate_folder(section: ModelSection, *, offline: bool) -> Path:
    """The folder of `identify`, for those who need no name of its content: a local one is not hashed, unless it lies in
    the Hub's cache, where names tell hashes."""
    local = Path(os.path.expanduser(section.base))
    if local.is_dir() and local.parent.name != "snapshots":
        return _folder(section, offline=offline, shape_only=False)
    return identify(section, offline=offline).make()


def of_recipe(recipe: Recipe, *, offline: bool) -> Base:
    """The base that a recipe starts from; what its `make` gives is found, and hashed, once."""
    shape_only = recipe.stages[0].kind == "pretrain"
    found = identify(recipe.model, offline=offline, shape_only=shape_only)
    return replace(found, make=cache(found.make))


def note_base(adapter: Path, name: str, trained_on: ModelStack, quantization: Quantization) -> None:
    """Keep beside an adapter which weights it was trained on: the hash of its base, which `name` names, those of the
    adapters below it, and whether they were quantised."""
    below = [store.sha256_file(path / ADAPTER_TENSORS) for path in trained_on.adapters]
    sha256 = weights_sha256(trained_on.base)
    noted = TrainedOn(base=name, sha256=sha256, adapters_below=below, quantization=quantization)
    store.write_json(adapter / TRAINED_ON, noted.as_json())


def quantization_of(stack: ModelStack) -> Quantization:
    """The precision that a model is opened in where nobody states one: that of its training, NF4 where its adapters do
    not say (other tools' do not, and QLoRA's are most of them); 16 bit for a whole model."""
    if not stack.adapters:
        return "none"
    return trained_quantization(stack.adapters[-1]) or "nf4"


def trained_quantization(adapter: Path) -> Quantization | None:
    """`model.quantization` that an adapter was trained with; None where it does not say."""
    known = _trained_on(adapter)
    if known is None:
        return None
    return known.quantization


def trained_on_sha256(adapter: Path) -> str | None:
    """Of the weights that an adapter was trained on; None where it does not say."""
    known = _trained_on(adapter)
    if known is None:
        return None
    return known.sha256


class TrainedOn(Facts):
    """trained_on.json: the base and the hash of its weights, the hashes of the adapters below, in order. quantization:
    not said by version 0.1."""

    base: str
    sha256: str
    adapters_below: list[str]
    quantization: Quantization | None = None


def _trained_on(adapter: Path) -> TrainedOn | None:
    """What `note_base` wrote; None where it wrote nothing. RecipeError where it was changed since."""
    path = adapter / TRAINED_ON
    if not path.exists():
        return None
    known = read_json(path)
    try:
        return TrainedOn.model_validate(known)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]["loc"][0]
        raise RecipeError(
            f"{path}: does not say {wrong}\nit was changed since training: copy the adapter again"
        ) from None


def name_of_base(name: str, folder: Path, run: Path) -> str:
    """What an adapter says that it was trained on: the recipe's base, or, below the same run, the path to it from the
    adapter's folder (of a base with earlier adapters folded in, or of a model trained in an earlier stage). PEFT, which
    looks for that elsewhere, then fails instead of loading the wrong weights."""
    return f"../../{folder.relative_to(run).as_posix()}" if folder.is_relative_to(run) else name


def base_in_run(adapter: Path, name: str) -> Path | None:
    """The folder that `name_of_base` meant, if the adapter is still in its run."""
    run = adapter.resolve().parent.parent
    found = (adapter.resolve() / name).resolve()
    known = name.startswith("../../") and (found / "config.json").is_file() and found.is_relative_to(run)
    return found if known and (adapter / TRAINED_ON).is_file() else None


def check_base(adapter: Path, folder: Path) -> None:
    """RecipeError where an adapter was trained on other weights than those of `folder`. Adapters of other tools do not
    say; for them the shapes must do."""
    trained_on = _trained_on(adapter)
    if trained_on is None:
        return
    if trained_on.adapters_below:
        raise RecipeError(f"{adapter}: was trained on top of an earlier adapter\nname the run, which holds both")
    _check_weights(adapter, trained_on, folder, "give its own base with --base")


def check_chain(adapters: Sequence[Path], folder: Path) -> None:
    """RecipeError where adapters that are to be applied in this order were not trained so, on the weights of `folder`.
    Adapters of other tools do not say."""
    below: list[str] = []
    for adapter in adapters:
        trained_on = _trained_on(adapter)
        if trained_on:
            _check_weights(adapter, trained_on, folder, "give its own base")
        if trained_on and trained_on.adapters_below != below:
            raise RecipeError(
                f"{adapter}: was trained on top of {len(trained_on.adapters_below)} adapters, "
                f"and these below it are others ({len(below)})\nname the run, which holds them all"
            )
        below.append(store.sha256_file(adapter / ADAPTER_TENSORS))


def _check_weights(adapter: Path, trained_on: TrainedOn, folder: Path, remedy: str) -> None:
    if trained_on.sha256 == (found := weights_sha256(folder)):
        return
    raise RecipeError(
        f"{adapter}: was trained on other weights than {folder}\n"
        f"sha256 {trained_on.sha256[:12]}, not {found[:12]}; {remedy}: {trained_on.base}"
    )


def weights_sha256(folder: Path) -> str:
    """One hash for all weight files of a model folder; each is read once and remembered by size and time."""
    found = _hashed(sorted(folder.glob("*.safetensors")))
    return store.sha256_json({path.name: value for path, value in found.items()})


def _hashed(paths: Sequence[Path]) -> dict[Path, str]:
    """sha256 of a base's files, remembered in the cache for all runs of this user: 16 GB are read once."""
    hashes = store.HashCache(store.cache_root() / "hashes.json")
    found = {path: hashes.sha256(path) for path in paths}
    with suppress(OSError):  # a cache folder that cannot be written costs the next hashing, nothing else
        store.cache_root().mkdir(parents=True, exist_ok=True)
        hashes.save()
    return found


def _folder(section: ModelSection, *, offline: bool, shape_only: bool) -> Path:
    local = Path(os.path.expanduser(section.base))
    if shape_only and (local / "config.json").is_file():
        return local
    from qmedtune.hub import resolve_base

    return resolve_base(section, offline=offline, shape_only=shape_only)


def _fetched(name: str, source: fetch.Packed) -> Base:
    """A base that `qmedtune fetch` brings."""

    def folder(full: bool = False) -> Path:
        if found := gguf_folder.ready(source.gguf_sha256, full=full):
            return found
        raise RecipeError(fetch.missing(name))

    # Hashed before it is read: a bit that flips under an unchanged time is seen by nothing else.
    return Base(name, gguf_folder.digest(source.gguf_sha256), lambda: folder(full=True), check=folder)


def _gguf(name: str) -> Base:
    """A local GGUF file is what it holds, wherever it lies; a bad one is refused before it is hashed or unpacked."""
    path = gguf_folder.find(name)
    gguf_header.read_header(path)
    sha256 = _hashed([path])[path]
    return Base(name, gguf_folder.digest(sha256), lambda: gguf_folder.converted(path, sha256))


def _builtin(name: str) -> Base:
    from qmedtune.tiny import DEFAULTS

    if name not in DEFAULTS:
        allowed = [*DEFAULTS, *(BUILTIN + known for known in fetch.PACKED)]
        raise RecipeError(f"model.base: no built-in base {name!r}\nallowed: {', '.join(allowed)}")
    return Base(name, _builtin_digest(name), lambda: _made(name, builtin_folder(name)))


def _builtin_digest(name: str) -> str:
    package = Path(__file__).parent
    sources = {p: store.sha256_file(package / p) for p in ("tiny.py", "data/synthetic/world.py")}
    return store.sha256_json({"base": name, **sources})


def builtin_folder(name: str) -> Path:
    """Where a built-in base is kept once it is made."""
    return store.cache_root() / "bases" / f"{name.removeprefix(BUILTIN)}-{_builtin_digest(name)[:16]}"


def blank_folder(name: str) -> Path:
    """Shape and tokenizer that a built-in base is pretrained from: beside its run folder, which holds no inputs."""
    return store.cache_root() / "blanks" / builtin_folder(name).name


def _made(name: str, folder: Path) -> Path:
    """The built-in base's model folder, pretrained now if it is not in the cache."""
    stage = folder / "01-pretrain"
    if store.intact(stage, full=True):
        return stage / "model"
    with store.lock(folder.with_name(f".{folder.name}.making"), wait=True):  # another run may be making it right now
        if not store.intact(stage, full=True):
            if stage.exists():
                ui.warn(f"{name} was damaged in {folder}; it is made again")
                store.discard(stage)
            make = makers.maker()
            if make is None:
                raise RecipeError(f"model.base: {name} is not made on this machine yet\nmake it: qmedtune run RECIPE")
            make(name, folder)
    return stage / "model"
