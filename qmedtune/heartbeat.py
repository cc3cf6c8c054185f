"""Does a run live, and where is it? A small file that moves while it does: `heartbeat.json`, beside run.json.

run.json says what a run last knew of itself; a process that is killed cannot change it any more. So a thread writes a
beat every 3 s, and it ends with the process. On the machine of the run the lock of the folder is the truth: the kernel
drops it with the process. From elsewhere (a shared disk) only the age of the last beat tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qmedtune import ui
from qmedtune.disk import read_plain

FILE = "heartbeat.json"
EVERY_S = 3.0
# From another machine: three beats may be late (a step that keeps the interpreter, a slow disk) before a run counts as
# dead.
STALE_S = 10.0

Status = Literal["running", "stopped", "failed", "finished"]


class Beat(BaseModel):
    """Content of a run's heartbeat file.

    One beat. Times are seconds since 1970 by the clock of the run's machine; names and figures, never text.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    host: str
    at: float
    started_at: float
    progress: ui.Progress


@dataclass(frozen=True)
class Life:
    """How a run stands. `killed`: it says of itself that it is running, and nothing does."""

    status: Status
    killed: bool
    beat: Beat | None


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Beat in `folder` for the length of the block. Inside the folder's lock."""
    ended = threading.Event()
    started_at = time.time()

    def beat_on() -> None:
        while not ended.is_set():
            _write(folder, started_at)
            ended.wait(EVERY_S)

    thread = threading.Thread(target=beat_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(EVERY_S)
        with contextlib.suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)


def _write(folder: Path, started_at: float) -> None:
    """Without fsync, which a slow disk would make felt: the next beat comes in 3 s. On a full disk there is none."""
    now = time.time()
    beat = Beat(pid=os.getpid(), host=os.uname().nodename, at=now, started_at=started_at, progress=ui.progress())
    temporary = folder / f".{FILE}.part~"
    with contextlib.suppress(OSError):
        temporary.write_text(beat.model_dump_json() + "\n", encoding="utf-8")
        os.replace(temporary, folder / FILE)


def read(folder: Path) -> Beat | None:
    """The last beat; None where there is none (a run of version 0.1, or one that ended)."""
    try:
        return Beat.model_validate_json(read_plain(folder / FILE))
    except (OSError, ValueError, ValidationError):
        return None


def life(folder: Path, said: str) -> Life:
    """How the run in `folder` stands, whose run.json has the status `said`.

    Only `running` can be untrue: it is the word of a process that may be gone.
    """
    beat = read(folder)
    if said in ("stopped", "failed", "finished"):
        return Life(said, False, None)
    if _lives(folder, beat):
        return Life("running", False, beat)
    return Life("stopped", True, beat)


def _lives(folder: Path, beat: Beat | None) -> bool:
    here = beat is None or beat.host == os.uname().nodename
    held = is_held(folder) if here else None
    fresh = beat is not None and abs(time.time() - beat.at) < STALE_S
    if held and beat is not None and not fresh:
        return _is_there(beat.pid)  # a worker that was forked from a killed run may hold its lock for a while
    return fresh if held is None else held


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def is_held(folder: Path) -> bool | None:
    """Whether a process of this machine holds the folder's lock; None where that cannot be told.

    The lock is tried as a reader for an instant: disk.lock, which a run begins with, tries again for longer than that.
    """
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # Lustre without -o flock, NFS without its lock service
        return None
    finally:
        os.close(handle)
    return False
