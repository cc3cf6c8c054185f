"""What every `qmedtune bench` returns and `--json` prints, and what one run of a training contender measures."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from qmedtune.results import Facts

Row = dict[str, Any]
"""One line of a benchmark's table: `kernel` or `case`, `contender`, `value`, `unit`, `ratio`, and figures of its own.
Numbers and names alone, JSON-safe."""


class BenchResult(TypedDict):
    """What `qmedtune bench` returns and prints with --json.

    versions: of what was measured; None: not installed. job: what the contenders were given.
    """

    bench: str
    device: str
    versions: dict[str, Any]
    rows: list[Row]
    job: NotRequired[Row]
    not_installed: NotRequired[list[str]]
    capability: NotRequired[str]
    sources: NotRequired[str]


class Measurement(Facts):
    """One run of a training contender in a process of its own.

    absent: why there are no figures; later: it only lacked time. tokens_per_s: supervised ones, median over the steps
    behind the warm-up; all_tokens_per_s: with those that carry no loss; cpu_s: CPU seconds of a step; data_share: of
    the wall time, waited for rows; peak_memory_bytes, reserved_bytes, device_bytes: allocated by torch, held by its
    allocator, on the device in all; losses: nats, per step. gradient_cosine, loss_gap: to the fp32 loop, tiny shape.
    """

    absent: str | None = None
    later: bool = False
    tokens_per_s: float | None = None
    all_tokens_per_s: float = 0.0
    cpu_s: float = 0.0
    first_step_s: float | None = None
    load_s: float | None = None
    data_share: float | None = None
    peak_memory_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    host_anonymous_bytes: int | None = None
    losses: list[float] = []
    micro_batch: int | None = None
    layers: dict[str, int] | None = None
    card: str | None = None
    gradient_cosine: float | None = None
    loss_gap: float | None = None


class Try(Facts):
    """One setting that `--best` tried; `failed` says why it has no speed."""

    micro_batch: int
    checkpointing: bool
    tokens_per_s: float | None = None
    failed: str | None = None
