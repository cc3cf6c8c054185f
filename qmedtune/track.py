"""`track:` of a recipe: the curves of a run for TensorBoard or trackio, in a folder of the run that has its name.

A process of its own (tracking/follow.py) reads metrics.jsonl while the run writes it. So training imports nothing of a
tracker and waits for nothing, a fault there stops no run, and the tracker's settings are those that are given here.
Figures alone; nothing is sent anywhere. Deliberately absent: other trackers, and settings of the user's for these.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmedtune import ui
from qmedtune.errors import RecipeError
from qmedtune.recipe import Recipe

PATIENCE_S = 60  # for the last lines: 100,000 steps are written in about 10 s on one core
# What would make trackio log to a Space, a bucket, a server or a webhook, and what would let it in there.
PREFIXES = ("TRACKIO_", "SPACE_")
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "SYSTEM")


def check(recipe: Recipe) -> None:
    """RecipeError where the package that `track` names is not installed."""
    if recipe.track is not None and importlib.util.find_spec(recipe.track) is None:
        raise RecipeError(f"track: {recipe.track} is not installed\npip install 'qmedtune[{recipe.track}]'")


@contextmanager
def following(recipe: Recipe, out: Path) -> Iterator[None]:
    """The curves of the run in `out` are written for the length of the block, whole when it ends."""
    if recipe.track is None:
        yield
        return
    words = [recipe.track, str(out.absolute()), recipe.name, *recipe.stage_names()]
    follower = subprocess.Popen(
        # -P: a file in the current folder that is called like a package is not taken for it.
        [sys.executable, "-P", "-m", "qmedtune.tracking.follow", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(out / recipe.track),
        start_new_session=True,  # Ctrl-C is the run's: it tells the follower to end, or ends itself and so its pipe
    )
    try:
        yield
    finally:
        _end(follower, recipe.track)


def _environment(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if not name.startswith(PREFIXES) and name not in SECRETS:
            found[name] = value
    # A journal in shared memory, trackio's own choice, does not work on the network disks that runs lie on.
    return found | {
        "TRACKIO_DIR": str(folder.absolute()),
        "TRACKIO_SQLITE_JOURNAL_MODE": "delete",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


def _end(follower: subprocess.Popen[bytes], tracker: str) -> None:
    try:
        follower.communicate(b"end\n", timeout=PATIENCE_S)  # a word: forked workers may hold the pipe open after this
    except subprocess.TimeoutExpired:
        follower.kill()
        follower.wait()
    if follower.returncode != 0:
        ui.warn(
            f"track: the curves for {tracker} are not complete (exit code {follower.returncode}); the run is as it is\n"
            "metrics.jsonl has them, and a command that goes on with the run writes them again"
        )
