"""Results of the merge and of the memorisation audit."""

from __future__ import annotations

from pydantic import Field

from qmedtune.results.scores import Score
from qmedtune.results.typed import Facts, Number


class Shift(Facts):
    """How far the merged model is from the NF4 model that was trained."""

    kl: Number | None = None
    kl_max: Number | None = None
    top1: Number | None = None
    max_abs_logit_diff: Number | None = None


class Probe(Facts):
    """What divergences were taken on."""

    tokens: int
    origin: str = Field(default="", validation_alias="from", serialization_alias="from")


class MixedWith(Facts):
    """The other model of a merge. sha256: of its weights; cosine: the lowest of a linear layer and the base's.
    clinical: sources of its own run whose text can name patients, each with its terms."""

    name: str
    sha256: str | None = None
    cosine: Number | None = None
    clinical: dict[str, str | None] = {}


class SweepPoint(Facts):
    """A share of the other model (None: the untouched base), on development items. gain: of what the rule goes by, over
    the base; general_loss: rise of the perplexity of general texts over the base's, .05 is 5 %; allowed: by the rule's
    limit on it; within_noise: of the chosen point (p > .05), by the rule's items, None where it has none."""

    share: Number | None = Field(default=None, alias="lambda")
    tasks: dict[str, Score] = {}
    perplexity: dict[str, Number] = {}
    gain: Number | None = None
    general_loss: Number | None = None
    allowed: bool | None = None
    within_noise: bool | None = None


class Sweep(Facts):
    """What a sweep found. rule: in words; development: share of items and texts that it was chosen on; scored_in: the
    precision, in words."""

    sweep: list[SweepPoint]
    sweep_base: SweepPoint
    chosen: Number
    rule: str
    development: Number
    scored_in: str | None = None
    warnings: list[str] = []


class Proven(Facts):
    """What the proof of a merge counted, once it has passed (`Merge` says what each is)."""

    kl: Number
    kl_max: Number
    top1: Number
    max_abs_logit_diff: Number
    lost: Number | None
    kl_of_base: Number
    elements: int
    violations: int
    swallowed: Number | None
    shift_from_nf4: Shift | None
    probe: Probe


class Merge(Facts):
    """The merge and its proof. kl, top1: published file against base + adapters. violations: elements that are not base
    + adapters; swallowed: share of the changed elements that rounding left as they were; lost: of the change, by KL."""

    path: str | None = None
    status: str | None = None
    base: str | None = None
    dtype: str | None = None
    error: str | None = None
    rounding: str | None = None
    rounding_seed: int | None = None
    rounding_why: str | None = None
    modules: int | None = None
    adapters: int | None = None
    tied: bool | None = None
    weights: dict[str, Number] | None = None  # of the stages, where they are not all 1
    mixed_with: MixedWith | None = Field(default=None, alias="with")
    method: str | None = None
    share: Number | None = Field(default=None, alias="lambda")
    on_sphere: int | None = None  # tensors that slerp has not mixed along the line
    sweep: list[SweepPoint] = []
    sweep_base: SweepPoint | None = None
    chosen: Number | None = None
    rule: str | None = None
    development: Number | None = None
    scored_in: str | None = None  # what the sweep was measured in
    kl: Number | None = None
    kl_max: Number | None = None
    top1: Number | None = None
    max_abs_logit_diff: Number | None = None
    max_weight_error: Number | None = None  # version 0.1: before each element was checked
    lost: Number | None = None
    kl_of_base: Number | None = None
    elements: int | None = None
    violations: int | None = None
    tensor: str | None = None
    swallowed: Number | None = None
    shift_from_nf4: Shift | None = None
    probe: Probe | None = None
    warnings: list[str] = []
    sha256: str | None = None
    seconds: Number | None = None
    host_peak_bytes: int | None = None

    @property
    def refused(self) -> bool:
        return self.status == "refused"


class Exposure(Facts):
    """Canaries of one source, planted equally often, after one stage. exposure: bits, mean; extracted: how many."""

    source: str
    repeats: int
    canaries: int
    exposure: Number
    highest: Number
    extracted: int
    passes: Number | None
    masked: bool


class Audit(Facts):
    """The memorisation audit, by stage. references: candidates that each secret is ranked among."""

    stages: dict[str, list[Exposure]]
    references: int
    seconds: Number | None = None
    host_peak_bytes: int | None = None


class AuditLimits(Facts):
    """What an audit was held against: bits, and a share of the canaries; None: no limit."""

    max_exposure: Number | None
    max_extracted: Number | None
