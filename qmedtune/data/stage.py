"""The first pass over a source: its records, read and treated, in one work file.

A source of several files is staged in parts of about 64 MB that are kept (compressed to a third) and named by what is
in their files: a killed run loses one part, and a changed file redoes its own.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from qmedtune import keys, store, ui
from qmedtune.data import decontaminate, phi
from qmedtune.data.rejects import Damaged, Refused, Rejects
from qmedtune.data.sources import VERSIONED, Deleted, Item, PmidSet, read_items, reading_order, source_files
from qmedtune.data.treat import ARRAYS, Pool, Staged
from qmedtune.recipe import Recipe, SourceSection

BATCH_RECORDS = 256
PART_BYTES = 64 << 20
ROW = np.dtype([("content", "<u8"), ("group", "<u8"), ("size", "<u4"), ("pmid", "<u4"), ("held_out", "i1")])


def stage_source(
    recipe: Recipe, name: str, items: list[decontaminate.Item], rejects: Rejects, work: Path
) -> tuple[Staged, np.ndarray]:
    """Write the sound records of source `name` to the file `work`, one JSON line each.

    Returns what is remembered of them and which are superseded. Parts go to `parts/` beside `work`. Raises DataError.
    """
    source, staged = recipe.data[name], Staged()
    parts = _parts(source)
    with work.open("wb") as file, Pool(recipe, name, items) as pool, ui.stage(f"read {name}", None, "records") as bar:
        for files in parts:
            if len(parts) == 1:
                for lines, batch in pool.treated(in_batches(_limited(read_items(source, files), source.max_records))):
                    file.writelines(lines)
                    staged.extend(_reported(batch, rejects))
                    bar.update(len(staged))
            else:
                part = work.with_name("parts") / _part_name(recipe, name, items, files or [])
                made = _kept_part(part, file) or _make_part(pool, source, files, part, file)
                staged.extend(_reported(made, rejects))
                bar.update(len(staged))
    return staged, staged.superseded()


def _reported(staged: Staged, rejects: Rejects) -> Staged:
    """Write the rejects down and forget them: there may be more of them than records."""
    for file, line, reason, refused in staged.rejects:
        rejects.at = (file, line)
        rejects.add(Refused(reason) if refused else Damaged(reason))
    staged.rejects.clear()
    return staged


def _limited(stream: Iterable[Item], limit: int | None) -> Iterator[Item]:
    """Up to the record number `limit`. With a limit, versions that a newer one replaces do not count."""
    if limit is None:
        yield from stream
        return
    seen, num = PmidSet(), 0
    for file, line, item in stream:
        if isinstance(item, Deleted):
            seen.update(item.pmids)
        elif isinstance(item, dict):
            num += not (item.get(VERSIONED) and seen.add(item["pmid"]))
        yield file, line, item
        if num == limit:
            return


def in_batches(items: Iterable[Any], size: int = BATCH_RECORDS) -> Iterator[list[Any]]:
    """Lists of `size` items (itertools.batched is Python 3.12)."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


# ---- parts -----------------------------------------------------------------------------------------------------------


def _parts(source: SourceSection) -> list[list[Path] | None]:
    """The source's files in reading order, in groups of about `PART_BYTES` whose borders depend on the files' names, so
    that a file that is added moves none. One group for what has no files or is read only in part."""
    if source.max_records is not None or not source_files(source):
        return [None]
    groups: list[list[Path] | None] = []
    group, size = [], 0
    for file in reading_order(source):
        group.append(file)
        bytes_ = file.stat().st_size
        size += bytes_
        if zlib.crc32(file.name.encode()) * PART_BYTES < bytes_ << 32 or size >= 2 * PART_BYTES:
            groups.append(group)
            group, size = [], 0
    return [*groups, group] if group else groups


def _part_name(recipe: Recipe, name: str, items: list[decontaminate.Item], files: list[Path]) -> str:
    """A digest of all that a part depends on."""
    source = recipe.data[name].model_dump(mode="json", exclude={"path", "license", "terms", *keys.PACKED_AS, "holdout"})
    hygiene = recipe.hygiene.model_dump(mode="json", exclude={"dedup", "max_bad_fraction"})
    content = [[str(file), store.sha256_file(file)] for file in files]
    texts = store.sha256_json([asdict(item) for item in items])
    return store.sha256_json([source, hygiene, content, texts, recipe.seed, keys.CODE])[:16]


def _make_part(pool: Pool, source: SourceSection, files: list[Path] | None, part: Path, work: IO[bytes]) -> Staged:
    """Stage some files into `work` and, compressed to a third, into the files of a part; its .json comes last."""
    part.parent.mkdir(exist_ok=True)
    staged = Staged()
    with _records(part).open("wb") as raw, zstandard.ZstdCompressor(1).stream_writer(raw) as packed:
        for lines, batch in pool.treated(in_batches(read_items(source, files))):
            text = b"".join(lines)
            packed.write(text)
            work.write(text)
            staged.extend(batch)
    table = np.zeros(len(staged), ROW)
    for name in ARRAYS:
        table[name] = getattr(staged, name)
    np.save(part.with_suffix(".npy"), table)
    lists = {name: getattr(staged, name) for name in ("hits", "deleted", "rejects", "cleaned")}
    store.write_json(part.with_suffix(".json"), lists | {"identifiers": staged.identifiers.as_dict()})
    return staged


def _kept_part(part: Path, work: IO[bytes]) -> Staged | None:
    """A part that an interrupted attempt or an earlier result has made, appended to `work`; None without one."""
    if not part.with_suffix(".json").is_file() and not all(map(store.take_over, _files(part))):
        return None
    staged, table = Staged(), np.load(part.with_suffix(".npy"))
    for name in ARRAYS:
        getattr(staged, name).frombytes(table[name].tobytes())
    lists = json.loads(part.with_suffix(".json").read_text())
    staged.hits = [(record, item, words) for record, item, words in lists["hits"]]
    staged.deleted = [(record, tuple(pmids)) for record, pmids in lists["deleted"]]
    staged.rejects = [(file, line, reason, refused) for file, line, reason, refused in lists["rejects"]]
    staged.cleaned = Counter(lists["cleaned"])
    staged.identifiers = phi.Tally.from_dict(lists["identifiers"])
    with _records(part).open("rb") as raw:
        zstandard.ZstdDecompressor().copy_stream(raw, work)
    return staged


def _records(part: Path) -> Path:
    return part.with_suffix(".jsonl.zst")


def _files(part: Path) -> tuple[Path, Path, Path]:
    return _records(part), part.with_suffix(".npy"), part.with_suffix(".json")
