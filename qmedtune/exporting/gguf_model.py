"""A model folder as one GGUF file, written block by block: under 1 GB of memory whatever the model.

The library `gguf` writes header, metadata and the table of tensors; their data follow in blocks of rows, encoded on all
cores. Nothing is added to a weight and none is left out: tied ends are written once, LLaMA 3.1's stretched positions
become the tensor that llama.cpp reads them from. Deliberately not here: the proof (logit_proof.py), the place
(place.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from qmedtune import store, ui
from qmedtune.errors import RecipeError
from qmedtune.exporting.tensor_names import Heads, gguf_name, row_order
from qmedtune.exporting.types import FLOATS, QUANTS, Quant, encoded, kind_of, size_bytes
from qmedtune.exporting.vocabulary import Vocabulary
from qmedtune.merging.disk_llama import DiskLlama
from qmedtune.merging.parallel import in_order, workers
from qmedtune.merging.tensors import row_blocks
from qmedtune.model_stack import HEAD

if TYPE_CHECKING:
    from transformers import LlamaConfig

ROPE_FREQS = "rope_freqs.weight"
MAX_KV_BYTES = 64 << 20  # metadata, of which a vocabulary of 256,000 takes 20 MB


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: transformers' name (None: made here), its own, shape and type, and its rows in order."""

    source: str | None
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


def write_model(path: Path, model: DiskLlama, vocabulary: Vocabulary, quant: Quant, *, title: str) -> None:
    """Write the file. It may not be on the disk yet: the caller syncs.

    Raises RecipeError for what llama.cpp's LLaMA does not have, RunError for numbers that do not fit the type, OSError
    or RunError where the disk is full: then `path` is not whole.
    """
    factors = rope_factors(model.model.config)
    tensors = _tensors(model, quant, factors)
    total = sum(size_bytes(tensor.shape, tensor.kind) for tensor in tensors)
    store.check_room(path.parent, total + MAX_KV_BYTES, "the GGUF file")
    writer = GGUFWriter(path, "llama")
    try:
        _add_metadata(writer, model.model.config, quant, title)
        add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            size = size_bytes(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        [file] = writer.fout
        with workers() as pool, ui.progress_bar("writing GGUF", total=len(tensors), unit="tensors") as shown:
            for number, tensor in enumerate(tensors, start=1):
                _write_data(file, writer.data_alignment, _blocks(model, tensor, factors), pool)
                shown.update(number)
    finally:
        writer.close()


def exact_quant(model: DiskLlama) -> Quant:
    """The smallest of the float types that keeps every number of the folder: its own, where all tensors have one."""
    stored = {model.source(name).dtype for name in model.shapes}
    for quant in QUANTS.values():
        if stored == {FLOATS.get(quant.matrices)}:
            return quant
    return QUANTS["f32"]


def _tensors(model: DiskLlama, quant: Quant, factors: Tensor | None) -> list[GgufTensor]:
    found = []
    if factors is not None:
        shape = tuple(factors.shape)
        found.append(GgufTensor(None, ROPE_FREQS, shape, kind_of(ROPE_FREQS, shape, quant)))
    for source, shape in model.shapes.items():
        if source == HEAD and model.tied:
            continue  # llama.cpp takes the embedding where there is no output.weight
        if source.endswith(".bias"):
            raise RecipeError(f"{model.folder}: {source}: LLaMAs with biases are not exported as GGUF\n--as vllm")
        name = gguf_name(source)
        found.append(GgufTensor(source, name, tuple(shape), kind_of(name, tuple(shape), quant)))
    return found


def _blocks(model: DiskLlama, tensor: GgufTensor, factors: Tensor | None) -> Iterator[Callable[[], np.ndarray]]:
    """The tensor's bytes as jobs of a few rows each, in the file's order."""
    if tensor.source is None:
        assert factors is not None
        yield partial(encoded, factors, tensor.kind, tensor.name)
        return
    weight = model.source(tensor.source)
    order = row_order(tensor.source, len(weight), Heads.of(model.model.config))
    for rows in row_blocks(tensor.shape):
        yield partial(_encode_rows, weight, rows if order is None else order[rows], tensor)


def _encode_rows(weight: Tensor, rows: slice | Tensor, tensor: GgufTensor) -> np.ndarray:
    return encoded(weight[rows], tensor.kind, tensor.name)


def _write_data(
    file: IO[bytes], alignment: int, blocks: Iterator[Callable[[], np.ndarray]], pool: ThreadPoolExecutor
) -> None:
    """One tensor at the next multiple of the alignment, as `write_tensor_data` places one that is held whole."""
    _pad(file, alignment)
    for block in in_order(pool, blocks):
        file.write(block.reshape(-1).view(np.uint8).data)
    _pad(file, alignment)


def _pad(file: IO[bytes], alignment: int) -> None:
    """Zeros up to the next multiple."""
    file.write(bytes(-file.tell() % alignment))


# ---- metadata --------------------------------------------------------------------------------------------------------


def _add_metadata(writer: GGUFWriter, config: LlamaConfig, quant: Quant, title: str) -> None:
    heads = Heads.of(config)
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(quant.file_type)
    writer.add_quantization_version(2)  # of the block layouts; raised by llama.cpp in May 2023
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.count)
    writer.add_head_count_kv(heads.kv)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    writer.add_rope_dimension_count(heads.size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_of(config: LlamaConfig) -> Mapping[str, Any]:
    """How positions are rotated. RecipeError for a way that is not carried over."""
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    allowed = ("default", "linear", "llama3")
    if rope.setdefault("rope_type", "default") not in allowed:
        raise RecipeError(
            f"config.json: rope_type {rope['rope_type']!r} is not exported as GGUF\nallowed: {', '.join(allowed)}"
        )
    return rope


def rope_factors(config: LlamaConfig) -> Tensor | None:
    """fp32 [head_dim / 2]: by how much LLaMA 3.1's scaling divides each frequency; None without it.

    The three bands of Meta's `apply_scaling` (Llama 3.1, 2024): short wavelengths stay, long ones are divided by
    `factor`, those between are blended.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    size = Heads.of(config).size
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    wavelengths = 2 * math.pi / (1.0 / rope.get("rope_theta", 10000.0) ** exponents)
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (trained / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    stretched = torch.where(wavelengths > trained / low, torch.full_like(blended, factor), blended)
    return torch.where(wavelengths < trained / high, torch.ones_like(blended), stretched)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for key, id in vocabulary.ids.items():
        name = "unknown_token_id" if key == "unknown" else f"{key}_token_id"
        writer.add_uint32(f"tokenizer.ggml.{name}", id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_before)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
