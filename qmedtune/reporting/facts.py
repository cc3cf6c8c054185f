"""What a run says about itself, read for the report: comparisons with their verdicts, loss curves, one outcome.

`run.json` is the source, `metrics.jsonl` gives the curves. A run that stopped early lacks parts; every function here
returns None or something empty for those, and the report says so in words.

Deliberately does not: format pages, recompute results, or read anything but those two files.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from qmedtune.results import (
    Evaluation,
    Interval,
    Logged,
    Number,
    Paired,
    Run,
    Score,
    Scores,
    Stage,
    TaskScores,
    scored_in,
)
from qmedtune.units import digits3

SIGNIFICANCE = 0.05
ALL, GENERATED = "all", "generated answers"
FEW = 3  # so many scores or texts are told one by one; of more, verdicts are counted
DROPPED = 0.01  # a share of dropped tokens that is worth a warning
MINUS = "−"

Points = list[tuple[int, Number]]  # (optimiser step, loss in nats per token)
Losses = dict[int, Number]  # by optimiser step


@dataclass(frozen=True)
class Comparison:
    """Base against final on the same items. `verdict`: better, worse, noise, or "" when it cannot be told."""

    task: str
    part: str  # ALL, GENERATED or the name of a facet
    base: Score | None
    final: Score | None
    change: str = ""
    verdict: str = ""
    reading: str = ""

    @property
    def label(self) -> str:
        if self.part == ALL:
            return self.task
        return f"{self.task}: {self.part}"

    @property
    def chance(self) -> Number | None:
        """Of the first score that is known, the final one first."""
        return self.scores[0].chance if self.scores else None

    @property
    def scores(self) -> list[Score]:
        """Those that are known, the final one first."""
        return [score for score in (self.final, self.base) if score is not None]


@dataclass
class Curve:
    """Loss of one stage; the validation curves are keyed by source."""

    train: Points = field(default_factory=list[tuple[int, Number]])
    validation: dict[str, Points] = field(default_factory=dict[str, Points])


@dataclass
class Metrics:
    curves: dict[str, Curve] = field(default_factory=dict[str, Curve])
    left_out: int = 0  # lines that are no JSON object (a kill in mid-line) or hold a loss that is not finite


# ---- scores ----------------------------------------------------------------------------------------------------------


def score_text(score: Score) -> str:
    """`0.81 (0.76–0.86)`, without the interval where there is none."""
    if score.ci95 is None:
        return f"{score.value:.2f}"
    return f"{score.value:.2f} ({interval_text(score.ci95)})"


def interval_text(interval: Interval) -> str:
    low, high = interval
    return f"{low:.2f}–{high:.2f}"


def comparisons(run: Run) -> list[Comparison]:
    """Every task as a whole, by generated answers where they were judged beside the options, and by facet."""
    found: list[Comparison] = []
    for name, task in run.scored.tasks.items():
        title = _title(name, task)
        found.append(_compare(title, ALL, task))
        written = _generated(task)
        if written is not None:
            found.append(_compare(title, GENERATED, written))
        for facet, scores in task.facets.items():
            found.append(_compare(title, facet, scores))
        for part, scores in task.overlap.items():
            found.append(_compare(title, f"{part} items", scores))
    return found


def wholes(run: Run) -> list[tuple[Comparison, Score]]:
    """The tasks as wholes whose result was scored, with that score."""
    found: list[tuple[Comparison, Score]] = []
    for each in comparisons(run):
        if each.part == ALL and each.final is not None:
            found.append((each, each.final))
    return found


def _title(name: str, task: TaskScores) -> str:
    """The task, with its metric where that is not accuracy."""
    score = task.final or task.base
    if score is None or score.metric == "accuracy":
        return name
    return f"{name} ({score.metric})"


def _generated(task: TaskScores) -> Scores | None:
    """What the models wrote, compared; None where no answers were asked for beside the options."""
    base, final = _written(task.base), _written(task.final)
    if base is None and final is None:
        return None
    if task.generation is None:
        return Scores(base=base, final=final)
    return Scores(base=base, final=final, difference=task.generation.difference, paired=task.generation.paired)


def _written(score: Score | None) -> Score | None:
    if score is None:
        return None
    return score.generation


def _compare(task: str, part: str, scores: Scores) -> Comparison:
    base, final, difference = scores.base, scores.final, scores.difference
    if base is None or final is None or difference is None:
        return Comparison(task, part, base, final)
    change = f"{difference.value:+.2f}"
    if difference.ci95 is not None:
        low, high = difference.ci95
        change += f" ({low:+.2f} to {high:+.2f})"
    clear, reading = _evidence(scores.paired, difference.ci95)
    if base.unparsed is not None and final.unparsed is not None:
        reading += f"; unreadable answers {base.unparsed:,} → {final.unparsed:,}"
    if guess := no_knowledge(final):
        reading += f"; {guess}"
    verdict = _verdict(clear, difference.value)
    return Comparison(task, part, base, final, change.replace("-", MINUS), verdict, reading)


def _verdict(clear: bool | None, difference: Number) -> str:
    if clear is None:
        return ""
    if not clear:
        return "noise"
    return "better" if difference > 0 else "worse"


def no_knowledge(score: Score) -> str:
    """In words, where the interval does not leave what always the commonest answer scores behind: .58 on PubMedQA,
    where .55 of the answers are yes, is no knowledge yet."""
    if score.majority is None or score.ci95 is None or score.ci95[0] > score.majority:
        return ""
    return f"not beyond always the commonest answer ({score.majority:.2f})"


def precision_words(run: Run) -> str:
    """In which precision base and final were scored; empty for runs that do not say."""
    return precision_of(run.scored)


def precision_of(evaluation: Evaluation) -> str:
    return scored_in(evaluation.precision, evaluation.weights)


def _evidence(paired: Paired | None, ci95: Interval | None) -> tuple[bool | None, str]:
    """Whether base and final differ beyond noise (None: cannot be told), by the best test there is, and in words."""
    if paired is not None:
        clear = paired.p_value < SIGNIFICANCE
        words = f"{_p_value(paired.p_value)}; {paired.gained:,} gained, {paired.lost:,} lost"
    elif ci95 is not None:
        clear = not ci95[0] <= 0 <= ci95[1]
        words = "interval of the change excludes 0" if clear else "interval of the change holds 0"
    else:
        return None, "no interval"
    if clear:
        return True, words
    return False, f"within noise ({words})"


def _p_value(p: Number) -> str:
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}"


# ---- curves ----------------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> Metrics:
    """Curves from metrics.jsonl."""
    if not path.is_file():
        return Metrics()
    return parse_metrics(path.read_text(encoding="utf-8", errors="replace").splitlines())


def parse_metrics(lines: Iterable[str]) -> Metrics:
    """Curves from the lines of metrics.jsonl. Steps that a resumed run did again count once, by their last line."""
    metrics = Metrics()
    train: dict[str, Losses] = {}
    validation: dict[str, dict[str, Losses]] = {}
    for line in lines:
        try:
            entry = Logged.model_validate_json(line)
        except ValidationError:
            metrics.left_out += 1
            continue
        if entry.loss is not None:
            _put(train.setdefault(entry.stage, {}), entry.step, entry.loss, metrics)
        for source, loss in (entry.validation or {}).items():
            by_source = validation.setdefault(entry.stage, {})
            _put(by_source.setdefault(source, {}), entry.step, loss, metrics)
    for stage in dict.fromkeys([*train, *validation]):
        curve = Curve(sorted(train.get(stage, {}).items()))
        for source, losses in validation.get(stage, {}).items():
            curve.validation[source] = sorted(losses.items())
        metrics.curves[stage] = curve
    return metrics


def _put(losses: Losses, step: int, loss: Number | None, metrics: Metrics) -> None:
    if loss is not None and math.isfinite(loss):
        losses[step] = loss
    else:
        metrics.left_out += 1


def curves(run: Run, metrics: Metrics) -> dict[str, Curve]:
    """One curve per stage of the run; validation from run.json where metrics.jsonl has none."""
    found: dict[str, Curve] = {}
    for stage in run.stages:
        curve = metrics.curves.get(stage.name, Curve())
        if not curve.validation:
            curve = Curve(curve.train, _sealed_validation(stage))
        if curve.train or curve.validation:
            found[stage.name] = curve
    return found


def _sealed_validation(stage: Stage) -> dict[str, Points]:
    by_source: dict[str, Points] = {}
    for entry in stage.validation:
        for source, loss in entry.losses.items():
            if loss is not None and math.isfinite(loss):
                by_source.setdefault(source, []).append((entry.step, loss))
    return by_source


# ---- in words --------------------------------------------------------------------------------------------------------


def outcome(run: Run) -> str:
    """One or two plain sentences: what came out of the run, or why there is nothing to tell."""
    if run.status == "failed":
        failed = f"The run failed{_at(run)}"
        if run.error:
            failed += f" ({run.error})"
        return f"{failed}; what was sealed before stands and is shown here."
    if run.status == "running":
        return f"The run is under way{_at(run)}: this page shows what is sealed and measured so far."
    if run.status == "stopped":
        return f"The run was stopped{_at(run)}: the same command goes on from there. Shown is what is there so far."
    told = [_tasks_sentence(run), _perplexity_sentence(run)]
    if any(told) and (words := precision_words(run)):
        told.append(_sentence(f"scored in {words}"))
    return " ".join(filter(None, told)) or "The run finished without an evaluation: there are no scores to tell."


def warnings_of(run: Run) -> list[str]:
    """What the steps warned of, and what of the figures nobody should overlook: tokens that were read and not trained
    on."""
    found = list(run.warnings)
    for stage in run.stages:
        share = dropped_share(stage)
        if share is not None and share >= DROPPED:
            found.append(
                f"{stage.name}: {share:.0%} of the tokens read were dropped ({stage.tokens.dropped:,} of "
                f"{stage.tokens.read:,}): documents were longer than a row and were cut"
            )
    return found


def dropped_share(stage: Stage) -> float | None:
    """Of the tokens that were read for a stage; None where no ledger says."""
    if not stage.tokens.read or stage.tokens.dropped is None:
        return None
    return stage.tokens.dropped / stage.tokens.read


def _at(run: Run) -> str:
    """The first step that is not sealed, in words."""
    for step in run.steps:
        if not step.is_sealed:
            return f" in {step.name}"
    return ""


def _tasks_sentence(run: Run) -> str:
    scored = wholes(run)
    if len(scored) > FEW:
        counted = verdicts([whole.verdict for whole, _ in scored])
        return _sentence(f"of {len(scored)} tasks: {counted}")
    parts = [_task_words(whole, final) for whole, final in scored]
    return _sentence("; ".join(parts))


def verdicts(found: Sequence[str]) -> str:
    """`18 better, 1 worse, 1 within noise`"""
    words = {"better": "better", "worse": "worse", "noise": "within noise", "": "not compared"}
    told: list[str] = []
    for verdict, word in words.items():
        number = sum(each == verdict for each in found)
        if number:
            told.append(f"{number} {word}")
    return ", ".join(told)


def _task_words(whole: Comparison, final: Score) -> str:
    metric = "score" if whole.task.endswith(")") else "accuracy"
    what, after = f"{metric} on {whole.task}", f"{final.value:.2f}"
    if final.n:
        after += f" ({final.n:,} items)"
    if whole.base is None:
        return f"{what} is {after}"
    before = f"{whole.base.value:.2f}"
    if whole.verdict == "noise":
        return f"{what} did not change beyond noise: {before} → {after}"
    verb = "rose" if final.value > whole.base.value else "fell"
    told = f"{what} {verb} from {before} to {after}"
    if guess := no_knowledge(final):
        told += f", {guess}"
    return told


def _perplexity_sentence(run: Run) -> str:
    fell: list[str] = []
    rose: list[str] = []
    for source, base, final in both_perplexities(run):
        side = fell if final < base else rose
        side.append(f"{source} ({digits3(base)} → {digits3(final)})")
    if len(fell) + len(rose) > FEW:
        return _sentence(f"perplexity fell on {len(fell)} of {len(fell) + len(rose)} texts")
    parts: list[str] = []
    if fell:
        parts.append(f"fell on {_join(fell)}")
    if rose:
        parts.append(f"rose on {_join(rose)}")
    if not parts:
        return ""
    return _sentence("perplexity " + " and ".join(parts))


def both_perplexities(run: Run) -> Iterator[tuple[str, Number, Number]]:
    """Source, base and final, where both were measured."""
    for source, text in run.scored.perplexity.items():
        if text.base is not None and text.final is not None:
            yield source, text.base, text.final


def _join(words: list[str]) -> str:
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + " and " + words[-1]


def _sentence(text: str) -> str:
    if not text:
        return ""
    return text[:1].upper() + text[1:] + "."


def base_name(run: Run) -> str:
    """The base as it may be shown to others: a Hub id or `builtin:` name as it is, of a local path the last part."""
    base = run.base or "unknown base"
    if base.startswith(("/", "~", ".")) or "\\" in base:
        return base.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return base
