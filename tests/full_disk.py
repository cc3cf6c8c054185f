"""Run the micro recipe on a disk that is too small, make it larger, run again, until it is finished.

    unshare --user --map-root-user --mount python tests/full_disk.py asked FOLDER RESULT

mounts a tmpfs on FOLDER (nobody outside sees it) and writes into RESULT, as JSON, what each attempt said and the sha256
of the weights in the end. Room for the whole run is not asked for here: another program fills the disk in the middle of
it. `unasked`: nor before each checkpoint and merge, so that writes fail half-way. `read-only`: the disk becomes that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kill import ROOT, half_artefacts, weights

STEP_BYTES = 3 << 19


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def attempts(folder: Path) -> dict:
    from qmedtune.errors import QmedtuneError
    from qmedtune.parsing.loader import load_recipe
    from qmedtune.run import run

    loaded = load_recipe(ROOT / "recipes" / "micro.yaml", ["save.every=3"])
    said, checkpoints, size = [], [], STEP_BYTES
    mount(folder, f"size={size}")
    while True:
        try:
            run(loaded.recipe, loaded.text, folder / "run", offline=True)
        except QmedtuneError as error:
            said.append(str(error))
        else:
            return {"said": said, "checkpoints": checkpoints, "weights": weights(folder / "run")}
        assert not half_artefacts(folder / "run")
        checkpoints.append(len(list((folder / "run").rglob("checkpoint-*/seal.json"))))
        size += STEP_BYTES
        mount(folder, f"remount,size={size}")


def asked(folder: Path) -> dict:
    from qmedtune.planning import capacity

    capacity.check = lambda *_: None
    return attempts(folder)


def unasked(folder: Path) -> dict:
    from qmedtune import store

    store.check_room = lambda *_: None
    return asked(folder)


def read_only(folder: Path) -> dict:
    """A run folder that was finished in part, and whose disk is read-only since."""
    from qmedtune import cli

    mount(folder, "size=64m")
    recipe = str(ROOT / "recipes" / "micro.yaml")
    command = ["run", recipe, "--out", str(folder / "run"), "--offline", "--until", "data/literature"]
    assert cli.invoke(command) == 0
    mount(folder, "remount,ro")
    return {"code": cli.invoke(command[:-2])}


if __name__ == "__main__":
    what = {"asked": asked, "unasked": unasked, "read-only": read_only}[sys.argv[1]]
    result = what(Path(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result), encoding="utf-8")
