"""One source from raw files to clean, de-duplicated, split records with a ledger: the `data/<source>` step.

Order: read, clean, identifiers (phi), exact duplicates, benchmark overlap, near duplicates, split. Two passes over a
work file, so that memory holds a few bytes per record, never the text. The split hangs on a record's content or
patient alone: adding records moves no other record between training and held-out.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from qmedtune import ui
from qmedtune.data.clean import clean
from qmedtune.data.rejects import Rejects
from qmedtune.data.sources import read_records, source_files
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection
from qmedtune.store import sha256_file

HASHES = "hashes.npy"
KEPT, DUPLICATE, CONTAMINATED = 0, 1, 2


@dataclass
class Staged:
    """What is remembered of each record between the passes: 25 bytes each, in arrays."""

    content: array = field(default_factory=lambda: array("Q"))
    group: array = field(default_factory=lambda: array("Q"))
    held_out: array = field(default_factory=lambda: array("b"))

    def add(self, content: int, group: int, held_out: bool | None) -> None:
        self.content.append(content)
        self.group.append(group)
        self.held_out.append(-1 if held_out is None else int(held_out))


def prepare_source(recipe: Recipe, name: str, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl and rejects.jsonl of source `name` below `out`; return facts with the ledger.

    inputs: folders of earlier sources (their records are duplicates here) and benchmark files. Always:
    read = kept + rejected + duplicates + contaminated + refused. Raises DataError when more than
    `hygiene.max_bad_fraction` of the records is damaged or nothing is left.
    """
    source = recipe.data[name]
    work = out / "work.jsonl"
    rejects = Rejects(name, out / "rejects.jsonl")
    staged = _stage(recipe, name, source, rejects, work)
    rejects.close()
    fate = _fates(recipe, staged, inputs)
    _check(recipe, name, source, rejects, fate)
    held_out = _split(source, staged, fate == KEPT)
    with (out / "train.jsonl").open("wb") as train, (out / "heldout.jsonl").open("wb") as heldout:
        _distribute(work, fate, held_out, train, heldout)
    work.unlink()
    np.save(out / HASHES, np.unique(np.array(staged.content, dtype=np.uint64)[fate == KEPT]))
    return _facts(source, rejects, fate, held_out, out)


def _stage(recipe: Recipe, name: str, source: SourceSection, rejects: Rejects, work: Path) -> Staged:
    staged = Staged()
    with work.open("w", encoding="utf-8") as file, ui.stage(f"read {name}", None, "records") as progress:
        for record in read_records(name, source, rejects):
            if recipe.hygiene.clean:
                _clean(record, source.kind)
            content = _digest(_normal(record))
            group = record["patient"] if source.split_by == "patient" and "patient" in record else record.get("group")
            staged.add(content, _digest(group) if group else content, record.pop("held_out", None))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            progress.update(len(staged.content))
    return staged


def _clean(record: dict[str, Any], kind: str) -> None:
    if "text" in record:
        record["text"] = clean(record["text"], kind)
    for message in record.get("messages", ()):
        message["content"] = clean(message["content"], kind)


def _normal(record: dict[str, Any]) -> str:
    """What counts as the same record: its words, whatever their case and spacing."""
    if "text" in record:
        return " ".join(record["text"].lower().split())
    return "\0".join(" ".join(f"{m['content']} {m.get('input', '')}".lower().split()) for m in record["messages"])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _fates(recipe: Recipe, staged: Staged, inputs: Mapping[str, Path]) -> np.ndarray:
    """KEPT, DUPLICATE or CONTAMINATED for every staged record."""
    content = np.array(staged.content, dtype=np.uint64)
    fate = np.full(len(content), KEPT, np.uint8)
    if recipe.hygiene.dedup.exact:
        first = np.zeros(len(content), bool)
        first[np.unique(content, return_index=True)[1]] = True
        fate[~first] = DUPLICATE
        for folder in inputs.values():
            if (folder / HASHES).is_file():
                fate[np.isin(content, np.load(folder / HASHES))] = DUPLICATE
    return fate


def _check(recipe: Recipe, name: str, source: SourceSection, rejects: Rejects, fate: np.ndarray) -> None:
    """Stops on too much damage and on an empty result."""
    bad, read = rejects.counts["rejected"], len(fate) + sum(rejects.counts.values())
    limit = recipe.hygiene.max_bad_fraction
    if read and bad / read > limit:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in rejects.reasons.most_common(3))
        raise DataError(
            f"data.{name} ({source.path}): {bad:,} of {read:,} records are unusable "
            f"(allowed: {limit:.1%}, `hygiene.max_bad_fraction`)\nmost frequent: {reasons}\n"
            "each is named in rejects.jsonl (file, line, reason); repair the files, set `columns:` or raise the limit"
        )
    if not (fate == KEPT).any():
        raise DataError(
            f"data.{name} ({source.path}): no record is left of {read:,} read\n"
            f"duplicates {int((fate == DUPLICATE).sum()):,}, contaminated {int((fate == CONTAMINATED).sum()):,}, "
            f"refused {rejects.counts['refused']:,}"
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


def _distribute(work: Path, fate: np.ndarray, held_out: np.ndarray, train: IO[bytes], heldout: IO[bytes]) -> None:
    with work.open("rb") as file:
        for line, end, held in zip(file, fate, held_out, strict=True):
            if end == KEPT:
                (heldout if held else train).write(line)


def _facts(
    source: SourceSection, rejects: Rejects, fate: np.ndarray, held_out: np.ndarray, out: Path
) -> dict[str, Any]:
    records = {
        "read": len(fate) + sum(rejects.counts.values()),
        "kept": int((fate == KEPT).sum()),
        "rejected": rejects.counts["rejected"],
        "duplicates": int((fate == DUPLICATE).sum()) + rejects.counts["duplicates"],
        "contaminated": int((fate == CONTAMINATED).sum()),
        "refused": rejects.counts["refused"],
    }
    assert records["read"] == sum(records[key] for key in records if key != "read")
    return {
        "records": records, "sha256": sha256_file(out / "train.jsonl"), "kind": source.kind, "license": source.license,
        "terms": source.terms, "held_out": int((held_out & (fate == KEPT)).sum()), "reasons": dict(rejects.reasons),
        "phi": {}, "warnings": [], "files": len(source_files(source)),
    }  # fmt: skip
