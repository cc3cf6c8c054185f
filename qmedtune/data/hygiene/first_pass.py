"""The first pass over a source: its records, read and treated, in one work file.

A source of several files is sound in parts of about 64 MB that are kept (compressed to a third) and named by what is
in their files: a killed run loses one part, and a changed file redoes its own.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from qmedtune import store, ui
from qmedtune.data.hygiene import decontaminate, phi
from qmedtune.data.hygiene.per_record import ARRAYS, Pool, SoundRecords, identifier_marks, worker_count
from qmedtune.data.reading.rejects import KINDS, Rejects
from qmedtune.data.reading.sources import VERSIONED, Deleted, PmidSet, ReadItem, read_items, reading_order
from qmedtune.data.reading.tally import ReadingTally
from qmedtune.recipe import PACKED_AS, Recipe, SourceSection
from qmedtune.versions import CODE

BATCH_RECORDS = 256
PART_BYTES = 64 << 20
ROW = np.dtype([("content", "<u8"), ("group", "<u8"), ("size", "<u4"), ("pmid", "<u4"), ("held_out", "i1")])


def read_source(
    recipe: Recipe, name: str, items: list[decontaminate.BenchmarkItem], *, rejects: Rejects, work: Path
) -> tuple[SoundRecords, np.ndarray]:
    """Write the sound records of source `name` to the file `work`, one JSON line each.

    Returns what is remembered of them and which are superseded. Parts go to `parts/` beside `work`. Raises DataError.
    """
    source, sound, files = recipe.data[name], SoundRecords(), reading_order(recipe.data[name])
    whole = source.max_records is not None or source.format == "huggingface"  # a dataset's files are no records
    if whole:
        parts = [files]
    else:
        parts = _parts(files)
    pool = Pool(recipe, name, items, worker_count(recipe.workers, files))
    with work.open("wb") as file, pool, ui.progress_bar(f"read {name}", None, "records") as bar:
        for piece in _whole(pool, source, parts[0], file) if len(parts) == 1 else _each(pool, parts, file):
            sound.extend(_reported(piece, rejects))
            bar.update(len(sound))
    return sound, sound.superseded()


def _whole(pool: Pool, source: SourceSection, files: list[Path], work: IO[bytes]) -> Iterator[SoundRecords]:
    """A source in one part, batch by batch: nothing of it is kept but what is in `work`."""
    items = read_items(source, files, Path(work.name).parent)
    for lines, batch in pool.treated(in_batches(_limited(items, source.max_records))):
        work.writelines(lines)
        yield batch
    yield SoundRecords(reading=items.tally)


def _each(pool: Pool, parts: list[list[Path]], work: IO[bytes]) -> Iterator[SoundRecords]:
    """A source in several parts: each is taken from where it is kept, or made."""
    folder, treatment = Path(work.name).with_name("parts"), _treatment_digest(pool.recipe, pool.name, pool.items)
    for files in parts:
        part = folder / _part_name(treatment, files)
        yield _kept_part(part, work) or _make_part(pool, files, part, work)


def _reported(sound: SoundRecords, rejects: Rejects) -> SoundRecords:
    """Write the rejects down and forget them: there may be more of them than records."""
    for file, line, reason, kind in sound.rejects:
        rejects.at = (file, line)
        rejects.add(KINDS[kind](reason))
    sound.rejects.clear()
    return sound


def _limited(stream: Iterable[ReadItem], limit: int | None) -> Iterator[ReadItem]:
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


Each = TypeVar("Each")


def in_batches(items: Iterable[Each], size: int = BATCH_RECORDS) -> Iterator[list[Each]]:
    """Lists of `size` items (itertools.batched is Python 3.12)."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


# ---- parts -----------------------------------------------------------------------------------------------------------


def _parts(files: list[Path]) -> list[list[Path]]:
    """Files in groups of about `PART_BYTES` whose borders hang on the files' names, so that one that is added moves
    none. One empty group where there are no files: what is built in, or on the Hub."""
    groups: list[list[Path]] = []
    group, size = [], 0
    for file in files:
        group.append(file)
        bytes_ = file.stat().st_size
        size += bytes_
        if zlib.crc32(file.name.encode()) * PART_BYTES < bytes_ << 32 or size >= 2 * PART_BYTES:
            groups.append(group)
            group, size = [], 0
    if group or not groups:
        return [*groups, group]
    return groups


def _treatment_digest(recipe: Recipe, name: str, items: list[decontaminate.BenchmarkItem]) -> str:
    """Of all that a part depends on beside its files."""
    source = recipe.data[name].model_dump(mode="json", exclude={"path", "license", "terms", *PACKED_AS, "holdout"})
    hygiene = recipe.hygiene.model_dump(mode="json", exclude={"dedup", "max_bad_fraction"})
    benchmarks = [asdict(item) for item in items]
    # The recognisers also where identifiers are only counted: a part holds their counts.
    identifiers = [phi.VERSION, identifier_marks(recipe, name)]
    return store.sha256_json([source, hygiene, benchmarks, identifiers, recipe.seed, CODE])


def _part_name(treatment: str, files: list[Path]) -> str:
    return store.sha256_json([treatment, *([str(file), store.sha256_file(file)] for file in files)])[:16]


def _make_part(pool: Pool, files: list[Path], part: Path, work: IO[bytes]) -> SoundRecords:
    """Stage some files into `work` and, compressed to a third, into the files of a part; its .json comes last."""
    part.parent.mkdir(exist_ok=True)
    sound = SoundRecords()
    with _records(part).open("wb") as raw, zstandard.ZstdCompressor(1).stream_writer(raw) as packed:
        items = read_items(pool.recipe.data[pool.name], files, part.parent)
        for lines, batch in pool.treated(in_batches(items)):
            text = b"".join(lines)
            packed.write(text)
            work.write(text)
            sound.extend(batch)
    sound.reading = items.tally
    table = np.zeros(len(sound), ROW)
    for name in ARRAYS:
        table[name] = getattr(sound, name)
    np.save(part.with_suffix(".npy"), table)
    lists = PartLists(
        hits=sound.hits,
        deleted=sound.deleted,
        rejects=sound.rejects,
        cleaned=sound.cleaned,
        identifiers=sound.identifiers,
        reading=sound.reading.as_dict(),
        sha256=_hashes(part),
    )
    for path in _files(part)[:-1]:
        store.fsync_path(path)
    store.write_checked(part.with_suffix(".json"), lists.model_dump(mode="json"))
    return sound


class PartLists(BaseModel):
    """The .json of a part: what `SoundRecords` remembers beside its arrays, and the hashes of its other files."""

    model_config = ConfigDict(frozen=True)

    hits: list[tuple[int, int, int]]
    deleted: list[tuple[int, tuple[str, ...]]]
    rejects: list[tuple[str, int, str, str]]
    cleaned: Counter[str]
    identifiers: phi.IdentifierCounts
    reading: dict[str, dict[str, int]]
    sha256: list[str]


def _hashes(part: Path) -> list[str]:
    found: list[str] = []
    for path in _files(part)[:-1]:
        found.append(store.sha256_file(path))
    return found


def _lists_of(part: Path) -> PartLists | None:
    """What the .json of a part holds; None where it, or a file beside it, is missing or damaged."""
    found = store.read_checked(part.with_suffix(".json"))
    if found is None:
        return None
    try:
        lists = PartLists.model_validate(found)
        if lists.sha256 == _hashes(part):
            return lists
        return None
    except (OSError, ValidationError):
        return None


def _kept_part(part: Path, work: IO[bytes]) -> SoundRecords | None:
    """A part that an interrupted attempt or an earlier result has made, appended to `work`; None without one."""
    lists = _lists_of(part) or (_lists_of(part) if store.take_over(_files(part)) else None)
    if lists is None:
        return None
    sound, table = SoundRecords(), np.load(part.with_suffix(".npy"))
    for name in ARRAYS:
        getattr(sound, name).frombytes(table[name].tobytes())
    sound.hits, sound.deleted, sound.rejects = lists.hits, lists.deleted, lists.rejects
    sound.cleaned, sound.identifiers = lists.cleaned, lists.identifiers
    sound.reading = ReadingTally.from_dict(lists.reading)
    with _records(part).open("rb") as raw:
        zstandard.ZstdDecompressor().copy_stream(raw, work)
    return sound


def _records(part: Path) -> Path:
    return part.with_suffix(".jsonl.zst")


def _files(part: Path) -> tuple[Path, Path, Path]:
    return _records(part), part.with_suffix(".npy"), part.with_suffix(".json")
