"""What recipe keys, options of the command line and arguments of functions may be, where several of them take the same.

Deliberately not here: types that need pydantic (fields.py), values that only one recipe key takes (sections/).
"""

from __future__ import annotations

from typing import Literal

Quantization = Literal["nf4", "none"]
"""How weights are held: in 4 bits, or in 16."""
MergeBase = Literal["full16", "nf4"]
"""What adapters are folded into: the 16-bit base, or its dequantised NF4 values."""
FloatDtype = Literal["bfloat16", "float16", "float32"]
MergeMethod = Literal["linear", "slerp", "task_arithmetic"]
RoundingMode = Literal["auto", "nearest", "stochastic"]
ScoringPrecision = Literal["delivered", "nf4", "full16"]
"""What base and result are scored in."""
BenchmarkSplit = Literal["test", "dev", "train"]
PromptSet = Literal["own", "me_llama"]
"""Who words a benchmark's questions."""
Extraction = Literal["stated", "me_llama"]
"""How the answer is read out of what a model wrote."""
ExportForm = Literal["gguf", "gguf-adapter", "ollama", "vllm", "transformers", "hub"]
