"""The tables of what a run has learnt: scores, perplexities, what NF4 cost, classification, memorisation.

Deliberately does not: know HTML or Markdown; every cell is text that the renderer escapes.
"""

import math
from collections.abc import Iterator

from qmedtune.reporting.cells import UNKNOWN, Row, Table, exact, three_decimals
from qmedtune.reporting.facts import MINUS, comparisons, precision_words, score_text
from qmedtune.results import Classification, Exposure, Number, Run, Score, TaskScores, Text
from qmedtune.units import digits3


def evaluation(run: Run) -> Table:
    columns = ("Task", "Base", "Final", "Change", "Commonest", "Items", "Reading")
    rows: list[Row] = []
    for each in comparisons(run):
        rows.append(
            (
                each.label,
                _score(each.base),
                _score(each.final),
                each.change or UNKNOWN,
                _commonest(each.scores),
                _items(each.scores),
                each.reading or UNKNOWN,
            )
        )
    if not rows:
        return Table("Scores", columns, [], "No task was scored in this run.")
    note = (
        f"{_scored_in(run)}{_asked_in(run)}"
        "Share of items answered correctly unless another metric is named, with 95% intervals. Base and final "
        "answered the same items; a change is called noise when its paired test gives p ≥ 0.05. Commonest: "
        f"what always the commonest answer scores, without any knowledge.{_methods(run)}"
    )
    return Table("Scores", columns, rows, note)


def _score(score: Score | None) -> str:
    if score is None:
        return UNKNOWN
    return score_text(score)


def _commonest(scores: list[Score]) -> str:
    for score in scores:
        if score.majority is not None:
            return f"{score.majority:.2f}"
    return UNKNOWN


def _items(scores: list[Score]) -> str:
    for score in scores:
        if score.n:
            return f"{score.n:,}"
    return UNKNOWN


def _methods(run: Run) -> str:
    """Which intervals the scores and changes carry, by name."""
    names: list[str] = []
    for task in run.scored.tasks.values():
        names += _methods_of(task)
    if not names:
        return ""
    return f" Intervals: {'; '.join(dict.fromkeys(names))}."


def _methods_of(task: TaskScores) -> Iterator[str]:
    for part in (task.base, task.final, task.difference):
        if part is not None and part.ci95_method is not None:
            yield part.ci95_method


def _asked_in(run: Run) -> str:
    if not run.scored.template:
        return ""
    return f"Asked in the template {run.scored.template}. "


def _scored_in(run: Run) -> str:
    words = precision_words(run)
    if not words:
        return ""
    return f"In {words}. "


def perplexity(run: Run) -> Table:
    columns = ("Text", "Base", "Final", "Change")
    texts = run.scored.perplexity
    rows: list[Row] = []
    for source, text in texts.items():
        rows.append(_perplexity_row(source, text.base, text.final))
    for source, text in texts.items():
        if text.nf4 is not None:
            rows.append(_perplexity_row(f"{source}, in NF4 as trained", text.nf4.base, text.nf4.final))
    if not rows:
        return Table("Perplexity", columns, [], "No perplexity was measured in this run.")
    note = f"{_scored_in(run)}Per token of held-out text, lower is better. "
    window = run.scored.window_tokens
    if window:
        note += f"Whole documents, in windows of {window:,} tokens where they are longer. "
    note += "Point estimates: no interval is computed."
    return Table("Perplexity", columns, rows, note)


def _perplexity_row(source: str, base: Number | None, final: Number | None) -> Row:
    changed = UNKNOWN
    if base and final:
        changed = change(base, final)
    return (source, _perplexity(base), _perplexity(final), changed)


def _perplexity(value: Number | None) -> str:
    if value is None:
        return UNKNOWN
    return digits3(value)


def change(before: Number, after: Number) -> str:
    """Of a perplexity, in per cent with its sign."""
    return f"{after / before - 1:+.1%}".replace("-", MINUS)


def quantisation(run: Run) -> Table:
    """What NF4 costs the base, and how much of what training gained in NF4 is left in what is delivered."""
    columns = ("Text", "NF4 costs the base", "Training, in NF4", "Training, as delivered", "Only repaired")
    rows: list[Row] = []
    for source, text in run.scored.perplexity.items():
        row = _quantisation_row(source, text)
        if row is not None:
            rows.append(row)
    if not rows:
        return Table("Quantisation", columns)
    note = (
        "Changes of perplexity. Repaired: nats per token that training gained in NF4 and the delivered model does "
        "not keep, because they only made good what rounding to NF4 had cost."
    )
    return Table("Quantisation", columns, rows, note)


def _quantisation_row(source: str, text: Text) -> Row | None:
    if text.nf4 is None or not (text.base and text.final and text.nf4.base and text.nf4.final):
        return None
    repaired = math.log(text.nf4.base / text.nf4.final) - math.log(text.base / text.final)
    return (
        source,
        change(text.base, text.nf4.base),
        change(text.nf4.base, text.nf4.final),
        change(text.base, text.final),
        f"{repaired:+.3f}".replace("-", MINUS),
    )


def audit(run: Run) -> Table:
    """Rows of the memorisation audit; none where the recipe asks for no audit."""
    columns = ("After", "Planted in", "Copies", "Trained on", "Exposure", "Extracted")
    rows: list[Row] = []
    if run.audit is not None:
        for stage, found in run.audit.stages.items():
            for exposure in found:
                rows.append(_exposure_row(stage, exposure))
    if run.audit is None or not rows:
        return Table("Memorisation", columns, [], "No audit was asked for.")
    candidates = run.audit.references + 1
    note = (
        "Invented secrets, planted as often as told. Exposure: how far up the secret ranks among "
        f"{candidates} numbers of its form, on average; 1.4 bits is chance, "
        f"{math.log2(candidates):.1f} the most that can be seen. Extracted: written word for word by "
        "greedy decoding behind the words in front of it. Low figures are no proof of privacy."
    )
    return Table("Memorisation", columns, rows, note)


def _exposure_row(stage: str, row: Exposure) -> Row:
    source, copies, trained_on = row.source, "never (control)", UNKNOWN
    if row.masked:
        source += ", masked prompts"
    if row.repeats:
        copies = f"{row.repeats}×"
    if row.passes is not None:
        trained_on = f"{row.repeats * row.passes:.0f}×"
    return (
        stage,
        source,
        copies,
        trained_on,
        f"{row.exposure:.1f} bits",
        f"{row.extracted} of {row.canaries}",
    )


def classification(run: Run) -> Table:
    """Empty where no stage classifies."""
    rows: list[Row] = []
    for stage in run.stages:
        if stage.classification is not None:
            rows.append(_classification_row(stage.name, stage.classification))
    counts = ("Documents", "Patients", "Labels scored", "Labels", "Of unknown label")
    columns = ("Stage", "AUROC", "AUPRC", "Micro F1", "Macro F1", *counts)
    note = (
        "Areas and macro F1 are means over labels, on documents held out, with the 95% interval over patients; an "
        "AUROC of 0.5 is chance, an AUPRC of the label's share. F1 of the labels that are chosen."
    )
    return Table("Classification", columns, rows, note)


def _classification_row(stage: str, found: Classification) -> Row:
    return (
        stage,
        _area(found),
        three_decimals(found.auprc),
        three_decimals(found.micro_f1),
        three_decimals(found.macro_f1),
        exact(found.n),
        exact(found.patients),
        exact(found.scored_labels),
        exact(found.labels),
        exact(found.unknown),
    )


def _area(found: Classification) -> str:
    if found.auroc is None or found.ci95 is None:
        return UNKNOWN
    low, high = found.ci95
    return f"{found.auroc:.3f} ({low:.3f}–{high:.3f})"
