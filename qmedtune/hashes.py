"""Hashes of files and of plain data, remembered (inputs) or kept beside what they are of (partial results).

Deliberately not here: manifests of folders (store.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmedtune.disk import read_plain, write_atomic, write_json

CHUNK_BYTES = 1 << 20
SETTLED_S = 2.0
ENTRY = re.compile(r"[0-9a-f]{64}|remembered:.*")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def kept(path: Path, work: Callable[[], Any]) -> Any:
    """A partial result, which no seal covers yet: what an interrupted attempt left in `path` and is as it was left,
    else the result of `work`, written in one rename."""
    if (found := read_checked(path)) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = write_checked(path, work())
    return found


def write_checked(path: Path, value: Any) -> Any:
    """Write a value with its hash; returns it as `read_checked` will (lists for tuples)."""
    value = json.loads(json.dumps(value))
    write_json(path, {"value": value, "sha256": sha256_json(value)})
    return value


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote; None where there is nothing, or it was damaged."""
    try:
        held = json.loads(read_plain(path))
        return held["value"] if held["sha256"] == sha256_json(held["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class HashCache:
    """sha256 of input files, remembered by (size, times, inode) so that an unchanged corpus is read once.

    A file that changed within the last SETTLED_S is not remembered: where times are as coarse as a second, it could
    change once more under the same one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.changed = False
        self.known = _entries(path)

    def seen(self, path: Path) -> str | None:
        """The hash, where it is remembered and the file has not changed since."""
        entry = self.known.get(_nameless(path))
        return entry[-1] if entry and entry[:-1] == _mark(path.stat()) else None

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        mark = _mark(stat)
        if known := self.seen(path):
            return known
        value = sha256_file(path)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_S:
            self.known[_nameless(path)] = [*mark, value]
            self.changed = True
        return value

    def remember(self, name: str, value: str) -> None:
        """Keep something that is known of an input that is no file (the commit of a Hub dataset)."""
        if self.remembered(name) != value:
            self.known[f"remembered:{name}"] = [value]
            self.changed = True

    def remembered(self, name: str) -> str | None:
        return self.known.get(f"remembered:{name}", [None])[0]

    def save(self) -> None:
        if self.changed:
            write_atomic(self.path, json.dumps(self.known))
            self.changed = False


def _nameless(path: Path) -> str:
    """A file by the hash of its path: paths of clinical data can hold names, and a run folder is passed on."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def _entries(path: Path) -> dict[str, list]:
    """What is remembered; of a damaged file the entries that are whole. Those of version 0.1 held paths: dropped."""
    try:
        found = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in entries if ENTRY.fullmatch(name) and _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) in (1, 5) and isinstance(entry[-1], str)
