"""Fold adapters into a model folder, tensor by tensor, and prove it before anything is renamed.

W + sum of scale * B @ A is added in fp32 and rounded once. Memory is a few blocks of 2 MB whatever the model; the
sharding is the base's. The proof (merging/verify.py) compares what was written with the same base + unmerged adapters.
Deliberately does not re-quantise (PEFT on 4-bit layers does, and loses the update), and does not rename: store.py does.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmedtune import store, ui
from qmedtune.errors import RunError
from qmedtune.merging.disk_llama import EMBEDDING, HEAD, DiskLlama, open_llama
from qmedtune.merging.lora_files import LowRank, Updates, read_adapters
from qmedtune.merging.parallel import in_fp32, in_order, workers
from qmedtune.merging.tensors import INDEX, row_blocks, write_safetensors
from qmedtune.merging.verify import PROBE_TOKENS, prove
from qmedtune.model import DTYPES
from qmedtune.recipe import MergeSection, ModelSection, Recipe

# Written by the merge itself, or meaningless for a merged model; everything else that describes a model is copied.
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def merge_stage(recipe: Recipe, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """The step of a run. inputs: base, adapter-1 ... adapter-N, and where there are any: template, validation."""
    adapters = [inputs[f"adapter-{n}"] for n in range(1, 1 + sum(name.startswith("adapter-") for name in inputs))]
    return merge(
        inputs["base"],
        adapters,
        out,
        recipe.merge,
        model_section=recipe.model,
        probe_ids=validation_ids(inputs["validation"]) if "validation" in inputs else None,
        template=inputs.get("template"),
    )


def merge(
    base: Path,
    adapters: list[Path],
    out: Path,
    section: MergeSection,
    *,
    model_section: ModelSection,
    probe_ids: np.ndarray | None = None,
    template: Path | None = None,
    card: str | None = None,
) -> dict[str, Any]:
    """Write base + adapters (in training order) as a plain model folder into `out`, an existing staging folder.

    probe_ids: int64 token ids [rows, length] for the proof (large models use their first columns), None: random ones.
    template: a folder with template.json. card: text of README.md. `model_section.compute_dtype` must be resolved.
    Returns facts.
    Raises RecipeError for folders that do not fit together; RunError where a file is damaged, a weight is not finite
    or the proof fails: then `out` must not be used.
    """
    started = time.monotonic()
    opened = open_llama(base)
    updates = read_adapters(adapters, opened.shapes, opened.linears)
    tied = _stays_tied(opened, updates)
    with workers() as pool, ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as hasher:
        write = partial(write_safetensors, disk=disk, hasher=hasher)
        hashes = _write_weights(opened, updates, out, section, model_section, tied, pool, write)
        _write_config(base / "config.json", out, section.dtype, tied)
        _copy_descriptions(base, out, template)
        if card is not None:
            (out / "README.md").write_text(card, encoding="utf-8")
        proof = prove(opened, updates, out, section, model_section, probe_ids, pool)
        sha256 = {name: pending.result() for name, pending in hashes.items()}
    return {
        "base": section.base,
        "dtype": section.dtype,
        "modules": updates.modules,
        "adapters": len(adapters),
        "tied": tied,
        **proof,
        "sha256": next(iter(sha256.values())) if len(sha256) == 1 else store.sha256_json(sha256),
        "seconds": round(time.monotonic() - started, 2),
    }


def _stays_tied(base: DiskLlama, updates: Updates) -> bool:
    """Tied weights stay tied while both ends are the same matrix; training one end, or both apart, unties them."""
    touched = {EMBEDDING, HEAD} & (updates.full.keys() | updates.low_rank.keys())
    if not base.tied or not touched:
        return base.tied
    ends = updates.full.get(EMBEDDING), updates.full.get(HEAD)
    return ends[0] is not None and ends[1] is not None and torch.equal(ends[0], ends[1])


def _write_weights(
    base: DiskLlama,
    updates: Updates,
    out: Path,
    section: MergeSection,
    model_section: ModelSection,
    tied: bool,
    pool: ThreadPoolExecutor,
    write: Callable[..., Future[str]],
) -> dict[str, Future[str]]:
    """All weight files, sharded as the base's, and their index. Returns the sha256 of each, by file name."""
    shards = _shards(base, tied)
    dtype = DTYPES[section.dtype]
    elements = sum(torch.Size(shape).numel() for shapes in shards.values() for shape in shapes.values())
    store.check_room(out, elements * dtype.itemsize, "the merged weights")
    hashes = {}
    with ui.stage("merging", total=sum(map(len, shards.values())), unit="tensors") as shown:

        def jobs(names: Iterable[str]) -> Iterator[Callable[[], Tensor]]:
            for name in names:
                source = _source(base, updates, name, section, model_section, pool)
                for rows in row_blocks(base.shapes[name]):
                    yield partial(merged_block, source, updates.low_rank.get(name, ()), rows, dtype, name)
                shown.update(shown.completed + 1)

        for file, shapes in shards.items():
            hashes[file] = write(out / file, shapes, dtype, in_order(pool, jobs(shapes)))
    if len(shards) > 1:
        files = {name: file for file, shapes in shards.items() for name in shapes}
        total = sum(torch.Size(base.shapes[name]).numel() * dtype.itemsize for name in files)
        store.write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return hashes


def _source(
    base: DiskLlama,
    updates: Updates,
    name: str,
    section: MergeSection,
    model_section: ModelSection,
    pool: ThreadPoolExecutor,
) -> Tensor:
    """What the low-rank updates of a weight are added to."""
    if name in updates.full:
        return updates.full[name]
    return base.nf4(name, model_section, pool.map) if section.base == "nf4" else base.source(name)


def _shards(base: DiskLlama, tied: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors with shapes. A head that was tied goes beside the embedding that it came from."""
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in base.shapes.items():
        if name == HEAD and tied:
            continue
        file = base.weights.files.get(name) or base.weights.files[EMBEDDING]
        shards.setdefault(file, {})[name] = shape
    return dict(sorted(shards.items()))


def merged_block(source: Tensor, low_rank: Sequence[LowRank], rows: slice, dtype: torch.dtype, name: str) -> Tensor:
    """Some rows of a merged tensor: fp32 sums, rounded to `dtype` once. RunError where they are not finite in it."""
    block = in_fp32(source[rows])
    for update in low_rank:
        block.addmm_(update.b[rows], update.a, alpha=update.scale)
    low, high = torch.aminmax(block)
    limit = torch.finfo(dtype).max
    if not (-limit <= low and high <= limit):  # also false for NaN
        raise RunError(
            f"{name}: the merged tensor is not finite in {str(dtype).removeprefix('torch.')}\n"
            "the base or an adapter is damaged or diverged (or merge.dtype is too narrow); nothing was published"
        )
    return block.to(dtype, copy=True)


# --------------------------------------------------------------------------------------------- what describes a model


def _write_config(source: Path, out: Path, dtype: str, tied: bool) -> None:
    """The base's config.json with the new dtype and tying; `torch_dtype` too, which readers before 2025 look for."""
    config = json.loads(source.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config |= {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": tied}
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_descriptions(base: Path, out: Path, template: Path | None) -> None:
    for pattern in COPIED:
        for path in sorted(base.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if template is not None:
        write_template(out, template)


def write_template(out: Path, template: Path) -> None:
    """The template of training becomes the tokenizer's only chat template, and stays readable as template.json."""
    from qmedtune.data import framing, templates

    trained = templates.load(template)
    templates.save(trained, out)
    if (out / "tokenizer.json").is_file():
        framing.publish(framing.frame_in(trained, out), out)


def validation_ids(folder: Path) -> np.ndarray | None:
    """Held-out ids for the proof, a row for each packed source, all as long as the shortest; None below 16 columns."""
    from qmedtune.data.pack import PackedRows

    sources = sorted(path for path in folder.iterdir() if path.is_dir())
    rows = [_first_ids(PackedRows(source), PROBE_TOKENS // len(sources)) for source in sources]
    length = min(map(len, rows), default=0)
    return np.stack([row[:length] for row in rows]) if length >= 16 else None


def _first_ids(rows: Any, tokens: int) -> np.ndarray:
    found: list[np.ndarray] = [np.empty(0, np.int64)]
    for index in range(len(rows)):
        found.append(rows[index]["input_ids"])
        if sum(map(len, found)) >= tokens:
            break
    return np.concatenate(found)[:tokens]
