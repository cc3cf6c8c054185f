"""Results of a fair comparison of models: the content of compare.json."""

from __future__ import annotations

from qmedtune.results.typed import Facts, Interval, Number


class Development(Facts):
    """How a setting was chosen. accuracy: what each reached on the development items."""

    items: int
    accuracy: dict[str, Number]


class Chosen(Facts):
    """How one model was asked in one task, and what it reached on the items that are scored."""

    template: str
    shots: int
    dev: Development
    accuracy: Number
    ci95: Interval
    n: int


class DuelEntry(Facts):
    """`model` against `reference` on one task. detectable: the difference that so many items could have shown."""

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
    test: str
    ci95_method: str


class HeadToHead(Facts):
    """models: by name and task. claims: one sentence for each model but the reference."""

    reference: str
    models: dict[str, dict[str, Chosen]]
    duels: list[DuelEntry]
    claims: list[str]
