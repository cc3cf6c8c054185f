"""The passes of a job over one source: each shard is treated, all are compared, each is written, all are checked.

    treat (every shard) -> compare (once) -> write (every shard) -> check (once)

Each pass leaves files with their hashes and finds what it has left there before: the same command goes on. What a
record becomes is decided by the functions that a run on one machine calls, in the same order of records, so that the
kept records and the ledger are the same. Deliberately not here: who runs which pass where (blocks.py, datatrove).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from qmedtune.data.fates import (
    KEPT,
    RecordLines,
    SourceRecords,
    StoredWindows,
    check_damage,
    check_left,
    fates,
    held_out_of,
)
from qmedtune.data.hygiene import dedup
from qmedtune.data.hygiene.first_pass import in_batches, reported
from qmedtune.data.hygiene.part_files import read_part, write_part
from qmedtune.data.hygiene.per_record import SoundRecords, Treatment, text_of
from qmedtune.data.prepare import DecidedSource, FilesFound, ledger, line_starts, write_hashes
from qmedtune.data.reading.document import Record
from qmedtune.data.reading.listing import SHARDS
from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import read_items as read_records
from qmedtune.data.shards.job import JobPlaces, ShardJob, check_files, read_items, read_job
from qmedtune.disk import owner_only, write_json
from qmedtune.errors import RunError
from qmedtune.hashes import read_checked, sha256_file, write_checked
from qmedtune.results import Source
from qmedtune.store import fsync_path

AGAIN = "give the same command again: it is made anew, the others are kept"
FATES = np.dtype([("fate", "u1"), ("held_out", "?")])


def treat(out: Path, name: str, shard: int) -> int:
    """Read, clean, search and digest the files of a shard; returns its sound records. Raises QmedtuneError."""
    job, places = read_job(out), JobPlaces(out, name)
    files = check_files(job.sources[name].shards[shard])
    part, beside = places.part(shard), places.beside(shard)
    done = read_part(part, beside)
    if done is not None:
        return len(done)
    with owner_only():
        # Under other names until they are whole: a task that a scheduler took for dead may still be writing.
        unfinished = [_unfinished(path) for path in beside]
        sound = _treated(job, name, files, (read_items(job, out), unfinished))
        for path, final in zip(unfinished, beside, strict=True):
            path.rename(final)
        write_part(part, sound, beside)
    return len(sound)


def _unfinished(path: Path) -> Path:
    """The name of a file that is being written, no other task's: two machines on one file system may share a process
    number, so the host and 32 random bits stand behind it. `check` removes what begins with a dot and a digit."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
    return path.with_name(f".{os.getpid()}-{host}-{secrets.token_hex(4)}-{path.name}")


def _treated(job: ShardJob, name: str, files: list[Path], into: tuple[list, list[Path]]) -> SoundRecords:
    """Write the lines, the windows and their counts; returns what is remembered of the records."""
    items, (records, windows, counts) = into
    treatment, near = Treatment(job.recipe, name, items), job.recipe.hygiene.dedup.near
    sound, per_text = SoundRecords(), []
    stream = read_records(job.recipe.data[name], files, records.parent)
    with records.open("wb") as lines_file, windows.open("wb") as windows_file:
        for batch in in_batches(stream):
            lines, found = treatment(batch)
            sound.extend(found)
            lines_file.writelines(lines)
            for some in in_batches(lines, dedup.BATCH_TEXTS) if near else ():
                hashes, bounds = dedup.windows_of([text_of(json.loads(line)) for line in some])
                windows_file.write(hashes.tobytes())
                per_text.append(np.diff(bounds))
    sound.reading = stream.tally
    with counts.open("wb") as file:
        np.save(file, np.concatenate([np.zeros(0, np.int64), *per_text]))
    return sound


def compare(out: Path, name: str) -> Source:
    """Decide about all records of a source, beside those of earlier sources; returns the ledger. Raises QmedtuneError:
    RunError for a shard that is missing or damaged, DataError as a run on one machine does."""
    job, places = read_job(out), JobPlaces(out, name)
    done = _decided(places)
    if done is not None:
        return done.ledger
    with owner_only():
        rejects = Rejects(name, places.rejects)
        own, sound = _joined(job, places, rejects)
        rejects.close()
        check_damage(job.recipe, name, rejects, len(sound))
        earlier = [JobPlaces(out, other) for other in job.recipe.compared_with(name) if other in job.sources]
        for other in earlier:
            _must_be_decided(other)
        compared = SourceRecords(
            job.recipe,
            name,
            own=own,
            earlier=_kept_lines(job, earlier),
            hashes=[other.hashes for other in earlier],
            scratch=places.folder,
        )
        fate, found = fates(compared, sound, sound.superseded(), read_items(job, out))
        source = job.recipe.data[name]
        check_left(name, source, rejects, fate)
        held_out = held_out_of(source, sound, fate == KEPT)
        planned = job.sources[name]
        files = FilesFound(sum(len(shard) for shard in planned.shards), Counter(planned.unread))
        counted = ledger(job.recipe, name, DecidedSource(sound, rejects, fate, held_out, found), files)
        _decide(places, sound, np.rec.fromarrays([fate, held_out], dtype=FATES))
        starts = np.cumsum([0, *(len(lines.starts) for lines in own)]).tolist()
        decided = {"ledger": counted.as_json(), "sha256": _hashes_of(places), "starts": starts}
        write_checked(places.decided, decided)
    return counted


def _joined(job: ShardJob, places: JobPlaces, rejects: Rejects) -> tuple[list[RecordLines], SoundRecords]:
    """The records of all shards in their order, and what is remembered of them."""
    several: list[RecordLines] = []
    sound = SoundRecords()
    for shard in range(_num_shards(job, places)):
        part = _part(job, places, shard)
        several.append(_lines(places, shard, line_starts(part)))
        sound.extend(reported(part, rejects))
    return several, sound


def _part(job: ShardJob, places: JobPlaces, shard: int) -> SoundRecords:
    part = read_part(places.part(shard), places.beside(shard))
    if part is None:
        raise RunError(
            f"{places.beside(shard)[0]}: shard {shard + 1} of {_num_shards(job, places)} is missing or damaged\n{AGAIN}"
        )
    return part


def _num_shards(job: ShardJob, places: JobPlaces) -> int:
    return len(job.sources[places.folder.name].shards)


def _lines(places: JobPlaces, shard: int, starts: np.ndarray) -> RecordLines:
    records, windows, counts = places.beside(shard)
    per_text = np.load(counts)
    if len(per_text) != len(starts):
        return RecordLines(records, starts)  # near duplicates are not looked for
    ends = np.cumsum(per_text)
    return RecordLines(records, starts, StoredWindows(windows, ends - per_text, ends))


def _kept_lines(job: ShardJob, earlier: list[JobPlaces]) -> list[RecordLines]:
    """What is kept of earlier sources, of each what is trained on first: the order in which a run has them."""
    found: list[RecordLines] = []
    if not job.recipe.hygiene.dedup.near:
        return found
    for places in earlier:
        own, _ = _joined(job, places, Rejects(places.folder.name))
        ends = np.load(places.fates)
        for held_out in (False, True):
            first = 0
            for lines in own:
                here = ends[first : first + len(lines.starts)]
                found.append(lines.some((here["fate"] == KEPT) & (here["held_out"] == held_out)))
                first += len(lines.starts)
    return found


def _decide(places: JobPlaces, sound: SoundRecords, ends: np.ndarray) -> None:
    write_hashes(places.hashes, sound, ends["fate"])
    np.save(places.fates, ends)
    fsync_path(places.hashes)
    fsync_path(places.fates)


def _hashes_of(places: JobPlaces) -> list[str]:
    return [sha256_file(places.fates), sha256_file(places.hashes)]


class DecisionFile(BaseModel):
    """decided.json. starts: the number of each shard's first record, and the end; sha256: of what lies beside it."""

    model_config = ConfigDict(frozen=True)

    ledger: Source
    sha256: list[str]
    starts: list[int]


def _decided(places: JobPlaces) -> DecisionFile | None:
    found = read_checked(places.decided)
    if found is None or not places.fates.is_file() or not places.hashes.is_file():
        return None
    decided = DecisionFile.model_validate(found)
    return decided if decided.sha256 == _hashes_of(places) else None


def _must_be_decided(places: JobPlaces) -> DecisionFile:
    decided = _decided(places)
    if decided is None:
        raise RunError(f"{places.fates}: what was decided is missing or damaged\n{AGAIN}")
    return decided


def kept_records(out: Path, name: str, shard: int) -> Iterator[Record]:
    """The records of a shard that are kept, in their order. Raises RunError where it is missing or damaged."""
    job, places = read_job(out), JobPlaces(out, name)
    starts = _must_be_decided(places).starts
    _part(job, places, shard)
    ends = np.load(places.fates)[starts[shard] : starts[shard + 1]]
    with places.beside(shard)[0].open("rb") as lines:
        for line, fate in zip(lines, ends["fate"], strict=True):
            if fate == KEPT:
                yield json.loads(line)


def is_written(out: Path, name: str, shard: int) -> bool:
    """Whether the shard lies there as it was written."""
    return _is_written(read_job(out), JobPlaces(out, name), shard)


def _is_written(job: ShardJob, places: JobPlaces, shard: int) -> bool:
    path, known = places.shard(shard, _num_shards(job, places)), read_checked(places.written(shard))
    return known is not None and path.is_file() and sha256_file(path) == known["sha256"]


def write(out: Path, name: str, shard: int, records: Iterable[Record]) -> int:
    """Write records as shard number `shard`, one JSON line each, gzipped and the same bytes each time; how many."""
    job, places = read_job(out), JobPlaces(out, name)
    path, num = places.shard(shard, _num_shards(job, places)), 0
    part = _unfinished(path)
    with owner_only():
        with part.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                num += 1
        fsync_path(part)
        part.rename(path)
        write_checked(places.written(shard), {"records": num, "sha256": sha256_file(path)})
    return num


def check(out: Path, name: str) -> Source:
    """Write ledger.json once all shards are there as they were written. Raises RunError naming those that are not."""
    job, places = read_job(out), JobPlaces(out, name)
    counted, num_shards = _must_be_decided(places).ledger, _num_shards(job, places)
    missing: list[str] = []
    sizes: dict[str, int] = {}
    for shard in range(num_shards):
        path = places.shard(shard, num_shards)
        if _is_written(job, places, shard):
            sizes[path.name] = path.stat().st_size
        else:
            missing.append(path.name)
    if missing:
        raise RunError(
            f"{places.shards}: {len(missing)} of {num_shards} shards missing or damaged: {', '.join(missing[:3])}\n"
            "give the same command again: they are made anew, the others are kept"
        )
    for folder in (places.treated, places.shards):
        for leftover in folder.glob(".[0-9]*-*"):  # of a task that was killed while it wrote: text of records
            leftover.unlink()
    with owner_only():
        write_checked(places.shards / SHARDS, sizes)
        write_json(places.ledger, counted.as_json())
    return counted


def is_whole(out: Path) -> bool:
    """Whether all sources have their ledger, and all shards lie there as they were written."""
    job = read_job(out)
    for name in job.sources:
        if not JobPlaces(out, name).ledger.is_file():
            return False
        try:
            check(out, name)
        except RunError:
            return False
    return True


def ledgers(out: Path) -> dict[str, Source]:
    """The ledger of every source. Raises RunError where one is not there: a task was killed and left no message."""
    found: dict[str, Source] = {}
    for name in read_job(out).sources:
        found[name] = check(out, name)
    return found
