"""What a base looks like, from its config.json or from a table, without torch and without reading a weight.

Sources in this order: built-in, a local folder, the Hub cache of this machine, shapes.json (public config values of
LLaMA-family models by Hub id, so that `plan` answers offline). Deliberately not here: downloads, tokenizers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from qmedtune import fetch, gguf_folder, gguf_header, store
from qmedtune.errors import RecipeError
from qmedtune.llama_shape import BUILTIN_VOCAB, BaseFacts, facts_from_config
from qmedtune.model_settings import read_settings
from qmedtune.model_stack import Stored, stored_tensors
from qmedtune.recipe import ModelSection


def base_facts(model: ModelSection) -> BaseFacts:
    """The shape that is trained: `model.base`'s, or the recipe's own. RecipeError where it is unknown or no LLaMA."""
    facts = _base_facts(model)
    if (shape := model.shape) is None:
        return facts
    return replace(
        facts,
        source=f"recipe, with the tokenizer of {model.base}",
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads or shape.heads,
        head_dim=shape.hidden // shape.heads,
        intermediate=shape.intermediate,
        max_positions=shape.max_positions or facts.max_positions,
        measured_bytes=None,
    )


def _base_facts(model: ModelSection) -> BaseFacts:
    if source := fetch.packed(model.base):
        return _fetched(model.base, source)
    if model.base.startswith("builtin:"):
        return _builtin(model.base)
    if gguf_folder.is_gguf(model.base):
        return _gguf(model.base)
    folder = Path(os.path.expanduser(model.base))
    if folder.is_dir():
        return _from_folder(model.base, folder, "config.json of the local folder")
    snapshot = cached_snapshot(model.base, model.revision)
    if snapshot is not None:
        return _from_folder(model.base, snapshot, "config.json in the Hub cache")
    table = _table()
    if model.base in table["ids"]:
        return BaseFacts(name=model.base, source="table of known shapes", **table["shapes"][table["ids"][model.base]])
    raise RecipeError(_unknown(model.base))


def _unknown(base: str) -> str:
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "~", "/"))
    fetch = f"fetch its shape (a few kB): hf download {base} config.json" if is_hub_id else "check the path"
    return (
        f"model.base: the shape of {base!r} is not known here\n"
        "allowed: builtin:tiny, a folder with config.json, a model in the Hub cache, or a known Hub id "
        f"({len(_table()['ids'])} are shipped, for example meta-llama/Llama-3.1-8B)\n{fetch}"
    )


@cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def _fetched(name: str, source: fetch.Packed) -> BaseFacts:
    """What `qmedtune fetch` brought, or will bring."""
    if folder := gguf_folder.ready(source.gguf_sha256):
        return _from_folder(name, folder, "config.json of the fetched base")
    table = _table()
    shape = table["shapes"][table["ids"][source.shape]] | {"stored_dtype": source.stored_dtype}
    return BaseFacts(name=name, source="table of known shapes", **shape)


def _gguf(name: str) -> BaseFacts:
    """From the unpacked folder where there is one and the file's hash is remembered, else from the file's header."""
    path = gguf_folder.find(name)
    known = store.HashCache(store.cache_root() / "hashes.json").seen(path)
    if known and (folder := gguf_folder.ready(known)):
        return _from_folder(name, folder, "config.json of the unpacked GGUF file")
    found = path.stat()
    return _in_header(name, path, (found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=4)
def _in_header(name: str, path: Path, _changed: tuple[int, int]) -> BaseFacts:
    """Asked for at every size of card that a plan tries; a header holds the vocabulary, and takes 0.1 s for 49,152."""
    header = gguf_header.read_header(path)
    return facts_from_config(name, gguf_folder.config_of(header), "header of the GGUF file")


def _builtin(name: str) -> BaseFacts:
    from qmedtune import base, tiny

    if name not in BUILTIN_VOCAB:
        allowed = [*BUILTIN_VOCAB, *(f"builtin:{known}" for known in fetch.PACKED)]
        raise RecipeError(f"model.base: no built-in base {name!r}\nallowed: {', '.join(allowed)}")
    made = base.blank_folder(name) / "config.json"
    with suppress(OSError, ValueError):  # not made yet, or cut by a full disk: it is written anew before it is used
        return facts_from_config(name, json.loads(made.read_text(encoding="utf-8")), "cache of built-in bases")
    return facts_from_config(name, tiny.config_dict(BUILTIN_VOCAB[name]), "package")


def cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot folder of a Hub id in this machine's cache, if its config.json is there. huggingface_hub says where
    the cache is: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, and what else it may come to read."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # no Hub id: a path that is not there
        return None
    return Path(config).parent if isinstance(config, str) else None


def _from_folder(name: str, folder: Path, source: str) -> BaseFacts:
    path = folder / "config.json"
    if not path.is_file():
        raise RecipeError(
            f"model.base: {folder} has no config.json\ngive the folder that holds config.json and weights"
        )
    config = read_settings(path)
    if not any(folder.glob("*.safetensors*")):  # pickled weights are refused where they would be read
        return facts_from_config(name, config, source, folder=str(folder))
    stored = stored_tensors(folder)
    shards = {tensor.file for tensor in stored.values()}
    sizes = [(folder / shard).stat().st_size for shard in shards]
    return facts_from_config(
        name,
        config,
        source,
        folder=str(folder),
        measured_bytes=sum(sizes) or None,
        largest_shard_bytes=max(sizes, default=None),
        stored_dtype=_most_stored(stored),
    )


def _most_stored(stored: Mapping[str, Stored]) -> str | None:
    """dtype of the largest tensor, in safetensors' spelling."""
    largest, dtype = 0, None
    for tensor in stored.values():
        if (size := math.prod(tensor.shape)) > largest:
            largest, dtype = size, tensor.dtype
    return dtype
