"""K-quants, which llama.cpp alone computes: through its `llama-quantize` or its library, where the user has one.

The library `gguf` unpacks them and cannot pack them. Deliberately not here: builds or downloads of llama.cpp.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gguf import LlamaFileType

from qmedtune.errors import RecipeError, RunError
from qmedtune.exporting.types import QUANTS
from qmedtune.gguf_header import read_header

# As `llama-quantize --help` names them.
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
PROGRAM = "llama-quantize"
LIBRARY = re.compile(r"libllama(\.v?[\d.]+)?\.(so|dylib)(\.[\d.]+)?")
PLACE = "QMEDTUNE_LLAMA_CPP"
INSIDE = ("", "bin", "lib", "build/bin")  # of a folder that is named: where builds and packages keep them


def check_quant(quant: str) -> None:
    """RecipeError for a quantisation that there is not, or that needs a llama.cpp that is not here."""
    if quant in QUANTS:
        return
    if quant not in K_QUANTS:
        raise RecipeError(f"--quant: got {quant!r}\nallowed: {', '.join([*QUANTS, *K_QUANTS])}")
    quantiser()


def quantiser() -> str:
    """llama-quantize or libllama: in the folder that QMEDTUNE_LLAMA_CPP names, else the command, the library of the
    package llama_cpp, the system's library. RecipeError where there is none."""
    place = os.environ.get(PLACE)
    found = _in_folder(Path(place).expanduser()) if place else _installed()
    if found is None:
        raise RecipeError(
            f"--quant: K-quants are computed by llama.cpp alone, and its {PROGRAM} or libllama is not here\n"
            f"install llama.cpp, or name the folder of one of them: {PLACE}=FOLDER\n"
            f"without it: {', '.join(QUANTS)}"
        )
    return found


def _in_folder(folder: Path) -> str | None:
    """The program, or else the library."""
    places = [folder / name for name in INSIDE if (folder / name).is_dir()]
    for place in places:
        if program := shutil.which(PROGRAM, path=str(place)):
            return program
    for place in places:
        for path in sorted(place.iterdir()):
            if LIBRARY.fullmatch(path.name):
                return str(path)
    return None


def _installed() -> str | None:
    if program := shutil.which(PROGRAM):
        return program
    spec = find_spec("llama_cpp")  # llama-cpp-python brings the library along; nothing of it is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if library := _in_folder(Path(folder)):
            return library
    return ctypes.util.find_library("llama")


def quantise(source: Path, target: Path, quant: str) -> str:
    """From a float file to a quantised one; returns the name of what did it. RunError with llama.cpp's last words where
    it fails, or where it has written another type."""
    tool, file_type = quantiser(), LlamaFileType[f"MOSTLY_{quant.upper()}"]
    if Path(tool).name == PROGRAM:
        command = [tool, str(source), str(target), quant.upper()]
    else:
        script = Path(__file__).with_name("llama_library.py")
        command = [sys.executable, "-I", str(script), tool, str(source), str(target), str(file_type.value)]
    done = subprocess.run(command, capture_output=True, check=False)
    name = Path(tool).name
    if done.returncode or not target.is_file():
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}, no message"]
        raise RunError(f"{name} failed: {said[-1][:300]}\nnothing was published; try --quant q8_0")
    written = read_header(target).metadata.get("general.file_type")
    if written != file_type.value:
        raise RunError(f"{name} wrote file type {written} for {quant}\nnothing was published; try --quant q8_0")
    return name
