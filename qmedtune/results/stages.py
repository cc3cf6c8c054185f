"""Results of the training steps."""

from __future__ import annotations

from pydantic import Field

from qmedtune.results.ledgers import Part, TokenLedger
from qmedtune.results.typed import Facts, Interval, Number


class Kernels(Facts):
    """Which path each operation took and why, and the modules that run it."""

    mode: str
    paths: dict[str, str] = {}
    modules: dict[str, int] = {}
    own_forward: dict[str, int] = {}


class Attention(Facts):
    name: str
    why: str


class Loss(Facts):
    """Nats per supervised token, of the first and the last optimiser step."""

    first: Number
    last: Number


class Validation(Facts):
    """One validation: the step, and beside it a loss per source (nats per token; None: it was not finite)."""

    __pydantic_extra__: dict[str, Number | None] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    step: int

    @property
    def losses(self) -> dict[str, Number | None]:
        return self.__pydantic_extra__


class Logged(Facts):
    """A line of metrics.jsonl: a loss, or the losses of a validation by source, or something else that was said."""

    stage: str
    step: int
    time: Number | None = None  # seconds since 1970; lines of 0.1 have none
    loss: Number | None = None
    grad_norm: Number | None = None
    lr: Number | None = None
    tokens: int | None = None
    tokens_per_s: Number | None = None
    memory: int | None = None
    validation: dict[str, Number | None] | None = None
    warning: str | None = None


class Memory(Facts):
    """Measured before the first step, on a GPU; empty on a CPU. said: what was changed for it."""

    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    layers: dict[str, int] = {}
    said: list[str] = []


class Areas(Facts):
    """Means over the labels that occur and are absent (None: no label can be scored); ci95: of auroc, over patients."""

    auroc: Number | None
    auprc: Number | None
    ci95: Interval | None
    n: int
    patients: int
    scored_labels: int
    micro_f1: Number | None = None
    macro_f1: Number | None = None
    accuracy: Number | None = None


class Classification(Facts):
    """Of a classify stage, on held-out documents: its labels, areas, and F1 of the labels that are chosen."""

    labels: int
    documents: int
    held_out: int
    unknown: int
    validation: int | None = None
    auroc: Number | None
    auprc: Number | None = None
    ci95: Interval | None = None
    n: int
    patients: int
    scored_labels: int
    micro_f1: Number | None = None
    macro_f1: Number | None = None
    accuracy: Number | None = None


class MadeWith(Facts):
    """Settings of a stage that the machine chose. device: the GPU's name, or `cpu`."""

    optimizer: str
    compute_dtype: str
    attention: str
    micro_batch: int
    device: str


class CheckpointSeal(Facts):
    """What the seal of a checkpoint tells."""

    step: int
    tokens: int
    made_with: MadeWith | None = None


class AdapterEntry(Facts):
    path: str
    sha256: str


class Model(Facts):
    path: str


class Trained(Facts):
    """What a training stage finds. kept_step: whose weights are kept; kept_by: the sources it was judged by;
    data_share: of the time, spent waiting for rows; processes: how each that trained along computes, where there are
    several: device and kernel path."""

    kernels: Kernels | None = None
    attention: Attention | None = None
    layers: dict[str, int] | None = None
    steps: int | None = None
    batch: int | None = None
    kept_step: int | None = None
    kept_by: list[str] = []
    loss: Loss | None = None
    tokens_per_s: Number | None = None
    train_seconds: Number | None = None
    data_share: Number | None = None
    slowest_save_s: Number | None = None
    step_s: Number | None = None
    peak_memory_bytes: int | None = None
    memory: Memory = Memory()
    micro_batch: int | None = None
    processes: list[str] = []
    validation: list[Validation] = []
    warnings: list[str] = []
    kind: str
    tokens: TokenLedger = TokenLedger()
    mixture: dict[str, Part] = {}
    classification: Classification | None = None
    model: Model | None = None
    seconds: Number | None = None
    host_peak_bytes: int | None = None


class _Entry(Facts):
    """What begins the entry of a stage."""

    name: str
    kind: str
    status: str
    key: str | None = None


class Stage(Trained, _Entry):
    """The entry of a stage in run.json. status: sealed, or `to do`, which has nothing but its name and kind."""

    adapter: AdapterEntry | None = None
