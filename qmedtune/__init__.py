"""qmedtune: an open LLaMA becomes a medical one on a single GPU, in one recipe."""

import logging
import os

__version__ = "0.1.0"

# OpenMP threads sleep instead of spinning while they wait. Where another process wants the same cores, spinning makes
# small-model training on the CPU collapse: 221 -> 4,310 tokens/s on 2 busy cores (same step, load 8, 2026-11-22).
# Read when torch is loaded, so it has to stand here; a value set by the user stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# bitsandbytes says at import that it did not fetch CPU kernels from the Hub. It never should: no fetched code is run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
