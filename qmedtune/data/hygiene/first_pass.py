"""The first pass over a source: its records, read and treated, in one work file.

A source of several files is sound in parts of about 64 MB that are kept (compressed to a third) and named by what is
in their files: a killed run loses one part, and a changed file redoes its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import zstandard

from qmedtune import store, ui
from qmedtune.data.hygiene import decontaminate, phi
from qmedtune.data.hygiene.part_files import read_part, write_part
from qmedtune.data.hygiene.per_record import Pool, SoundRecords, identifier_marks, worker_count
from qmedtune.data.reading.rejects import KINDS, Rejects
from qmedtune.data.reading.sources import VERSIONED, Deleted, PmidSet, ReadItem, read_items, reading_order
from qmedtune.recipe import PACKED_AS, Recipe, SourceSection
from qmedtune.versions import CODE

BATCH_RECORDS = 256
PART_BYTES = 64 << 20


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
            sound.extend(reported(piece, rejects))
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


def reported(sound: SoundRecords, rejects: Rejects) -> SoundRecords:
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
    write_part(part, sound, [_records(part)])
    return sound


def _kept_part(part: Path, work: IO[bytes]) -> SoundRecords | None:
    """A part that an interrupted attempt or an earlier result has made, appended to `work`; None without one."""
    records = _records(part)
    sound = read_part(part, [records])
    if sound is None and store.take_over((records, part.with_suffix(".npy"), part.with_suffix(".json"))):
        sound = read_part(part, [records])
    if sound is None:
        return None
    with records.open("rb") as raw:
        zstandard.ZstdDecompressor().copy_stream(raw, work)
    return sound


def _records(part: Path) -> Path:
    return part.with_suffix(".jsonl.zst")
