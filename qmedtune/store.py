"""Folders that are either complete under their final name or not there at all.

A step builds into `.building/<name>`, every file is fsynced, `seal.json` (a sha256 manifest with the step's key and
facts) is written last, then one rename publishes the folder. What a newer result replaces goes to `.history/` and
comes back when its key is asked for again: nothing that was paid for is deleted. Durability is as strong as the file
system's fsync; SIGKILL at any instant is tested, power loss is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune.errors import RunError

SEAL = "seal.json"
STAMP = ".key"
PART = ".part~"  # ends the names of temporaries of `write_atomic`; a kill leaves one behind
CHUNK_BYTES = 1 << 20
# Carries times and speeds: listed and verified, but not part of what later steps depend on.
VOLATILE = frozenset({"metrics.jsonl"})
# The model card is rendered after the evaluation, from run.json, into the folder that was sealed before it.
RENDERED = "README.md"


@dataclass(frozen=True)
class Seal:
    """What seal.json holds. `digest` names the content: equal digests mean equal bytes in all non-volatile files."""

    key: str
    digest: str
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]


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


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` in one rename; readers see the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _content_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, STAMP, RENDERED))


def seal(folder: Path, key: str, facts: dict[str, Any]) -> Seal:
    """Hash and fsync everything below `folder`, then write seal.json last."""
    for leftover in folder.rglob(f".*{PART}"):
        leftover.unlink()
    files = {}
    for path in _content_files(folder):
        stat = path.stat()
        entry = {"sha256": sha256_file(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        files[path.relative_to(folder).as_posix()] = entry
        fsync_path(path)
    stable = {name: f["sha256"] for name, f in files.items() if Path(name).name not in VOLATILE}
    result = Seal(key, sha256_json(stable), facts, files)
    content = {"key": key, "digest": result.digest, "facts": facts, "files": files}
    write_json(folder / SEAL, {**content, "sha256": sha256_json(content)})
    for sub in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(sub)
    fsync_path(folder)
    return result


def read_seal(folder: Path) -> Seal | None:
    """The seal of a finished folder; None where there is none or it is unreadable."""
    try:
        data = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if data.pop("sha256") != sha256_json(data):
            return None
        return Seal(data["key"], data["digest"], data["facts"], data["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(folder: Path, sealed: Seal, *, full: bool) -> list[str]:
    """Names what differs from the seal. Not `full`: sizes and times only, hashing just the files whose time differs."""
    problems = []
    for name, entry in sealed.files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            problems.append(f"{name}: missing")
            continue
        if stat.st_size != entry["size"]:
            problems.append(f"{name}: {stat.st_size} bytes, sealed with {entry['size']}")
        elif (full or stat.st_mtime_ns != entry["mtime_ns"]) and sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: sha256 differs")
    return problems


def intact(folder: Path, key: str | None = None, *, full: bool = False) -> Seal | None:
    """The folder's seal if it is there, carries `key` and its files are unchanged."""
    sealed = read_seal(folder)
    if sealed is None or (key is not None and sealed.key != key):
        return None
    return None if damage(folder, sealed, full=full) else sealed


def retire(folder: Path, root: Path) -> Path | None:
    """Move a folder that is no longer current to `.history/`, keeping it under its key."""
    if not folder.exists():
        return None
    sealed = read_seal(folder)
    stamp = folder / STAMP
    label = sealed.key[:12] if sealed else f"partial-{stamp.read_text()[:12]}" if stamp.is_file() else "unsealed"
    if sealed and damage(folder, sealed, full=False):
        label = f"damaged-{label}"
    name = folder.relative_to(root).as_posix().replace("/", "__")
    target = root / ".history" / f"{name}-{label}"
    number = 1
    while target.exists():
        number += 1
        target = root / ".history" / f"{name}-{label}-{number}"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, target)
    return target


def recall(folder: Path, root: Path, key: str) -> Seal | None:
    """Bring an intact earlier result with this key back from `.history/`."""
    name = folder.relative_to(root).as_posix().replace("/", "__")
    for candidate in sorted((root / ".history").glob(f"{name}-{key[:12]}*")):
        sealed = intact(candidate, key, full=True)
        if sealed:
            retire(folder, root)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(candidate, folder)
            return sealed
    return None


def borrow(folder: Path, root: Path, key: str, siblings: Iterable[Path]) -> Seal | None:
    """Take a result with this key from another run's folder, as hard links (copies where the file system has none).

    Safe because sealed files are never written to, only replaced; the seal is linked last, so that what a kill leaves
    is no seal. The donor's files are hashed in full first.
    """
    for sibling in siblings:
        donor = sibling / folder.relative_to(root)
        if sealed := intact(donor, key, full=True):
            building = building_of(folder, root)
            shutil.rmtree(building, ignore_errors=True)
            for name in [*sealed.files, SEAL]:
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                _link(donor / name, building / name)
            _move_into_place(building, folder, root)
            return sealed
    return None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def begin(folder: Path, root: Path, key: str, *, keep_partial: bool) -> Path:
    """The folder to build `folder` in. With `keep_partial` an earlier attempt with the same key is continued; one with
    another key goes to `.history/`, from where it comes back when its key is asked for again."""
    building = building_of(folder, root)
    if keep_partial and _is_attempt(building, key):
        return building
    if building.exists():
        if keep_partial and (building / STAMP).is_file():
            retire(building, root)
        else:
            shutil.rmtree(building)
    if keep_partial and (earlier := _retired_attempt(building, root, key)):
        os.replace(earlier, building)
        return building
    building.mkdir(parents=True, exist_ok=True)
    write_atomic(building / STAMP, key)
    return building


def _is_attempt(folder: Path, key: str) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == key


def _retired_attempt(building: Path, root: Path, key: str) -> Path | None:
    """The newest attempt with this key in `.history/`."""
    name = building.relative_to(root).as_posix().replace("/", "__")
    found = [path for path in (root / ".history").glob(f"{name}-partial-{key[:12]}*") if _is_attempt(path, key)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def publish(building: Path, folder: Path, root: Path, key: str, facts: dict[str, Any]) -> Seal:
    """Seal `building` and rename it to `folder`; what stood there goes to `.history/`."""
    sealed = seal(building, key, facts)
    _move_into_place(building, folder, root)
    return sealed


def _move_into_place(building: Path, folder: Path, root: Path) -> None:
    retire(folder, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(building, folder)
    fsync_path(folder.parent)
    (folder / STAMP).unlink(missing_ok=True)


def complete(folder: Path, root: Path, key: str) -> Seal | None:
    """Finish a publication that was killed between its seal and its rename."""
    building = building_of(folder, root)
    sealed = intact(building, key, full=True)
    if sealed:
        _move_into_place(building, folder, root)
    return sealed


def take_over(path: Path) -> bool:
    """Link `path`, below a folder in the making, from an earlier result of the same step; False where none has it.

    For files whose names tell their contents. What was damaged since is not taken.
    """
    building = next((folder for folder in path.parents if folder.parent.name == ".building"), None)
    if building is None:
        return False
    root, name = building.parent.parent, path.relative_to(building).as_posix()
    for folder in [root / building.name.replace("__", "/"), *sorted((root / ".history").glob(f"{building.name}-*"))]:
        sealed = read_seal(folder) if (folder / name).is_file() else None
        if sealed and name in sealed.files and sha256_file(folder / name) == sealed.files[name]["sha256"]:
            try:
                os.link(folder / name, path)
            except OSError:  # another file system, or one without links
                shutil.copy2(folder / name, path)
            return True
    return False


def building_of(folder: Path, root: Path) -> Path:
    return root / ".building" / folder.relative_to(root).as_posix().replace("/", "__")


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """One process per folder; others are refused, or `wait`. The kernel drops the lock with the process: no stale lock
    can stay behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise RunError(
                f"{folder}: already running (pid {pid})\nwait for it, or give this run another folder with --out"
            ) from error
        file.seek(0)
        if file.read().strip() != str(os.getpid()):
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield


class HashCache:
    """sha256 of input files, remembered by (size, mtime, inode) so that an unchanged corpus is read once."""

    def __init__(self, path: Path):
        self.path = path
        self.changed = False
        try:
            self.known: dict[str, list] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(str(path.resolve()))
        if entry and entry[:3] == mark:
            return entry[3]
        value = sha256_file(path)
        self.known[str(path.resolve())] = [*mark, value]
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


def cache_root() -> Path:
    """`$QMEDTUNE_CACHE`, else `$XDG_CACHE_HOME/qmedtune`, else `~/.cache/qmedtune`."""
    if own := os.environ.get("QMEDTUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmedtune"
