"""A tokenizer.json as GGUF holds a vocabulary: tokens, types, merges or scores, and the name of how text is split.

Two kinds can be expressed exactly: byte-level BPE with a splitting that llama.cpp has built in, and SentencePiece's
BPE, whose merges follow from scores. What else a definition asks for is refused by name: llama.cpp would tokenise
otherwise than training did. Deliberately not here: tokenizer.model files (tokenizer.json says the same), the writer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gguf import TokenType

from qmedtune.data.packing import templates
from qmedtune.data.packing.tokens import Codec, load_codec
from qmedtune.errors import RecipeError
from qmedtune.exporting import splits
from qmedtune.exporting.template_bos import without_bos

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
MAX_DOUBTFUL = 5000
SPACE = "\u2581"  # what SentencePiece writes for a blank
OTHERWISE = "serve it with --as transformers or --as vllm"


@dataclass(frozen=True)
class Vocabulary:
    """What stands under `tokenizer.*`. kind: llama.cpp's name, `gpt2` (byte-level) or `llama` (SentencePiece). pre: how
    text is split. types: gguf's TokenType. scores: of `llama`, fp32, the higher is merged first; merges: of `gpt2`.
    ids: special tokens by GGUF's key. space_before: a blank is put before text. doubtful: texts that the file may
    encode otherwise, for the proof to decide."""

    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_before: bool = False
    template: str | None = None
    doubtful: Sequence[str] = ()


def refuse(folder: Path, what: str, then: str = OTHERWISE) -> NoReturn:
    raise RecipeError(f"{folder / 'tokenizer.json'}: {what}, which GGUF cannot express\n{then}")


def read_vocabulary(folder: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a model folder whose embedding has `rows`. pre: the name of how text is split, where it is none
    that is known here. Raises RecipeError for a tokenizer that GGUF cannot express."""
    codec = load_codec(folder)
    said = json.loads(codec.backend.to_str())
    _check_model(folder, said)
    tokens, types = _tokens(folder, said, codec, rows)
    if codec.eos_id is None:
        refuse(folder, "the tokenizer names no eos token", "set it in tokenizer_config.json")
    add_bos, add_eos = _marks(folder, codec)
    ids = _special_ids(folder, codec)
    template = templates.chat_source(folder)
    bos = "" if codec.bos_id is None else str(codec.backend.id_to_token(codec.bos_id))
    if template and add_bos:
        template = without_bos(template, bos, codec.eos_token)
    shared = {"ids": ids, "add_bos": add_bos, "add_eos": add_eos, "template": template}
    if said["model"].get("byte_fallback"):
        scores, doubtful = _scores(said, tokens, types), _doubtful(said, tokens, types)
        shared |= {"scores": scores, "doubtful": doubtful, "space_before": _space_before(folder, said)}
        return Vocabulary("llama", "default", tokens, types, **shared)
    return Vocabulary("gpt2", pre or _split(folder, said, codec.backend), tokens, types, merges=_merges(said), **shared)


def _check_model(folder: Path, said: dict) -> None:
    model = said["model"]
    if model["type"] != "BPE":
        refuse(folder, f"it is a {model['type']} model, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            refuse(folder, f"its BPE has a {key}")
    for token in said["added_tokens"]:
        for key in ("lstrip", "rstrip", "single_word"):
            if token[key]:
                refuse(folder, f"its token {token['content']!r} asks for {key}")


def _tokens(folder: Path, said: dict, codec: Codec, rows: int) -> tuple[list[str], list[int]]:
    """One of each for every row of the embedding; rows without a token are `UNUSED`."""
    added = {token["id"]: token for token in said["added_tokens"]}
    unknown = said["model"].get("unk_token")
    by_id = {id: token for token, id in codec.vocabulary.items()}
    tokens, types = [], []
    for row in range(rows):
        token = by_id.get(row)
        tokens.append(f"[PAD{row}]" if token is None else token)
        types.append(int(_type(token, added.get(row), unknown, bool(said["model"].get("byte_fallback")))))
    if len(set(tokens)) < len(tokens):
        refuse(folder, "two tokens have the same text")
    return tokens, types


def _type(token: str | None, added: dict | None, unknown: str | None, bytes_fall_back: bool) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if bytes_fall_back and token == unknown:
        return TokenType.UNKNOWN
    if bytes_fall_back and BYTE.fullmatch(token):
        return TokenType.BYTE
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _marks(folder: Path, codec: Codec) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and eos behind it."""
    bare = codec.backend.encode("a", add_special_tokens=False).ids
    marked = codec.backend.encode("a", add_special_tokens=True).ids
    before = [codec.bos_id] if marked[: len(marked) - len(bare)] and marked[0] == codec.bos_id else []
    behind = [codec.eos_id] if len(marked) > len(bare) + len(before) else []
    if marked != [*before, *bare, *behind]:
        refuse(folder, "its post-processor adds other marks than bos and eos")
    return bool(before), bool(behind)


def _special_ids(folder: Path, codec: Codec) -> dict[str, int]:
    """By GGUF's key; `eot`: the mark that ends an answer, where it is not eos."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    unknown = codec.vocabulary.get(templates.special(config, "unk_token"))
    named = {"bos": codec.bos_id, "eos": codec.eos_id, "unknown": unknown, "padding": codec.pad_id}
    ids = {key: id for key, id in named.items() if id is not None}
    generation = folder / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    for end in ends if isinstance(ends, list) else []:
        if end != codec.eos_id:
            ids.setdefault("eot", end)
    return ids


# ---- byte-level ------------------------------------------------------------------------------------------------------


def _split(folder: Path, said: dict, backend: Tokenizer) -> str:
    if said["normalizer"] is not None:
        refuse(folder, f"its normalizer ({said['normalizer']['type']}) changes text")
    name = splits.name_of(backend)
    if name is None:
        raise RecipeError(
            f"{folder / 'tokenizer.json'}: how it splits text is none of {', '.join(splits.NAMES)}\n"
            "a wrong name would tokenise quietly otherwise, so none is guessed\n"
            "name the one that llama.cpp has for it: --pre NAME"
        )
    return name


def _merges(said: dict) -> list[str]:
    merges = []
    for merge in said["model"]["merges"]:
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    return merges


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def _space_before(folder: Path, said: dict) -> bool:
    """Whether a blank is put before every stretch of text, as llama.cpp does it. RecipeError for other treatments."""
    normalizer, splitter = said["normalizer"], said["pre_tokenizer"]
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    parts = [part for part in parts if part]
    prepends = False
    for part in parts:
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            prepends = True
        elif not (part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE):
            refuse(folder, f"its normalizer ({part['type']}) changes text")
    if splitter is None:
        return prepends
    if splitter["type"] != "Metaspace" or splitter.get("split", True):
        refuse(folder, f"it splits text ({splitter['type']}) before it merges, as SentencePiece does not")
    scheme = splitter.get("prepend_scheme", "always")
    if scheme == "first":
        refuse(folder, "it puts a blank before the first text and none after special tokens (prepend_scheme: first)")
    return prepends or scheme == "always"


def _scores(said: dict, tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Scores that merge as the merges do: SentencePiece joins the neighbours whose joint token has the highest score,
    which is the order in which the merges first make each token."""
    order: dict[str, int] = {}
    for left, right in _pairs(said):
        order.setdefault(left + right, len(order))
    rest = len(order)
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind != TokenType.NORMAL:
            scores.append(0.0)
        elif token in order:
            scores.append(float(-order[token]))
        else:
            scores.append(float(-rest))
            rest += 1
    return scores


def _doubtful(said: dict, tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Texts on which merging by scores may differ: of tokens whose merges do not stand together, or lack a pair that
    SentencePiece would join. A tokenizer that was converted from SentencePiece has none."""
    seen: set[str] = set()
    doubtful: set[str] = set()
    last = ""
    pairs = _pairs(said)
    for left, right in pairs:
        piece = left + right
        if piece != last and piece in seen:
            doubtful.add(piece)
        seen.add(piece)
        last = piece
    known = set(pairs)
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for piece in pieces:
        for at in range(1, len(piece)):
            if piece[:at] in pieces and piece[at:] in pieces and (piece[:at], piece[at:]) not in known:
                doubtful.add(piece)
    return [piece.replace(SPACE, " ") for piece in sorted(doubtful)[:MAX_DOUBTFUL]]


def _pairs(said: dict) -> list[tuple[str, str]]:
    pairs = []
    for merge in said["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs
