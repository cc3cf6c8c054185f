"""qmedtune: an open LLaMA becomes a medical one on a single GPU, in one recipe."""

import logging
import os
import sys

__version__ = "0.1.0"

# OpenMP threads sleep instead of spinning while they wait. Where another process wants the same cores, spinning makes
# small-model training on the CPU collapse: 221 -> 4,310 tokens/s on 2 busy cores (same step, load 8, 2026-11-22).
# Read when torch is loaded, so it has to stand here; a value set by the user stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# TRL 1.16 reports model type and GPU name to the Hub from every trainer, and the Hub's library names its caller.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Where Hugging Face's `kernels` is installed, bitsandbytes downloads and loads compiled code through it at import, and
# says so where it is not. It never should: no fetched code is run, so that package is not there for this process.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
