"""Files that are whole or not there: atomic writes, durable renames, room checked first, one process per folder.

Deliberately not here: what is written (store.py knows seals and history). Nothing is retried.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qmedtune import ui
from qmedtune.errors import RunError

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without its lock service
PATIENCE_S = 0.2  # `qmedtune runs` and `watch` ask for a lock for microseconds, to see whether a run lives
MOST_BYTES = 32 << 20  # of run.json, a seal, remembered hashes: a run of 8 stages over 30 sources has 0.3 MB
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
    # Two machines on one file system may share a process number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        # Half a character, as JSON can say it, is written as its escape.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
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


def read_plain(path: Path) -> str:
    """Text of a file of ours that may be anybody's. OSError where it is no plain file (a pipe would be waited for for
    ever), or longer than any that we write."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no plain file", str(path))
    if path.stat().st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"longer than {MOST_BYTES:,} bytes", str(path))
    return path.read_text(encoding="utf-8")


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


def _open_lock(path: Path, mode: int) -> BinaryIO:
    """A file to lock, made if need be. RunError where it is no plain file.

    Through a link, what is written into it would go into a file elsewhere. O_NONBLOCK: a FIFO would wait.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path}: is no plain file, so no lock can be written there\nremove it, or give another --out")
    return os.fdopen(handle, "r+b")


def _take(file: BinaryIO, operation: int, without: str) -> None:
    """Lock a file. BlockingIOError where another process holds it. without: what to say where there are no locks."""
    patient_until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, operation)
        except BlockingIOError:
            if time.monotonic() > patient_until:
                raise
            time.sleep(PATIENCE_S / 10)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return ui.warn(without)


@contextmanager
def lock_file(path: Path, advice: str) -> Iterator[BinaryIO]:
    """A file, made if need be, open for reading and writing, that one process holds at a time; RunError for others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_lock(path, 0o600) as file:
        try:
            without = f"{path}: this file system has no locks; do not start this command twice"
            _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB, without)
        except BlockingIOError as error:
            raise RunError(f"{path}: another process is writing it\n{advice}") from error
        yield file


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """One process per folder; others are refused, or `wait`. The kernel drops the lock with the process: no stale lock
    can stay behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with _open_lock(folder / ".lock", 0o666) as file:
        if os.fstat(file.fileno()).st_nlink > 1:  # the process id below would be written into another's file
            raise RunError(
                f"{folder / '.lock'}: is a hard link to another file, so no lock can be written there\n"
                "remove it, or give another --out"
            )
        try:
            without = f"{folder}: this file system has no locks; do not start a second run in this folder"
            _take(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), without)
        except BlockingIOError as error:
            pid = file.read().decode(errors="replace").strip() or "unknown"
            raise RunError(
                f"{folder}: already running (pid {pid})\nwait for it, or give this run another folder with --out"
            ) from error
        pid = str(os.getpid()).encode()
        if file.read().strip() != pid:
            file.seek(0)
            file.truncate()
            file.write(pid)
            file.flush()
        yield
