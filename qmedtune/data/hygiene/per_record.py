"""What is done to each record before records are compared: cleaned, searched for identifiers and benchmarks, digested.

Records are treated in batches, by as many processes as wanted and in order, so that the result is the same for any
number of them. What is remembered of a record are 25 bytes, never its text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from qmedtune.data.hygiene import decontaminate, language, phi, presidio, secret, surrogates
from qmedtune.data.hygiene.clean import clean
from qmedtune.data.reading.document import Record
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, kind_of
from qmedtune.data.reading.sources import VERSIONED, Deleted, PmidSet, ReadItem
from qmedtune.data.reading.tally import ReadingTally
from qmedtune.errors import RunError
from qmedtune.interrupt import stop
from qmedtune.recipe import Recipe

WORKER_BYTES = 8 << 20  # of input per worker: starting one takes half a second, as long as it takes to clean 8 MB
WAITING_BATCHES = 4  # per worker: what is read ahead and not yet written
ARRAYS = ("content", "group", "size", "pmid", "held_out")


@dataclass
class SoundRecords:
    """What is remembered of the records of a source, of a part, or of a batch, in their order.

    Arrays, one entry per record that is written: digest of its text, digest of what it is split by, bytes of its line,
    PubMed id where versions replace each other (else 0), held out by the source itself (1, 0; -1: not said).
    """

    content: array = field(default_factory=lambda: array("Q"))
    group: array = field(default_factory=lambda: array("Q"))
    size: array = field(default_factory=lambda: array("I"))
    pmid: array = field(default_factory=lambda: array("I"))
    held_out: array = field(default_factory=lambda: array("b"))
    hits: list[tuple[int, int, int]] = field(default_factory=list)  # record, benchmark item, words
    deleted: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)  # before which record, PubMed ids
    rejects: list[tuple[str, int, str, str]] = field(default_factory=list)  # file, line, reason, kind (rejects.KINDS)
    identifiers: phi.IdentifierCounts = field(default_factory=phi.IdentifierCounts)
    reading: ReadingTally = field(default_factory=ReadingTally)
    cleaned: Counter[str] = field(default_factory=lambda: Counter({"records": 0, "characters": 0}))

    def __len__(self) -> int:
        return len(self.content)

    def extend(self, other: SoundRecords) -> None:
        """Append what came after."""
        first = len(self)
        for name in ARRAYS:
            getattr(self, name).extend(getattr(other, name))
        for record, item, words in other.hits:
            self.hits.append((first + record, item, words))
        for record, pmids in other.deleted:
            self.deleted.append((first + record, pmids))
        self.rejects += other.rejects
        self.identifiers.merge(other.identifiers)
        self.reading.merge(other.reading)
        self.cleaned += other.cleaned

    def superseded(self) -> np.ndarray:
        """True for PubMed records that a newer file, read before them, has replaced or withdrawn."""
        old, seen, deleted = np.zeros(len(self), bool), PmidSet(), deque(self.deleted)
        for record in np.flatnonzero(np.frombuffer(self.pmid, np.uint32)).tolist() if len(self) else ():
            while deleted and deleted[0][0] <= record:
                seen.update(deleted.popleft()[1])
            old[record] = seen.add(str(self.pmid[record]))
        return old


class Treatment:
    """What a recipe does to each record of a source; what takes long to load is loaded once per process."""

    def __init__(self, recipe: Recipe, name: str, items: list[decontaminate.BenchmarkItem]):
        self.source, self.hygiene = recipe.data[name], recipe.hygiene
        self.index = decontaminate.build(items)
        self.phi = phi_mode(recipe, name)
        if self.phi == "redact":
            self.secret = secret.load()
        else:
            self.secret = b""
        if self.phi != "off":
            model = self.hygiene.presidio
        else:
            model = None
        if model:
            self.persons = presidio.person_finder(model)
        else:
            self.persons = None

    def __call__(self, batch: list[ReadItem]) -> tuple[list[bytes], SoundRecords]:
        """The lines of a batch's sound records, and what is to be remembered of them."""
        sound, lines, texts, pmids = SoundRecords(), [], [], []
        for file, line, item in batch:
            if isinstance(item, Deleted):
                sound.deleted.append((len(sound), item.pmids))
                continue
            if isinstance(item, (Damaged, RefusedRecord)):
                why = item
            else:
                why = self._problem(item, sound)
            if why:
                sound.rejects.append((file, line, why.reason, kind_of(why)))
                continue
            assert isinstance(item, dict)
            texts.append(text_of(item))
            pmids.append(item.get("pmid"))
            lines.append(self._remember(item, texts[-1], sound))
        if self.index.items:
            found = decontaminate.search(self.index, texts, pmids, every=self.hygiene.contaminated != "drop")
            sound.hits = []
            for hit in found:
                sound.hits.append((hit.record, hit.item, hit.words))
        return lines, sound

    def _problem(self, record: Record, sound: SoundRecords) -> Damaged | RefusedRecord | None:
        """Clean a record in place; why it cannot be used, if so."""
        before = text_of(record)
        if self.hygiene.clean:
            change_texts(record, partial(clean, kind=self.source.kind))
        text = text_of(record)
        if text != before:
            sound.cleaned.update(records=1, characters=max(0, len(before) - len(text)))
        if _is_empty(record):
            return Damaged("nothing is left after cleaning")
        if self.source.split_by == "patient" and "patient" not in record:
            return Damaged("no patient id, which split_by: patient needs (`columns: {patient: ...}`)")
        return self._unwanted(text) or self._identifiers(record, sound.identifiers)

    def _unwanted(self, text: str) -> RefusedRecord | None:
        if len(text) < self.hygiene.min_characters:
            return RefusedRecord("shorter than hygiene.min_characters")
        if self.hygiene.max_characters is not None and len(text) > self.hygiene.max_characters:
            return RefusedRecord("longer than hygiene.max_characters")
        if self.hygiene.languages != "any":
            found = language.detect(text)
            if found is not None and found not in self.hygiene.languages:
                return RefusedRecord(f"language {found} is not among hygiene.languages")
        return None

    def _identifiers(self, record: Record, tally: phi.IdentifierCounts) -> RefusedRecord | None:
        """Count (under `redact` replace, under `refuse` refuse) the identifiers of a record."""
        if self.phi == "off":
            return None
        patient, found = record.get("patient", record["id"]), False

        def treated(text: str) -> str:
            nonlocal found
            spans = phi.find(text, self.persons)
            tally.add(text, spans)
            found |= bool(spans)
            if spans and self.phi == "redact":
                return surrogates.redact(
                    text, spans, surrogates.StandIns(patient, self.secret, self.hygiene.shift_dates)
                )
            return text

        change_texts(record, treated)
        tally.records += found
        if found and self.phi == "refuse":
            return RefusedRecord("holds identifiers (phi: refuse)")
        return None

    def _remember(self, record: Record, text: str, sound: SoundRecords) -> bytes:
        content = digest(" ".join(text.lower().split()))
        if self.source.split_by == "patient":
            group = record["patient"]
        else:
            group = record.get("group")
        held_out, versioned = record.pop("held_out", None), record.pop(VERSIONED, False)
        sound.content.append(content)
        sound.group.append(digest(group) if group else content)
        sound.held_out.append(-1 if held_out is None else int(held_out))
        known = versioned and record["pmid"].isdecimal() and len(record["pmid"]) <= 9
        sound.pmid.append(int(record["pmid"]) if known else 0)
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        sound.size.append(len(line))
        return line


def phi_mode(recipe: Recipe, name: str) -> str:
    """What is done about identifiers in a source: what it says, else `hygiene.phi` where its text is clinical."""
    source = recipe.data[name]
    return source.phi or (recipe.hygiene.phi if source.is_clinical else "off")


def identifier_marks(recipe: Recipe, name: str) -> dict[str, object]:
    """What finds identifiers and what stands in for them, where the text that is kept of a source depends on it."""
    mode = phi_mode(recipe, name)
    if mode not in ("redact", "refuse"):
        return {}
    if mode == "refuse":
        return {"recognisers": phi.VERSION}
    return {
        "recognisers": phi.VERSION,
        "surrogates": surrogates.VERSION,
        "secret": secret.fingerprint(secret.load()),
    }


def change_texts(record: Record, change: Callable[[str], str]) -> None:
    """Put `change` of each text of a record in its place."""
    if "text" in record:
        record["text"] = change(record["text"])
    for message in record.get("messages", ()):
        for key in message:
            if key != "role":
                message[key] = change(message[key])


def _is_empty(record: Record) -> bool:
    if "text" in record:
        return not record["text"]
    return not all(message["content"] for message in record["messages"])


def text_of(record: Record) -> str:
    """All words of a record, for hashing and for search."""
    if "text" in record:
        return record["text"]
    return "\n".join(f"{m['content']}\n{m.get('input', '')}" for m in record["messages"])


def digest(text: str) -> int:
    """64 bits of the text's BLAKE2b."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


# ---- processes -------------------------------------------------------------------------------------------------------


def worker_count(wanted: int | str, files: list[Path]) -> int:
    """Number of worker processes.

    `auto`: one per core, but no more than there are `WORKER_BYTES` of input.
    """
    if isinstance(wanted, int):
        return wanted
    size = sum(file.stat().st_size for file in files)
    return max(1, min(len(os.sched_getaffinity(0)), size // WORKER_BYTES))


class Pool:
    """Treats batches in this process or in several others; results come in the order of the batches."""

    def __init__(self, recipe: Recipe, name: str, items: list[decontaminate.BenchmarkItem], workers: int):
        self.recipe, self.name, self.items, self.workers = recipe, name, items, workers
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        what = self.recipe, self.name, self.items
        if self.recipe.hygiene.presidio and phi_mode(self.recipe, self.name) != "off":
            presidio.check(self.recipe.hygiene.presidio)  # what a worker raises at its start reaches nobody
        if self.workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of the progress bar's thread
            self.executor = ProcessPoolExecutor(self.workers, spawn, _start_worker, what)
        else:
            self.treat = Treatment(*what)
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(cancel_futures=True)

    def treated(self, batches: Iterable[list[ReadItem]]) -> Iterator[tuple[list[bytes], SoundRecords]]:
        if self.executor is None:
            yield from map(self.treat, batches)
            return
        waiting: deque[Future] = deque()
        try:
            for batch in batches:
                waiting.append(self.executor.submit(_treat_in_worker, batch))
                if len(waiting) > WAITING_BATCHES * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            stop.raise_if_requested()  # Slurm signals all processes of a job, and a worker may be gone first
            raise RunError(
                f"one of {self.workers} worker processes was killed, perhaps for want of memory\n"
                "give the same command again; with fewer processes: --set workers=1"
            ) from error


def _start_worker(recipe: Recipe, name: str, items: list[decontaminate.BenchmarkItem]) -> None:
    global _treatment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends these
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _treatment = Treatment(recipe, name, items)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _treat_in_worker(batch: list[ReadItem]) -> tuple[list[bytes], SoundRecords]:
    return _treatment(batch)
