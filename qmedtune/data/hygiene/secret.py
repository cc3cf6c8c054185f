"""The random secret that stand-ins of identifiers are derived from: outside the run folder, its owner's alone.

Whoever has it can tell which identifier a stand-in belongs to by trying; without it nobody can. Its fingerprint is part
of the data's key and is kept in the run folder, so that a run cannot go on elsewhere with other stand-ins for the same
patients. All nodes of a run need the same file: share the folder, or point QMEDTUNE_SECRETS to one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from qmedtune.disk import fsync_path, read_plain, write_json
from qmedtune.errors import RecipeError

FILE, NOTE = "surrogates.key", ".surrogates"
SIZE_BYTES = 32


def folder() -> Path:
    """`$QMEDTUNE_SECRETS`, else `$XDG_CONFIG_HOME/qmedtune`, else `~/.config/qmedtune`."""
    if own := os.environ.get("QMEDTUNE_SECRETS"):
        return Path(own)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qmedtune"


def load() -> bytes:
    """The secret (32 bytes), made on first use. RecipeError where others can read it, or it is none."""
    path = folder() / FILE
    if not path.exists():
        _make(path)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for for ever
        raise RecipeError(f"{path}: is no plain file, so no secret of stand-ins\nremove it; the next run makes one")
    if stat.S_IMODE(found.st_mode) & 0o077 and os.name == "posix":
        raise RecipeError(
            f"{path}: others can read the secret that stand-ins are derived from\nchmod 600 {path}, or make another"
        )
    secret = path.read_bytes()
    if len(secret) != SIZE_BYTES:
        raise RecipeError(
            f"{path}: {len(secret)} bytes, the secret of stand-ins has {SIZE_BYTES}\n"
            "put back the right file; if it is lost, remove it (runs that used it then begin anew elsewhere)"
        )
    return secret


def _make(path: Path) -> None:
    """Whole or not there, with mode 0600 from the first moment; another process that is first wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(SIZE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
    fsync_path(path.parent)


def fingerprint(secret: bytes) -> str:
    """Tells secrets apart and gives nothing of them away: 64 bits of a keyed hash."""
    return hashlib.blake2b(b"fingerprint", key=secret, digest_size=8).hexdigest()


def check(out: Path) -> None:
    """RecipeError where the stand-ins in `out` were made with a secret that is not here. Makes no secret there."""
    _check_place(out)
    try:
        before = json.loads(read_plain(out / NOTE))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    path = folder() / FILE
    if path.exists() and fingerprint(load()) == before:
        return
    raise RecipeError(
        f"{out}: identifiers were replaced with a secret that is not here (fingerprint {before})\n"
        f"looked for: {path} ({'another one' if path.exists() else 'not there'})\n"
        "bring that file from where the run began (QMEDTUNE_SECRETS names its folder), or give another --out"
    )


def _check_place(out: Path) -> None:
    """RecipeError where the secret would lie in a run folder: whoever is given the run would have it too."""
    place = folder().resolve()
    if out.resolve() in (place, *place.parents):
        raise RecipeError(
            f"QMEDTUNE_SECRETS: {folder()} lies in the run folder {out}, which may be passed on\n"
            "name a folder outside of it (without QMEDTUNE_SECRETS: ~/.config/qmedtune)"
        )


def note(out: Path) -> None:
    """Keep in the run folder which secret its stand-ins are from."""
    write_json(out / NOTE, {"fingerprint": fingerprint(load())})
