"""Near duplicates: recall, no false removal of templates, bounded bands."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from qmedtune.data.hygiene import dedup, ngrams

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def find(tmp_path, texts, threshold=0.8):
    batches = (dedup.windows_of(texts[i : i + 64]) for i in range(0, len(texts), 64))
    return dedup.near_duplicates(batches, texts.__getitem__, threshold, tmp_path / "bands") >= 0


def words(rng, count):
    return [f"w{rng.randrange(20_000)}" for _ in range(count)]


def changed(rng, text, edits):
    tokens = text.split()
    for _ in range(edits):
        tokens[rng.randrange(len(tokens))] = f"n{rng.randrange(10**6)}"
    return " ".join(tokens)


def similarity(a, b):
    sets = [set(ngrams.shingles(ngrams.letters([t]))[0].tolist()) for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_recall_and_precision_on_planted_copies(tmp_path):
    rng = random.Random(0)
    originals = [" ".join(words(rng, 200)) for _ in range(1500)]
    copies = [changed(rng, text, rng.randint(0, 8)) for text in originals[:500]]
    found = find(tmp_path, originals + copies)
    assert not found[:1500].any()
    expected = np.array([similarity(a, b) >= 0.8 for a, b in zip(originals, copies, strict=False)])
    assert expected.sum() > 250
    assert found[1500:][expected].mean() >= 0.99
    assert not found[1500:][~expected].any()


def test_case_punctuation_and_spacing_do_not_hide_a_copy(tmp_path):
    rng = random.Random(1)
    text = " ".join(words(rng, 100))
    noisy = ", ".join(text.upper().split()).replace("W1", "  W-1")
    assert find(tmp_path, [text, noisy]).tolist() == [False, True]


def test_notes_of_one_template_are_not_one_note(tmp_path):
    rng = random.Random(2)
    template = [" ".join(words(rng, 40)) for _ in range(10)]
    notes = [" ".join(f"{part} {' '.join(words(rng, 3))}" for part in template) for _ in range(200)]
    assert similarity(notes[0], notes[1]) > 0.5
    almost = changed(rng, notes[0], 2)
    assert find(tmp_path, [*notes, almost], 0.5).tolist() == [False] * 200 + [True]


def test_the_built_in_world_loses_nothing(tmp_path):
    from qmedtune.data.synthetic import world

    for corpus in ("literature", "notes", "general"):
        texts = [record["text"] for record in world.records(corpus, world.make_world("tiny"))]
        assert not find(tmp_path, texts).any()


def test_partitions_change_nothing(tmp_path, monkeypatch):
    rng = random.Random(3)
    texts = [" ".join(words(rng, 80)) for _ in range(300)]
    texts += [changed(rng, text, 1) for text in texts[:100]]
    one = find(tmp_path, texts)
    monkeypatch.setattr(dedup, "PARTITION_BYTES", 4096)
    assert (find(tmp_path, texts) == one).all()
    assert one.sum() >= 95
    assert not (tmp_path / "bands").exists()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_reach_their_recall(threshold):
    bands = dedup.num_bands(threshold)
    assert 1 - (1 - threshold**dedup.ROWS_PER_BAND) ** bands >= dedup.RECALL or threshold == 1


def test_windows_never_cross_texts():
    texts = ["one two three four five six", "seven eight nine ten eleven"]
    alone = [ngrams.shingles(ngrams.letters([text]))[0] for text in texts]
    hashes, bounds = ngrams.shingles(ngrams.letters(texts))
    for i in range(2):
        assert np.array_equal(hashes[bounds[i] : bounds[i + 1]], alone[i])


@pytest.mark.skipif(not REAL.is_dir(), reason="real text is not part of the repository")
def test_real_abstracts_are_not_near_duplicates(tmp_path):
    import json

    lines = (REAL / "literature/hoc_abstracts.jsonl").read_text().splitlines()
    assert find(tmp_path, [json.loads(line)["text"] for line in lines]).mean() < 0.005
