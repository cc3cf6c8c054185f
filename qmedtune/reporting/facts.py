"""What a run says about itself, read for the report: scores with their intervals, verdicts, loss curves, one outcome.

`run.json` is the source, `metrics.jsonl` gives the curves. A run that stopped early lacks parts; every function here
returns None or something empty for those, and the report says so in words.

Deliberately does not: format pages, recompute results, or read anything but those two files.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmedtune.units import digits3

SIGNIFICANCE = 0.05
ALL, GENERATED = "all", "generated answers"

Points = list[tuple[int, float]]  # (optimiser step, loss in nats per token)


@dataclass(frozen=True)
class Score:
    """The main metric of a task, 0 to 1, with its 95% interval; what is not known is None."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None
    majority: float | None = None  # what always the commonest answer would score
    ties: int | None = None  # items whose best two options are nearer than the precision can tell
    unparsed: int | None = None  # generated answers that could not be read, counted as wrong

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" ({self.interval()})" if self.low is not None else "")

    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.2f}–{self.high:.2f}"


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
        return self.task if self.part == ALL else f"{self.task}: {self.part}"


@dataclass
class Curve:
    """Loss of one stage; the validation curves are keyed by source."""

    train: Points = field(default_factory=list)
    validation: dict[str, Points] = field(default_factory=dict)


@dataclass
class Metrics:
    curves: dict[str, Curve] = field(default_factory=dict)
    left_out: int = 0  # lines that are no JSON object (a kill in mid-line) or hold a loss that is not finite


def read_score(entry: Any) -> Score | None:
    """A score from `{"metric", <metric>, "ci95": [low, high], "n", ...}`, `{"mean", "ci95"}` or a bare number."""
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        return Score(float(entry))
    low, high = entry.get("ci95") or (None, None)
    metric = entry.get("metric", "accuracy")
    value = entry[metric] if metric in entry else entry["mean"]
    known = {name: entry.get(name) for name in ("n", "chance", "majority", "ties", "unparsed")}
    return Score(float(value), low, high, **known)


def comparisons(run: dict) -> list[Comparison]:
    """Every task as a whole, by generated answers where they were judged beside the options, and by facet."""
    found = []
    for name, task in (run.get("evaluation") or {}).get("tasks", {}).items():
        metric = next((task[model].get("metric") for model in ("final", "base") if model in task), None)
        title = name if metric in (None, "accuracy") else f"{name} ({metric})"
        found.append(_compare(title, ALL, task))
        if generated := _generated(task):
            found.append(_compare(title, GENERATED, generated))
        found += [_compare(title, facet, entry) for facet, entry in task.get("facets", {}).items()]
        found += [_compare(title, f"{part} items", entry) for part, entry in task.get("overlap", {}).items()]
    return found


def _generated(task: dict) -> dict:
    models = {model: task[model]["generation"] for model in ("base", "final") if "generation" in task.get(model, {})}
    return models | task.get("generation", {})


def _compare(task: str, part: str, entry: dict) -> Comparison:
    base, final = read_score(entry.get("base")), read_score(entry.get("final"))
    if base is None or final is None:
        return Comparison(task, part, base, final)
    difference = entry.get("difference") or {"value": final.value - base.value, "ci95": None}
    change = f"{difference['value']:+.2f}"
    if difference["ci95"]:
        change += " ({:+.2f} to {:+.2f})".format(*difference["ci95"])
    clear, reading = _evidence(entry.get("paired"), difference["ci95"], base, final)
    verdict = "" if clear is None else "noise" if not clear else "better" if difference["value"] > 0 else "worse"
    if base.unparsed is not None:
        reading += f"; unreadable answers {base.unparsed:,} → {final.unparsed:,}"
    if guess := no_knowledge(final):
        reading += f"; {guess}"
    return Comparison(task, part, base, final, change.replace("-", "−"), verdict, reading)


def no_knowledge(score: Score) -> str:
    """In words, where the interval does not leave what always the commonest answer scores behind: .58 on PubMedQA,
    where .55 of the answers are yes, is no knowledge yet."""
    if score.majority is None or score.low is None or score.low > score.majority:
        return ""
    return f"not beyond always the commonest answer ({score.majority:.2f})"


def precision_words(run: dict) -> str:
    """In which precision base and final were scored; empty for runs that do not say."""
    return precision_of(run.get("evaluation") or {})


def precision_of(evaluation: Mapping[str, Any]) -> str:
    name, weights = evaluation.get("precision"), evaluation.get("weights")
    if weights is None:  # a run of version 0.1
        return {"nf4": "NF4, as trained", "full16": "16 bit"}.get(str(name), "")
    if name == "nf4":
        return "NF4, as trained, not as delivered" if weights == "nf4" else f"{weights}, as trained"
    return f"{weights}, as delivered" if name == "delivered" else str(weights)


def _evidence(
    paired: dict | None, ci95: tuple[float, float] | None, base: Score, final: Score
) -> tuple[bool | None, str]:
    """Whether base and final differ beyond noise (None: cannot be told), by the best test there is, and in words."""
    if paired:
        p = paired["p"] if "p" in paired else paired["p_value"]
        clear, words = p < SIGNIFICANCE, f"{_p_value(p)}; {paired['gained']:,} gained, {paired['lost']:,} lost"
    elif ci95:
        clear, words = not ci95[0] <= 0 <= ci95[1], "interval of the change"
        words += " excludes 0" if clear else " holds 0"
    elif base.low is not None and base.high is not None and final.low is not None and final.high is not None:
        clear = final.low > base.high or final.high < base.low
        words = "intervals apart" if clear else "intervals overlap"
    else:
        return None, "no interval"
    return clear, words if clear else f"within noise ({words})"


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def perplexities(run: dict) -> dict[str, tuple[float | None, float | None]]:
    """Base and final perplexity per kind of text."""
    found = (run.get("evaluation") or {}).get("perplexity", {})
    return {source: (entry.get("base"), entry.get("final")) for source, entry in found.items()}


def nf4_perplexities(run: dict) -> dict[str, tuple[float, float]]:
    """Base and final in NF4, as trained, where they were measured beside the delivered ones."""
    found = (run.get("evaluation") or {}).get("perplexity", {})
    return {source: (entry["nf4"]["base"], entry["nf4"]["final"]) for source, entry in found.items() if "nf4" in entry}


def read_metrics(path: Path) -> Metrics:
    """Curves from metrics.jsonl."""
    return parse_metrics(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])


def parse_metrics(lines: Iterable[str]) -> Metrics:
    """Curves from the lines of metrics.jsonl. Steps that a resumed run did again count once, by their last line."""
    metrics = Metrics()
    train: dict[str, dict[int, float]] = {}
    validation: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            stage, step = entry["stage"], int(entry["step"])
        except (json.JSONDecodeError, KeyError, TypeError):
            metrics.left_out += 1
            continue
        losses = [(train.setdefault(stage, {}), entry["loss"])] if entry.get("loss") is not None else []
        for source, loss in (entry.get("validation") or {}).items():
            losses.append((validation.setdefault(stage, {}).setdefault(source, {}), loss))
        for points, loss in losses:
            if loss is not None and math.isfinite(loss):
                points[step] = loss
            else:
                metrics.left_out += 1
    for stage in [*train, *(name for name in validation if name not in train)]:
        by_source = {source: sorted(points.items()) for source, points in validation.get(stage, {}).items()}
        metrics.curves[stage] = Curve(sorted(train.get(stage, {}).items()), by_source)
    return metrics


def curves(run: dict, metrics: Metrics) -> dict[str, Curve]:
    """One curve per stage of the run; validation from run.json where metrics.jsonl has none."""
    found = {}
    for stage in run.get("stages", []):
        curve = metrics.curves.get(stage["name"], Curve())
        if not curve.validation:
            curve = Curve(curve.train, _sealed_validation(stage))
        if curve.train or curve.validation:
            found[stage["name"]] = curve
    return found


def _sealed_validation(stage: dict) -> dict[str, Points]:
    by_source: dict[str, Points] = {}
    for entry in stage.get("validation") or []:
        for source, loss in entry.items():
            if source != "step" and isinstance(loss, int | float) and math.isfinite(loss):
                by_source.setdefault(source, []).append((entry["step"], loss))
    return by_source


def _at(run: dict) -> str:
    """The first step that is not sealed, in words."""
    left = [step["name"] for step in run.get("steps", []) if step["status"] != "sealed"]
    return f" in {left[0]}" if left else ""


def outcome(run: dict) -> str:
    """One or two plain sentences: what came out of the run, or why there is nothing to tell."""
    if run["status"] == "failed":
        why = f" ({run['error']})" if run.get("error") else ""
        return f"The run failed{_at(run)}{why}; what was sealed before stands and is shown here."
    if run["status"] == "running":
        return f"The run is under way{_at(run)}: this page shows what is sealed and measured so far."
    if run["status"] == "stopped":
        return f"The run was stopped{_at(run)}: the same command goes on from there. Shown is what is there so far."
    told = [sentence for sentence in (_tasks_sentence(run), _perplexity_sentence(run)) if sentence]
    if told and (words := precision_words(run)):
        told.append(_sentence(f"scored in {words}"))
    return " ".join(told) or "The run finished without an evaluation: there are no scores to tell."


def _tasks_sentence(run: dict) -> str:
    parts = []
    for whole in (c for c in comparisons(run) if c.part == ALL and c.final is not None):
        assert whole.final is not None
        name, final = whole.task, f"{whole.final.value:.2f}"
        metric = "score" if name.endswith(")") else "accuracy"
        items = f" ({whole.final.n:,} items)" if whole.final.n else ""
        if whole.base is None:
            parts.append(f"{metric} on {name} is {final}{items}")
        elif whole.verdict == "noise":
            parts.append(f"{metric} on {name} did not change beyond noise: {whole.base.value:.2f} → {final}{items}")
        else:
            verb = "rose" if whole.final.value > whole.base.value else "fell"
            guess = f", {words}" if (words := no_knowledge(whole.final)) else ""
            parts.append(f"{metric} on {name} {verb} from {whole.base.value:.2f} to {final}{items}{guess}")
    return _sentence("; ".join(parts))


def _perplexity_sentence(run: dict) -> str:
    both = {s: (b, f) for s, (b, f) in perplexities(run).items() if b is not None and f is not None}
    fell = [f"{s} ({digits3(b)} → {digits3(f)})" for s, (b, f) in both.items() if f < b]
    rose = [f"{s} ({digits3(b)} → {digits3(f)})" for s, (b, f) in both.items() if f >= b]
    parts = [f"fell on {_join(fell)}" if fell else "", f"rose on {_join(rose)}" if rose else ""]
    return _sentence("perplexity " + " and ".join(part for part in parts if part)) if both else ""


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


def base_name(run: dict) -> str:
    """The base as it may be shown to others: a Hub id or `builtin:` name as it is, of a local path the last part."""
    base = str(run.get("recipe", {}).get("model", {}).get("base", "unknown base"))
    is_path = base.startswith(("/", "~", ".")) or "\\" in base
    return base.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] if is_path else base
