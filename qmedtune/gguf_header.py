"""The header of a GGUF file: shape, types and tokenizer of a LLaMA, judged before anything is converted.

The `gguf` package reads the same in 4.6 s for a vocabulary of 49,152 (one numpy view per token, 2026-11-29), which
`plan` does not have: here arrays are walked, not kept. Needs no torch. Deliberately not here: tensor data, and what a
file becomes (gguf_folder.py).
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from qmedtune.errors import RecipeError

Metadata = dict[str, Any]  # numbers, text and lists, as the file's own type codes say
SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counted tensors in 32 bits and was replaced within weeks, in August 2023
ALIGNMENT = 32  # bytes, where `general.alignment` says nothing
# Metadata types of the format: fixed sizes by number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 7: "?", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ARRAY = 10_000_000  # entries; a vocabulary has up to 300,000 and as many merges
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
# How a byte-level vocabulary splits text before it merges (`tokenizer.ggml.pre`), as far as LLaMAs use it and it is
# rebuilt exactly: by transformers from LLaMA-3's expression or Mistral's, by gguf_folder.py for digits one by one.
LLAMA3_SPLIT, TEKKEN_SPLIT = ("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe", "pixtral"), ("tekken",)
GPT2_SPLIT, DIGITS_SPLIT = ("default", "gpt-2", "olmo"), ("smollm", "refact", "starcoder", "codeshell")
SPLITS = (*LLAMA3_SPLIT, *TEKKEN_SPLIT, *GPT2_SPLIT, *DIGITS_SPLIT)


@dataclass(frozen=True)
class Tensor:
    """Tensor info of a GGUF file.

    One entry of the table. `shape` in torch's order (outermost first); `kind` is ggml's name of its type.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Header of a GGUF file: metadata and the table of tensors.

    What the file says of itself. `metadata` holds scalars and strings; of arrays only their length.
    """

    path: Path
    metadata: Metadata
    tensors: dict[str, Tensor]

    def number(self, key: str, default: int | None = None) -> int:
        """An integer `llama.<key>`. RecipeError where it is missing and has no default."""
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int):
            refuse(self.path, f"the header has no number `llama.{key}`")
        return value

    @property
    def quantised(self) -> bool:
        return any(tensor.kind not in FLOATS for tensor in self.tensors.values())

    @property
    def stored_dtype(self) -> str:
        """The dtype that keeps every value: the file's own 16 bit, or fp32.

        A dequantised value is scale x integer (+ minimum): fp16 changes 48 % of SmolLM2's Q4_1 values, bf16 82 %.
        """
        matrices = {tensor.kind for tensor in self.tensors.values() if len(tensor.shape) > 1}
        return FLOATS.get(next(iter(matrices)), "float32") if len(matrices) == 1 else "float32"

    @property
    def types(self) -> str:
        """The types of the matrices, commonest first: `Q4_1, Q8_0`."""
        kinds: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                kinds[tensor.kind] += 1
        return ", ".join(kind for kind, _ in kinds.most_common())


def refuse(path: Path, what: str, remedy: str = "fetch or copy the file again") -> NoReturn:
    raise RecipeError(f"{path}: {what}\n{remedy}")


def read_header(path: Path) -> Header:
    """Read and judge a GGUF file. RecipeError where it is damaged, no LLaMA, or of a type that nobody unpacks."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(path, data).header()
    except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
        if isinstance(error, RecipeError):
            raise
        refuse(path, f"cannot be read ({getattr(error, 'strerror', None) or 'it is empty'})")
    _judge(header)
    return header


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, list[Any]]:
    """Arrays of the metadata, whole, by key; those that are not there are left out. RecipeError for a damaged file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data, keys)
        reader.header()
    return reader.arrays


class _Reader:
    """Walks the header; every read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap, wanted: Collection[str] = ()):
        self.path, self.data, self.at, self.wanted = path, data, 0, wanted
        self.key = ""
        self.arrays: dict[str, list[Any]] = {}

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            refuse(self.path, "is no GGUF file (it does not begin with GGUF)")
        self.at = 4
        version = self.take("I")
        if version not in VERSIONS:
            turned = version & 0xFFFF == 0
            what = "is written for big-endian machines" if turned else f"is GGUF version {version}"
            refuse(self.path, what, f"allowed: little-endian files of version {VERSIONS[0]} or {VERSIONS[1]}")
        tensors, entries = self.take("Q"), self.take("Q")
        metadata: Metadata = {}
        for _ in range(entries):
            self.key = self.string()
            metadata[self.key] = self.value(self.take("I"))
        return Header(self.path, metadata, self.table(tensors, metadata))

    def take(self, format: str) -> Any:
        """One number of a struct format."""
        size = struct.calcsize(f"<{format}")
        if self.at + size > len(self.data):
            refuse(self.path, "is truncated: the file ends within its header")
        (value,) = struct.unpack_from(f"<{format}", self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.data):
            refuse(self.path, "is truncated: the file ends within its header")
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            refuse(self.path, f"has metadata of the unknown type {kind}")
        return self.array()

    def array(self) -> int:
        """Walk over an array, and keep it where it is wanted; its length."""
        kind, length = self.take("I"), self.take("Q")
        if length > MAX_ARRAY or kind not in (*SCALARS, STRING):
            refuse(self.path, f"has an array of {length:,} entries of type {kind} in its header")
        if self.key in self.wanted:
            self.arrays[self.key] = [
                self.string() if kind == STRING else self.take(SCALARS[kind]) for _ in range(length)
            ]
            return length
        if kind in SCALARS:
            self.at += struct.calcsize(SCALARS[kind]) * length
            return length
        for _ in range(length):
            size = self.take("Q")
            self.at += size
        return length

    def table(self, count: int, metadata: Metadata) -> dict[str, Tensor]:
        entries = [self.entry() for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            refuse(self.path, f"has the alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            tensors[name] = self.placed(name, shape, kind, start + offset)
        if len(tensors) < count:
            refuse(self.path, "has two tensors of one name")
        return tensors

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.take("I")
        if dimensions > 4:
            refuse(self.path, f"tensor {name!r} has {dimensions} dimensions")
        sizes = [self.take("Q") for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self.take("I"), self.take("Q")

    def placed(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
        label, block, size = _type(self.path, name, kind)
        if not shape or shape[-1] % block:
            refuse(self.path, f"tensor {name!r} of shape {shape} is not made of whole blocks of {label}")
        end = begin + prod(shape) // block * size
        if end > len(self.data):
            refuse(self.path, f"is truncated: tensor {name!r} ends at byte {end:,}, the file at {len(self.data):,}")
        return Tensor(name, shape, label, begin, end)


def _type(path: Path, name: str, kind: int) -> tuple[str, int, int]:
    """ggml's name of a tensor type, elements and bytes of a block. RecipeError where `gguf` cannot unpack it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits  # the types that gguf.dequantize knows; it has no public list

    known = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits}
    if kind not in known:
        names = {member.value: member.name for member in GGMLQuantizationType}
        shown = ", ".join(sorted(member.name for member in known))
        refuse(
            path, f"tensor {name!r} is of type {names.get(kind, kind)}, which cannot be unpacked", f"allowed: {shown}"
        )
    member = GGMLQuantizationType(kind)
    return member.name, *GGML_QUANT_SIZES[member]


def _judge(header: Header) -> None:
    """RecipeError for what is no whole LLaMA."""
    said, path = header.metadata, header.path
    architecture = said.get("general.architecture")
    if said.get("general.type", "model") != "model":
        refuse(path, f"holds a {said['general.type']!r}, not a model", "give the GGUF file of the model itself")
    if architecture != "llama":
        refuse(path, f"is a {architecture!r} model", "allowed: LLaMA-family models (general.architecture llama)")
    if said.get("split.count", 0) > 1:
        remedy = "join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
        refuse(path, f"is one of {said['split.count']} parts of a model", remedy)
    if said.get("llama.expert_count", 0):
        refuse(path, "is a mixture of experts", "allowed: LLaMA-family models with one MLP a layer")
    if (scaling := said.get("llama.rope.scaling.type", "none")) not in ("none", "linear"):
        refuse(path, f"stretches its positions by {scaling!r}", "allowed: none, linear, and LLaMA 3.1's factors")
    _judge_tensors(header)
    _judge_tokenizer(header)


def _judge_tensors(header: Header) -> None:
    layers = [f"blk.{i}.{part}.weight" for i in range(header.number("block_count")) for part in LAYER]
    needed = {"token_embd.weight", "output_norm.weight", *layers}
    if missing := sorted(needed - header.tensors.keys()):
        refuse(header.path, f"tensor {missing[0]!r} is missing (of {len(missing)})")
    # Known and without a place in transformers' LLaMA: the frequencies, which the configuration says.
    spare = {"output.weight", "rope_freqs.weight"} | {f"blk.{i}.attn_rot_embd.weight" for i in range(len(layers))}
    if foreign := sorted(header.tensors.keys() - needed - spare):
        remedy = "allowed: LLaMA's own tensors (biases and experts are of other models)"
        refuse(header.path, f"tensor {foreign[0]!r} is not of a LLaMA (of {len(foreign)})", remedy)


def _judge_tokenizer(header: Header) -> None:
    said, rows = header.metadata, header.tensors["token_embd.weight"].shape[0]
    model, tokens = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.tokens", 0)
    if model not in ("llama", "gpt2") or not tokens:
        refuse(
            header.path, f"has a tokenizer of the kind {model!r}", "allowed: llama (SentencePiece), gpt2 (byte-level)"
        )
    if tokens > rows:
        what = f"the tokenizer has {tokens} tokens, the model only {rows} embeddings: {tokens - rows} were added"
        refuse(header.path, what, "convert the model again with its embeddings resized to its tokenizer")
    split = said.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and split not in SPLITS:
        what = f"splits text by {split!r} (tokenizer.ggml.pre), which is not rebuilt here"
        refuse(header.path, what, f"allowed: {', '.join(SPLITS)}; or give the original folder")
