"""Packing for `classify`: whole documents with their labels, for training and, apart from it, for scoring.

A document is cut at `seq_len` (how many are is told), never split over rows. With `validation` a share of the training
patients is laid out apart, to choose weights by: what is scored must not choose them. `targets.npy` holds a row of
zeros and ones per document in the order of the shards, `labels.json` the names of its columns: those that occur in
training, `ids.json` each document's id and patient.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qmedtune import ui
from qmedtune.data.packing import pack
from qmedtune.data.packing.ledger import Draws
from qmedtune.data.packing.tokens import load_codec
from qmedtune.data.reading.document import Record
from qmedtune.errors import DataError
from qmedtune.resolved import ResolvedClassify
from qmedtune.results import Classes, Packing

TARGETS, LABELS, IDS, HELD_OUT = "targets.npy", "labels.json", "ids.json", "heldout"
VALIDATION = "validation"
BETWEEN = re.compile(r"[,;]")
ALL = 2**62  # of the tokens held out: all are scored, whatever cap holds in training


def pack_classes(stage: pack.StageToPack, out: Path) -> Packing:
    """Lay out the documents of a classify stage below `out`, the held-out ones below `out/heldout`, those that
    choose the weights below `out/validation`.

    Returns the ledger of training. Raises DataError for fewer than two labels and
    where nothing is held out.
    """
    recipe, index = stage.recipe, stage.index
    section = recipe.stages[index].classify
    assert section is not None, "a stage of another kind"
    codec, folder = load_codec(stage.tokenizer_dir), stage.inputs[section.data]
    train, validation = folder / "train.jsonl", None
    if section.validation:
        train, validation = _set_apart(train, section, recipe.seed, out)
    labels = sorted({name for _, names in _labels(train, section.multi_label) for name in names})
    if len(labels) < 2:
        raise DataError(
            f"{section.data}: {len(labels)} label in all; classify needs two or more\nlook at its `label` column"
        )
    (out / LABELS).write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
    how = _Labelling(pack.Tokenising(recipe, section, stage.tokenizer_dir, codec), section, labels)
    _, held_out = _lay_out(how, folder / "heldout.jsonl", out / HELD_OUT)
    rng = np.random.default_rng([recipe.seed, index])
    packed, documents = _lay_out(how, train, out, rng=rng)
    unknown = int((np.load(out / HELD_OUT / TARGETS).sum(1) == 0).sum())
    classes = Classes(labels=len(labels), documents=documents, held_out=held_out, unknown=unknown)
    if validation is not None:
        _, chosen_by = _lay_out(how, validation, out / VALIDATION)
        classes = classes.model_copy(update={"validation": chosen_by})
        train.unlink()  # the source's own file has it
        validation.unlink()
    tokens = packed.tokens.model_copy(update={"supervised": packed.documents_drawn})  # one prediction per document
    if packed.records and (cut := packed.records.truncated):
        ui.warn(f"{section.data}: {cut:,} of {documents:,} documents are cut at seq_len {section.seq_len}")
    return packed.model_copy(update={"tokens": tokens, "classes": classes})


def _set_apart(path: Path, section: ResolvedClassify, seed: int, out: Path) -> tuple[Path, Path]:
    """The documents of training in two files below `out`: those trained on, and those of a share of the patients. By a
    hash of the patient and the seed, so that other documents in the file move nobody; at least one patient is in each.
    DataError where there is one patient."""
    of_patient: dict[str, float] = {}
    for record, _ in _labels(path, section.multi_label):
        patient = _patient(record)
        digest = hashlib.sha256(f"{seed} {patient}".encode()).digest()
        of_patient[patient] = int.from_bytes(digest[:8], "big") / 2**64
    if len(of_patient) < 2:
        raise DataError(
            f"{section.data}: its documents for training are of one patient; `validation` keeps whole patients apart\n"
            "take `validation` out, or give more patients"
        )
    ordered = sorted(of_patient, key=of_patient.__getitem__)
    first = [patient for patient in ordered if of_patient[patient] < section.validation] or ordered[:1]
    apart = set(first[: len(ordered) - 1])
    kept, validation = out / "train.jsonl", out / "validation.jsonl"
    with (
        path.open(encoding="utf-8") as lines,
        kept.open("w", encoding="utf-8") as train,
        validation.open("w", encoding="utf-8") as others,
    ):
        for line in lines:
            if _patient(json.loads(line)) in apart:
                others.write(line)
            else:
                train.write(line)
    return kept, validation


def _patient(record: Record) -> str:
    return str(record.get("patient", record["id"]))


@dataclass(frozen=True)
class _Labelling:
    """How documents become tokens, and which labels they may have."""

    tokenising: pack.Tokenising
    section: ResolvedClassify
    labels: list[str]


def _lay_out(how: _Labelling, path: Path, out: Path, *, rng: np.random.Generator | None = None) -> tuple[Packing, int]:
    """Pack one file: all of it once in its order for scoring, `epochs` shuffled passes where there is a generator. The
    ledger, and the number of its documents."""
    section, labels = how.section, how.labels
    out.mkdir(exist_ok=True)
    corpus = pack.tokenise(how.tokenising, section.data, path, out, max_tokens=None if rng else ALL)
    if not len(corpus.documents):
        raise DataError(f"{section.data}: nothing is held out to score on\nset data.{section.data}.holdout above 0")
    column = {}
    for number, name in enumerate(labels):
        column[name] = number
    targets = np.zeros((len(corpus.documents), len(labels)), np.uint8)
    ids = []
    for row, (record, names) in zip(targets, _labels(path, section.multi_label), strict=True):
        row[[column[name] for name in names if name in column]] = 1
        ids.append([record["id"], record.get("patient", record["id"])])
    np.save(out / TARGETS, targets)
    (out / IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")
    everything = np.arange(len(corpus.documents))
    plan = Draws([corpus], np.zeros(len(everything), np.int64), everything, {section.data: 1.0}, [])
    if rng is not None:
        plan = pack.epochs(section.epochs, [corpus], rng)
    packed = pack.write_rows(section, plan, rng or np.random.default_rng(0), out, whole=True)
    return packed, len(corpus.documents)


def _labels(path: Path, multi_label: bool) -> Iterator[tuple[Record, list[str]]]:
    """Every record with its labels."""
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            label = record["label"]
            if isinstance(label, list):
                yield record, label
            else:
                parts = []
                for part in BETWEEN.split(label):
                    parts.append(part.strip())
                yield record, [part for part in parts if part] if multi_label else [label]


class LabelledRows(pack.PackedRows):
    """Packed rows whose `labels` name, at the last token of each document, that document's row in `targets`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.targets = np.load(folder / TARGETS)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        item, pieces = super().__getitem__(row), self.pieces(row)
        labels = np.full_like(item["labels"], pack.IGNORED)
        labels[np.cumsum(pieces[:, 2]) - 1] = pieces[:, 0]
        return {**item, "labels": labels}
