"""`qmedtune run --on-end CMD`: one command of the user's when a run ends, however it ends.

What it is told stands in its environment: name, status, folder and one line on what came out. Names and figures, or the
first line of our own error: never text of a record. Its failure changes nothing about the run.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmedtune import ui
from qmedtune.errors import QmedtuneError
from qmedtune.heartbeat import Life
from qmedtune.interrupt import Stopped
from qmedtune.reporting.headline import headline
from qmedtune.results import Run

PATIENCE_S = 60  # a message that cannot be sent must not keep the machine


@dataclass
class End:
    """How a run ended: `told` once it has come to its end, else by what was raised."""

    status: str = "failed"
    headline: str = ""

    def told(self, run: Run) -> None:
        if run.status == "finished":
            self.status, self.headline = "finished", headline(run, Life("finished", False, None))
        else:  # --until
            self.status, self.headline = "stopped", headline(run, Life("stopped", False, None))


@contextmanager
def telling(command: str | None, name: str, folder: Path) -> Iterator[End]:
    """Run the command behind the block, with $QMEDTUNE_NAME, _STATUS, _HEADLINE and _RUN."""
    end = End()
    try:
        yield end
    except Stopped as stopped:
        end.status, end.headline = "stopped", str(stopped)
        raise
    except QmedtuneError as error:
        end.status, end.headline = "failed", str(error).splitlines()[0]
        raise
    except BaseException as error:  # its message may quote a record
        end.status, end.headline = "failed", type(error).__name__
        raise
    finally:
        if command is not None:
            _run(command, name, folder, end)


def _run(command: str, name: str, folder: Path, end: End) -> None:
    told = {"NAME": name, "STATUS": end.status, "HEADLINE": end.headline, "RUN": str(folder.absolute())}
    environment = dict(os.environ)
    for key, value in told.items():
        environment[f"QMEDTUNE_{key}"] = value
    try:
        done = subprocess.run(
            command, shell=True, env=environment, stdin=subprocess.DEVNULL, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ui.warn(f"--on-end: the command took more than {PATIENCE_S} s and was ended")
    except (OSError, ValueError) as error:  # a name that no environment can hold
        return ui.warn(f"--on-end: the command could not be started ({type(error).__name__})")
    if done.returncode != 0:
        ui.warn(f"--on-end: the command ended with exit code {done.returncode}")
