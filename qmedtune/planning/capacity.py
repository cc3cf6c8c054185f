"""Whether this machine has room for what a run still has to do: asked before it starts, and by `plan`.

Disk from file sizes, without reading a record; each checkpoint and each merge asks again for exactly what it writes
(disk.check_room): other people fill disks too. Memory from shapes. A missing GPU is warned about, not refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from qmedtune import ui, units
from qmedtune.disk import below, unmounted_drive
from qmedtune.errors import DataError, DoesNotFit, RecipeError
from qmedtune.lineage import final_model, lineage_of
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning import fit, memory
from qmedtune.planning.machine import this_machine
from qmedtune.planning.memory import Setup
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.resolved import ResolvedRecipe

# Text is about four times its compressed size; a token of biomedical English has at least three bytes (4.4 characters
# in large vocabularies, 3.6 in those of 32k).
COMPRESSED, UNPACKED = (".gz", ".zst", ".parquet"), 4
BYTES_PER_TOKEN = 3
BUILTIN_BYTES = 9  # of prepared text per token of the built-in world: whole words, with ids and JSON around them
# Real bases from this size on want a GPU; `plan` takes one for them where none is here.
GPU_PARAMETERS = 0.5e9


def free_bytes(place: Path) -> int:
    """Of the disk that holds `place`, or will."""
    return shutil.disk_usage(_existing(place)).free


def refuse_too_little(parts: Mapping[str, int], there_bytes: int, free: int) -> None:
    """DoesNotFit where `parts`, less what an unfinished attempt has written already, are more than is free."""
    needed = sum(parts.values()) - there_bytes
    if needed <= free:
        return
    largest: list[str] = []
    for name, size in sorted(parts.items(), key=lambda part: -part[1])[:3]:
        largest.append(f"{name} {units.size(size)}")
    raise DoesNotFit(
        f"the run needs {units.size(needed)} of disk ({needed:,} bytes), {units.size(free)} are free ({free:,} bytes)\n"
        f"largest: {', '.join(largest)}\n"
        "remedy: free space (results of earlier recipes lie in the run's .history/), another --out, save.keep: 1"
    )


def refuse_too_little_memory(phases: Mapping[str, int], there_bytes: int) -> None:
    """DoesNotFit where a phase of the run takes more host memory than this machine has."""
    phase, needed = max(phases.items(), key=lambda phase: phase[1])
    if needed > there_bytes:
        raise DoesNotFit(
            f"{phase} needs {units.size(needed)} of host memory, this machine has {units.size(there_bytes)}\n"
            "remedy: a smaller base, or a machine with more RAM"
        )


def check_writable(out: Path) -> None:
    """RecipeError where the run folder could not be made or written, or would go with a Colab machine."""
    if advice := unmounted_drive(out):
        raise RecipeError(f"--out: {out} would be lost with this machine\n{advice}")
    existing = _existing(out)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "read-only" if existing.is_dir() else "a file"
        raise RecipeError(
            f"--out: cannot write to {out} ({existing} is {why})\ngive a folder that you may write to with --out"
        )
    for path in below(out):
        if path.is_symlink():
            raise RecipeError(
                f"--out: {path} is a link; what is written through it would land elsewhere\n"
                "a run folder holds no links, but may itself be one: move the whole folder, or give another with --out"
            )


def _existing(place: Path) -> Path:
    """The nearest of a path and the folders above it that is there."""
    while not place.exists():
        place = place.absolute().parent
    return place


def kept_of(recipe: Recipe, text: int, tokens: int) -> memory.DiskContents:
    """What a resolved recipe leaves on disk, with so many bytes of prepared text and tokens packed."""
    folded, best = 0, recipe.validation.keep_best
    for line, stage in zip(lineage_of(recipe), recipe.stages, strict=True):
        folded += line.folds_into is not None
        if stage.classify and stage.classify.validation:
            best = True
    return memory.DiskContents(
        recipe.save.keep,
        recipe.merge.dtype,
        text,
        tokens,
        folded=folded,
        merged=bool(final_model(recipe).adapters),
        best=best,
        swept=recipe.merge.sweep is not None,
    )


def check(recipe: ResolvedRecipe, out: Path, to_do: Collection[str]) -> None:
    """Before a run of a resolved recipe: room for the steps that are not sealed yet. Raises DoesNotFit."""
    facts = base_facts(recipe.model)
    setups = [fit.setup_of(recipe, index) for index in range(len(recipe.stages))]
    training = any(name in to_do for name in recipe.stage_names())
    if training:
        _check_machine(facts, setups)
    text = sum(text_bytes(recipe.data[name]) for name in recipe.used_sources())
    parts = memory.disk_bytes(facts, setups, kept_of(recipe, text, text // BYTES_PER_TOKEN))
    needed = {
        "base (download)": False,  # it is here by now
        "prepared text": any(f"data/{name}" in to_do for name in recipe.used_sources()),
        "packed tokens": any(name.startswith("data/") for name in to_do),
        "checkpoints": training,
        "best weights": training,
        "adapters": training,
        "stage models": training,
        "folded bases": any(name.endswith("-base") for name in to_do),
        "mix of the sweep": "sweep" in to_do,
        "merged model": "merged" in to_do,
    }
    begun = sum(_file_bytes(path) for path in below(out / ".building"))
    refuse_too_little({name: size for name, size in parts.items() if needed[name]}, begun, free_bytes(out))


def _file_bytes(path: Path) -> int:
    """0 where it is gone: another run is at work there, which the lock will say."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def host_phases(facts: BaseFacts, setups: list[Setup], *, gpu: bool) -> dict[str, int]:
    """Host memory by phase, in bytes: the most that any stage takes."""
    most: dict[str, int] = {}
    for setup in setups:
        for name, size in memory.host_memory(facts, setup, gpu=gpu, merge=True).items():
            most[name] = max(size, most.get(name, 0))
    return most


def _check_machine(facts: BaseFacts, setups: list[Setup]) -> None:
    here = this_machine()
    if not here.is_gpu and not facts.builtin and facts.parameters >= GPU_PARAMETERS:
        ui.warn(
            f"no GPU here: training {units.count(facts.parameters)} parameters on a CPU takes days. Ask "
            "`qmedtune doctor`; on Colab: Runtime > Change runtime type > T4 GPU. --smoke rehearses without a GPU"
        )
    refuse_too_little_memory(host_phases(facts, setups, gpu=here.is_gpu), here.host_bytes)


def text_bytes(source: SourceSection) -> int:
    """About the size of a source's prepared text; 0 for what is built in or not here."""
    from qmedtune.data.reading.sources import source_files

    try:
        files = source_files(source)
    except DataError:  # reading it says so, and better
        return 0
    size = 0
    for file in files:
        unpacked = UNPACKED if file.suffix in COMPRESSED else 1
        size += file.stat().st_size * unpacked
    return size
