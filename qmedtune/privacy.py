"""Which files of a run hold text of its sources, and what is known of it: `privacy` of run.json.

Taken from run.json and the seals, so that it can be told of any run, of version 0.1 too. Deliberately not here:
removing text (erase.py), tables (reporting/privacy.py), and what was written outside the run folder: answers of
`predict`, items of `eval --out`, exported models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from qmedtune import store
from qmedtune.disk import read_plain
from qmedtune.results import Exposure, Facts, Part, Privacy, Remembered, Run, Scan, Stage, Terms, TextFolder
from qmedtune.results.privacy import ERASED, HELD, NONE

NOTE = "erased.json"
# Below data/: kept text, packed tokens (a tokenizer turns them back), what was planted. Facts are in the seals.
TEXT_FOLDER = "data"
# Elsewhere: questions and answers item by item, and what was read off samples.
TEXT_NAMES = ("*.items.jsonl", "items.html", "rejects.jsonl", "*.txt.gz", "samples*.jsonl", "audit*.jsonl")


@dataclass(frozen=True)
class Erased:
    """What `erased.json` notes: names below the run folder, and when."""

    files: frozenset[str] = frozenset()
    at: str | None = None


def holds_text(name: str) -> bool:
    """Whether a file of a sealed folder, by its path below the run, holds text. Seals do not."""
    place = PurePosixPath(name)
    if place.name == store.SEAL:
        return False
    return place.parts[0] == TEXT_FOLDER or any(fnmatch(place.name, pattern) for pattern in TEXT_NAMES)


def erased(out: Path) -> Erased:
    """Empty where nothing was erased, or the note is damaged."""
    try:
        note = json.loads(read_plain(out / NOTE))
        sha256 = note.pop("sha256")
        if sha256 != store.sha256_json(note):
            return Erased()
        return Erased(frozenset(note["files"]), str(note["time"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Erased()


def of(out: Path, run: Run) -> Privacy:
    """What stands in the folder `out` of the sources of `run`, and what is known of it."""
    folders: list[TextFolder] = []
    for step in run.sealed_steps:
        sealed = store.read_seal(out / step.name)
        if sealed is not None:
            folders += _text_of(out, step.name, sealed, run)
    folders += _at_the_root(out)
    note = erased(out)
    gone = sum(not (out / name).exists() for name in note.files)
    found = Privacy(
        text=_state(folders, gone),
        files=folders,
        scanned=[_scan(run, name) for name in run.data],
        memorised=_memorised(run),
        terms=_terms(run),
    )
    if not gone:
        return found
    return found.model_copy(update={"erased": gone, "erased_at": note.at})


def _at_the_root(out: Path) -> list[TextFolder]:
    """What no step has sealed: the page of items."""
    sizes: list[int] = []
    for path in out.iterdir() if out.is_dir() else ():
        if path.is_file() and holds_text(path.name):
            sizes.append(path.stat().st_size)
    if not sizes:
        return []
    return [TextFolder(folder=".", files=len(sizes), bytes=sum(sizes))]


def _state(folders: list[TextFolder], gone: int) -> str:
    if folders:
        return HELD
    return ERASED if gone else NONE


class MixtureSeal(Facts):
    """What is read here of any step's seal."""

    mixture: dict[str, Part] | None = None


def _text_of(out: Path, step: str, sealed: store.Seal, run: Run) -> list[TextFolder]:
    """At most one entry: the files of a step that hold text and are there."""
    files = size = 0
    for name, entry in sealed.files.items():
        if holds_text(f"{step}/{name}") and (out / step / name).exists():
            files += 1
            size += entry["size"]
    if not files:
        return []
    return [TextFolder(folder=step, files=files, bytes=size, sources=_sources(step, sealed, run))]


def _sources(step: str, sealed: store.Seal, run: Run) -> list[str]:
    """Whose text it is: a source's own folder, a packed stage's mixture, or a part for each of several sources."""
    own = step.removeprefix(f"{TEXT_FOLDER}/")
    if own in run.data:
        return [own]
    mixture = MixtureSeal.model_validate(sealed.facts).mixture
    if mixture is not None:
        return list(mixture)
    parts: list[str] = []
    for name in sealed.files:
        part = name.partition("/")[0]
        if part in run.data and part not in parts:
            parts.append(part)
    return parts


def _scan(run: Run, name: str) -> Scan:
    source = run.data[name]
    found = source.phi
    known = Scan(source=name, kind=source.kind, mode=found.mode)
    if found.mode is None:
        return known
    counts = {"records": found.records, "identifiers": found.identifiers, "classes": dict(found.classes)}
    return known.model_copy(update=counts)


def _memorised(run: Run) -> list[Remembered]:
    clinical: list[str] = []
    told: list[Remembered] = []
    for stage in run.stages:
        if stage.status != "sealed":
            continue
        for name in _clinical(run, stage):  # what an earlier stage has learnt, a later one builds on
            if name not in clinical:
                clinical.append(name)
        entry = Remembered(stage=stage.name, clinical=list(clinical))
        rows = run.audit.stages.get(stage.name, []) if run.audit else []
        told.append(_with_audit(entry, [row for row in rows if row.repeats]))
    return told


def _clinical(run: Run, stage: Stage) -> Iterable[str]:
    for name in stage.mixture:
        if run.may_identify(name):
            yield name


def _with_audit(entry: Remembered, rows: list[Exposure]) -> Remembered:
    """rows: of canaries that were planted, without the controls."""
    if not rows:
        return entry
    counts = {
        "canaries": sum(row.canaries for row in rows),
        "extracted": sum(row.extracted for row in rows),
        "exposure": max(row.exposure for row in rows),
    }
    return entry.model_copy(update=counts)


def _terms(run: Run) -> list[Terms]:
    found: list[Terms] = []
    for name, source in run.data.items():
        found.append(Terms(of=name, license=source.license, terms=source.terms))
    return found
