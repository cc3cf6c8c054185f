"""Where an export lies: written beside its folder, sealed, and renamed in one step. It is whole or not there.

The same export again finds its seal and changes nothing. Deliberately not here: what is in the folder.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from qmedtune import store, ui
from qmedtune.errors import RecipeError, RunError
from qmedtune.results import Exported

FULL = (errno.ENOSPC, errno.EDQUOT)


def publish(out: Path, key: str, make: Callable[[Path], Exported]) -> Exported:
    """What `make(folder)` returns, once the folder is at `out`. RecipeError where something else is there,
    RunError where the disk is full."""
    if out.exists():
        return _again(out, key)
    staging = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(staging):  # a second export to the same place leaves
        folder = staging / "export"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed attempt
        folder.mkdir(parents=True)
        try:
            made = make(folder)
            store.seal(folder, key, made.as_json(), _known(folder, made))
            store.rename(folder, out)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise RunError(
                f"{out}: the disk is full; nothing was published\nmake room, or name another disk"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return made


def _known(folder: Path, made: Exported) -> dict[str, str]:
    """Of the file whose hash was taken while it was written."""
    if made.sha256 is None:
        return {}
    [file] = folder.glob("*.gguf")
    return {file.name: made.sha256}


def _again(out: Path, key: str) -> Exported:
    sealed = store.intact(out, key, full=True) if out.is_dir() else None
    if sealed is None:
        raise RecipeError(f"--out: {out} is there already, and is not this export\nmove it away, or give another name")
    ui.note(f"{out} is this export already: nothing was changed")
    return Exported.model_validate(sealed.facts)
