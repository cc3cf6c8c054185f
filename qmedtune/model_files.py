"""What is read of a model folder before it is judged: JSON of bounded size, and what is never accepted in one.

Pickled weights, code to import and links out of the folder are refused, always. Deliberately not here: whether
configuration and tensors belong together (model_stack.py), and downloads (hub.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from qmedtune.errors import RecipeError

MAX_JSON_BYTES = 64 << 20  # an index of 1,000 shards has 10 MB
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Settings that name Python code to import (PEFT imports the module `megatron_core` where `megatron_config` is given).
CODE_KEYS = {
    "config.json": "auto_map", "tokenizer_config.json": "auto_map", "processor_config.json": "auto_map",
    "generation_config.json": "auto_map", "adapter_config.json": "megatron_config",
}  # fmt: skip


def refuse(place: Path, what: str, then: str = "fetch or copy the folder again") -> NoReturn:
    raise RecipeError(f"{place}: {what}\n{then}")


def read_json(path: Path) -> dict[str, Any]:
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
