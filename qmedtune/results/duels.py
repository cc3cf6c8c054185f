"""Results of the head-to-head: how each model was asked, what it scored, and what that allows to say."""

from __future__ import annotations

from qmedtune.results.typed import Facts, Interval, Number, Told


class Development(Facts):
    """accuracy: of each way of asking, on `items` that are not scored."""

    items: int
    accuracy: dict[str, Number] = {}


class Contestant(Facts):
    """One model on one task: the way of asking that it chose, and its share of right answers."""

    template: str
    shots: int
    dev: Development
    accuracy: Number
    ci95: Interval
    n: int


class Duel(Facts):
    """`model` against `reference` on one task; difference: above 0 where `model` is better. p_holm: corrected over all
    duels; detectable: the difference that so many items show in four of five draws."""

    task: str
    model: str
    reference: str
    n: int
    gained: int
    lost: int
    difference: Number
    ci95: Interval
    p_value: Number
    p_holm: Number
    verdict: str
    detectable: Number
    test: str = ""
    ci95_method: str = ""


class HeadToHead(Told):
    """subject: the model that is held against all others. models: by name and task; claims: a sentence per model;
    left_out: tasks that cannot be compared."""

    subject: str
    models: dict[str, dict[str, Contestant]]
    duels: list[Duel]
    claims: list[str]
    left_out: list[str] = []
    precision: str | None = None
    weights: str | None = None
    computed_in: str | None = None
    why: str | None = None
    asked: str | None = None
    host_peak_bytes: int | None = None
