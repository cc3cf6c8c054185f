"""`qmedtune erase RUN --text`: all text of the sources out of a run folder; weights, figures and seals stay.

Gone are the kept and packed texts, answers item by item, rejects, unfinished work and everything in `.history/`.
Each sealed folder keeps its manifest, so what is left can still be verified; `erased.json` at the root says what was
removed, and `report RUN --verify` then takes these files as erased. The reports are rendered again and say so.
Deliberately not promised: that a disk forgets (snapshots, backups, flash), or that weights do (docs/audit.md).
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from qmedtune import claims, disk, privacy, record, store
from qmedtune.errors import RunError

# Folders that hold text whatever their files are called: unfinished and earlier work.
WORK = (".building", ".history")


class Removed(TypedDict):
    """Files and folders that `qmedtune erase` removed.

    folders: those that went as a whole. elsewhere: files that have another name outside of the run, where their text
    stays."""

    files: int
    bytes: int
    folders: list[str]
    elsewhere: int


def runs_in(folder: Path) -> list[Path]:
    """The run folder itself, or the runs of an ablation."""
    if (folder / record.RUN).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"arms/*/seed-*/{record.RUN}")) or [folder]


def erase(folder: Path) -> Removed:
    """Remove all text from a run folder, or from those of an ablation. RunError where a run is at work there.

    Killed half-way, the same command finishes it: the note is written first and names everything that goes.
    """
    total: Removed = {"files": 0, "bytes": 0, "folders": list(WORK), "elsewhere": _linked_elsewhere(folder)}
    for out in runs_in(folder):
        if not claims.is_ours(out):
            raise RunError(f"{out}: no run folder\nnothing was changed")
        with store.lock(out):
            files, size = _erase_run(out)
        total["files"] += files
        total["bytes"] += size
    return total


def _erase_run(out: Path) -> tuple[int, int]:
    """How many files, and their bytes."""
    gone = sorted(path.relative_to(out).as_posix() for path in _texts(out))
    before = privacy.erased(out).files
    note = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": sorted({*gone, *before})}
    size = sum((out / name).stat().st_size for name in gone)
    store.write_json(out / privacy.NOTE, {**note, "sha256": store.sha256_json(note)})
    for name in gone:
        (out / name).unlink()
    for name in WORK:
        shutil.rmtree(out / name, ignore_errors=True)
    store.fsync_path(out)
    for name in WORK:
        if (out / name).exists():
            raise RunError(f"{out / name}: could not be removed\nremove it by hand, then give the same command again")
    _tell(out)
    return len(gone), size


def _tell(out: Path) -> None:
    """Say it in run.json and the reports, where there are any that can be read."""
    run = record.read(out)
    if run is None or not record.is_whole(run):  # damaged: `report --verify` must go on naming it
        return
    record.write_with_privacy(out, run)
    record.render(out)


def _texts(out: Path) -> Iterator[Path]:
    """Files with text in the sealed folders; seals stay."""
    for path in out.rglob("*"):
        place = path.relative_to(out).parts
        if not path.is_file() or path.is_symlink() or place[0] in WORK:
            continue
        unfinished = path.name.startswith(".") and path.name.endswith(store.PART)  # of a write that was killed
        if unfinished or privacy.holds_text(path.relative_to(out).as_posix()):
            yield path


def _linked_elsewhere(folder: Path) -> int:
    """Files with text that other folders hold too, under a second name of the same file (arms that share a source)."""
    names: Counter[tuple[int, int]] = Counter()
    links: dict[tuple[int, int], int] = {}
    for out in runs_in(folder):
        for path in _texts(out):
            stat = path.stat()
            names[stat.st_dev, stat.st_ino] += 1
            links[stat.st_dev, stat.st_ino] = stat.st_nlink
        for work in WORK:
            for path in disk.below(out / work):
                stat = path.lstat()
                names[stat.st_dev, stat.st_ino] += 1
    return sum(links[file] > names[file] for file in links)
