"""The proof of a merge: what was published, as transformers reads it, against base + adapters, as transformers and
PEFT read them.

Gated, each fault by the name of its tensor: the files and their names, the tie flag, adapters and scales
(reference.py), and every element (elements.py). Reported, never gated unless a recipe asks for it: how far the model is
from base + adapters in nats per token, which share of the change rounding lost, and the shift from the NF4 model that
was trained.
No threshold on a divergence separates right merges from wrong ones (docs/merging.md).
Deliberately not done in 16 bit: the rounding of activations alone is larger than what is to be measured.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from torch import Tensor

from qmedtune import ui
from qmedtune.errors import MergeRefused, RunError
from qmedtune.merging.diagnosis import diagnose, place_of
from qmedtune.merging.disk_llama import DiskLlama
from qmedtune.merging.elements import ElementCheck, Expected
from qmedtune.merging.lora_files import Updates
from qmedtune.merging.methods import Mixture, Source, WeightedSum, same
from qmedtune.merging.parallel import in_fp32
from qmedtune.merging.reference import ReadModel, difference, read_model, tie_flag
from qmedtune.merging.rounding import Rounding
from qmedtune.merging.streamed import Load, Streamed, from_parameters, logits_of_all, streamed_model
from qmedtune.merging.tensors import open_weights, row_blocks
from qmedtune.model import DTYPES
from qmedtune.model_stack import EMBEDDING, HEAD, INDEX, SINGLE
from qmedtune.recipe import MergeSection, ModelSection
from qmedtune.results import Probe, Proven, Shift

PROBE_SEED = 17
# Of a large model each token costs a fiftieth of the merge; what is gated does not depend on them. Multiples of 16: a
# block of weights times 32 columns takes MKL .37 ms, times 30 of them .60 (Zen 4, one core).
PROBE_TOKENS, PROBE_TOKENS_LARGE, LARGE = 512, 32, 500_000_000
# KL of the unrounded fp32 sum, in another order, to itself: up to 2.2e-11. A change of the model below this is none.
SMALLEST_CHANGE = 1e-8


@dataclass(frozen=True)
class Reference:
    """What is to be proven against: the base as transformers reads it, and the adapters as PEFT does; where another
    model is mixed in, the updates with their factors, and what they are added to."""

    base: ReadModel
    updates: Updates
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Divergence:
    """How far one model's distributions over the next token are from another's: KL in nats per token (mean over
    positions, and the largest position's), share of positions with the same most likely token, largest difference of
    two logits."""

    kl: float
    kl_max: float
    top1: float
    max_abs_logit_diff: float


@dataclass(frozen=True)
class RoundingLoss:
    """Share of the training's effect that rounding the merged weights lost.

    lost: KL(merged || base + adapters) over KL(base || base + adapters), None where the adapters change nothing.
    """

    lost: float | None
    kl_of_base: float


def probe(ids: np.ndarray | None, parameters: int, vocab: int) -> Tensor:
    """Token ids [rows, length]: the given ones, else random ones (seed 17), as many as a model of this size affords."""
    tokens = PROBE_TOKENS
    if parameters >= LARGE:
        tokens = PROBE_TOKENS_LARGE
    if ids is None:
        return torch.randint(0, vocab, (2, tokens // 2), generator=torch.Generator().manual_seed(PROBE_SEED))
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))[:, : max(1, tokens // len(ids))]


def divergence(reference: Tensor, other: Tensor) -> Divergence:
    """Of `other` from `reference`, both logits [rows, length, vocab] in fp32."""
    p_rows, q_rows = reference.flatten(0, 1), other.flatten(0, 1)
    kl, same, largest = [], 0, 0.0
    for p, q in zip(p_rows.split(16), q_rows.split(16), strict=True):  # 16 x 128k in fp64: 16 MB each
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        largest = max(largest, float((p - q).abs().max()))
    each = torch.cat(kl)
    return Divergence(max(0.0, float(each.mean())), max(0.0, float(each.max())), same / len(each), largest)


def loss_of(kl: float, kl_of_base: float) -> RoundingLoss:
    if kl_of_base < SMALLEST_CHANGE:
        return RoundingLoss(None, kl_of_base)
    return RoundingLoss(kl / kl_of_base, kl_of_base)


@dataclass(kw_only=True)
class MergeProof:
    """The proof of one merged folder: `written` is what transformers reads there. `base.nf4` gives the weights where
    the merge is onto NF4's values."""

    base: DiskLlama
    reference: Reference
    merged: Path
    section: MergeSection
    model: ModelSection
    rounding: Rounding
    pool: ThreadPoolExecutor
    written: ReadModel = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.written = read_model(self.merged, self.rounding.dtype)
        except RunError as error:
            raise MergeRefused(str(error), {}) from error

    def check_nf4(self) -> None:
        """The values of NF4 come from own code (nf4_roundtrip.py): bitsandbytes, some hundred times as slow, reads the
        smallest weight a second time."""
        shapes = self.base.shapes
        by_size: list[tuple[int, str]] = []
        for linear in self.base.linears:
            name = f"{linear}.weight"
            if name != HEAD:
                by_size.append((math.prod(shapes[name]), name))
        _, name = min(by_size)
        dtype = DTYPES[self.model.compute_dtype]
        weight = self.reference.base.parameters[name].to(dtype).contiguous()
        state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=self.model.double_quantization, quant_type="nf4"
        )
        if not torch.equal(bnb.dequantize_4bit(*state), self.nf4(name)):
            raise MergeRefused(
                f"{place_of(name)}: bitsandbytes reads other values of NF4 than the merge", {"tensor": name}
            )

    def nf4(self, name: str) -> Tensor:
        return self.base.nf4(name, self.model, self.pool.map)

    @property
    def load(self) -> Load:
        """Base weights that updates are added to."""
        if self.section.base == "nf4":
            return self.nf4
        if self.reference.mixture is not None:
            return self.reference.mixture.source
        return from_parameters(self.reference.base.parameters)

    def weight(self, name: str) -> Source:
        full = self.reference.updates.full
        if name in full:
            return full[name]
        return self.load(name)

    def run(self, probe_ids: np.ndarray | None) -> Proven:
        """What it counts. Raises MergeRefused where anything is not as it must be."""
        check_files(self.merged, self.section.dtype, self.written)
        check_tie(self.merged, self.reference, self.written)
        if self.section.base == "nf4":
            self.check_nf4()
        ids = probe(probe_ids, self.base.model.num_parameters(), self.base.model.config.vocab_size)
        check = ElementCheck(self.rounding, self._expected(), self.written.parameters)
        reference, bare, ours, trained = self._logits(ids, check)
        self._check_rest(check)
        self._refuse_violations(check)
        figures = divergence(reference, ours)
        loss = loss_of(figures.kl, divergence(reference, bare).kl)
        self._refuse_limit(figures)
        total = check.total()
        swallowed, shift = None, None
        if total.changed:
            swallowed = total.swallowed / total.changed
        if self.section.base == "nf4":
            shift = Shift(**asdict(figures))
        elif trained is not None:
            shift = Shift(**asdict(divergence(trained, ours)))
        origin = "random token ids"
        if probe_ids is not None:
            origin = "held-out text"
        return Proven(
            **asdict(figures),
            **asdict(loss),
            elements=total.elements,
            violations=total.violations,
            swallowed=swallowed,
            shift_from_nf4=shift,
            probe=Probe.model_validate({"tokens": ids.numel(), "from": origin}),
        )

    def _expected(self) -> dict[str, Expected]:
        updates = self.reference.updates
        changed = {name: self.load(name) for name in updates.full}
        changed |= self._mixed_alone()
        found: dict[str, Expected] = {}
        for name in self.written.parameters:
            if name == HEAD and self.written.tied:
                continue
            found[name] = Expected(name, tuple(updates.low_rank.get(name, ())), changed.get(name))
        return found

    def _mixed_alone(self) -> dict[str, Source]:
        """What the base has of tensors that a mix changes and no low-rank update does."""
        reference = self.reference
        if reference.mixture is None:
            return {}
        found: dict[str, Source] = {}
        for name in self.written.parameters:
            whole = name in reference.updates.full or isinstance(reference.mixture.source(name), WeightedSum)
            if whole and name not in reference.updates.low_rank:
                found[name] = reference.base.parameters[name]
        return found

    def _logits(self, ids: Tensor, check: ElementCheck) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of base + adapters, the bare base, the merged model and the NF4 model that was trained, side by side. The
        first one's blocks are checked as they pass."""
        skeleton, updates, apply = self.base.model, self.reference.updates, self.pool.map

        def visit(name: str, rows: slice, weight: Source, block: Tensor) -> None:
            if name not in check.expected:
                name = EMBEDDING
            check.block(name, rows, weight, block)

        sources = [Streamed(self.load, updates, True, visit, apply)]
        sources += [Streamed(from_parameters(self.written.parameters), apply=apply)]
        if self.model.quantization == "nf4" and self.section.base != "nf4" and self.reference.mixture is None:
            sources += [Streamed(self.nf4, updates, apply=apply)]
        models = [streamed_model(skeleton, source) for source in sources]
        layers = []
        for model in models:
            layers += model.model.layers
        with ui.progress_bar("proving the merge", total=len(layers), unit="layers") as shown:
            for layer in layers:
                layer.register_forward_hook(lambda *_: shown.update(shown.completed + 1))
            found = logits_of_all(models, ids, sources)
        [reference, bare], [ours], *others = found
        trained = None
        if others:
            [[trained]] = others
        return reference, bare, ours, trained

    def _check_rest(self, check: ElementCheck) -> None:
        """Embedding, norms and biases: no linear layer has brought them."""

        def one(name: str) -> None:
            weight = self.weight(name)
            for rows in row_blocks(tuple(weight.shape)):
                check.block(name, rows, weight, in_fp32(weight[rows]))

        list(self.pool.map(one, check.rest()))

    def _refuse_violations(self, check: ElementCheck) -> None:
        count, worst, share = 0, "", 0.0
        for name, tally in check.tallies.items():
            if tally.violations:
                count += 1
                if tally.violations / tally.elements > share:
                    worst, share = name, tally.violations / tally.elements
        if not count:
            return
        tally, reason = check.tallies[worst], diagnose(check, worst, self.weight)
        others = ""
        if count > 1:
            others = f" ({count} of {len(check.tallies)} tensors differ)"
        raise MergeRefused(
            f"{place_of(worst)} is not base + adapters rounded to {self.section.dtype}: "
            f"{tally.violations:,} of {tally.elements:,} elements differ, {reason}{others}",
            {"violations": check.total().violations, "elements": check.total().elements, "tensor": worst},
        )

    def _refuse_limit(self, figures: Divergence) -> None:
        limit = self.section.verify.max_kl
        if limit is not None and not figures.kl <= limit:
            raise MergeRefused(
                f"the merged model is {figures.kl:.2e} nats per token from base + adapters, "
                f"merge.verify.max_kl allows {limit:.0e}\n"
                "every element is right: only a wider merge.dtype, or merge.rounding: stochastic, comes nearer",
                asdict(figures),
            )

    def lost_by(self, rounding: Rounding, probe_ids: np.ndarray | None) -> float | None:
        """What another rounding would lose, without writing it."""
        ids = probe(probe_ids, self.base.model.num_parameters(), self.base.model.config.vocab_size)
        check = ElementCheck(rounding, self._expected(), self.written.parameters)

        def rounded(name: str) -> Source:
            if name not in check.expected:
                name = EMBEDDING
            return _round(check.expected[name], self.weight(name), rounding)

        apply = self.pool.map
        sources = [Streamed(self.load, self.reference.updates, True, None, apply), Streamed(rounded, apply=apply)]
        models = [streamed_model(self.base.model, source) for source in sources]
        [reference, bare], [ours] = logits_of_all(models, ids, sources)
        return loss_of(divergence(reference, ours).kl, divergence(reference, bare).kl).lost


def _round(expected: Expected, weight: Source, rounding: Rounding) -> Source:
    """The whole tensor as the merge would write it, block by block; itself, where nothing changes it."""
    if not expected.changed_by_training and weight.dtype == rounding.dtype:
        return weight
    out = torch.empty(weight.shape, dtype=rounding.dtype)
    for rows in row_blocks(tuple(weight.shape)):
        block = in_fp32(weight[rows])
        if expected.low_rank:
            b, a = expected.factors
            block.addmm_(b[rows], a)
        first = rows.start * (weight.numel() // max(1, len(weight)))
        out[rows] = expected.rounding(rounding)(block, expected.name, first)
    return out


def check_readings(updates: Updates, reference: Reference) -> None:
    """MergeRefused where the merge has folded other adapters, or scales, than PEFT reads."""
    if found := difference(updates, reference.updates):
        raise MergeRefused(f"the adapters were read in two ways: {found}", {})


def check_files(folder: Path, dtype: str, written: ReadModel) -> None:
    """The weight files are those that transformers reads, with the right tensors in the right dtype and no others."""
    files = {path.name for path in folder.glob("*.safetensors")}
    weights, named = open_weights(folder), {SINGLE}
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        named = set(weight_map.values())
        if SINGLE in files:
            raise MergeRefused(f"{SINGLE} and {INDEX} are both there: programs differ in which one they read", {})
        for name, file in sorted(weights.files.items()):
            if weight_map.get(name) != file:
                raise MergeRefused(f"{INDEX} is stale: it does not lead to {place_of(name)} ({name})", {})
    if extra := sorted(files - named):
        raise MergeRefused(f"{extra[0]} is among the weights, and nothing names it", {})
    if written.unexpected:
        raise MergeRefused(f"tensor {written.unexpected[0]} was written, which is none of the model", {})
    for name in weights.files:
        if (stored := str(weights[name].dtype).removeprefix("torch.")) != dtype:
            raise MergeRefused(f"{place_of(name)} was written as {stored}, not {dtype}", {"tensor": name})


def check_tie(folder: Path, reference: Reference, written: ReadModel) -> None:
    """Ends are tied in the published model if, and only if, they are one matrix in base + adapters."""
    updates = reference.updates
    trained = updates.low_rank.keys() | updates.full.keys()
    one = reference.base.tied and trained.isdisjoint((EMBEDDING, HEAD))
    if reference.base.tied and EMBEDDING in updates.full and HEAD in updates.full:
        one = same(updates.full[EMBEDDING], updates.full[HEAD])
    if written.tied and not one:
        raise MergeRefused(
            "the output layer is lost: it was published tied to the embedding, which is another matrix",
            {"tensor": HEAD},
        )
    if tie_flag(folder) != written.tied or (one and not written.tied):
        raise MergeRefused("config.json: tie_word_embeddings does not say what the weights are", {})
