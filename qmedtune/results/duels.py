"""Results of a fair comparison of models: the content of compare.json."""

from __future__ import annotations

from qmedtune.results.typed import Facts, Interval, Number


class Development(Facts):
    """How a setting was chosen. accuracy: what each reached on the development items."""

    items: int
    accuracy: dict[str, Number]


class ChosenPrompting(Facts):
    """How one model was asked in one task, and what it reached on the items that are scored. weights: dtype, or nf4;
    majority: what always the commonest answer to these items would reach."""

    template: str
    shots: int
    dev: Development
    accuracy: Number
    ci95: Interval
    n: int
    majority: Number | None = None
    weights: str | None = None


class DuelEntry(Facts):
    """`model` against `reference` on one task. detectable: the difference that so many items could have shown; groups:
    of items that share a note or premise, which the test and the interval go by."""

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
    groups: int | None = None
    test: str
    ci95_method: str


class HeadToHead(Facts):
    """Result of comparing several models on the same items.

    models: by name and task. reference: the model that all others are held against; in a run instead the `subject`,
    which is held against all others. claims: one sentence for each of the others; left_out: tasks that cannot be
    compared."""

    reference: str = ""
    subject: str = ""
    models: dict[str, dict[str, ChosenPrompting]]
    duels: list[DuelEntry]
    claims: list[str]
    left_out: list[str] = []
    precision: str | None = None
    weights: str | None = None
    computed_in: str | None = None
    why: str | None = None
    asked: str | None = None
    seconds: Number | None = None
    host_peak_bytes: int | None = None
