"""A GGUF file as a program finds it: tensors in transformers' order, and the tokenizer that its metadata describe.

What is proven of an export is read from the file by this, not by what wrote it: the header by the reader that judges
GGUF bases, quantised values by the library `gguf`, the order of rows from the definition of the rotation, merges from
the scores. Deliberately not here: the comparison (logit_proof.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, models, normalizers
from torch import Tensor

from qmedtune import gguf_header
from qmedtune.exporting import splits
from qmedtune.exporting.tensor_names import gguf_name
from qmedtune.exporting.types import FLOATS
from qmedtune.gguf_header import Header
from qmedtune.model_stack import HEAD

LISTS = ("tokens", "token_type", "merges", "scores")
SPACE = "\u2581"


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. Rows that are asked for are unpacked, in transformers' order; the rest stays on the disk.
    raw: uint8 [rows, bytes of a row]; heads: of rotated rows, 0 where they are not turned."""

    raw: np.ndarray
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    heads: int = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice) and self.heads:
            rows = torch.arange(len(self))[rows]
        if isinstance(rows, slice):
            return self._values(self.raw[rows]).view(-1, *self.shape[1:])
        raw = self.raw[self._places(rows.flatten()).numpy()]
        return self._values(raw).view(*rows.shape, *self.shape[1:])

    def _values(self, raw: np.ndarray) -> Tensor:
        """Float types as they are stored, others as fp32."""
        if self.kind in FLOATS:
            return torch.from_numpy(raw).view(FLOATS[self.kind])
        return torch.from_numpy(dequantize(np.ascontiguousarray(raw), self.kind))

    def float(self) -> Tensor:
        return self[slice(None)].float()

    def _places(self, rows: Tensor) -> Tensor:
        """Where the file has these rows: rows j and j + half of a head are a pair that is turned, there neighbours."""
        if not self.heads:
            return rows
        size = len(self) // self.heads
        half = size // 2
        head, inside = rows // size, rows % size
        return head * size + 2 * (inside % half) + inside // half


@dataclass(frozen=True)
class GgufFile:
    """An opened file; tensors by transformers' names."""

    path: Path
    header: Header
    data: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """RecipeError for what is no whole LLaMA."""
        return cls(path, gguf_header.read_header(path), np.memmap(path, np.uint8, mode="c"))

    def load(self, name: str) -> FileTensor:
        """The tensor of this name of transformers; the head of a file without one is the embedding."""
        tied = name == HEAD and "output.weight" not in self.header.tensors
        tensor = self.header.tensors["token_embd.weight" if tied else gguf_name(name)]
        raw = self.data[tensor.begin : tensor.end].reshape(tensor.shape[0], -1)
        heads = self.header.number("attention.head_count")
        turned = {"q_proj": heads, "k_proj": self.header.number("attention.head_count_kv", heads)}
        return FileTensor(raw, GGMLQuantizationType[tensor.kind], tensor.shape, turned.get(name.split(".")[-2], 0))


@dataclass(frozen=True)
class FileTokenizer:
    """What the metadata say, in tokenizers' terms, and the marks that are put around a text."""

    backend: Tokenizer
    before: list[int]
    behind: list[int]

    def encode(self, text: str, *, marks: bool) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.before, *ids, *self.behind] if marks else ids


def read_tokenizer(file: GgufFile) -> FileTokenizer | None:
    """The tokenizer of a file; None where it splits text in a way that is not known here."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.header.metadata.items()}
    keys = {f"tokenizer.ggml.{name}" for name in LISTS}
    lists = {key.rpartition(".")[2]: value for key, value in gguf_header.read_arrays(file.path, keys).items()}
    if said["model"] == "llama":
        backend = _sentencepiece(lists, before=bool(said.get("add_space_prefix", True)))
    elif (split := splits.NAMES.get(said["pre"])) is not None:
        backend = _byte_level(lists, split)
    else:
        return None
    for special in (True, False):
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN) if special else (TokenType.USER_DEFINED,)
        names = _of_type(lists, *kinds)
        backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    before = [said["bos_token_id"]] if said.get("add_bos_token") else []
    return FileTokenizer(backend, before, [said["eos_token_id"]] if said.get("add_eos_token") else [])


def _of_type(lists: dict[str, list], *kinds: TokenType) -> list[str]:
    return [token for token, kind in zip(lists["tokens"], lists["token_type"], strict=True) if kind in kinds]


def _ids(lists: dict[str, list]) -> dict[str, int]:
    return {token: id for id, token in enumerate(lists["tokens"])}


def _byte_level(lists: dict[str, list], split: splits.TextSplit) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in lists["merges"]]
    backend = Tokenizer(models.BPE(_ids(lists), merges, ignore_merges=split.whole_words))
    backend.pre_tokenizer = split.pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(lists: dict[str, list], *, before: bool) -> Tokenizer:
    """Merges are all that join two tokens to one, the best score first."""
    pieces = set(_of_type(lists, TokenType.NORMAL))
    scored = zip(lists["scores"], lists["tokens"], strict=True)
    merges = []
    for _, piece in sorted(scored, key=lambda pair: -pair[0]):
        for at in range(1, len(piece)) if piece in pieces else ():
            if piece[:at] in pieces and piece[at:] in pieces:
                merges.append((piece[:at], piece[at:]))
    [unknown] = _of_type(lists, TokenType.UNKNOWN)
    backend = Tokenizer(models.BPE(_ids(lists), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", SPACE)
    steps = [normalizers.Prepend(SPACE), blanks] if before else [blanks]
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return backend
