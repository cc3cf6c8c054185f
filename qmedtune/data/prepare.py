"""One source from raw files to clean, de-duplicated, split records with a ledger: the `data/<source>` step.

Order: read, clean, identifiers (phi), exact duplicates, benchmark overlap, near duplicates, split. Two passes over a
work file, so that memory holds 26 bytes per record, never the text. The split hangs on a record's content or
patient alone: adding records moves no other record between training and held-out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from qmedtune import ui
from qmedtune.data import decontaminate, dedup, phi, surrogates
from qmedtune.data.benchmarks import benchmark_items
from qmedtune.data.clean import clean
from qmedtune.data.rejects import Damaged, Refused, Rejects
from qmedtune.data.sources import read_records, source_files
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.store import sha256_file

HASHES = "hashes.npy"
KEPT, DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = 0, 1, 2, 3
BATCH_RECORDS = 256


@dataclass
class Staged:
    """What is remembered of each record between the passes: 26 bytes each, in arrays, and what the stages counted."""

    content: array = field(default_factory=lambda: array("Q"))
    group: array = field(default_factory=lambda: array("Q"))
    line_start: array = field(default_factory=lambda: array("Q"))
    held_out: array = field(default_factory=lambda: array("b"))
    hits: list[tuple[int, int, int]] = field(default_factory=list)  # record, benchmark item, words
    identifiers: phi.Tally = field(default_factory=phi.Tally)


def prepare_source(recipe: Recipe, name: str, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl and rejects.jsonl of source `name` below `out`; return facts with the ledger.

    inputs: folders of earlier sources; their records are duplicates here. Always: read = kept + rejected +
    duplicates + contaminated + refused. Raises DataError when more than `hygiene.max_bad_fraction` of the records
    is damaged or nothing is left.
    """
    source = recipe.data[name]
    work = out / "work.jsonl"
    index = decontaminate.build(benchmark_items(recipe))
    rejects = Rejects(name, out / "rejects.jsonl")
    staged = _stage(recipe, name, rejects, index, work)
    rejects.close()
    _check_damage(recipe, name, rejects, len(staged.content))
    fate, overlap = _fates(recipe, staged, index, inputs, work)
    _check_left(name, source, rejects, fate)
    held_out = _split(source, staged, fate == KEPT)
    with (out / "train.jsonl").open("wb") as train, (out / "heldout.jsonl").open("wb") as heldout:
        _distribute(work, fate, held_out, train, heldout)
    work.unlink()
    np.save(out / HASHES, np.unique(np.array(staged.content, dtype=np.uint64)[fate == KEPT]))
    return _facts(recipe, name, rejects, staged, fate, held_out, out) | {"contamination": overlap}


# ---- first pass ------------------------------------------------------------------------------------------------------


def _stage(recipe: Recipe, name: str, rejects: Rejects, index: decontaminate.Index, work: Path) -> Staged:
    """Read, clean, look for identifiers and benchmark text; write what remains to the work file."""
    staged = Staged()
    with work.open("wb") as file, ui.stage(f"read {name}", None, "records") as progress:
        for batch in in_batches(_sound_records(recipe, name, rejects, staged.identifiers)):
            first = len(staged.content)
            if index.items:
                found = decontaminate.search(index, [_text(r) for r in batch], [r.get("pmid") for r in batch])
                staged.hits += [(first + hit.record, hit.item, hit.words) for hit in found]
            for record in batch:
                _remember(record, recipe.data[name].split_by, staged, file)
            progress.update(len(staged.content))
    return staged


def in_batches(items: Iterable[Any], size: int = BATCH_RECORDS) -> Iterator[list[Any]]:
    """Lists of `size` items (itertools.batched is Python 3.12)."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _sound_records(recipe: Recipe, name: str, rejects: Rejects, tally: phi.Tally) -> Iterator[dict[str, Any]]:
    source, hygiene = recipe.data[name], recipe.hygiene
    look = hygiene.phi != "off" and source.kind == "clinical"
    for record in read_records(name, source, rejects):
        if hygiene.clean:
            _clean(record, source.kind)
        if _is_empty(record):
            rejects.add(Damaged("nothing is left after cleaning"))
        elif source.split_by == "patient" and "patient" not in record:
            rejects.add(Damaged("no patient id, which split_by: patient needs (`columns: {patient: ...}`)"))
        elif look and _identifiers(record, recipe, tally) and hygiene.phi == "refuse":
            rejects.add(Refused("holds identifiers (hygiene.phi: refuse)"))
        else:
            yield record


def _identifiers(record: dict[str, Any], recipe: Recipe, tally: phi.Tally) -> bool:
    """Count (and under `redact` replace) the identifiers of a text record; True where there were any."""
    spans = phi.find(record["text"])
    tally.add(record["text"], spans)
    if spans and recipe.hygiene.phi == "redact":
        patient = record.get("patient", record["id"])
        record["text"] = surrogates.redact(record["text"], spans, patient, recipe.seed, recipe.hygiene.shift_dates)
    return bool(spans)


def _clean(record: dict[str, Any], kind: str) -> None:
    if "text" in record:
        record["text"] = clean(record["text"], kind)
    for message in record.get("messages", ()):
        message |= {key: clean(value, kind) for key, value in message.items() if key != "role"}


def _is_empty(record: dict[str, Any]) -> bool:
    if "text" in record:
        return not record["text"]
    return not all(message["content"] for message in record["messages"])


def _text(record: dict[str, Any]) -> str:
    """All words of a record, for hashing and for search."""
    if "text" in record:
        return record["text"]
    return "\n".join(f"{m['content']}\n{m.get('input', '')}" for m in record["messages"])


def _remember(record: dict[str, Any], split_by: str, staged: Staged, file: IO[bytes]) -> None:
    content = _digest(" ".join(_text(record).lower().split()))
    group = record["patient"] if split_by == "patient" else record.get("group")
    held_out = record.pop("held_out", None)
    staged.content.append(content)
    staged.group.append(_digest(group) if group else content)
    staged.held_out.append(-1 if held_out is None else int(held_out))
    staged.line_start.append(file.tell())
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ---- between the passes ----------------------------------------------------------------------------------------------


def _fates(
    recipe: Recipe, staged: Staged, index: decontaminate.Index, inputs: Mapping[str, Path], work: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """What becomes of every staged record, and what was found of each benchmark."""
    content = np.array(staged.content, dtype=np.uint64)
    fate = np.full(len(content), KEPT, np.uint8)
    if recipe.hygiene.dedup.exact:
        first = np.zeros(len(content), bool)
        first[np.unique(content, return_index=True)[1]] = True
        fate[~first] = DUPLICATE
        for folder in inputs.values():
            if (folder / HASHES).is_file():
                fate[np.isin(content, np.load(folder / HASHES))] = DUPLICATE
    generic = decontaminate.given_back([(item, words) for _, item, words in staged.hits], len(content))
    hits = [hit for hit in staged.hits if hit[1] not in generic and fate[hit[0]] == KEPT]
    if recipe.hygiene.contaminated == "drop":
        fate[[record for record, _, _ in hits]] = CONTAMINATED
    if recipe.hygiene.dedup.near and (fate == KEPT).sum() > 1:
        _mark_near_duplicates(recipe.hygiene.dedup.near, staged, fate, work)
    return fate, decontaminate.overlap(index, hits, generic)


def _mark_near_duplicates(threshold: float, staged: Staged, fate: np.ndarray, work: Path) -> None:
    places = np.array(staged.line_start, dtype=np.uint64)[fate == KEPT]
    bands = work.with_name("bands")
    shutil.rmtree(bands, ignore_errors=True)  # of an attempt that was killed here
    with work.open("rb") as file:

        def text_of(number: int) -> str:
            file.seek(int(places[number]))
            return _text(json.loads(file.readline()))

        def batches() -> Iterator[list[str]]:
            for some in in_batches(range(len(places)), dedup.BATCH_TEXTS):
                yield [text_of(number) for number in some]

        duplicate = dedup.near_duplicates(batches(), text_of, threshold, bands)
    fate[np.flatnonzero(fate == KEPT)[duplicate]] = NEAR_DUPLICATE


def _check_damage(recipe: Recipe, name: str, rejects: Rejects, num_sound: int) -> None:
    bad, read = rejects.counts["rejected"], num_sound + sum(rejects.counts.values())
    limit = recipe.hygiene.max_bad_fraction
    if not read or bad / read <= limit:
        return
    reasons = "; ".join(f"{reason} ({count:,})" for reason, count in rejects.reasons.most_common(3))
    raise DataError(
        f"data.{name} ({recipe.data[name].path}): {bad:,} of {read:,} records are unusable "
        f"(allowed: {limit:.1%}, `hygiene.max_bad_fraction`)\nmost frequent: {reasons}\n"
        f"each is named in {rejects.path} (file, line, reason)\nrepair the files, set `columns:` or raise the limit"
    )


def _check_left(name: str, source: SourceSection, rejects: Rejects, fate: np.ndarray) -> None:
    if not (fate == KEPT).any():
        raise DataError(
            f"data.{name} ({source.path}): no record is left of {len(fate) + sum(rejects.counts.values()):,} read\n"
            f"duplicates {int(((fate == DUPLICATE) | (fate == NEAR_DUPLICATE)).sum()):,}, "
            f"contaminated {int((fate == CONTAMINATED).sum()):,}, refused {rejects.counts['refused']:,}"
        )


def _split(source: SourceSection, staged: Staged, kept: np.ndarray) -> np.ndarray:
    """True for held-out records: whole groups whose hash falls below `holdout`; the built-in world marks its own."""
    marked = np.array(staged.held_out, dtype=np.int8)
    if (marked >= 0).any():
        return marked == 1
    group = np.array(staged.group, dtype=np.uint64)
    held_out = (group < np.uint64(source.holdout * 2**64)) & kept
    if source.holdout and not held_out.any() and len(np.unique(group[kept])) > 1:
        held_out = kept & (group == group[kept].min())  # a small source still needs something to be validated on
    return held_out


# ---- second pass -----------------------------------------------------------------------------------------------------


def _distribute(work: Path, fate: np.ndarray, held_out: np.ndarray, train: IO[bytes], heldout: IO[bytes]) -> None:
    with work.open("rb") as file:
        for line, end, held in zip(file, fate, held_out, strict=True):
            if end == KEPT:
                (heldout if held else train).write(line)


def _facts(
    recipe: Recipe, name: str, rejects: Rejects, staged: Staged, fate: np.ndarray, held_out: np.ndarray, out: Path
) -> dict[str, Any]:
    source = recipe.data[name]
    near = int((fate == NEAR_DUPLICATE).sum())
    records = {
        "read": len(fate) + sum(rejects.counts.values()),
        "kept": int((fate == KEPT).sum()),
        "rejected": rejects.counts["rejected"],
        "duplicates": int((fate == DUPLICATE).sum()) + near + rejects.counts["duplicates"],
        "contaminated": int((fate == CONTAMINATED).sum()),
        "refused": rejects.counts["refused"],
    }
    assert records["read"] == sum(count for key, count in records.items() if key != "read")
    looked = recipe.hygiene.phi != "off" and source.kind == "clinical"
    return {
        "records": records, "near_duplicates": near, "held_out": int((held_out & (fate == KEPT)).sum()),
        "sha256": sha256_file(out / "train.jsonl"), "kind": source.kind, "license": source.license,
        "terms": source.terms, "files": len(source_files(source)), "reasons": dict(rejects.reasons),
        "phi": staged.identifiers.facts(recipe.hygiene.phi) if looked else {}, "warnings": [],
    }  # fmt: skip
