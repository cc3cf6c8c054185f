"""Model folders: which are accepted, and how a Hub id becomes one. Pickled weights and remote code are refused, always.

No torch here: a recipe that names a missing or refused base must say so within a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.errors import RecipeError
from qmedtune.model_stack import json_value, read_model
from qmedtune.recipe import ModelSection

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Settings that name Python code to import (PEFT imports the module `megatron_core` where `megatron_config` is given).
CODE_KEYS = {
    "config.json": "auto_map", "tokenizer_config.json": "auto_map", "processor_config.json": "auto_map",
    "generation_config.json": "auto_map", "adapter_config.json": "megatron_config",
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Refuse a model folder that would unpickle or execute something, or that points out of itself."""
    weights = sorted(folder.glob("*.safetensors"))
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern) if p.name != "training_args.bin")
    if pickled and not weights:
        raise RecipeError(
            f"{folder}: weights are pickled ({pickled[0]}); loading them could run code\n"
            "allowed: *.safetensors; convert the model, or take a revision that has them"
        )
    if not weights:
        raise RecipeError(f"{folder}: no *.safetensors in this folder\ngive a folder with config.json and weights")
    for name, key in CODE_KEYS.items():
        path = folder / name
        if path.is_file() and _names(json_value(path), key):
            raise RecipeError(f"{path}: `{key}` asks for remote code, which is never run\nuse a LLaMA-family model")
    here = folder.resolve()
    inside = [here]
    if here.parent.name == "snapshots":  # the Hub's cache: files are links to ../../blobs
        inside.append(here.parent.parent / "blobs")
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in inside):
            raise RecipeError(f"{path}: a link out of the model folder\ncopy the file into the folder")


def _names(value: Any, key: str) -> bool:
    """Whether `key` is set anywhere in a configuration: those of parts lie in it (`text_config`)."""
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_names(part, key) for part in value.values())
    return isinstance(value, list) and any(_names(part, key) for part in value)


def resolve_base(section: ModelSection, *, offline: bool, shape_only: bool = False) -> Path:
    """The local folder of a base that is not built in; downloads a Hub id unless `offline`, with `shape_only` no
    weights: config and tokenizer are all that `pretrain` takes of it."""
    local = Path(section.base).expanduser()
    if local.is_dir():
        _judge(local)
        return local
    if local.is_absolute() or section.base.startswith((".", "~")) or section.base.count("/") != 1:
        raise RecipeError(
            f"model.base: no folder {section.base!r} here, and it is not a Hub id\n"
            "allowed: a folder with config.json and weights, a *.gguf, builtin:tiny, builtin:smollm2, or owner/name"
        )
    folder = _download(section, offline=offline, shape_only=shape_only)
    if not shape_only:
        _judge(folder)
    return folder


def _judge(folder: Path) -> None:
    for note in read_model(folder).notes:
        ui.warn(note)


def _download(section: ModelSection, *, offline: bool, shape_only: bool) -> Path:
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "tokenizer*", "*.model", "*.jinja"]
    patterns += [] if shape_only else ["*.safetensors", "*.safetensors.index.json"]
    try:
        path = snapshot_download(
            section.base, revision=section.revision, allow_patterns=patterns, local_files_only=offline
        )
    except GatedRepoError as error:
        page = f"https://huggingface.co/{section.base}"
        what = f"this login has no access yet: ask for it on {page}, and wait for the answer"
        if get_token() is None:
            what = f"accept its licence on {page}, then log in: hf auth login"
        raise RecipeError(f"model.base: {section.base} is gated\n{what}") from error
    except RepositoryNotFoundError as error:
        raise RecipeError(
            f"model.base: the Hub has no model {section.base!r} (or this login may not see it)\n"
            "check the name, or give a local folder"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = "offline" if offline else "the Hub was not reached"
        answer = getattr(error.__cause__ or error, "response", None)
        if answer is not None and answer.status_code == 401:
            why = "the Hub does not know this login (log in again: hf auth login)"
        raise RecipeError(
            f"model.base: {section.base} is not in the local cache, and {why}\n"
            f"fetch it once where there is a network: hf download {section.base}\n"
            "or set model.base to a local folder; without any: builtin:tiny"
        ) from error
    return Path(path)


@contextmanager
def closed() -> Iterator[None]:
    """No library opens a connection to the Hub within: what is needed is here by now. A configuration can name a kernel
    of the Hub, and bitsandbytes looks for one where the package `kernels` is installed."""
    from huggingface_hub import constants

    before = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[1]
        if before[0] is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before[0]
