"""Benchmark questions that occur in training text: 13-word grams, whole short questions, and PubMed ids.

A record is contaminated when it holds any 13 consecutive words of a benchmark text, a whole question of fewer words,
or the PMID of a benchmark abstract; case, punctuation and spacing do not matter. Short questions that match more
than one record in a thousand are phrases of the language and are given back (and named in the facts). Paraphrases
are not found: no claim is made about them. What is looked for is gathered in benchmarks.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from qmedtune.data.hygiene import ngrams
from qmedtune.results import Overlap

NUM_WORDS = 13
PROBE = 16  # bytes looked up at every position of the corpus; what follows is compared only where they occur
MIN_LETTERS = 16  # a shorter question says too little to be told from chance
GENERIC_WORDS = 8
GENERIC_SHARE = 1e-3
WORD = re.compile(rb"[a-z0-9\x80-\xff]+")


@dataclass(frozen=True)
class BenchmarkItem:
    """One benchmark item as it must not appear: its texts, and the PMID it was made from where there is one."""

    task: str
    id: str
    texts: tuple[str, ...]
    pmid: str | None = None


@dataclass(frozen=True)
class Index:
    """Index of the n-grams of benchmark items.

    `phrases`: probe hash -> [(letters, item number, number of words)].
    """

    items: list[BenchmarkItem]
    phrases: dict[int, list[tuple[bytes, int, int]]]
    pmids: dict[str, int]
    bitmap: np.ndarray
    too_short: int


def build(items: list[BenchmarkItem]) -> Index:
    """An index over benchmark items; a few hundred bytes per word of benchmark text."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    too_short = 0
    for number, item in enumerate(items):
        for text in item.texts:
            phrases = _phrases(text)
            too_short += not phrases
            for phrase, words in phrases:
                holders = found.setdefault(phrase, [])
                if not holders or holders[-1][0] != number:
                    holders.append((number, words))
    probes = np.frombuffer(b"".join(phrase[:PROBE] for phrase in found), np.uint8)
    keys = ngrams.windows(probes, PROBE)[::PROBE]
    bitmap = np.zeros(1 << 24, bool)
    bitmap[keys >> np.uint64(40)] = True
    by_key: dict[int, list[tuple[bytes, int, int]]] = {}
    for key, (phrase, holders) in zip(keys.tolist(), found.items(), strict=True):
        by_key.setdefault(key, []).extend((phrase, number, words) for number, words in holders)
    pmids = {}
    for number, item in reversed(list(enumerate(items))):
        if item.pmid:
            pmids[item.pmid] = number
    return Index(items, by_key, pmids, bitmap, too_short)


def _phrases(text: str) -> list[tuple[bytes, int]]:
    """The letters of every 13 consecutive words and how many words they are; of all words where there are fewer."""
    words = WORD.findall(ngrams.lower_bytes(text))
    grouped = (words[start : start + NUM_WORDS] for start in range(max(1, len(words) - NUM_WORDS + 1)))
    joined = ((b"".join(group), len(group)) for group in grouped)
    found: list[tuple[bytes, int]] = []
    for phrase, count in joined:
        if len(phrase) >= MIN_LETTERS:
            found.append((phrase, count))
    return found


@dataclass(frozen=True)
class Hit:
    """Record `record` of a batch holds `words` consecutive words of item `item` (0 words: its PMID)."""

    record: int
    item: int
    words: int


def search(index: Index, texts: Sequence[str], pmids: Sequence[str | None], every: bool = False) -> list[Hit]:
    """Hits in a batch of texts: one for each text, the longest, which is enough to drop it; with `every`, one for each
    item that it holds."""
    best: dict[tuple[int, int], Hit] = {}
    batch = ngrams.letters(texts)
    hashes = ngrams.windows(batch.buffer, PROBE)
    places = np.flatnonzero(index.bitmap[hashes >> np.uint64(40)])
    owners = np.searchsorted(batch.bounds, places, side="right") - 1
    for place, owner, key in zip(places.tolist(), owners.tolist(), hashes[places].tolist(), strict=True):
        if every:
            known = None
        else:
            known = best.get((owner, 0))
        if known is not None and known.words == NUM_WORDS:
            continue
        for phrase, item, words in index.phrases.get(key, ()):
            end, slot = place + len(phrase), (owner, item if every else 0)
            known = best.get(slot)
            fits = end <= batch.bounds[owner + 1] and (known is None or words > known.words)
            if fits and batch.buffer[place:end].tobytes() == phrase:
                best[slot] = Hit(owner, item, words)
    for record, pmid in enumerate(pmids):
        if pmid in index.pmids:
            item = index.pmids[pmid]
            best.setdefault((record, item if every else 0), Hit(record, item, 0))
    return list(best.values())


def given_back(hits: list[tuple[int, int]], num_records: int) -> set[int]:
    """Items whose short question (hits of fewer than 8 words: (item, words)) is a phrase of the language."""
    counts = Counter(item for item, words in hits if 0 < words < GENERIC_WORDS)
    found: set[int] = set()
    for item, count in counts.items():
        if count > max(20, GENERIC_SHARE * num_records):
            found.add(item)
    return found


def overlap(items: Sequence[BenchmarkItem], hits: list[tuple[int, int, int]], generic: set[int]) -> dict[str, Overlap]:
    """Per task: items checked, items found in this source (by id, so that an evaluation can be split), hits by kind.

    hits: (record, item, words); 0 words mean the PMID. No text, only ids of the public benchmark.
    """
    counted: dict[str, _Counted] = {}
    for number, item in enumerate(items):
        entry = counted.setdefault(item.task, _Counted())
        entry.items += 1
        entry.given_back += number in generic
    hit: set[int] = set()
    for _, item, words in hits:
        hit.add(item)
        entry = counted[items[item].task]
        entry.records += 1
        entry.by_pmid += words == 0
    for item in sorted(hit):
        counted[items[item].task].found.append(items[item].id)
    found: dict[str, Overlap] = {}
    for task, entry in counted.items():
        found[task] = Overlap(**asdict(entry))
    return found


@dataclass
class _Counted:
    """The figures of an `Overlap` while they are counted."""

    items: int = 0
    found: list[str] = field(default_factory=list)
    records: int = 0
    by_pmid: int = 0
    given_back: int = 0
