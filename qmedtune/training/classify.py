"""The head of a `classify` stage: its loss during training, and AUROC on the documents held out.

A document is judged by the hidden state of its last token, as LLaMA's sequence classification in transformers does. The
head is fp32 and trained at the stage's rate, with or without adapters below it. Deliberately absent: thresholds, and
calibration of the probabilities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from qmedtune import model as models
from qmedtune import store
from qmedtune.data.packing.classes import HELD_OUT, IDS, LABELS, LabelledRows
from qmedtune.evaluation.statistics import auroc, bootstrap
from qmedtune.modeling.collation import collate
from qmedtune.modeling.loss import packed_hidden
from qmedtune.recipe import ClassifySection
from qmedtune.results import Areas

HEAD, ITEMS, SCORES = "head.safetensors", "heldout.items.jsonl", "heldout.scores.safetensors"
RESAMPLES = 200  # of the patients, for the interval: 1,000 would take minutes where there are 1,000 labels


class Head(nn.Module):
    """Classification head.

    Linear on hidden states, fp32. `targets`: uint8 [documents, labels] of training; `multi_label`: each label is a
    question of its own (binary cross entropy, mean over labels), otherwise one of them is right. `balanced`: errors
    count by `class_weights`."""

    def __init__(self, hidden: int, targets: np.ndarray, multi_label: bool, balanced: bool = False):
        super().__init__()
        self.linear = nn.Linear(hidden, targets.shape[1])
        self.multi_label = multi_label
        self.register_buffer("targets", torch.from_numpy(targets), persistent=False)
        weights = np.ones(targets.shape[1])
        if balanced:
            weights = class_weights(targets, multi_label)
        self.register_buffer("weights", torch.from_numpy(weights).float(), persistent=False)
        nn.init.zeros_(self.linear.weight)  # begins at chance whatever the hidden states are
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [documents, hidden] -> logits fp32 [documents, labels]."""
        return self.linear(hidden.float())

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed over documents, 0-dim."""
        if self.multi_label:
            weights: Any = self.weights
            each = F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=weights, reduction="none")
            return each.mean(1).sum()
        return F.cross_entropy(logits, targets.argmax(1), weight=self.weights, reduction="sum")  # type: ignore[arg-type]


def class_weights(targets: np.ndarray, multi_label: bool) -> np.ndarray:
    """Float64 [labels]. One label a document: n / (labels x count), scikit-learn's `balanced`, 1 on average over the
    documents. Several: negatives over positives, for the positive side. A label that is not there counts as one."""
    positive = np.maximum(targets.sum(0, dtype=np.int64), 1)
    if multi_label:
        return np.maximum(len(targets) - positive, 1) / positive
    return len(targets) / (np.count_nonzero(targets.any(0)) * positive)


def attach_head(model: Any, rows: LabelledRows, section: ClassifySection) -> None:
    """Put a head on the model and make trainable what the section asks for besides: with `frozen` nothing, else the
    last adapter, with `train_earlier` all."""
    hidden = model.get_input_embeddings().weight.shape[1]
    model.head = Head(hidden, rows.targets, section.multi_label, section.class_weights == "balanced").to(
        models.device()
    )
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            parameter.requires_grad_(True)
        elif section.adapter == "frozen":
            parameter.requires_grad_(False)
        elif section.train_earlier and "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def last_token_logits(model: Any, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
    """Logits [documents, labels] in the order of `labels` (int64 [rows, length], -100 but at last tokens)."""
    return model.head(packed_hidden(model, input_ids, position_ids)[labels != -100])


def document_nll(model: Any, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
    """Summed loss of the documents that end in these rows; the place of loss.token_nll in QTrainer."""
    logits = last_token_logits(model, input_ids, labels, position_ids)
    return model.head.nll(logits, model.head.targets[labels[labels != -100]])


@torch.no_grad()
def _logits(model: Any, rows: LabelledRows, pad_id: int, batch: int) -> np.ndarray:
    """Of every document, fp32 [documents, labels]. The model is in eval mode."""
    logits = np.zeros(rows.targets.shape, np.float32)
    for start in range(0, len(rows), batch):
        picked = collate([rows[i] for i in range(start, min(start + batch, len(rows)))], pad_id)
        picked.pop("lengths")
        on_device = {name: values.to(models.device()) for name, values in picked.items()}
        found = last_token_logits(model, **on_device)
        documents = picked["labels"][picked["labels"] != -100].numpy()
        logits[documents] = found.float().cpu().numpy()
    return logits


def validation_loss(model: Any, rows: LabelledRows, pad_id: int, batch: int) -> float:
    """Mean loss of the documents set apart, in nats, all errors counting alike whatever the training weighs (as
    aryopg/clinical_peft chooses by). Documents of a label that training never saw are left out."""
    was_training = model.training
    model.eval()
    known = np.flatnonzero(rows.targets.sum(1))
    logits = torch.from_numpy(_logits(model, rows, pad_id, batch)[known]).double()
    targets = torch.from_numpy(rows.targets[known])
    model.train(was_training)
    if model.head.multi_label:
        return float(F.binary_cross_entropy_with_logits(logits, targets.double()))
    return float(F.cross_entropy(logits, targets.argmax(1)))


@torch.no_grad()
def score(model: Any, tokens: Path, out: Path, *, pad_id: int, batch: int, seed: int) -> Areas:
    """AUROC on the held-out documents of a packed classify stage, macro over the labels that occur and do not.

    Writes one line per document below `out` (id, labels, five highest scores; no text), all scores (fp32, so that every
    figure can be computed again) and the head with its labels. Documents whose label training never saw are left out,
    and counted in the stage's `classes`.
    """
    rows, labels = LabelledRows(tokens / HELD_OUT), json.loads((tokens / LABELS).read_text(encoding="utf-8"))
    model.eval()
    logits = _logits(model, rows, pad_id, batch)
    if not model.head.multi_label:  # against the other labels, so that one document's scores compare with another's
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    known = np.flatnonzero(rows.targets.sum(1))
    names, patient_of = [], []
    for name, patient in json.loads((tokens / HELD_OUT / IDS).read_text(encoding="utf-8")):
        names.append(name)
        patient_of.append(patient)
    _write(out, _Judged(names, labels, rows.targets, logits))
    save_file({"weight": model.head.linear.weight.detach(), "bias": model.head.linear.bias.detach()}, out / HEAD)
    patients = [patient_of[place] for place in known]
    found = result(rows.targets[known], logits[known], patients, seed)
    chosen = decided(rows.targets[known], logits[known], multi_label=model.head.multi_label)
    return found.model_copy(update=chosen)


def decided(targets: np.ndarray, scores: np.ndarray, *, multi_label: bool) -> dict[str, float]:
    """{"micro_f1", "macro_f1", "accuracy"} of the labels that are chosen: the highest, or with `multi_label` all above
    a probability of one half. Macro over the labels that occur; accuracy: all labels of a document right."""
    right = targets.astype(bool)
    chosen = np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
    if multi_label:
        chosen = scores > 0
    hits, wrong = (right & chosen).sum(0), (right ^ chosen).sum(0)
    each = 2 * hits / np.maximum(2 * hits + wrong, 1)
    there = right.any(0)
    macro_f1, accuracy = 0.0, 0.0
    if there.any():
        macro_f1 = float(each[there].mean())
    if len(right):
        accuracy = float((right == chosen).all(1).mean())
    return {
        "micro_f1": float(2 * hits.sum() / max(1, 2 * hits.sum() + wrong.sum())),
        "macro_f1": macro_f1,
        "accuracy": accuracy,
    }


def result(targets: np.ndarray, scores: np.ndarray, patients: list[str], seed: int) -> Areas:
    """Both areas are None where no label both occurs and is absent, and means over those that do.

    The interval resamples patients with all their documents: notes of one patient are not independent.
    """
    right = targets.astype(bool)
    both = right.any(0) & ~right.all(0)
    if not both.any():
        return Areas(
            auroc=None, auprc=None, ci95=None, n=len(targets), patients=len(set(patients)), scored_labels=0
        )  # fmt: skip
    right, scores = right[:, both], scores[:, both]

    def macro(documents: np.ndarray) -> float:
        areas = [auroc(scores[documents, label], right[documents, label]) for label in range(right.shape[1])]
        if not np.isfinite(areas).any():
            return float("nan")
        return float(np.nanmean(areas))

    _, patient_of = np.unique(patients, return_inverse=True)
    documents_of = np.split(np.argsort(patient_of, kind="stable"), np.cumsum(np.bincount(patient_of))[:-1])
    interval = bootstrap(
        lambda drawn: macro(np.concatenate([documents_of[i] for i in drawn])),
        len(documents_of),
        resamples=RESAMPLES,
        seed=seed,
    )
    mean_roc, mean_precision_recall = _areas(right, scores)
    return Areas(
        auroc=mean_roc,
        auprc=mean_precision_recall,
        ci95=interval,
        n=len(right),
        patients=len(documents_of),
        scored_labels=int(both.sum()),
    )


def _areas(right: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """(AUROC, AUPRC), means over labels that occur and are absent. right: bool, scores: [documents, labels]."""
    from sklearn import metrics  # a second to import, and only `classify` stages need it

    roc, precision_recall = [], []
    for label in range(right.shape[1]):
        roc.append(metrics.roc_auc_score(right[:, label], scores[:, label]))
        precision_recall.append(metrics.average_precision_score(right[:, label], scores[:, label]))
    return float(np.mean(roc)), float(np.mean(precision_recall))


@dataclass(frozen=True)
class _Judged:
    """Documents by their ids, with what is right (uint8) and what was scored (float): both [documents, labels]."""

    ids: list[str]
    labels: list[str]
    targets: np.ndarray
    scores: np.ndarray


def _write(out: Path, judged: _Judged) -> None:
    labels, targets, scores = judged.labels, judged.targets, judged.scores
    lines = []
    for name, right, row in zip(judged.ids, targets, scores, strict=True):
        gold = [labels[place] for place in np.flatnonzero(right)]
        best = {labels[place]: round(float(row[place]), 4) for place in np.argsort(-row)[:5]}
        lines.append(json.dumps({"id": name, "gold": gold, "highest": best}, ensure_ascii=False))
    store.write_atomic(out / ITEMS, "\n".join(lines) + "\n")
    store.write_json(out / LABELS, labels)
    save_file({"targets": torch.from_numpy(targets), "scores": torch.from_numpy(scores)}, out / SCORES)
