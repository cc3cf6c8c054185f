"""The head-to-head of `evaluate.against` as a table, and as the sentences that say what may be claimed."""

import re

from qmedtune.reporting.tables import Table

COLUMNS = ("Against", "Task", "Its score", "Final", "Difference", "p (Holm)", "Verdict", "Asked with")


def head_to_head(run: dict) -> Table:
    """A row per model and task; no rows where the recipe names no models."""
    found = run.get("against") or {"duels": []}
    rows = []
    for duel in found["duels"]:
        theirs, ours = (found["models"][name][duel["task"]] for name in (duel["reference"], duel["model"]))
        low, high = duel["ci95"]
        rows.append(
            (
                duel["reference"],
                duel["task"],
                f"{theirs['accuracy']:.3f}",
                f"{ours['accuracy']:.3f} of {duel['n']:,}",
                _signed(f"{duel['difference']:+.3f} ({low:+.3f} to {high:+.3f})"),
                f"{duel['p_holm']:.3f}",
                duel["verdict"],
                f"{_asked(theirs)} / {_asked(ours)}",
            )
        )
    return Table("Head to head", COLUMNS, rows, _note(found) if rows else "")


def _note(found: dict) -> str:
    words = (
        "Each model was asked in the template and with the number of examples that answered most development items "
        "rightly; those are not scored, and all models answered the same other items. Differences with Tango's 95% "
        "score interval; exact McNemar tests, Holm's correction over all rows. A tie is no proof of equality."
    )
    left_out = found.get("left_out") or []
    return words + (f" Not compared, no choices of accuracy or too few: {', '.join(left_out)}." if left_out else "")


def claims(run: dict) -> list[str]:
    """One sentence per model that the result was held against."""
    return [_signed(sentence) for sentence in (run.get("against") or {}).get("claims", [])]


def _asked(score: dict) -> str:
    return f"{score['template']}, {score['shots']} shots"


def _signed(text: str) -> str:
    """With the sign that is as wide as a plus."""
    return re.sub(r"(?<![\w])-(?=\d)", "−", text)
