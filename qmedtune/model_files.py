"""What is read of a model folder before it is judged: JSON of bounded size, and what is never accepted in one.

Pickled weights, links out of the folder and pipes are refused, always. Deliberately not here: what settings may say
(model_settings.py), whether they and the tensors belong together (model_stack.py), and downloads (hub.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn, cast

from qmedtune.errors import RecipeError
from qmedtune.local_names import is_utf8

JsonObject = dict[str, Any]  # of a file that others wrote: anything, until it is judged
MAX_JSON_BYTES = 64 << 20  # an index of 1,000 shards has 10 MB
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MOST_FILES = 10_000  # a model of 1,000 shards has about as many files


def refuse(place: Path, what: str, then: str = "fetch or copy the folder again") -> NoReturn:
    raise RecipeError(f"{place}: {what}\n{then}")


def read_json(path: Path) -> JsonObject:
    """An object. RecipeError for anything else, however deep or long."""
    value = json_value(path)
    if not isinstance(value, dict):
        refuse(path, f"holds a {type(value).__name__}, not an object with keys")
    return value


def json_value(path: Path) -> Any:
    """Whatever a JSON file holds. RecipeError where it is none, or too long or deep for a configuration."""
    if not path.is_file():
        refuse(path, "no such file", "give a folder as transformers or PEFT writes it")
    if path.stat().st_size > MAX_JSON_BYTES:
        refuse(path, f"has {path.stat().st_size:,} bytes, which no configuration has")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON ({type(error).__name__})\nfetch or copy the folder again") from error


def as_object(value: object) -> JsonObject | None:
    """The value of a foreign JSON file, if it is an object."""
    if isinstance(value, dict):
        return cast(JsonObject, value)
    return None


def as_list(value: object) -> list[Any] | None:
    """The value of a foreign JSON file, if it is a list."""
    if isinstance(value, list):
        return cast(list[Any], value)
    return None


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
    check_links(folder)


def check_links(folder: Path) -> None:
    """Refuse links out of a model folder, also below it (transformers reads `additional_chat_templates/`), and what is
    neither file nor folder: a pipe would be waited for for ever."""
    here = folder.resolve()
    inside = [here]
    if here.parent.name == "snapshots":  # the Hub's cache: files are links to ../../blobs
        inside.append(here.parent.parent / "blobs")
    for number, path in enumerate(folder.rglob("*")):
        if number > MOST_FILES:
            refuse(folder, f"has more than {MOST_FILES:,} files", "give the folder of one model")
        if path.is_symlink() and not any(_real(path).is_relative_to(root) for root in inside):
            refuse(path, "a link out of the model folder", "copy the file into the folder")
        if not is_utf8(path.name):
            raise RecipeError(f"{folder}: the name of {ascii(path.name)} is not UTF-8\nrename or remove that file")
        if not path.is_file() and not path.is_dir():
            refuse(path, "neither a file nor a folder", "remove it, or copy the file into the folder")


def _real(path: Path) -> Path:
    """`Path.resolve` raises where a link leads to itself."""
    return Path(os.path.realpath(path))
