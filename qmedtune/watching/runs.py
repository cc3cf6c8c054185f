"""Which runs lie in a folder, and how each of them stands.

A run is known by its run.json. What is read is kept by the file's time and size, so that looking again every other
second costs a few system calls per run. Deliberately not here: curves (curves.py), pages (pages.py).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qmedtune import heartbeat
from qmedtune.claims import MARK
from qmedtune.disk import read_plain
from qmedtune.errors import RecipeError
from qmedtune.local_names import is_utf8
from qmedtune.record import RUN
from qmedtune.reporting.headline import headline
from qmedtune.results import Run

# Of `runs/` itself, the runs in it, an ablation's arms/<arm>/seed-<n>: deeper lie other people's files.
MAX_DEPTH = 4
# A new run is seen after so long: a hundred times as long as looking took, within these.
SHARE, LEAST_S, MOST_S = 100, 0.5, 8.0


@dataclass(frozen=True)
class Seen:
    """A run at one look. `name`: below the folder that is looked in; `changed_at`: of its last sign of life, in seconds
    since 1970."""

    name: str
    folder: Path
    run: Run
    life: heartbeat.Life
    changed_at: float

    @property
    def status(self) -> str:
        return self.life.status


class Line(BaseModel):
    """What `qmedtune runs --json` says of a run. age_s: since its last sign of life; left_s: None where not known."""

    model_config = ConfigDict(frozen=True)

    name: str
    folder: str
    status: str
    killed: bool
    age_s: float
    step: str | None
    left_s: float | None
    headline: str


class Shelf:
    """The runs of one folder (or the one run that the folder is)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, tuple[tuple[int, int], Run]] = {}
        self._found: list[Path] = []
        self._fresh_until = 0.0

    def folders(self) -> list[Path]:
        """As they were found a moment ago: in a large tree looking takes long, and is done the less often."""
        began = time.monotonic()
        if began >= self._fresh_until:
            self._found = run_folders(self.root)
            now = time.monotonic()
            self._fresh_until = now + min(MOST_S, max(LEAST_S, SHARE * (now - began)))
        return self._found

    def all(self) -> list[Seen]:
        """The newest sign of life first."""
        found: list[Seen] = []
        for folder in self.folders():
            if seen := self.look(folder):
                found.append(seen)
        return sorted(found, key=lambda seen: -seen.changed_at)

    def named(self, name: str) -> Seen | None:
        """By the name that `all` gives. A name is compared, never joined to a path."""
        for folder in self.folders():
            if self.name_of(folder) == name:
                return self.look(folder)
        return None

    def name_of(self, folder: Path) -> str:
        if folder == self.root:
            return folder.resolve().name
        return folder.relative_to(self.root).as_posix()

    def look(self, folder: Path) -> Seen | None:
        """None where run.json went meanwhile."""
        try:
            stat = (folder / RUN).stat()
            run = self._parsed(folder, (stat.st_mtime_ns, stat.st_size))
        except OSError:
            return None
        except ValueError:  # no run, or no text
            run = Run(
                name=folder.name, status="failed", error=f"{RUN} cannot be read; `qmedtune run` composes it again"
            )
        life = heartbeat.life(folder, run.status)
        last_beat = life.beat.at if life.beat else 0.0
        return Seen(self.name_of(folder), folder, run, life, max(stat.st_mtime, last_beat))

    def _parsed(self, folder: Path, stamp: tuple[int, int]) -> Run:
        kept = self._read.get(folder)
        if kept and kept[0] == stamp:
            return kept[1]
        run = Run.model_validate_json(read_plain(folder / RUN))
        self._read[folder] = stamp, run
        return run


def run_folders(root: Path) -> list[Path]:
    """Folders with a run.json, `root` itself included; what lies inside of a run is not looked at."""
    found: list[Path] = []
    depth = len(root.parts)
    for place, below, files in os.walk(root):
        here = Path(place)
        if RUN in files:
            found.append(here)
        inside = RUN in files or (MARK in files and "arms" not in below)
        too_deep = len(here.parts) - depth >= MAX_DEPTH
        # No address can hold a name that is not UTF-8, and no run makes such a folder.
        visible = [name for name in below if not name.startswith(".") and is_utf8(name)]
        below[:] = [] if inside or too_deep else sorted(visible)
    return found


def line_of(seen: Seen) -> Line:
    progress = seen.life.beat.progress if seen.life.beat else None
    return Line(
        name=seen.name,
        folder=str(seen.folder),
        status=seen.status,
        killed=seen.life.killed,
        age_s=round(max(0.0, time.time() - seen.changed_at), 1),
        step=progress.step if progress else None,
        left_s=progress.run_left_s or progress.left_s if progress and seen.status == "running" else None,
        headline=headline(seen.run, seen.life),
    )


def lines(folder: Path) -> list[Line]:
    """Every run in `folder`. RecipeError where there is no such folder."""
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        raise RecipeError(f"{folder}: {what}\ngive the folder that holds the runs; default: runs")
    return [line_of(seen) for seen in Shelf(folder).all()]
