"""qmedtune: an open LLaMA becomes a medical one on a single GPU, in one recipe.

The Python interface is what `__all__` lists (see api.py); each name is imported when it is first used.
"""

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmedtune.api import merge_adapters, plan_recipe, run_recipe
    from qmedtune.errors import QmedtuneError
    from qmedtune.evaluate import evaluate_model
    from qmedtune.parsing.loader import load_recipe

__all__ = ["QmedtuneError", "evaluate_model", "load_recipe", "merge_adapters", "plan_recipe", "run_recipe"]
__version__ = "0.2.0"
_HOMES = {
    "QmedtuneError": "errors",
    "evaluate_model": "evaluate",
    "load_recipe": "parsing.loader",
    "merge_adapters": "api",
    "plan_recipe": "api",
    "run_recipe": "api",
}

# OpenMP threads sleep instead of spinning while they wait. Where another process wants the same cores, spinning makes
# small-model training on the CPU collapse: 221 -> 4,310 tokens/s on 2 busy cores (same step, load 8, 2026-11-22).
# Read when torch is loaded, so it has to stand here; a value set by the user stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Memory of a GPU in segments that grow: rows change in length from batch to batch, and segments of fixed size leave
# holes between them. Read when the first tensor is put there; what the user says about the allocator stays.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# TRL 1.16 reports model type and GPU name to the Hub from every trainer, and the Hub's library names its caller.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Where Hugging Face's `kernels` is installed, bitsandbytes downloads and loads compiled code through it at import, and
# says so where it is not. It never should: no fetched code is run, so that package is not there for this process.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """The public names, which would cost seconds if they were imported here."""
    if name in _HOMES:
        return getattr(import_module(f"qmedtune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qmedtune' has no attribute {name!r}")
