"""The proof of a merge: the written model against the same base with its adapters unmerged, on probe tokens.

Both are computed in fp32 from the weights on disk, layer by layer (disk_llama.py); the merged side reads the files that
were just written. Two things must agree: the distributions over the next token, and, up to rounding, what each linear
layer answers to random signs, which meet every element of it. Beside them the shift from the NF4 model that was trained
is measured: reported, never gated.
Deliberately not done in 16 bit: the rounding of activations alone is larger than what is to be found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qmedtune import ui
from qmedtune.errors import RunError
from qmedtune.merging.disk_llama import EMBEDDING, SIGNS, DiskLlama, StreamedLinear, open_llama, streamed_model
from qmedtune.merging.lora_files import Updates
from qmedtune.recipe import MergeSection, ModelSection

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PROBE_SEED = 17
# A wrong linear layer shows in its weight error, everything else within a few tokens. A large model gets 30, with SIGNS
# twice the 16 columns that MKL multiplies at once: a 1.1B shape has the KL it has with 64 (5.7e-5), in half the time.
PROBE_TOKENS, PROBE_TOKENS_LARGE, LARGE = 512, 30, 500_000_000
# Half a unit in the last place, relative: no element's rounding is larger, their root mean square at most 0.58 of it.
# For float32 what sums over a row in another order differ by.
WEIGHT_ERROR = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}


def probe(ids: np.ndarray | None, parameters: int, vocab: int) -> Tensor:
    """Token ids [rows, length]: the given ones, else random ones (seed 17), as many as a model of this size affords."""
    tokens = PROBE_TOKENS if parameters < LARGE else PROBE_TOKENS_LARGE
    if ids is None:
        return torch.randint(0, vocab, (2, tokens // 2), generator=torch.Generator().manual_seed(PROBE_SEED))
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))[:, : max(1, tokens // len(ids))]


def divergence(reference: Tensor, other: Tensor) -> dict[str, float]:
    """How far `other` is from `reference`, both logits [rows, length, vocab] in fp32.

    kl: mean over all positions of KL(reference || other) in nats per token; kl_max: the largest position's; top1: share
    of positions with the same most likely token; max_abs_logit_diff.
    """
    p_rows, q_rows = reference.flatten(0, 1), other.flatten(0, 1)
    kl, same, largest = [], 0, 0.0
    for p, q in zip(p_rows.split(16), q_rows.split(16), strict=True):  # 16 x 128k in fp64: 16 MB each
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        largest = max(largest, float((p - q).abs().max()))
    each = torch.cat(kl)
    return {
        "kl": max(0.0, float(each.mean())),
        "kl_max": max(0.0, float(each.max())),
        "top1": same / len(each),
        "max_abs_logit_diff": largest,
    }


def weight_errors(ours: nn.Module, reference: nn.Module, allowed: float) -> dict[str, float]:
    """Frobenius norm of the difference of each linear layer's weights over the weight's own, estimated from what both
    models, having run, answered to the same signs. The difference is unbiased in its square, within some 10 % for 64
    rows and more. So is the weight's norm, but for weights that have one main direction (half of it for one in a
    hundred that have 4/5 of their energy there): where the ratio is not `allowed`, the exact norm decides. Biases are
    left to the KL."""
    linears = [(name, m) for name, m in ours.named_modules() if isinstance(m, StreamedLinear)]
    others = [m for m in reference.modules() if isinstance(m, StreamedLinear)]
    return {name: _weight_error(a, b, allowed) for (name, a), b in zip(linears, others, strict=True)}


def _weight_error(ours: StreamedLinear, reference: StreamedLinear, allowed: float) -> float:
    difference = float((ours.response - reference.response).norm())
    error = difference / max(float(reference.response.norm()), 1e-30)
    return error if error <= allowed else difference / math.sqrt(SIGNS) / max(ours.norm(), 1e-30)


def prove(
    base: DiskLlama,
    updates: Updates,
    merged: Path,
    section: MergeSection,
    model_section: ModelSection,
    probe_ids: np.ndarray | None,
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:
    """Figures of `divergence` for the written model, and `shift_from_nf4` (None where training was not in NF4).

    Raises RunError where the mean KL is above `section.verify.max_kl`.
    """

    def nf4(name: str) -> Tensor:
        return base.nf4(name, model_section, pool.map)

    written = open_llama(merged)
    ids = probe(probe_ids, base.model.num_parameters(), base.model.config.vocab_size)
    models = [streamed_model(written, written.source, Updates(), pool.map)]
    models += [streamed_model(base, nf4 if section.base == "nf4" else base.source, updates, pool.map)]
    if model_section.quantization == "nf4" and section.base != "nf4":
        models += [streamed_model(base, nf4, updates, pool.map)]
    ours, reference, *trained = _logits(models, ids)
    error = _check_weights(weight_errors(models[0], models[1], WEIGHT_ERROR[section.dtype]), section.dtype)
    figures = divergence(reference, ours)
    if not figures["kl"] <= section.verify.max_kl:
        raise RunError(
            f"the merged model differs from base + adapters: KL {figures['kl']:.2e} nats per token, "
            f"allowed {section.verify.max_kl:.0e} (merge.verify.max_kl)\n"
            f"same most likely token: {figures['top1']:.1%}; nothing was published\n"
            f"{_remedy(base, section)}"
        )
    shift = {"nf4": figures, "full16": divergence(trained[0], ours) if trained else None}[section.base]
    return {
        **figures,
        "max_weight_error": error,
        "shift_from_nf4": shift,
        "probe": {"tokens": ids.numel(), "from": "held-out text" if probe_ids is not None else "random token ids"},
    }


def _check_weights(errors: dict[str, float], dtype: str) -> float:
    """The largest one, if rounding explains it."""
    name, worst = max(errors.items(), key=lambda each: (math.isnan(each[1]), each[1]))
    if not worst <= WEIGHT_ERROR[dtype]:
        raise RunError(
            f"{name}: the merged weight differs from base + adapters by {worst:.2e} of its norm, "
            f"rounding to {dtype} explains {WEIGHT_ERROR[dtype]:.1e}\n"
            f"nothing was published; merge again, to another disk or with merge.dtype: float32"
        )
    return worst


def _remedy(base: DiskLlama, section: MergeSection) -> str:
    stored = str(base.source(EMBEDDING).dtype).removeprefix("torch.")
    if stored != section.dtype:
        return f"the base is stored in {stored}, merge.dtype {section.dtype} rounds it: try merge.dtype: {stored}"
    return f"{section.dtype} may be too coarse for these weights: try merge.dtype: float32"


def _logits(models: Sequence[LlamaForCausalLM], ids: Tensor) -> list[Tensor]:
    """Each model's, side by side: while one waits for its last blocks or attends, the other's are computed."""
    layers = sum(len(model.model.layers) for model in models)
    with ui.stage("proving the merge", total=layers, unit="layers") as shown, ThreadPoolExecutor(len(models)) as each:

        @torch.no_grad()  # of each thread its own
        def logits(model: LlamaForCausalLM) -> Tensor:
            for layer in model.model.layers:
                layer.register_forward_hook(lambda *_: shown.update(shown.completed + 1))
            return model(input_ids=ids, use_cache=False).logits

        return list(each.map(logits, models))
