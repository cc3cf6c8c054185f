"""One line on a run: where it is, why it ended, or what came out. For lists, where the report has its sentences."""

from __future__ import annotations

from qmedtune.heartbeat import Life
from qmedtune.reporting.facts import both_perplexities, precision_words, verdicts, wholes
from qmedtune.results import Run
from qmedtune.ui import Progress
from qmedtune.units import clock, digits3

FEW = 2  # so many scores are named one by one; of more, verdicts are counted
GOES_ON = "the same command goes on"


def headline(run: Run, life: Life) -> str:
    """Names and figures; an error is named by its first line, which holds no text of records."""
    if life.status == "running":
        return _under_way(life.beat.progress) if life.beat else "under way"
    if life.status == "failed":
        return (run.error or "failed").splitlines()[0]
    if life.status == "stopped":
        told = "killed" if life.killed else "stopped"
        left = next_step(run)
        if left is not None:
            told += f" in {left}"
        return f"{told}; {GOES_ON}"
    return result(run)


def next_step(run: Run) -> str | None:
    """The first step that is not sealed."""
    for step in run.steps:
        if not step.is_sealed:
            return step.name
    return None


def _under_way(progress: Progress) -> str:
    parts = [progress.step or "beginning"]
    if progress.total:
        parts.append(f"{min(progress.completed / progress.total, 1.0):.0%}")
    if progress.note:
        parts.append(progress.note)
    left = progress.run_left_s or progress.left_s
    if left is not None:
        parts.append(f"{clock(left)} left")
    return ", ".join(parts)


def result(run: Run) -> str:
    """`facts 0.06 → 0.81; perplexity fell on 3 of 3 texts; in bfloat16, as delivered`, or counts of verdicts where
    there are many tasks."""
    parts = [part for part in (_tasks(run), _texts(run)) if part]
    if not parts:
        return "finished without an evaluation"
    if words := precision_words(run):
        parts.append(f"in {words}")
    return "; ".join(parts)


def _tasks(run: Run) -> str:
    found = wholes(run)
    if len(found) > FEW:
        return verdicts([whole.verdict for whole, _ in found])
    told: list[str] = []
    for whole, final in found:
        figures = f"{final.value:.2f}"
        if whole.base is not None:
            figures = f"{whole.base.value:.2f} → {figures}"
        if whole.verdict == "noise":
            figures += " (within noise)"
        told.append(f"{whole.task} {figures}")
    return ", ".join(told)


def _texts(run: Run) -> str:
    pairs = list(both_perplexities(run))
    if not pairs:
        return ""
    if len(pairs) == 1:
        [(name, base, final)] = pairs
        return f"perplexity of {name} {digits3(base)} → {digits3(final)}"
    fell = [name for name, base, final in pairs if final < base]
    return f"perplexity fell on {len(fell)} of {len(pairs)} texts"
