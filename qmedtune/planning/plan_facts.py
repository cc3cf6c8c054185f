"""What a plan holds, as `qmedtune plan --json` writes it: the names and types of every figure.

Dictionaries with stated keys, because a plan is plain data for other programs. Bytes, seconds, tokens and steps are
counted; a `spread` is a share that the figure may be off by. Deliberately not here: how anything is found (plan.py).
"""

from __future__ import annotations

from typing import TypedDict

from pydantic import JsonValue


class Decision(TypedDict):
    """What an `auto` of the recipe became, with the reason in one sentence."""

    key: str
    value: JsonValue
    why: str


class PlannedBase(TypedDict):
    """What a reader of the plan needs of the base; all fields of llama_shape.BaseFacts stand beside these. making_s: of
    a built-in base that is to be pretrained here first, once."""

    name: str
    source: str
    parameters: int
    bytes: int
    making_s: float


class PlannedMachine(TypedDict):
    """The same of planning.machine.Machine."""

    kind: str
    name: str
    memory_bytes: int
    host_bytes: int
    cards: int


class PlannedSource(TypedDict):
    """planning.estimate.Estimate of one source."""

    source: str
    records: int
    tokens: int
    spread: float
    num_files: int
    read_bytes: int
    missing: str
    sampled: int


class PlannedStep(TypedDict):
    name: str
    status: str
    why: str


class PlannedStage(TypedDict):
    """A stage: planning.rows.Tokens, how it is trained, its predicted memory by parts and its time (None where nobody
    knows how many tokens there are). `measured`: the speed is this run folder's own. `exchange_bytes`: of gradients,
    between several GPUs in every step; `gathered_bytes`: of a base that is `sharded`, received by each."""

    name: str
    kind: str
    trained: int
    rows: int
    batch: int
    steps: int
    spread: float
    note: str
    seq_len: int
    micro_batch: int
    lr: float | str
    dtype: str
    attention: str
    trained_parameters: int
    exchange_bytes: int
    gathered_bytes: int
    sharded: bool
    memory: dict[str, int]
    peak_bytes: int
    budget_bytes: int
    frees: list[tuple[str, int]]
    tokens_per_s: float
    measured: bool
    seconds: float | None


class PlannedTask(TypedDict):
    """A benchmark: `questions` (each draw of examples counts), tokens that one model reads for them and writes at most,
    and the seconds of both models."""

    name: str
    questions: int
    read: int
    written: int
    seconds: float


class PlannedEvaluation(TypedDict):
    """What is scored, by how many processes, in which precision (`why`: where it is not what the recipe asks for), and
    for how long: `seconds` in all, at least so many where benchmarks are `unknown`, because they are not here or too
    large to look at."""

    processes: int
    precision: str
    weights: str
    computed_in: str
    why: str | None
    tasks: list[PlannedTask]
    unknown: list[str]
    text_tokens: int
    text_seconds: float
    models_loaded: int
    load_seconds: float
    seconds: float


class Missing(TypedDict):
    """Something a run needs that is not here: `the base`, a `source` or a `benchmark`, with the environment variables
    in its path that are not set."""

    what: str
    name: str
    variables: list[str]


class HostRoom(TypedDict):
    parts: dict[str, int]
    needed_bytes: int
    there_bytes: int


class DiskRoom(TypedDict):
    parts: dict[str, int]
    needed_bytes: int
    free_bytes: int


class Plan(TypedDict):
    """What `qmedtune plan` computes and prints with --json.

    times: seconds that are left, by what they go to: data, loading, training, merging, evaluation; seconds: in all.
    evaluation: None where nothing is scored."""

    recipe: str
    base: PlannedBase
    machine: PlannedMachine
    decisions: list[Decision]
    data: list[PlannedSource]
    steps: list[PlannedStep]
    stages: list[PlannedStage]
    host: HostRoom
    disk: DiskRoom
    evaluation: PlannedEvaluation | None
    times: dict[str, float]
    seconds: float
    missing: list[Missing]
    borders: dict[str, str | None] | None
    notes: list[str]
