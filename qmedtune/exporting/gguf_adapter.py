"""A LoRA adapter as a GGUF adapter, which llama.cpp adds to the base's file when it loads it.

llama.cpp scales an update by alpha / r, with one alpha for the file and r of each tensor. PEFT's scale is alpha / r
too, or alpha / sqrt(r) with rsLoRA: so alpha is written as scale x r (45.25 for alpha 16 and r 8; llama.cpp's own
converter writes 16, and the adapter is silently weak). Where modules differ, the rest of the scale goes into B. Several
adapters on one base are one of the sum of their ranks. Deliberately refused: trained copies of embeddings, which have
no place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, ReaderTensor, dequantize
from torch import Tensor

from qmedtune import store
from qmedtune.errors import RecipeError, RunError
from qmedtune.exporting.logit_proof import LIMITS, probe_ids
from qmedtune.exporting.tensor_names import Heads, gguf_name, row_order
from qmedtune.exporting.types import FLOATS, QUANTS
from qmedtune.merging.disk_llama import DiskLlama
from qmedtune.merging.lora_files import LowRank, Updates, read_adapters
from qmedtune.merging.parallel import workers
from qmedtune.merging.proof import divergence
from qmedtune.merging.reference import read_base, read_updates
from qmedtune.merging.streamed import Streamed, from_parameters, logits_of_all, streamed_model
from qmedtune.model_stack import HEAD

ALLOWED = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class AdapterProof:
    """Base + adapter of the file against base + adapters as PEFT reads them, on logits; alpha: as the file has it."""

    kl: float
    top1: float
    max_abs_logit_diff: float
    alpha: float
    modules: int
    probe_tokens: int


def write_adapter(path: Path, model: DiskLlama, folders: Sequence[Path], quant: str, *, title: str) -> AdapterProof:
    """Write and prove the file. Raises RecipeError for what a GGUF adapter cannot hold."""
    updates = read_adapters(folders, model.shapes)
    _check(updates, model, folders)
    joined = {name: _joined(parts) for name, parts in updates.low_rank.items()}
    alpha = _alpha(joined)
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_type("adapter")
        writer.add_name(title)
        writer.add_file_type(QUANTS[quant].file_type)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, update in joined.items():
            b = update.b * (update.scale * len(update.a) / alpha)
            order = _order(model, name, len(b))
            _add(writer, f"{gguf_name(name)}.lora_a", update.a, quant)
            _add(writer, f"{gguf_name(name)}.lora_b", b if order is None else b[order], quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    store.fsync_path(path)
    return _prove(path, model, folders, quant)


def _check(updates: Updates, model: DiskLlama, folders: Sequence[Path]) -> None:
    merge = f"merge it instead: qmedtune merge {folders[-1]} --out MERGED, and export that with --as gguf"
    if updates.full:
        name = next(iter(updates.full))
        raise RecipeError(f"{folders[-1]}: holds a trained copy of {name}; a GGUF adapter holds updates alone\n{merge}")
    if HEAD in updates.low_rank and model.tied:
        raise RecipeError(
            f"{folders[-1]}: updates the head, which is the base's embedding too: its file has no head\n{merge}"
        )


def _joined(parts: Sequence[LowRank]) -> LowRank:
    """Several updates of one weight as one; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    scaled = [part.b * part.scale for part in parts]
    return LowRank(torch.cat([part.a for part in parts]), torch.cat(scaled, 1), 1.0)


def _alpha(joined: dict[str, LowRank]) -> float:
    """The alpha that most modules share."""
    found: dict[float, int] = {}
    for update in joined.values():
        alpha = update.scale * len(update.a)
        found[alpha] = found.get(alpha, 0) + 1
    return max(found, key=lambda alpha: found[alpha])


def _order(model: DiskLlama, name: str, rows: int) -> Tensor | None:
    return row_order(name, rows, Heads.of(model.model.config))


def _add(writer: GGUFWriter, name: str, values: Tensor, quant: str) -> None:
    kind = QUANTS[quant].matrices
    made = values.to(FLOATS[kind]).contiguous()
    if not made.isfinite().all():
        raise RunError(f"{name}: a number of it is not finite as {kind.name}\nexport with --quant f32")
    data = made.view(torch.uint8).numpy() if quant == "bf16" else made.numpy()
    writer.add_tensor(name, data, raw_dtype=kind)


# ---- the proof -------------------------------------------------------------------------------------------------------


def _prove(path: Path, model: DiskLlama, folders: Sequence[Path], quant: str) -> AdapterProof:
    """RunError where the file, read by the library `gguf`, is not what PEFT reads."""
    updates, alpha = read_file(path, model)
    ids = probe_ids(model)
    with workers() as pool:
        load = from_parameters(read_base(model.folder, model.weights).parameters)
        theirs = read_updates(folders, model.model)
        sources = [Streamed(load, told, apply=pool.map) for told in (theirs, updates)]
        models = [streamed_model(model.model, source) for source in sources]
        [expected], [found] = logits_of_all(models, ids, sources)
    figures = divergence(expected, found)
    if not figures.kl <= LIMITS.get(quant, LIMITS["f16"]):
        raise RunError(
            f"{path.name}: {figures.kl:.2e} nats per token from base + adapter\n"
            "nothing was published; export with --quant f32"
        )
    return AdapterProof(figures.kl, figures.top1, figures.max_abs_logit_diff, alpha, len(updates.low_rank), ids.numel())


def read_file(path: Path, model: DiskLlama) -> tuple[Updates, float]:
    """What llama.cpp reads of the file: updates by transformers' names, rows in transformers' order; and its alpha."""
    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
    updates = Updates()
    for linear in model.linears:
        name = f"{linear}.weight"
        if (a := tensors.pop(f"{gguf_name(name)}.lora_a", None)) is None:
            continue
        b = tensors.pop(f"{gguf_name(name)}.lora_b")
        order = _order(model, name, len(b))
        b = b if order is None else b[order.argsort()]
        updates.low_rank[name] = [LowRank(a, b, alpha / b.shape[1])]
    if tensors:
        raise RunError(f"{path.name}: tensor {next(iter(tensors))} belongs to no module of the base")
    return updates, alpha


def _values(tensor: ReaderTensor) -> Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
