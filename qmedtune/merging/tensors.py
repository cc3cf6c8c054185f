"""Weights of a model folder, one tensor at a time: read from memory-mapped safetensors, written block by block.

A merge of an 8B model must not hold 16 GB, nor a whole 5 GB shard: reading costs page cache (which the kernel takes
back when it needs it), and the writer knows the header before the first byte of data, so blocks go straight to disk.
Deliberately no pickle, no judgement of folders (model_stack.py), no sharding decisions (the base's are kept), no dtype
conversions.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qmedtune.model_stack import Stored, stored_tensors
from qmedtune.store import fsync_path

# 2 MB in fp32: small enough to stay in cache from one operation to the next and to leave work for all cores; 4 MB takes
# 7 % more CPU time, 16 MB a third more (1.1B, a Zen 4 with 1 MB of second-level cache a core).
BLOCK_ELEMENTS = 1 << 19
BLOCKS_WAITING = 4
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Weights:
    """The tensors below one folder. `files` maps tensor name to file name; tensors are views of the mapped files."""

    folder: Path
    files: dict[str, str]
    handles: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[self.files[name]].get_tensor(name)


def open_weights(folder: Path) -> Weights:
    """Map the weights of a model folder. RecipeError where files are missing or damaged, or the index is wrong."""
    return map_stored(folder, stored_tensors(folder))


def map_stored(folder: Path, stored: Mapping[str, Stored]) -> Weights:
    """Map the files that these tensors of a folder are in."""
    files = {name: tensor.file for name, tensor in stored.items()}
    handles = {file: _open(folder / file) for file in sorted(set(files.values()))}
    return Weights(folder, files, handles)


def open_file(path: Path) -> Weights:
    """The tensors of a single safetensors file."""
    handle = _open(path)
    return Weights(path.parent, dict.fromkeys(handle.keys(), path.name), {path.name: handle})


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension with at most BLOCK_ELEMENTS elements each (at least one row)."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    blocks: Iterable[Tensor],
    disk: Executor,
    hasher: Executor,
    metadata: Mapping[str, str] = {},  # noqa: B006 - nothing changes it
) -> Future[str]:
    """Write tensors of `dtype`, given as contiguous row blocks in the order of `shapes`.

    Writing and hashing run in `disk` and `hasher` (one worker each) while the caller computes the next block; at most
    BLOCKS_WAITING blocks are held. Returns the sha256 of what was to be written, ready once the file is on the disk.
    """
    digest = hashlib.sha256()
    waiting: deque[Future[Any]] = deque()
    with path.open("wb") as file:
        for data in chain([_header(shapes, dtype, metadata)], (b.view(torch.uint8).numpy().data for b in blocks)):
            waiting += disk.submit(file.write, data), hasher.submit(digest.update, data)
            while len(waiting) > 2 * BLOCKS_WAITING:
                waiting.popleft().result()
        for pending in waiting:
            pending.result()
    return disk.submit(_settle, path, digest.hexdigest())


def _settle(path: Path, sha256: str) -> str:
    fsync_path(path)
    return sha256


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    """Length (8 bytes, little-endian) and JSON of the format, padded so that data starts at a multiple of 8 bytes.

    `format: pt` is what transformers asks of a file before loading it.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
