"""Model folders: which are accepted, and how a Hub id becomes one. Pickled weights and remote code are refused, always.

No torch here: a recipe that names a missing or refused base must say so within a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmedtune import local_names, ui
from qmedtune.errors import RecipeError
from qmedtune.model_stack import read_model
from qmedtune.recipe import ModelSection


def resolve_base(section: ModelSection, *, offline: bool, shape_only: bool = False) -> Path:
    """The local folder of a base that is not built in; downloads a Hub id unless `offline`, with `shape_only` no
    weights: config and tokenizer are all that `pretrain` takes of it."""
    local = Path(os.path.expanduser(section.base))
    if local.is_dir():
        _judge(local)
        return local
    local_names.check(section.base, "model.base")
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
