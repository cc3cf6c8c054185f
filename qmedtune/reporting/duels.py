"""The head-to-head of `evaluate.against` as a table, and as the sentences that say what may be claimed.

Deliberately does not: know HTML or Markdown; every cell is text that the renderer escapes.
"""

import re

from qmedtune.reporting.cells import Row, Table, three_decimals
from qmedtune.reporting.facts import MINUS
from qmedtune.results import ChosenPrompting, HeadToHead, scored_in

MEASURES = ("Its score", "Final", "Commonest", "Difference", "p (Holm)", "Verdict")
COLUMNS = ("Against", "Task", *MEASURES, "Asked with")
NOTE = (
    "Each model was asked in the template and with the number of examples that answered most development items "
    "rightly; those are not scored, and all models answered the same other items. Differences with Tango's 95% score "
    "interval (resampled groups, where items share a note or premise); exact McNemar tests (exact sign flips of such "
    "groups), Holm's correction over all rows. A tie is no proof of equality. "
    "Commonest: what always the commonest answer would score."
)


def head_to_head(found: HeadToHead) -> Table:
    """A row per model and task."""
    rows: list[Row] = []
    for duel in found.duels:
        theirs, ours = found.models[duel.reference][duel.task], found.models[duel.model][duel.task]
        low, high = duel.ci95
        rows.append(
            (
                duel.reference,
                duel.task,
                three_decimals(theirs.accuracy),
                f"{ours.accuracy:.3f} of {duel.n:,}",
                three_decimals(ours.majority),
                _signed(f"{duel.difference:+.3f} ({low:+.3f} to {high:+.3f})"),
                three_decimals(duel.p_holm),
                duel.verdict,
                f"{_asked(theirs)} / {_asked(ours)}",
            )
        )
    note = NOTE
    if words := scored_in(found.precision, found.weights):
        note += f" All models were scored in {words}."
    if found.left_out:
        note += f" Not compared, no choices of accuracy or too few: {', '.join(found.left_out)}."
    return Table("Head to head", COLUMNS, rows, note)


def claims(found: HeadToHead) -> list[str]:
    """One sentence per model that the result was held against."""
    return [_signed(sentence) for sentence in found.claims]


def _asked(score: ChosenPrompting) -> str:
    return f"{score.template}, {score.shots} shots"


def _signed(text: str) -> str:
    """With a minus as wide as a plus."""
    return re.sub(r"(?<!\w)-(?=\d)", MINUS, text)
