"""Folders that are either complete under their final name or not there at all.

A step builds into `.building/<name>`, every file is fsynced, `seal.json` (a sha256 manifest with the step's key and
facts) is written last, then one rename publishes the folder. What a newer result replaces goes to `.history/` and
comes back when its key is asked for again: nothing that was paid for is deleted. Durability is as strong as the file
system's fsync; SIGKILL at any instant is tested, power loss is not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import TypedDict

from qmedtune.disk import (
    PART,
    check_room,
    discard,
    fsync_path,
    link,
    lock,
    lock_file,
    read_plain,
    rename,
    write_atomic,
    write_json,
)
from qmedtune.errors import RunError
from qmedtune.hashes import HashCache, kept, read_checked, sha256_file, sha256_json, write_checked
from qmedtune.model_files import JsonObject, as_object
from qmedtune.results import Json

__all__ = [
    "PART",
    "HashCache",
    "check_room",
    "discard",
    "fsync_path",
    "kept",
    "lock",
    "lock_file",
    "read_checked",
    "rename",
]
__all__ += ["sha256_file", "sha256_json", "write_atomic", "write_checked", "write_json"]

SEAL = "seal.json"
STAMP = ".attempt"  # of which key and section an unfinished folder is
SCRATCH = "scratch"  # what a step resumes from: not sealed, and deleted once the step is
# Carries times and speeds: listed and verified, but not part of what later steps depend on.
VOLATILE = frozenset({"metrics.jsonl"})
REFUSED = ".refused"  # ending of a folder whose proof has failed: kept, and never read
# The model card is rendered after the evaluation, from run.json, into the folder that was sealed before it.
RENDERED = "README.md"


class Sealed(TypedDict):
    """One file of a sealed folder, as seal.json holds it."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Seal:
    """What seal.json holds. `digest` names the content: equal digests mean equal bytes in all non-volatile files."""

    key: str
    digest: str
    facts: JsonObject
    files: Mapping[str, Sealed]

    @property
    def section(self) -> JsonObject:
        """What the folder was made from, as the step's key has it."""
        return as_object(self.facts.get("section")) or {}


def content_files(folder: Path) -> list[Path]:
    """What a seal lists: all files but its own, and what is rendered later or only resumed from."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, STAMP, RENDERED))
    return sorted(p for p in found if p.relative_to(folder).parts[0] != SCRATCH)


def seal(folder: Path, key: str, facts: Mapping[str, object], known: Mapping[str, str] = {}) -> Seal:  # noqa: B006
    """Hash and fsync everything below `folder`, then write seal.json last. known: sha256 by name, of files that were
    hashed while they were written, and read back since."""
    for leftover in folder.rglob(f".*{PART}"):
        leftover.unlink()
    files: dict[str, Sealed] = {}
    stable: dict[str, str] = {}
    for path in content_files(folder):
        stat, name = path.stat(), path.relative_to(folder).as_posix()
        sha256 = known.get(name) or sha256_file(path)
        files[name] = {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if path.name not in VOLATILE:
            stable[name] = files[name]["sha256"]
        fsync_path(path)
    result = Seal(key, sha256_json(stable), dict(facts), files)
    content = {"key": key, "digest": result.digest, "facts": facts, "files": files}
    for sub in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(sub)
    write_json(folder / SEAL, {**content, "sha256": sha256_json(content)})
    return result


def read_seal(folder: Path) -> Seal | None:
    """The seal of a finished folder; None where there is none or it is unreadable."""
    try:
        data = json.loads(read_plain(folder / SEAL))
        if data.pop("sha256") != sha256_json(data) or not all(map(_is_below, data["files"])):
            return None
        return Seal(data["key"], data["digest"], data["facts"], data["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_below(name: str) -> bool:
    """Whether a name leads to something inside of the folder that it is joined to."""
    return not name.startswith("/") and ".." not in name.split("/")


def damage(folder: Path, sealed: Seal, *, full: bool) -> list[str]:
    """Names what differs from the seal. Not `full`: sizes and times only, hashing just the files whose time differs."""
    problems = []
    for name, entry in sealed.files.items():
        path = folder / name
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):
                problems.append(f"{name}: no plain file")
            elif stat.st_size != entry["size"]:
                problems.append(f"{name}: {stat.st_size} bytes, sealed with {entry['size']}")
            elif (full or stat.st_mtime_ns != entry["mtime_ns"]) and sha256_file(path) != entry["sha256"]:
                problems.append(f"{name}: sha256 differs")
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as error:  # a bad sector, a file that may not be read
            problems.append(f"{name}: unreadable ({error.strerror})")
    return problems


def without(sealed: Seal, names: Collection[str]) -> Seal:
    """A seal that does not ask for these files."""
    files = dict(sealed.files)
    for name in names:
        files.pop(name, None)
    return replace(sealed, files=files)


def intact(folder: Path, key: str | None = None, *, full: bool = False) -> Seal | None:
    """The folder's seal if it is there, carries `key` and its files are unchanged."""
    sealed = read_seal(folder)
    if sealed is None or (key is not None and sealed.key != key):
        return None
    return None if damage(folder, sealed, full=full) else sealed


def check_stamped(folder: Path) -> None:
    """RunError where something stands under the name of a step that carries no stamp of ours: it is the user's."""
    if not folder.exists() or (folder / SEAL).is_file() or attempt_of(folder) or (folder / SCRATCH).is_dir():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    raise RunError(
        f"{folder}: stands where a step writes, and carries no seal of qmedtune\n"
        "nothing was changed there; move it away, or give another --out\n"
        "(of a step that lost its seal.json: the same command then makes it again)"
    )


def retire(folder: Path, root: Path, name: str | None = None) -> Path | None:
    """Move a folder that is no longer current to `.history/`, keeping it under its key (and another `name`).

    RunError where it carries no stamp of ours.
    """
    if not folder.exists():
        return None
    check_stamped(folder)
    sealed, attempt = read_seal(folder), attempt_of(folder)
    label = sealed.key[:12] if sealed else f"partial-{attempt[0][:12]}" if attempt else "unsealed"
    if sealed and damage(folder, sealed, full=False):
        label = f"damaged-{label}"
    name = name or flat_name(folder, root)
    target = root / ".history" / f"{name}-{label}"
    number = 1
    while target.exists():
        number += 1
        target = root / ".history" / f"{name}-{label}-{number}"
    target.parent.mkdir(parents=True, exist_ok=True)
    rename(folder, target)
    return target


def flat_name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix().replace("/", "__")


def recall(folder: Path, root: Path, key: str) -> Seal | None:
    """Bring an intact earlier result with this key back from `.history/`."""
    for candidate in sorted((root / ".history").glob(f"{flat_name(folder, root)}-{key[:12]}*")):
        sealed = intact(candidate, key, full=True)
        if sealed:
            _move_into_place(candidate, folder, root)
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
            if building.exists():
                _put_aside(building, folder, root, keep_partial=True)
            for name in [*sealed.files, SEAL]:
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                link(donor / name, building / name)
            _move_into_place(building, folder, root)
            return sealed
    return None


def begin(folder: Path, root: Path, key: str, section: Mapping[str, object], *, keep_partial: bool) -> Path:
    """The folder to build `folder` in. With `keep_partial` an earlier attempt with the same key is continued; one with
    another key goes to `.history/`, from where it comes back when its key is asked for again. `section` says what it
    is made from, for `attempt_of`."""
    building = building_of(folder, root)
    if keep_partial and _is_attempt(building, key):
        return building
    if building.exists():
        _put_aside(building, folder, root, keep_partial)
    if keep_partial and (earlier := _retired_attempt(building, root, key)):
        rename(earlier, building)
        return building
    building.mkdir(parents=True, exist_ok=True)
    write_json(building / STAMP, {"key": key, "section": section})
    return building


def _put_aside(building: Path, folder: Path, root: Path, keep_partial: bool) -> None:
    """What was paid for goes to `.history/`: a sealed result whose rename was killed, an attempt that can go on, and
    one that cannot because its stamp is damaged."""
    if read_seal(building):
        discard(building / SCRATCH)
        retire(building, root, flat_name(folder, root))
    elif keep_partial and (attempt_of(building) or (building / SCRATCH).exists()):
        retire(building, root)
    else:
        shutil.rmtree(building)


def attempt_of(building: Path) -> tuple[str, Json] | None:
    """Key and section of an unfinished folder; None where there is none, or it was begun by nobody."""
    try:
        stamp = json.loads(read_plain(building / STAMP))
        return stamp["key"], stamp["section"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_attempt(folder: Path, key: str) -> bool:
    attempt = attempt_of(folder)
    return attempt is not None and attempt[0] == key


def _retired_attempt(building: Path, root: Path, key: str) -> Path | None:
    """The newest attempt with this key in `.history/`."""
    name = flat_name(building, root)
    found = [path for path in (root / ".history").glob(f"{name}-partial-{key[:12]}*") if _is_attempt(path, key)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def publish(building: Path, folder: Path, root: Path, key: str, facts: Mapping[str, object]) -> Seal:
    """Seal `building` and rename it to `folder`; what stood there goes to `.history/`."""
    sealed = seal(building, key, facts)
    _move_into_place(building, folder, root)
    return sealed


def keep_refused(building: Path, folder: Path, why: str) -> Path:
    """Move what was made, but must not be published, to `<folder>.refused`, with the reason in it; an earlier one that
    stands there is replaced. Returns where it is."""
    kept = folder.with_name(f"{folder.name}{REFUSED}")
    (building / STAMP).unlink(missing_ok=True)
    discard(kept)
    write_atomic(building / "REFUSED.txt", f"{why}\n")
    rename(building, kept)
    return kept


def _move_into_place(building: Path, folder: Path, root: Path) -> None:
    discard(building / SCRATCH)
    (building / STAMP).unlink(missing_ok=True)
    retire(folder, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rename(building, folder)


def complete(folder: Path, root: Path, key: str) -> Seal | None:
    """Finish a publication that was killed between its seal and its rename."""
    building = building_of(folder, root)
    sealed = intact(building, key, full=True)
    if sealed:
        _move_into_place(building, folder, root)
    return sealed


def take_over(paths: Sequence[Path]) -> bool:
    """Link files that belong together, below a folder in the making, from one earlier result of the same step; False
    where none has them. The last one must be there; of the others those that the result had.

    For files whose names tell their contents. Where one of them was damaged since, none is taken. What an interrupted
    attempt left of them is removed: it may be a link, and writing to it would write into the earlier result.
    """
    for path in paths:
        path.unlink(missing_ok=True)
    building = next((folder for folder in paths[0].parents if folder.parent.name == ".building"), None)
    if building is None:
        return False
    root, names = building.parent.parent, [path.relative_to(building).as_posix() for path in paths]
    for folder in [root / building.name.replace("__", "/"), *sorted((root / ".history").glob(f"{building.name}-*"))]:
        sealed = read_seal(folder)
        had = [name for name in names if sealed and name in sealed.files]
        if sealed and names[-1] in had and not damage(folder, without(sealed, sealed.files.keys() - had), full=True):
            for name in had:
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                link(folder / name, building / name)
            return True
    return False


def building_of(folder: Path, root: Path) -> Path:
    return root / ".building" / flat_name(folder, root)


def cache_root() -> Path:
    """`$QMEDTUNE_CACHE`, else `$XDG_CACHE_HOME/qmedtune`, else `~/.cache/qmedtune`."""
    if own := os.environ.get("QMEDTUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmedtune"
