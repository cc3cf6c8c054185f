"""The types a tensor can be written as: floats, and the block quantisations that the library `gguf` computes.

A block is 32 numbers of one row, so that a few rows can be written by themselves. Norms stay fp32, as everything in
llama.cpp expects; embedding and head of 4- and 5-bit files are Q8_0, because their errors reach every token. K-quants
are llama.cpp's own (k_quants.py). Deliberately not here: importance matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from qmedtune.errors import RunError
from qmedtune.exporting.tensor_names import ENDS
from qmedtune.merging.parallel import in_fp32

KINDS = GGMLQuantizationType
FLOATS = {KINDS.F32: torch.float32, KINDS.F16: torch.float16, KINDS.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Quant:
    """What `--quant` names. ends: the type of embedding and head; file_type: llama.cpp's number for the whole."""

    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    file_type: LlamaFileType


QUANTS = {
    "f32": Quant(KINDS.F32, KINDS.F32, LlamaFileType.ALL_F32),
    "f16": Quant(KINDS.F16, KINDS.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Quant(KINDS.BF16, KINDS.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Quant(KINDS.Q8_0, KINDS.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": Quant(KINDS.Q5_1, KINDS.Q8_0, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": Quant(KINDS.Q5_0, KINDS.Q8_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": Quant(KINDS.Q4_1, KINDS.Q8_0, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": Quant(KINDS.Q4_0, KINDS.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}


def kind_of(name: str, shape: tuple[int, ...], quant: Quant) -> GGMLQuantizationType:
    """The type of a tensor of this GGUF name; a row that is not made of whole blocks is kept in F16."""
    if len(shape) < 2:
        return KINDS.F32
    kind = quant.ends if name in ENDS.values() else quant.matrices
    block, _ = GGML_QUANT_SIZES[kind]
    return KINDS.F16 if shape[-1] % block else kind


def size_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def _all_finite(values: Tensor) -> bool:
    """NaN goes through `aminmax`, which takes a twentieth of the time of `isfinite` for 16-bit numbers."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous. Between the two 16-bit types by way of fp32, which gives the same bits: torch has vector code for
    both of these steps, and none for the direct one."""
    if rows.dtype != dtype and torch.float32 not in (rows.dtype, dtype):
        return in_fp32(rows).to(dtype)
    return rows.to(dtype).contiguous()


def encoded(rows: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """uint8, the bytes of these rows. RunError where a number does not fit the type."""
    if kind in FLOATS:
        made = _converted(rows, FLOATS[kind])
        if not _all_finite(made):
            raise RunError(
                f"{name}: a number of it is not finite as {kind.name}\n"
                "it is too large for that (take --quant bf16 or f32), or the model is damaged"
            )
        return made.view(torch.uint8).numpy() if made.dim() else made.numpy()
    return quantize(rows.float().numpy(), kind)
