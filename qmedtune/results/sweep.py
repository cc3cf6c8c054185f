"""Results of an ablation: the content of ablation.json, and what it reads of the items of its runs."""

from __future__ import annotations

from pydantic import JsonValue

from qmedtune.results.typed import Facts, Interval, Number
from qmedtune.results.whole_run import Provenance


class JudgedAnswer(Facts):
    """Whether one answer is right: by log-likelihood, or else what was written."""

    correct: bool | None = None
    generation: JudgedAnswer | None = None

    @property
    def is_right(self) -> bool:
        if self.correct is not None:
            return self.correct
        assert self.generation is not None and self.generation.correct is not None
        return self.generation.correct


class AnsweredItem(Facts):
    """A line of <task>.items.jsonl, as far as its answers are compared. group: number of the note or premise that it
    was taken from, where items share them."""

    id: str
    group: int | None = None
    facet: str | None = None
    gold: JsonValue = None
    base: JudgedAnswer | None = None
    final: JudgedAnswer | None = None

    def of(self, label: str) -> JudgedAnswer:
        """What `base` or `final` answered."""
        found = self.base if label == "base" else self.final
        assert found is not None
        return found


class Measure(Facts):
    """One measure of one arm: its mean, a 95 % interval (None: one seed), each seed's own, and of means over items
    their number."""

    mean: Number
    ci95: Interval | None
    by_seed: list[Number]
    items: int | None = None


class ArmEntry(Facts):
    """An arm over its seeds: scores by task and facet, perplexity by source, tokens trained by stage."""

    arm: str
    change: str
    seeds: list[int]
    scores: dict[str, Measure]
    perplexity: dict[str, Measure]
    trained_tokens: dict[str, int]

    def measures(self, kind: str) -> dict[str, Measure]:
        """`scores` or `perplexity`."""
        return self.scores if kind == "scores" else self.perplexity


class ArmDifference(Facts):
    """Two arms on one score. p_holm: adjusted for the number of pairs."""

    score: str
    first: str
    second: str
    difference: Number
    p: Number
    p_holm: Number
    within_noise: bool


class Ratio(Facts):
    """Perplexity of an arm over that of the reference."""

    text: str
    arm: str
    ratio: Number
    ci95: Interval | None
    within_noise: bool


class Comparisons(Facts):
    """What was measured, and how sure the differences are."""

    reference: str | None
    arms: list[ArmEntry]
    differences: list[ArmDifference]
    perplexity_ratios: list[Ratio]


class _Sweep(Facts):
    """What begins ablation.json."""

    name: str
    status: str
    recipe_sha256: str | None = None
    seeds: list[int]


class Ablation(Comparisons, _Sweep):
    """ablation.json. chance: what guessing gives, where all tasks agree on it; precision: in which arms were scored;
    majority: by task, what always its commonest answer scores."""

    chance: Number | None
    majority: dict[str, Number] = {}
    seconds: Number
    notes: list[str]
    precision: str = ""
    recipe_text: str
    provenance: Provenance = Provenance()
