"""What this program asks of the process that it runs in: set at its start, never by `import qmedtune`.

The command line calls `prepare` first, and so does each function of the Python interface: whoever only imports the
package keeps his environment as it was. All of it must be there before torch and bitsandbytes are loaded. Deliberately
not here: anything that a recipe can say.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from qmedtune import makers


def prepare() -> None:
    """Set the environment of this process and its children, and say who makes a built-in base; once is enough."""
    # OpenMP threads sleep instead of spinning while they wait. Where another process wants the same cores, spinning
    # makes small-model training on the CPU collapse: 221 -> 4,310 tokens/s on 2 busy cores (same step, load 8,
    # 2026-11-22). Read when torch is loaded; a value set by the user stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # Memory of a GPU in segments that grow: rows change in length from batch to batch, and segments of fixed size leave
    # holes between them. Read when the first tensor is put there; what the user says about the allocator stays.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    # TRL 1.16 reports model type and GPU name to the Hub from every trainer, and the Hub's library names its caller.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

    # Where Hugging Face's `kernels` is installed, bitsandbytes downloads and loads compiled code through it at import,
    # and says so where it is not. It never should: no fetched code is run, so that package is not there for us. Where
    # the host process has loaded it already, it stays.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    makers.made_by(_make_base)


def _make_base(name: str, folder: Path) -> None:
    from qmedtune import builtin_base

    builtin_base.make(name, folder)
