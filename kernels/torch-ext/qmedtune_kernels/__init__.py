"""Triton kernels for QLoRA: NF4 dequantise and matmul, LoRA linears, RMSNorm, SwiGLU, RoPE, loss; a reference beside
each.

Knows neither bitsandbytes nor PEFT: it takes raw packed tensors. Only relative imports (Hugging Face kernel-builder).
"""

from . import cross_entropy, dispatch, layers, lora, matmul, nf4, rms_norm, rope, swiglu
from .lora import Adapter
from .nf4 import NF4Weight

__all__ = [
    "Adapter", "NF4Weight", "cross_entropy", "dispatch", "layers", "lora", "matmul", "nf4", "rms_norm", "rope", "swiglu"
]  # fmt: skip
