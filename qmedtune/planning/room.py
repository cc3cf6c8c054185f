"""Whether the disk has room for what a run still has to write: asked before it starts, and by `plan`.

From file sizes, without reading a record. Each checkpoint and each merge asks again for exactly what it writes
(disk.check_room): other people fill disks too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from qmedtune import units
from qmedtune.errors import DataError, DoesNotFit, RecipeError
from qmedtune.planning import fit, memory
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe, SourceSection

# Text is about four times its compressed size; a token of biomedical English has at least three bytes (4.4 characters
# in large vocabularies, 3.6 in those of 32k).
COMPRESSED, UNPACKED = (".gz", ".zst", ".parquet"), 4
BYTES_PER_TOKEN = 3


def free_bytes(place: Path) -> int:
    """Of the disk that holds `place`, or will."""
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def refuse_too_little(parts: Mapping[str, int], there_bytes: int, free: int) -> None:
    """DoesNotFit where `parts`, less what an unfinished attempt has written already, are more than is free."""
    needed = sum(parts.values()) - there_bytes
    if needed <= free:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    raise DoesNotFit(
        f"the run needs {units.size(needed)} of disk ({needed:,} bytes), {units.size(free)} are free ({free:,} bytes)\n"
        f"largest: {', '.join(f'{name} {units.size(size)}' for name, size in largest)}\n"
        "remedy: free space (results of earlier recipes lie in the run's .history/), another --out, save.keep: 1"
    )


def check_writable(out: Path) -> None:
    """RecipeError where the run folder could not be made or written."""
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RecipeError(
            f"--out: cannot write to {out} ({existing} is {'read-only' if existing.is_dir() else 'a file'})\n"
            "give a folder that you may write to with --out"
        )


def check(recipe: Recipe, out: Path, to_do: Collection[str]) -> None:
    """Before a run of a resolved recipe: room for the steps that are not sealed yet. Raises DoesNotFit."""
    facts = base_facts(recipe.model)
    setups = [fit.setup_of(recipe, index) for index in range(len(recipe.stages))]
    text = sum(_text_bytes(recipe.data[name]) for name in recipe.used_sources())
    parts = memory.disk_bytes(
        facts,
        setups,
        keep=recipe.save.keep,
        merge_dtype=recipe.merge.dtype,
        text_bytes=text,
        tokens=text // BYTES_PER_TOKEN,
    )
    if recipe.validation.keep_best:
        trained = max(memory.trained_parameters(facts, setup) for setup in setups)
        parts["best weights"] = (recipe.save.keep + 1) * 4 * trained
    training = any(name in to_do for name in recipe.stage_names())
    needed = {
        "base (download)": False,  # it is here by now
        "prepared text": any(f"data/{name}" in to_do for name in recipe.used_sources()),
        "packed tokens": any(name.startswith("data/") for name in to_do),
        "checkpoints": training,
        "best weights": training,
        "adapters": training,
        "merged model": "merged" in to_do,
    }
    begun = sum(path.stat().st_size for path in (out / ".building").rglob("*") if path.is_file())
    refuse_too_little({name: size for name, size in parts.items() if needed[name]}, begun, free_bytes(out))


def _text_bytes(source: SourceSection) -> int:
    from qmedtune.data.sources import source_files

    try:
        files = source_files(source)
    except DataError:  # reading it says so, and better
        return 0
    return sum(file.stat().st_size * (UNPACKED if file.suffix in COMPRESSED else 1) for file in files)
