"""Token shards: the training text of each source as token ids on disk, written in batches and resumed by shard.

A shard is three .npy files: `tokens` (uint32), `documents` (int64, one row per document: length, kept, supervised)
and for instructions `mask` (uint8: 0 no loss, 255 loss, 1 the prompt's weight). `documents` is renamed into place last,
so a shard that has it is whole, and a killed run loses one shard at most. Shards end where the text says so and are
named by what is in them: when a source changes, only the shards that hold the change are made again. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from qmedtune import store
from qmedtune.data.packing.borders import document_borders
from qmedtune.data.packing.templates import special
from qmedtune.data.reading.document import Record
from qmedtune.errors import DataError
from qmedtune.model_settings import check_tokenizer_file, read_settings

SHARD_BYTES = 32 << 20  # of jsonl, on average; about 8 M tokens
BATCH_BYTES = 2 << 20  # of jsonl per call of the tokenizer: enough to keep all cores busy, little to hold
ID_BYTES = 4
LENGTH, KEPT, SUPERVISED = 0, 1, 2
FULL_WEIGHT = 255
PROMPT_MARK = 1  # of tokens that carry the loss weight which the packed folder states (`loss_on: 0.3`)


@dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer with the ids that it names. `bos_id`, `pad_id`: None where the tokenizer names no such token."""

    backend: Tokenizer
    bos_id: int | None
    eos_id: int
    eos_token: str
    pad_id: int | None = None

    def encode(self, texts: Sequence[str], markers: bool) -> list[list[int]]:
        """Token ids without bos and eos. Special tokens spelled in the text count only with `markers`."""
        self.backend.encode_special_tokens = not markers
        found: list[list[int]] = []
        for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False):
            found.append(encoding.ids)
        return found

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids, the character that each token begins at) per text; special tokens spelled in it count."""
        self.backend.encode_special_tokens = False
        encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        result: list[tuple[list[int], list[int]]] = []
        for found in encoded:
            result.append((found.ids, _starts(found)))
        return result

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        return frozenset(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Matches every token that is no piece of text, for `defuse`: special tokens, and others added like them."""
        names = []
        for token in self.backend.get_added_tokens_decoder().values():
            if _is_marker(token):
                names.append(token.content)
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    def defuse(self, content: str) -> str:
        """Message text in which a spelled special token, say `</s>`, cannot become that token."""
        safe = self.marker_pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", content)
        normalizer = self.backend.normalizer
        if safe.isascii() or normalizer is None:
            return safe
        while match := self.marker_pattern.search(normalizer.normalize_str(safe)):  # full-width forms of them
            safe = _broken(safe, normalizer, self.marker_pattern, match[0])
        return safe


def _starts(encoding: Any) -> list[int]:
    found: list[int] = []
    for start, _ in encoding.offsets:
        found.append(start)
    return found


def _is_marker(token: Any) -> bool:
    """Added tokens of blanks alone (runs of spaces, as GPT-NeoX's have) are text."""
    return token.special or not token.content.isspace()


def _broken(text: str, normalizer: Any, pattern: re.Pattern[str], mark: str) -> str:
    """`text` with a space inside the first stretch that is a marker only once it is normalised."""
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + len(mark)) + 1):
            if pattern.search(normalizer.normalize_str(text[start:end])):
                return f"{text[: end - 1]} {text[end - 1 :]}"
    raise DataError("a message spells a special token in a form that cannot be broken up\nremove it from the data")


def load_codec(tokenizer_dir: Path) -> Codec:
    """The tokenizer of a model folder. Raises DataError where it has no tokenizer.json or no eos token."""
    files = []
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        files.append(tokenizer_dir / name)
    return _load_codec(tokenizer_dir, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _load_codec(tokenizer_dir: Path, _changed: tuple[int, ...]) -> Codec:
    file = tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"{tokenizer_dir}: no tokenizer.json in this folder\n"
            "save the tokenizer in the fast format: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    backend = _backend(file)
    backend.no_truncation()
    backend.no_padding()
    config_file = tokenizer_dir / "tokenizer_config.json"
    if config_file.is_file():
        config = read_settings(config_file)
    else:
        config = {}
    eos = special(config, "eos_token") or next((t for t in ("</s>", "<|end_of_text|>") if backend.token_to_id(t)), "")
    if eos:
        eos_id = backend.token_to_id(eos)
    else:
        eos_id = None
    if eos_id is None:
        raise DataError(f"{tokenizer_dir}: the tokenizer names no eos_token\nset it in tokenizer_config.json")
    bos = special(config, "bos_token")
    _check_fits(backend, tokenizer_dir)
    pad = special(config, "pad_token")
    if pad:
        pad_id = backend.token_to_id(pad)
    else:
        pad_id = None
    return Codec(backend, backend.token_to_id(bos) if bos else None, eos_id, eos, pad_id)


def _backend(file: Path) -> Tokenizer:
    """What the library of the tokenizers raises of a hostile file is a plain Exception, or a panic of its own kind,
    which is no Exception at all."""
    check_tokenizer_file(file)
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(
            f"{file}: cannot be read as a tokenizer ({str(error)[:120]})\nfetch or copy the model folder again"
        ) from error


def _check_fits(backend: Tokenizer, folder: Path) -> None:
    """DataError where the tokenizer yields ids that the model beside it has no embedding for: it is another model's."""
    config = folder / "config.json"
    if config.is_file():
        rows = read_settings(config).get("vocab_size")
    else:
        rows = None
    if rows and backend.get_vocab_size() > rows:
        raise DataError(
            f"{folder}: the tokenizer has {backend.get_vocab_size()} tokens, the model only {rows} embeddings\n"
            "use the tokenizer that came with the base"
        )


@dataclass(frozen=True)
class Encoded:
    """One document: ids with its marks, loss weights (None: every token), kept length."""

    ids: list[int]
    mask: list[int] | None
    kept: int

    @property
    def supervised(self) -> int:
        """How many of the kept tokens have a loss weight that the mask states; 0 without a mask."""
        if self.mask:
            return sum(weight > 0 for weight in self.mask[1 : self.kept])
        return 0


def encode_texts(codec: Codec, records: list[Record], limit: int | None) -> list[Encoded]:
    """Documents of a text source; `limit` truncates (chunking: truncate), None keeps everything."""
    borders = document_borders(codec)
    if borders.start is None:
        start = []
    else:
        start = [borders.start]
    documents = []
    for ids in codec.encode([record["text"] for record in records], markers=False):
        whole = [*start, *ids, borders.end]
        documents.append(Encoded(whole, None, len(whole) if limit is None else min(len(whole), limit)))
    return documents


@dataclass(frozen=True)
class Encoder:
    """A tokenising function with its cache key.

    How records become tokens; `key` names all that this depends on beside their text.
    """

    encode: Callable[[list[Record]], list[Encoded]]
    key: str = ""


def write_shards(
    path: Path, place: Path, encoder: Encoder, progress: Callable[[int], None], *, max_tokens: int | None = None
) -> list[Path]:
    """Tokenise the records of a jsonl file into `<place>-<digest>.*`; shards that are there already are kept, and
    shards of an earlier result that this folder replaces are taken over.

    Returns the shards' paths without extension. `progress` gets the number of documents done. `max_tokens` ends after
    the document that reaches it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    shards, done = [], 0
    for part in _shards(path):
        shard = place.with_name(f"{place.name}-{_digest(path, part, f'{encoder.key} {max_tokens}')}")
        if not _file(shard, "documents").is_file() and not store.take_over(_files(shard)):
            _write_shard(
                shard, _lines(path, part), encoder, lambda n, done=done: progress(done + n), max_tokens=max_tokens
            )
        shards.append(shard)
        done += part.num_lines
        if max_tokens is not None:
            max_tokens -= int(np.load(_file(shard, "documents"))[:, LENGTH].sum())
            if max_tokens <= 0:
                break
    return shards


@dataclass(frozen=True)
class _Part:
    """Some lines of a file: bytes `start` to `end`."""

    start: int
    end: int
    num_lines: int


def _shards(path: Path) -> Iterator[_Part]:
    """The lines of a file in parts of `SHARD_BYTES` on average and twice that at most, which hold what a shard holds.

    A line ends a part with a probability that grows with its length, drawn from its own checksum: what is inserted or
    taken out elsewhere moves no border.
    """
    start = end = num_lines = 0
    with path.open("rb") as file:
        for line in file:
            end, num_lines = end + len(line), num_lines + 1
            if zlib.crc32(line) * SHARD_BYTES < len(line) << 32 or end - start >= 2 * SHARD_BYTES:
                yield _Part(start, end, num_lines)
                start, num_lines = end, 0
    if num_lines:
        yield _Part(start, end, num_lines)


def _lines(path: Path, part: _Part) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(part.start)
        for _ in range(part.num_lines):
            yield file.readline()


def _digest(path: Path, part: _Part, encoding: str) -> str:
    digest = hashlib.sha256(encoding.encode())
    for line in _lines(path, part):
        digest.update(line)
    return digest.hexdigest()[:16]


def _files(shard: Path) -> list[Path]:
    """In the order in which they are written. Only shards with prompts have a mask."""
    found: list[Path] = []
    for what in ("mask", "tokens", "documents"):
        found.append(_file(shard, what))
    return found


def _file(shard: Path, what: str) -> Path:
    return shard.with_name(f"{shard.name}.{what}.npy")


def _groups(lines: Iterable[bytes], limit_bytes: int) -> Iterator[list[bytes]]:
    """Consecutive lines in groups of at least `limit_bytes`."""
    group, size = [], 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= limit_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_shard(
    shard: Path, lines: Iterable[bytes], encoder: Encoder, progress: Callable[[int], None], *, max_tokens: int | None
) -> None:
    tokens, mask, rows, done = bytearray(), bytearray(), [], 0
    for batch in _groups(lines, BATCH_BYTES):
        documents = encoder.encode([json.loads(line) for line in batch])
        if max_tokens is not None:
            documents = _upto(documents, max_tokens - len(tokens) // ID_BYTES)
        tokens += _flat([d.ids for d in documents], np.uint32).tobytes()
        mask += _flat([d.mask for d in documents if d.mask is not None], np.uint8).tobytes()
        for d in documents:
            rows.append((len(d.ids), d.kept, d.supervised))
        done += len(batch)
        progress(done)
        if max_tokens is not None and len(tokens) >= max_tokens * ID_BYTES:
            break
    arrays = {"tokens": np.frombuffer(tokens, np.uint32), "documents": np.array(rows, dtype=np.int64).reshape(-1, 3)}
    if mask:
        arrays = {"mask": np.frombuffer(mask, np.uint8), **arrays}
    for what, array in arrays.items():
        temporary = _file(shard, f"{what}.part")
        np.save(temporary, array)
        store.fsync_path(temporary)  # after power loss an attempt must not find empty files under final names
        os.replace(temporary, _file(shard, what))


def _upto(documents: list[Encoded], room: int) -> list[Encoded]:
    """The first documents, up to and with the one that fills `room` tokens."""
    ends = np.cumsum([len(d.ids) for d in documents])
    return documents[: int(np.searchsorted(ends, room)) + 1]


def _flat(lists: list[list[int]], dtype: Any) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype=dtype, count=sum(map(len, lists)))


def shard_array(shard: Path, what: Literal["tokens", "documents"]) -> np.ndarray:
    """What every shard has, as a memory map."""
    return np.load(_file(shard, what), mmap_mode="r")


def shard_mask(shard: Path) -> np.ndarray | None:
    """uint8, of each token, as a memory map; None for a shard of texts, every token of which is learnt."""
    file = _file(shard, "mask")
    if file.is_file():
        return np.load(file, mmap_mode="r")
    return None
