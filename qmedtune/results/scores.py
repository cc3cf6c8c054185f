"""Results of an evaluation: scores with their intervals, comparisons on the same items, perplexities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, model_serializer

from qmedtune.results.typed import Facts, Interval, Number


class Bin(Facts):
    """Answers whose confidence (the share of the chosen option in the probability of all options) is at least `low`
    and below `high`, the last bin with 1: how many, their mean confidence, and the share that is right."""

    low: Number
    high: Number
    n: int
    confidence: Number
    accuracy: Number


class Score(Facts):
    """The metrics of a task, 0 to 1, the main one (`metric`) with its 95 % interval. Metrics stand under their own
    names (tasks/definitions.py says what each counts). majority: what always the commonest answer would score; ties:
    items whose best options are nearer than the precision can tell; unparsed: answers that could not be read; prompts,
    extraction: whose words and whose reading, where not ours; ece: expected calibration error over `calibration`, the
    bins that hold answers (of a task as a whole; version 0.1 has none)."""

    __pydantic_extra__: dict[str, Number] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    metric: str = "accuracy"
    definition: str | None = None
    draws: list[Number] | None = None
    sd_of_draws: Number | None = None
    ci95: Interval | None = None
    ci95_method: str | None = None
    n: int | None = None
    groups: int | None = None
    unparsed: int | None = None
    cut: int | None = None
    truncated: int | None = None
    shots: int | None = None
    shots_from: str | None = None
    prompts: str | None = None
    extraction: str | None = None
    chance: Number | None = None
    majority: Number | None = None
    per_character: Number | None = None
    ece: Number | None = None
    calibration: list[Bin] | None = None
    ties: int | None = None
    generation: Score | None = None

    @property
    def metrics(self) -> dict[str, Number]:
        return self.__pydantic_extra__

    @property
    def value(self) -> Number:
        """Of the main metric."""
        return self.metrics[self.metric]

    @model_serializer(mode="wrap")
    def _metrics_first(self, write: Callable[[Score], dict[str, Any]]) -> dict[str, Any]:
        """Metrics are written behind their definition, before the interval of the main one."""
        written = write(self)
        ordered: dict[str, Any] = {}
        for name in ("metric", "definition"):
            if name in written:
                ordered[name] = written.pop(name)
        for name in self.metrics:
            ordered[name] = written.pop(name)
        return ordered | written


class Difference(Facts):
    """Final less base on the same items."""

    value: Number
    ci95: Interval | None = None
    ci95_method: str | None = None


class Paired(Facts):
    """A paired significance test on the same items.

    gained: items that final alone answers rightly; lost: that base alone does.
    """

    test: str
    gained: int
    lost: int
    p_value: Number


class Change(Facts):
    """Base against final, paired on the same items."""

    difference: Difference | None = None
    paired: Paired | None = None


class Scores(Facts):
    """Base and final on some items (in a run), or the one `model` that was measured; `generation` compares what they
    wrote where the items also have options."""

    base: Score | None = None
    final: Score | None = None
    model: Score | None = None
    difference: Difference | None = None
    paired: Paired | None = None
    generation: Change | None = None

    def of(self, label: str) -> Score | None:
        """`base`, `final` or `model`."""
        return {"base": self.base, "final": self.final, "model": self.model}[label]


class TaskScores(Scores):
    """A task as a whole, by facet, and by whether training text holds the items."""

    facets: dict[str, Scores] = {}
    overlap: dict[str, Scores] = {}


class BaseAndFinal(Facts):
    """One figure of base and of final, or of the one model that was measured."""

    base: Number | None = None
    final: Number | None = None
    model: Number | None = None


class Text(BaseAndFinal):
    """Perplexity over `tokens` of held-out text; ends: mean log p (nats) of the `marks` that close documents."""

    tokens: int | None = None
    marks: int | None = None
    ends: BaseAndFinal | None = None
    nf4: BaseAndFinal | None = None
    bits_per_byte: Number | None = None


def scored_in(precision: str | None, weights: str | None) -> str:
    """In words, what scores were taken in; empty where nothing says. weights: dtype, or nf4; None: version 0.1."""
    if weights is None:
        return {"nf4": "NF4, as trained", "full16": "16 bit"}.get(str(precision), "")
    if precision == "nf4" and weights == "nf4":
        return "NF4, as trained, not as delivered"
    if precision == "nf4":
        return f"{weights}, as trained"
    if precision == "delivered":
        return f"{weights}, as delivered"
    return weights.replace("nf4", "NF4")


class Evaluation(Facts):
    """Scores and perplexities. precision: delivered, nf4 or full16, which `why` explains where it is not what was
    asked; weights: dtype of both models, or nf4 (version 0.1 does not say)."""

    tasks: dict[str, TaskScores] = {}
    perplexity: dict[str, Text] = {}
    precision: str | None = None
    weights: str | None = None
    computed_in: str | None = None
    why: str | None = None
    asked: str | None = None
    template: str | None = None
    window_tokens: int | None = None
    warnings: list[str] = []
    seconds: Number | None = None
    host_peak_bytes: int | None = None


class ModelScores(Evaluation):
    """Scores of one model that was named: what `qmedtune eval` returns and keeps. quantization: nf4 or none."""

    model: str
    quantization: str
