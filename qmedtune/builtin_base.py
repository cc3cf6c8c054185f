"""Make a built-in base: a run of this project, one `pretrain` stage over the built-in general corpus.

Deliberately not here: when one is needed and where it is kept (base.py, to which process.py hands `make`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmedtune import base, claims, peers, store, tiny, ui
from qmedtune.recipe import Recipe
from qmedtune.run import run


def make(name: str, folder: Path) -> None:
    """Pretrain the built-in base `name` in `folder`, whose lock is held (base.py)."""
    _clear(folder)
    ui.note(f"{name} is made once and kept in {folder}")
    blank = base.blank_folder(name)
    _write_blank(name, blank)
    recipe = pretraining_recipe(name, blank)
    text = json.dumps(recipe.model_dump(mode="json", by_alias=True), indent=1)
    with peers.alone():
        run(recipe, text, folder, offline=True)


def _clear(folder: Path) -> None:
    """Of a cache that was cut or cleaned, what is not whole goes: all of it can be made again. An attempt goes on."""
    if folder.exists() and not claims.is_ours(folder):
        store.discard(folder)
    for place in (*folder.glob("data/*"), folder / "01-pretrain"):
        if place.exists() and not store.intact(place, full=True):
            store.discard(place)


def _write_blank(name: str, folder: Path) -> None:
    """config.json and tokenizer of a model that does not exist yet; what an interrupted or damaged cache holds of them
    is replaced by the same bytes."""
    tokenizer = tiny.build_tokenizer(tiny.world_of(name))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    for path in folder.iterdir():
        store.fsync_path(path)
    store.write_json(folder / "config.json", tiny.config_dict(tiny.vocab_size(tokenizer)))


def pretraining_recipe(name: str, blank: Path) -> Recipe:
    """The recipe of a built-in base, with nothing left to `auto`."""
    constants = tiny.DEFAULTS[name].pretraining
    corpus = "builtin:general" if name == "builtin:tiny" else f"{name}/general"
    stage: dict[str, Any] = {
        "mix": {"general": 1.0},
        "tokens": constants.tokens,
        "seq_len": constants.seq_len,
        "batch": constants.batch_rows,
        "micro_batch": constants.batch_rows,
        "lr": constants.lr,
        "embedding_lr": constants.lr,
        "warmup": {"ratio": constants.warmup_ratio},
        "min_lr_ratio": constants.min_lr_ratio,
        "max_grad_norm": constants.max_grad_norm,
        "betas": list(constants.betas),
        "weight_decay": constants.weight_decay,
        "gradient_checkpointing": False,
        "optimizer": "adamw",
    }
    return Recipe.model_validate(
        {
            "name": name.replace(":", "-"),
            "seed": constants.seed,
            "model": {"base": str(blank), "quantization": "none"},
            "data": {"general": {"path": corpus, "kind": "general", "holdout": 0.0}},
            "hygiene": {"dedup": {"exact": False, "near": False}, "decontaminate": "off", "phi": "off"},
            "stages": [{"pretrain": stage}],
        }
    )
