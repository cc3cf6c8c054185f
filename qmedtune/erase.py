"""`qmedtune erase RUN --text`: all text of the sources out of a run folder; weights, figures and seals stay.

Gone are the kept and packed texts, answers item by item, rejects, unfinished work and everything in `.history/`.
Each sealed folder keeps its manifest, so what is left can still be verified; `erased.json` at the root says what was
removed, and `report RUN --verify` then takes these files as erased. Deliberately not promised: that a disk forgets
(snapshots, backups, flash), or that weights do (docs/audit.md).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from qmedtune import claims, store
from qmedtune.errors import RunError
from qmedtune.results import Facts

NOTE = "erased.json"
# Folders that hold text whatever their files are called: unfinished and earlier work.
WORK = (".building", ".history")
# Below data/: kept text, packed tokens (a tokenizer turns them back), what was planted. Facts are in the seals.
TEXT_FOLDER = "data"
# Elsewhere: questions and answers item by item, and what was read off samples.
TEXT_NAMES = ("*.items.jsonl", "rejects.jsonl", "*.txt.gz", "samples*.jsonl", "audit*.jsonl")


class Erased(Facts):
    """How much was removed: files and their bytes, and the folders of unfinished work."""

    files: int
    bytes: int
    folders: list[str]


def erase(out: Path) -> Erased:
    """Remove all text from a run folder. RunError where a run is at work there.

    Killed half-way, the same command finishes it: the note is written first and names everything that goes.
    """
    if not claims.is_ours(out):
        raise RunError(f"{out}: no run folder\nnothing was changed")
    with store.lock(out):
        gone = sorted(path.relative_to(out).as_posix() for path in _texts(out))
        before = erased(out)
        note = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": sorted({*gone, *before})}
        size = sum((out / name).stat().st_size for name in gone)
        store.write_json(out / NOTE, {**note, "sha256": store.sha256_json(note)})
        for name in gone:
            (out / name).unlink()
        for name in WORK:
            shutil.rmtree(out / name, ignore_errors=True)
        store.fsync_path(out)
    left = [name for name in WORK if (out / name).exists()]
    if left:
        raise RunError(f"{out / left[0]}: could not be removed\nremove it by hand, then give the same command again")
    return Erased(files=len(gone), bytes=size, folders=[name for name in WORK if name not in left])


def erased(out: Path) -> set[str]:
    """Names, below the run folder, of the files that were erased; empty where nothing was, or the note is damaged."""
    try:
        note = json.loads((out / NOTE).read_text(encoding="utf-8"))
        sha256 = note.pop("sha256")
        return set(note["files"]) if sha256 == store.sha256_json(note) else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _texts(out: Path) -> Iterator[Path]:
    """Files with text in the sealed folders; seals stay."""
    for path in out.rglob("*"):
        place = path.relative_to(out).parts
        if not path.is_file() or path.is_symlink() or place[0] in WORK or path.name == store.SEAL:
            continue
        if place[0] == TEXT_FOLDER or any(path.match(pattern) for pattern in TEXT_NAMES):
            yield path
