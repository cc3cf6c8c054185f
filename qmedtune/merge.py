"""Fold adapters into a model folder, tensor by tensor, and prove it before anything is renamed.

W + sum of scale * B @ A is added in fp32 and rounded once, to the nearest number or stochastically (rounding.py).
Memory is a few blocks of 2 MB whatever the model; the sharding is the base's. The proof (merging/proof.py) holds every
element of what was written against base + adapters, read by transformers and PEFT.
Deliberately does not re-quantise (PEFT on 4-bit layers does, and loses the update), and does not rename: store.py does.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmedtune import store, ui
from qmedtune.base import check_chain
from qmedtune.data.packing.framing import write_template
from qmedtune.errors import RecipeError, RunError
from qmedtune.lineage import parts_of
from qmedtune.merging.disk_llama import DiskLlama, open_llama
from qmedtune.merging.lora_files import LowRank, Updates, read_adapters
from qmedtune.merging.methods import Mixture, Source, WeightedSum, same
from qmedtune.merging.other_model import open_other
from qmedtune.merging.parallel import in_fp32, in_order, workers
from qmedtune.merging.proof import PROBE_TOKENS, MergeProof, Reference, check_readings
from qmedtune.merging.reference import ReadModel, read_base, read_updates
from qmedtune.merging.rounding import Rounding
from qmedtune.merging.sibling import Mixing
from qmedtune.merging.tensors import row_blocks, write_safetensors
from qmedtune.merging.weighing import Share, blend, check_blend, last_adapters, summed, terms_of, weigh
from qmedtune.model import DTYPES
from qmedtune.model_settings import ATTENTION
from qmedtune.model_stack import EMBEDDING, HEAD, INDEX, ModelStack
from qmedtune.recipe import MergeSection, ModelSection, Recipe
from qmedtune.results import Merge, Proven

# Written by the merge itself, or meaningless for a merged model; everything else that describes a model is copied.
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# The share of the change (by KL) that `rounding: auto` lets the nearest number lose: a hundredth of what was learnt.
MAX_LOST = 0.01


@dataclass(frozen=True)
class MergeJob:
    """The adapters of `stack` are folded into its base. seed: of stochastic rounding. probe_ids: int64 token ids
    [rows, length] to report divergences on (large models use their first columns), None: random ones. card: text of
    README.md. shares: how much of each stage, where that is not all of each. mixing: what comes in of another model.
    `model.compute_dtype` must be resolved."""

    stack: ModelStack
    section: MergeSection
    model: ModelSection
    seed: int = 17
    probe_ids: np.ndarray | None = None
    card: str | None = None
    shares: Sequence[Share] = ()
    mixing: Mixing | None = None

    @property
    def described(self) -> ModelStack:
        """What has configuration, tokenizer and template of the result: of siblings the other one, which knows a chat's
        marks and ends; the template of training before all."""
        if self.mixing is None:
            return self.stack
        sibling = self.mixing.sibling
        return ModelStack(sibling.folder, template=self.stack.template or sibling.template)

    @property
    def folders(self) -> list[Path]:
        """Of all adapters that are read."""
        return [share.adapter for share in self.shares] or list(self.stack.adapters)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.section.dtype]

    @property
    def nearest(self) -> Rounding:
        return Rounding(self.dtype)

    @property
    def stochastic(self) -> Rounding:
        return Rounding(self.dtype, self.seed)


def merge_step(recipe: Recipe, stack: ModelStack, out: Path, validation: Path | None = None) -> Merge:
    """The step of a run. validation: folder of packed rows per source, which the proof reports divergences on."""
    return merge(MergeJob(stack, recipe.merge, recipe.model, recipe.seed, validation_ids(validation)), out)


def weighed_merge_step(recipe: Recipe, stack: ModelStack, out: Path, validation: Path | None = None) -> Merge:
    """As `merge_step` where the recipe weighs its stages: the adapters are those of all stages, in order."""
    shares = shares_of(recipe, recipe.merge.weights, stack.adapters)
    kept = replace(stack, adapters=stack_of(shares))
    probe_ids = validation_ids(validation)
    return merge(MergeJob(kept, recipe.merge, recipe.model, recipe.seed, probe_ids, shares=shares), out)


def shares_of(recipe: Recipe, weights: Mapping[str, float], adapters: Sequence[Path]) -> list[Share]:
    """What of each stage is merged, `adapters` being theirs in order; none of it where all of each is."""
    parts = parts_of(recipe)
    if all(weights.get(part.stage, 1.0) == 1.0 for part in parts):
        return []
    place = {part.adapter: adapter for part, adapter in zip(parts, adapters, strict=True)}
    shares = []
    for part in parts:
        earlier = place[part.earlier] if part.earlier else None
        shares.append(Share(part.stage, place[part.adapter], earlier, weights.get(part.stage, 1.0)))
    return shares


def stack_of(shares: Sequence[Share]) -> tuple[Path, ...]:
    """The adapters that the trained model has on its base: those that no later stage continues."""
    continued = {share.earlier for share in shares}
    return tuple(share.adapter for share in shares if share.adapter not in continued)


def merge(job: MergeJob, out: Path) -> Merge:
    """Write base + adapters as a plain model folder into `out`, an existing staging folder.

    Raises RecipeError for folders that do not fit together, RunError where a file is damaged or a weight is not finite:
    then `out` must not be used; MergeRefused where the proof fails: `out` is complete, and wrong.
    """
    started = time.monotonic()
    check_onto(job.section, job.model)
    base, folded = job.stack.base, job.stack.adapters
    opened = open_llama(base)
    with ExitStack() as stack:
        adapters = _Adapters(job, opened, _blend_folder(job, out, stack))
        updates = adapters.updates
        _check_copies(job, updates, opened)
        check_chain(folded, base)
        pool = stack.enter_context(workers())
        helpers, disk = stack.enter_context(ThreadPoolExecutor(1)), stack.enter_context(ThreadPoolExecutor(1))
        # transformers changes torch's default dtype while it loads: nothing else may run beside it.
        transformers_reads = read_base(opened.folder, opened.weights)
        other = open_other(job.mixing)
        peft_reads = helpers.submit(adapters.as_peft_reads)
        mixture = None
        if other is not None:
            mixture = other.mixture(opened, updates, pool.map)
            updates = mixture.scaled()
        writer = _Writer(job, opened, updates, mixture, _stays_tied(opened, updates), out, pool, disk)

        def reference() -> Reference:
            plain = adapters.agreed(peft_reads.result(), transformers_reads)
            if other is None or mixture is None:
                return plain
            return other.reference(mixture, plain, pool.map)

        written = _write_and_prove(writer, cache(reference))
    files = list(written.hashes.values())
    whole = files[0]
    if len(files) > 1:
        whole = store.sha256_json(written.hashes)
    found = Merge(
        base=job.section.base,
        dtype=job.section.dtype,
        rounding=written.rounding.name,
        rounding_seed=written.rounding.seed,
        rounding_why=written.why,
        modules=updates.modules,
        adapters=len(folded),
        tied=writer.tied,
        warnings=_warnings(job, written),
        sha256=whole,
        seconds=round(time.monotonic() - started, 2),
        **written.proven.as_json(),
    )
    if job.shares:
        found = found.model_copy(update={"weights": {share.stage: share.weight for share in job.shares}})
    if other is None or mixture is None:
        return found
    return other.told(found, mixture)


def _blend_folder(job: MergeJob, out: Path, stack: ExitStack) -> Path | None:
    """A folder beside `out` for trained copies by their weights, which is gone once the merge is done."""
    if not job.shares:
        return None
    return Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.blend")))


class _Adapters:
    """The adapters of a merge, read by its own reader and by PEFT: as they were trained, or by the stages' weights."""

    def __init__(self, job: MergeJob, base: DiskLlama, folder: Path | None):
        self.job, self.base = job, base
        groups = [[adapter] for adapter in job.folders] if job.shares else [list(job.stack.adapters)]
        self.groups = groups
        self.ours = [read_adapters(group, base.shapes) for group in groups]
        self.terms = terms_of(job.shares)
        self.blended: dict[str, Tensor] = {}
        if folder is None:
            self.updates = self.ours[0]
            return
        lasts = last_adapters(job.shares)
        for share in job.shares:
            place = job.stack.adapters.index(lasts[share.adapter])
            check_chain([*job.stack.adapters[:place], share.adapter], job.stack.base)
        read = dict(zip(job.folders, self.ours, strict=True))
        left = summed(self.terms)
        self.blended = blend(read, left, base.source, folder)
        self.updates = weigh(read, left, self.blended)

    def as_peft_reads(self) -> list[Updates]:
        return [read_updates(group, self.base.model) for group in self.groups]

    def agreed(self, theirs: list[Updates], base: ReadModel) -> Reference:
        """What the merge is held against: PEFT's reading, which must be the merge's, each stage's terms by themselves.
        MergeRefused where the two differ."""
        for mine, other in zip(self.ours, theirs, strict=True):
            check_readings(mine, Reference(base, other))
        if not self.job.shares:
            return Reference(base, theirs[0])
        read = dict(zip(self.job.folders, theirs, strict=True))
        check_blend(self.blended, read, self.terms, base.parameters.__getitem__)
        asked = [term for term in self.terms if term.factor]
        return Reference(base, weigh(read, asked, self.blended))


def _check_copies(job: MergeJob, updates: Updates, opened: DiskLlama) -> None:
    """An adapter brings its base's embeddings along where PEFT stored them: they must be this base's."""
    adapters = ", ".join(map(str, job.stack.adapters))
    for name, copy in updates.copies.items():
        if not torch.equal(copy, opened.source(name).to(copy.dtype)):
            raise RecipeError(
                f"{adapters}: holds a copy of {name} that is not that of {opened.folder}\n"
                "its vocabulary was resized or trained apart: give the base as it was then with --base"
            )


def check_onto(section: MergeSection, model: ModelSection) -> None:
    """RecipeError for a merge onto NF4's values of a model that was trained on others, or noise without a rounding."""
    if section.base == "nf4" and model.quantization != "nf4":
        raise RecipeError(
            f"merge.base: nf4, but model.quantization is {model.quantization}: no model on NF4's values was trained\n"
            "allowed with it: full16"
        )
    if section.base == "nf4" and section.other is not None:
        raise RecipeError("merge.with: models are mixed in 16 bit, and merge.base is nf4\nallowed with it: full16")
    if section.rounding == "stochastic" and section.dtype == "float32":
        raise RecipeError("merge.rounding: stochastic, but float32 keeps every update\nallowed with it: auto, nearest")


@dataclass(frozen=True)
class WrittenMerge:
    """A merged folder as it was written and proven. hashes: sha256 by file name; why: it was rounded so."""

    hashes: dict[str, str]
    rounding: Rounding
    proven: Proven
    why: str = "as stated"


def _write_and_prove(writer: _Writer, reference: Callable[[], Reference]) -> WrittenMerge:
    """`auto` writes the nearest numbers, and again stochastically where those lose too much and noise loses less."""
    job = writer.job

    def attempt(rounding: Rounding) -> tuple[WrittenMerge, MergeProof]:
        settling = writer.write(rounding)
        proof = MergeProof(
            base=writer.base,
            reference=reference(),
            merged=writer.out,
            section=job.section,
            model=job.model,
            rounding=rounding,
            pool=writer.pool,
        )
        proven = proof.run(job.probe_ids)
        hashes: dict[str, str] = {}
        for name, file in settling.items():
            hashes[name] = file.result()
        return WrittenMerge(hashes, rounding, proven), proof

    if job.section.rounding == "stochastic":
        return attempt(job.stochastic)[0]
    written, proof = attempt(job.nearest)
    if job.section.rounding == "nearest":
        return written
    lost = written.proven.lost or 0.0
    if lost <= MAX_LOST or job.dtype == torch.float32:
        return replace(written, why=f"it loses {lost:.2%} of the change, up to 1 % is fine")
    other = proof.lost_by(job.stochastic, job.probe_ids) or 0.0
    del proof  # it maps the files that are written anew
    if other >= lost:
        why = f"it loses {lost:.1%} of the change, stochastic rounding {other:.1%}; a wider merge.dtype keeps it"
        return replace(written, why=why)
    why = f"to the nearest number {lost:.1%} of the change would be lost, so {other:.1%}"
    ui.note(f"merge.rounding: auto took stochastic: {why}")
    return replace(attempt(job.stochastic)[0], why=why)


def _warnings(job: MergeJob, written: WrittenMerge) -> list[str]:
    lost = written.proven.lost or 0.0
    if lost <= MAX_LOST:
        return []
    keeps = "merge.rounding: stochastic, or a wider merge.dtype, may keep"
    if written.rounding.stochastic:
        keeps = "a wider merge.dtype keeps"
    return [f"{written.rounding.name} rounding to {job.section.dtype} lost {lost:.1%} of the change (KL): {keeps} more"]


def _stays_tied(base: DiskLlama, updates: Updates) -> bool:
    """Tied weights stay tied while both ends are the same matrix; training one end, or both apart, unties them."""
    touched = {EMBEDDING, HEAD} & (updates.full.keys() | updates.low_rank.keys())
    if not base.tied or not touched:
        return base.tied
    ends = updates.full.get(EMBEDDING), updates.full.get(HEAD)
    return ends[0] is not None and ends[1] is not None and same(ends[0], ends[1])


@dataclass(frozen=True)
class _Writer:
    """Writes the merged folder; more than once where another rounding is taken. disk: one thread, which writes and then
    waits for the disk while the proof reads what was written."""

    job: MergeJob
    base: DiskLlama
    updates: Updates
    mixture: Mixture | None
    tied: bool
    out: Path
    pool: ThreadPoolExecutor
    disk: ThreadPoolExecutor

    def write(self, rounding: Rounding) -> dict[str, Future[str]]:
        """The whole folder. Returns the sha256 of each weight file, ready once it is on the disk."""
        with ThreadPoolExecutor(1) as hasher:
            put = partial(
                write_safetensors, dtype=self.job.dtype, metadata=_metadata(rounding), disk=self.disk, hasher=hasher
            )
            settling = self._weights(rounding, put)
        stack = self.job.described
        _write_config(stack.base / "config.json", self.out, self.job.section.dtype, self.tied)
        _copy_descriptions(stack, self.out)
        if self.job.card is not None:
            (self.out / "README.md").write_text(self.job.card, encoding="utf-8")
        return settling

    def _weights(self, rounding: Rounding, put: Callable[..., Future[str]]) -> dict[str, Future[str]]:
        """All weight files, sharded as the base's, and their index."""
        shards = self._shards()
        elements, file_of = 0, {}
        for file, shapes in shards.items():
            for name, shape in shapes.items():
                elements += math.prod(shape)
                file_of[name] = file
        store.check_room(self.out, elements * self.job.dtype.itemsize, "the merged weights")
        hashes = {}
        with ui.progress_bar("merging", total=len(file_of), unit="tensors") as shown:

            def jobs(names: Iterable[str]) -> Iterator[Callable[[], Tensor]]:
                for name in names:
                    yield from self._blocks(name, rounding)
                    shown.update(shown.completed + 1)

            for file, shapes in shards.items():
                (self.out / file).unlink(missing_ok=True)  # an earlier attempt may still be mapped
                try:
                    hashes[file] = put(self.out / file, shapes, blocks=in_order(self.pool, jobs(shapes)))
                except RunError as error:
                    raise RunError(f"{self.job.stack.base / file}: {error}") from error
        if len(shards) > 1:
            index = {"metadata": {"total_size": elements * self.job.dtype.itemsize}, "weight_map": file_of}
            store.write_json(self.out / INDEX, index)
        return hashes

    def _blocks(self, name: str, rounding: Rounding) -> Iterator[Callable[[], Tensor]]:
        source, low_rank = self._source(name), self.updates.low_rank.get(name, ())
        changed = bool(low_rank) or name in self.updates.full or isinstance(source, WeightedSum)
        how = Rounding(rounding.dtype)
        if changed:  # noise is for what training changed
            how = rounding
        for rows in row_blocks(self.base.shapes[name]):
            yield partial(merged_block, source, low_rank, rows, how, name=name)

    def _source(self, name: str) -> Source:
        """What the low-rank updates of a weight are added to."""
        if name in self.updates.full:
            return self.updates.full[name]
        if self.mixture is not None:
            return self.mixture.source(name)
        if self.job.section.base == "nf4":
            return self.base.nf4(name, self.job.model, self.pool.map)
        return self.base.source(name)

    def _shards(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """File name -> tensors with shapes. Of tied ends the embedding is written; one that was tied goes beside the
        end that it came from."""
        shards: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.base.shapes.items():
            if name != HEAD or not self.tied:
                shards.setdefault(self.base.weights.files[self.base.stored_as(name)], {})[name] = shape
        return dict(sorted(shards.items()))


def _metadata(rounding: Rounding) -> dict[str, str]:
    """With noise the file says how to draw it again."""
    if not rounding.stochastic:
        return {}
    return {"rounding": "stochastic", "rounding_seed": str(rounding.seed)}


def merged_block(source: Source, low_rank: Sequence[LowRank], rows: slice, rounding: Rounding, *, name: str) -> Tensor:
    """Some rows of a merged tensor: fp32 sums, rounded once. RunError where they are not finite in the new dtype."""
    block = in_fp32(source[rows])
    for update in low_rank:
        block.addmm_(update.b[rows], update.a, alpha=update.scale)
    low, high = torch.aminmax(block)
    limit = torch.finfo(rounding.dtype).max
    if not (-limit <= low and high <= limit):  # also false for NaN
        raise RunError(
            f"{name}: the merged tensor is not finite in {str(rounding.dtype).removeprefix('torch.')}\n"
            "what is merged is damaged or diverged (or merge.dtype is too narrow); nothing was published"
        )
    return rounding(block, name, rows.start * (source.numel() // max(1, len(source))))


# --------------------------------------------------------------------------------------------- what describes a model


def _write_config(source: Path, out: Path, dtype: str, tied: bool) -> None:
    """The base's config.json with the new dtype and tying; `torch_dtype` too, which readers before 2025 look for."""
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in ("_name_or_path", *ATTENTION):  # whoever loads it decides
        config.pop(key, None)
    config |= {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": tied}
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_descriptions(stack: ModelStack, out: Path) -> None:
    for pattern in COPIED:
        for path in sorted(stack.base.glob(pattern)):
            if not path.is_file():  # a folder LICENSES/, say
                continue
            shutil.copyfile(path, out / path.name)
    if stack.template is not None:
        write_template(out, stack.template)


def validation_ids(folder: Path | None) -> np.ndarray | None:
    """Held-out ids for the proof, a row for each packed source, all as long as the shortest; None below 16 columns."""
    from qmedtune.data.packing.pack import PackedRows

    if folder is None:
        return None
    sources = sorted(path for path in folder.iterdir() if path.is_dir())
    rows = [_first_ids(PackedRows(source), PROBE_TOKENS // len(sources)) for source in sources]
    length = min(map(len, rows), default=0)
    if length < 16:
        return None
    return np.stack([row[:length] for row in rows])


def _first_ids(rows: Any, tokens: int) -> np.ndarray:
    found: list[np.ndarray] = [np.empty(0, np.int64)]
    for index in range(len(rows)):
        found.append(rows[index]["input_ids"])
        if sum(map(len, found)) >= tokens:
            break
    return np.concatenate(found)[:tokens]
