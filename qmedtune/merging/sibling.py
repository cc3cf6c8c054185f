"""`merge.with`: the other model, and whether it and the base are two states of one model.

A mix of unequal parts is a folder that loads and talks nonsense. So everything that a weight means is compared first:
shapes, positions, numbers of heads, tied ends, each token of the vocabulary, and the weights themselves: a model that
was trained on from this base still points where it does. Deliberately not here: the mix (methods.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmedtune import base as bases
from qmedtune import record
from qmedtune.allowed import MergeMethod
from qmedtune.data.packing.templates import FILE
from qmedtune.errors import RecipeError
from qmedtune.evaluation.open_model import locate
from qmedtune.merging.disk_llama import DiskLlama, open_llama
from qmedtune.model import load_tokenizer
from qmedtune.model_stack import EMBEDDING, HEAD

# Of siblings cosines are beyond .9 (LLaMA-2 and its code model: .9 and more); of two trainings from scratch 0 +- .01.
SAME_ORIGIN = 0.5
SAMPLE = 1 << 16  # elements of each linear layer that are looked at: a cosine of 0 is then within .02 of it
# Settings that change what the same weights compute. Positions are compared apart.
MEANT_ALIKE = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "attention_bias",
    "mlp_bias",
)  # fmt: skip
# Of a tokenizer what turns text into ids; not how it marks documents or decodes.
SPLITTING = ("normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True)
class Sibling:
    """The other model: a whole model's folder, and the one with template.json that it is asked with, if it has one.
    run: the run folder that it comes from."""

    name: str
    folder: Path
    template: Path | None
    run: Path | None = None


@dataclass(frozen=True)
class Mixing:
    """How much of another model comes into a merge, and how. cosine: see `check_alike`."""

    sibling: Sibling
    method: MergeMethod
    share: float
    cosine: float


def find(name: str, *, offline: bool) -> Sibling:
    """The model that `merge.with` names: a run, a model folder, a Hub id. RecipeError for an adapter."""
    try:
        found = locate(name, offline=offline)
    except RecipeError as error:
        raise RecipeError(f"merge.with: {error}") from error
    if found.adapters:
        raise RecipeError(
            f"merge.with: {name} is an adapter, and whole models are mixed\n"
            f"merge it first: qmedtune merge {name} --out DIR, and give that folder"
        )
    template = found.base if (found.base / FILE).is_file() else None
    return Sibling(name, found.base, template, _run_of(found.base))


def _run_of(model: Path) -> Path | None:
    """The run folder that a model lies in: as `merged`, or as `NN-sft/model` where all parameters were trained."""
    for folder in (model.parent, model.parent.parent):
        if (folder / record.RUN).is_file():
            return folder
    return None


def clinical_sources(sibling: Sibling) -> dict[str, str | None]:
    """Sources, by name with their terms, that the other model has seen in its run and that can name patients: what it
    can give away, the mix can."""
    if sibling.run is None:
        return {}
    run = record.load(sibling.run)
    found: dict[str, str | None] = {}
    if run.merge is not None and run.merge.mixed_with is not None:
        found |= run.merge.mixed_with.clinical
    for name, source in run.data.items():
        if run.may_identify(name):
            found[name] = source.terms
    return found


def check_alike(base: Path, sibling: Sibling) -> float:
    """RecipeError, naming what differs, where `base` and the other model are no siblings. Returns the lowest cosine of
    their linear layers."""
    for difference in _differences(base, sibling):
        raise RecipeError(f"merge.with: {sibling.name} is no sibling of {base}: {difference}")
    ours, theirs = open_llama(base), open_llama(sibling.folder)
    cosine, name = _lowest_cosine(ours, theirs)
    if not cosine >= SAME_ORIGIN:
        raise RecipeError(
            f"merge.with: {sibling.name} comes from another base than {base}: the weights of {name} point elsewhere "
            f"(cosine {cosine:.2f}, of siblings above .9)\n"
            "a mix of the two would be noise: give a model that was trained on from this base"
        )
    return cosine


def _differences(base: Path, sibling: Sibling) -> Iterator[str]:
    """In words, the most telling first."""
    ours, theirs = open_llama(base), open_llama(sibling.folder)
    rows, others = ours.shapes[EMBEDDING][0], theirs.shapes[EMBEDDING][0]
    if rows != others:
        yield f"another vocabulary ({rows:,} rows and {others:,})\na mix needs one and the same"
    yield from _other_shapes(ours, theirs)
    if ours.tied != theirs.tied:
        words = {True: "tied to the embedding", False: "a matrix of its own"}
        yield (
            f"the output layer is {words[ours.tied]} in the base, {words[theirs.tied]} there\n"
            "untie one, or take the sibling as it was trained"
        )
    yield from _other_settings(ours.model.config, theirs.model.config)
    yield from _other_tokens(base, sibling.folder)
    yield from _another_origin(base, sibling)


def _other_shapes(ours: DiskLlama, theirs: DiskLlama) -> Iterator[str]:
    for name in [*ours.shapes, *theirs.shapes]:
        here, there = ours.shapes.get(name), theirs.shapes.get(name)
        if here != there:
            sizes = [" x ".join(map(str, shape)) if shape else "missing" for shape in (here, there)]
            yield f"other shapes ({name}: {sizes[0]} in the base, {sizes[1]} there)\na mix needs models of one size"


def _other_settings(ours: Any, theirs: Any) -> Iterator[str]:
    here, there = _positions(ours), _positions(theirs)
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield (
                f"other rope scaling ({key}: {here.get(key)} in the base, {there.get(key)} there)\n"
                "their positions mean different angles: take the sibling of this very base"
            )
    for key in MEANT_ALIKE:
        one, two = getattr(ours, key, None), getattr(theirs, key, None)
        if one != two:
            yield f"another {key} ({one} in the base, {two} there)\nthe same weights mean something else"


def _positions(config: Any) -> dict[str, Any]:
    """Of RoPE, as transformers reads it from the old keys and the new one."""
    found = dict(config.rope_parameters or {})
    return {key: value for key, value in found.items() if value is not None and key != "type"}


def _other_tokens(base: Path, other: Path) -> Iterator[str]:
    here, there = load_tokenizer(base), load_tokenizer(other)
    ids, others = here.get_vocab(), there.get_vocab()
    for token in sorted(ids.keys() | others.keys()):
        if ids.get(token) != others.get(token):
            number = ids.get(token, others.get(token))
            yield f"another vocabulary (token {number} is not the same in both)\na mix needs one and the same"
    ours, theirs = _splitting(here), _splitting(there)
    for key in SPLITTING:
        if ours.get(key) != theirs.get(key):
            yield f"another tokenizer (`{key}` differs)\nthe same text becomes other tokens: take its real sibling"


def _splitting(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json's parts; nothing where the tokenizer has no such form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts = json.loads(backend.to_str())
    return {key: parts.get(key) for key in SPLITTING}


def _another_origin(base: Path, sibling: Sibling) -> Iterator[str]:
    """Of a run of qmedtune: its first adapter says which weights it was trained on."""
    if sibling.run is None:
        return
    for adapter in sorted(sibling.run.glob("[0-9][0-9]-*/adapter")):
        known = bases.trained_on_sha256(adapter)
        if known is None:
            continue
        if known != bases.weights_sha256(base):
            yield f"its run was trained on another base (sha256 {known[:12]})\ngive a run on this base"
        return


def _lowest_cosine(ours: DiskLlama, theirs: DiskLlama) -> tuple[float, str]:
    lowest, where = 1.0, ""
    for linear in ours.linears:
        name = f"{linear}.weight"
        if name == HEAD:
            continue
        rows = max(1, SAMPLE // ours.shapes[name][1])
        one, two = ours.source(name)[:rows].flatten().double(), theirs.source(name)[:rows].flatten().double()
        cosine = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        if not cosine >= lowest:
            lowest, where = cosine, name
    return lowest, where
