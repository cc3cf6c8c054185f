"""K-quants, which llama.cpp alone computes: through its `llama-quantize`, where the user has it.

The library `gguf` unpacks them and cannot pack them. Deliberately not here: builds or downloads of llama.cpp.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from qmedtune.errors import RecipeError, RunError
from qmedtune.exporting.types import QUANTS

# As `llama-quantize --help` names them.
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
PROGRAM = "llama-quantize"
PLACE = "QMEDTUNE_LLAMA_CPP"


def check_quant(quant: str) -> None:
    """RecipeError for a quantisation that there is not, or that needs a llama.cpp that is not here."""
    if quant in QUANTS:
        return
    if quant not in K_QUANTS:
        raise RecipeError(f"--quant: got {quant!r}\nallowed: {', '.join([*QUANTS, *K_QUANTS])}")
    program()


def program() -> str:
    """The path of llama-quantize: in the folder that QMEDTUNE_LLAMA_CPP names, else among the commands."""
    place = os.environ.get(PLACE)
    found = shutil.which(PROGRAM, path=place) if place else shutil.which(PROGRAM)
    if found is None:
        raise RecipeError(
            "--quant: K-quants are computed by llama.cpp alone, and its llama-quantize is not here\n"
            f"install llama.cpp, or name the folder of that program: {PLACE}=FOLDER\n"
            f"without it: {', '.join(QUANTS)}"
        )
    return found


def quantise(source: Path, target: Path, quant: str) -> None:
    """From an f32 or f16 file to a quantised one. RunError with llama.cpp's last words where it fails."""
    done = subprocess.run([program(), str(source), str(target), quant.upper()], capture_output=True, check=False)
    if done.returncode or not target.is_file():
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RunError(f"{PROGRAM} failed: {said[-1][:300]}\nnothing was published; try --quant q8_0")
