"""Files that are whole or not there: atomic writes, durable renames, room checked first, one process per folder.

Deliberately not here: what is written (store.py knows seals and history). Nothing is retried.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qmedtune import ui
from qmedtune.errors import RunError

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without its lock service
PART = ".part~"  # ends the names of temporaries of `write_atomic`; a kill leaves one behind


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
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """Rename within a file system, and bring both folders' entries to the disk."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        fsync_path(folder)


def link(source: Path, target: Path) -> None:
    """The same bytes under a second name; a copy where the file system has no hard links.

    FileExistsError where `target` is there: a copy onto it would write into every other name that it has.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target)
        fsync_path(target)


def discard(folder: Path) -> None:
    """Delete a folder; killed half-way, no half of it is left under its name."""
    dropped = folder.with_name(f".{folder.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    if folder.exists():
        os.replace(folder, dropped)
        shutil.rmtree(dropped)


@contextmanager
def owner_only() -> Iterator[None]:
    """Files 0600 and folders 0700 within: clinical text is for its owner alone. Child processes inherit it."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def unmounted_drive(path: Path) -> str | None:
    """What to do where `path` lies on a Google Drive that this Colab machine has not mounted; None elsewhere."""
    if "COLAB_RELEASE_TAG" not in os.environ or not path.absolute().is_relative_to(DRIVE) or DRIVE.is_mount():
        return None
    return f"Google Drive is not mounted: from google.colab import drive; drive.mount('{DRIVE}')"


def check_room(folder: Path, needed_bytes: float, what: str) -> None:
    """RunError where the disk of `folder` (or of its first parent that exists) has less than `needed_bytes` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise RunError(
            f"{folder}: no room for {what}: {needed_bytes:,.0f} bytes needed, {free:,} free\n"
            "what is sealed stays; free space (earlier results lie in the run's .history/) or lower save.keep,\n"
            "then give the same command again: it continues from the last sealed checkpoint"
        )


def below(folder: Path) -> Iterator[Path]:
    """Everything below a folder, links not followed; what goes meanwhile is left out."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def _check_lock_file(handle: int, path: Path) -> None:
    """RunError where the lock is no plain file of one name: the process id would be written into another's file."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = "a hard link to another file" if stat.S_ISREG(found.st_mode) else "no plain file"
        raise RunError(f"{path}: is {what}, so no lock can be written there\nremove it, or give another --out")


@contextmanager
def lock_file(path: Path, advice: str) -> Iterator[BinaryIO]:
    """A file, made if need be, open for reading and writing, that one process holds at a time; RunError for others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path}: no plain file\nremove it, or give another --out")
    with os.fdopen(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{path}: another process is writing it\n{advice}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            ui.warn(f"{path}: this file system has no locks; do not start this command twice")
        yield file


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """One process per folder; others are refused, or `wait`. The kernel drops the lock with the process: no stale lock
    can stay behind."""
    folder.mkdir(parents=True, exist_ok=True)
    # Through a link, the process id below would be written into a file elsewhere. O_NONBLOCK: a FIFO would wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(folder / ".lock", flags, 0o666)
    try:
        _check_lock_file(handle, folder / ".lock")
    except RunError:
        os.close(handle)
        raise
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise RunError(
                f"{folder}: already running (pid {pid})\nwait for it, or give this run another folder with --out"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            ui.warn(f"{folder}: this file system has no locks; do not start a second run in this folder")
        file.seek(0)
        if file.read().strip() != str(os.getpid()):
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield
