"""The recipe: what a run is, as frozen models. One class per section, in the order in which people write them.

Reading YAML (line numbers, suggestions, `--set`) is in parsing/loader.py; turning `auto` into numbers is in
planning/resolve.py, which leaves the types of resolved.py.
Deliberately absent: dotted import paths, plug-ins, remote code. Every key here has a reader (tests/test_recipe.py).
"""

from __future__ import annotations

import codecs
from typing import Annotated, Literal, cast

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from qmedtune.fields import (
    Auto,
    Fraction,
    Language,
    Name,
    Positive,
    Rate,
    Section,
    SourceFormat,
    SourceKind,
    Weight,
    later,
)


class ShapeSection(Section):
    """A model's own widths for `pretrain`, in place of those of the base, which then gives tokenizer and constants."""

    hidden: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive | None = None
    intermediate: Positive
    max_positions: Positive | None = None

    @model_validator(mode="after")
    def _divides(self) -> ShapeSection:
        if self.hidden % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError("`hidden` must be a multiple of `heads`, and `heads` one of `kv_heads`")
        return self


class ModelSection(Section):
    """The base: `builtin:tiny`, a local folder, or a Hub id."""

    base: str
    revision: str | None = None
    shape: ShapeSection | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    double_quantization: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    attention: Literal["auto", "varlen", "sdpa", "flex_attention", "flash_attention_2", "eager"] = "auto"


class AdapterSection(Section):
    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    train_embeddings: bool | Auto = "auto"


# Keys of a source that packing reads, and reading does not.
PACKED_AS = {"template", "chunking", "overlap", "max_tokens"}


class SourceSection(Section):
    """One named corpus. `path` takes files, folders, globs, `builtin:...` and `${VARIABLE}`s."""

    path: str | list[str]
    kind: SourceKind
    format: SourceFormat = "auto"
    columns: dict[str, str] = {}
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None  # of a table; None: found and told
    encoding: str | None = None  # of a table or text file, by Python's name; None: found and told
    template: str | None = None
    split_by: Literal["record", "patient"] = "record"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    max_records: Positive | None = None  # the first so many documents are read
    max_tokens: Positive | None = None  # a seeded choice of whole documents is trained on
    chunking: Literal["pack", "truncate", "window", "overlap"] = "pack"
    overlap: Annotated[float, Field(gt=0, le=0.5)] = 0.125  # of a row, that chunks of a long document share
    phi: Literal["off", "report", "redact", "refuse"] | None = None  # None: hygiene.phi where the text is clinical
    license: str | None = None
    terms: str | None = None

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def is_builtin(self) -> bool:
        """All of it is text of the built-in world."""
        return all(path.startswith("builtin:") for path in self.paths)

    @field_validator("delimiter")
    @classmethod
    def _usable_delimiter(cls, value: str | None) -> str | None:
        if value is not None and value in '"\r\n':
            raise ValueError("neither a quote nor a line end separates columns")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            codecs.lookup(value or "utf-8")
        except LookupError as error:
            raise ValueError("no encoding that Python knows, such as utf-8, utf-16, cp1252, latin-1") from error
        return value


class DedupSection(Section):
    exact: bool = True
    near: Annotated[float, Field(ge=0.5, le=1)] | Literal[False] = 0.8


class HygieneSection(Section):
    """What happens to every record. `contaminated: split` keeps it, and scores the benchmark in two parts."""

    clean: bool = True
    languages: Literal["any"] | Annotated[list[Language], Field(min_length=1)] = "any"
    min_characters: Annotated[int, Field(ge=0)] = 0
    max_characters: Positive | None = None
    dedup: DedupSection = DedupSection()
    decontaminate: Literal["off", "evaluation"] | list[str] = "evaluation"
    contaminated: Literal["drop", "report", "split"] = "drop"
    phi: Literal["off", "report", "redact", "refuse"] = "report"
    presidio: str | None = None  # a spaCy model, package or folder, that finds names in running text
    shift_dates: bool = False
    max_bad_fraction: Fraction = 0.01


class WarmupSection(Section):
    """Exactly one of the two, so that 0.03 steps or a ratio of 100 cannot happen."""

    ratio: Fraction | None = None
    steps: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> WarmupSection:
        if (self.ratio is None) == (self.steps is None):
            raise ValueError("give exactly one of `ratio` (0 to 1) and `steps` (a count)")
        return self


class LayersSection(Section):
    """How many layers keep their activations, make the cheap ones again, recompute all, or wait in host memory."""

    keep: Annotated[int, Field(ge=0)] = 0
    cheap: Annotated[int, Field(ge=0)] = 0
    recompute: Annotated[int, Field(ge=0)] = 0
    offload: Annotated[int, Field(ge=0)] = 0


class TrainSection(Section):
    """What all training stages share. `auto` is resolved per base; `plan` prints value and reason."""

    seq_len: Annotated[int, Field(ge=16)] | Auto = "auto"
    batch: Positive | Auto = "auto"
    min_steps: Positive | Auto = "auto"  # where `batch` is auto, it is made smaller until so many steps are left
    micro_batch: Positive | Auto = "auto"
    lr: Rate | Auto = "auto"
    embedding_lr: Rate | Auto = "auto"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: WarmupSection | Auto = "auto"
    min_lr_ratio: Fraction = 0.05
    horizon_steps: Positive | None = None  # where the schedule ends: at a step, or at a multiple of the stage's
    horizon_ratio: Annotated[float, Field(gt=0, le=100)] | None = None  # steps (2: stopped half-way)
    weight_decay: Weight = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    gradient_checkpointing: bool | LayersSection | Auto = "auto"
    # Which weights: the last adapter on, a new one on its fold into the base, a new one on top, or all parameters.
    # `frozen` is for `classify`: the adapters as they are, with a head on top.
    adapter: Literal["continue", "merge_then_new", "new", "none", "frozen"] = "continue"
    lora: AdapterSection | None = None  # of a new adapter, in place of the recipe's `adapter`

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(cast(list[object], value)) if isinstance(value, list) else value


class MixSection(TrainSection):
    """Next-token training on a weighted mixture. One of `tokens` and `epochs` sets the budget."""

    mix: dict[str, Weight]
    unit: Literal["tokens", "documents"] = "tokens"
    tokens: Positive | Auto = "auto"
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_repeats: Annotated[float, Field(gt=0)] | None = None

    @property
    def budget(self) -> int | None:
        """Tokens to train on; None where packing counts the text first."""
        return None if self.tokens == "auto" else self.tokens

    @model_validator(mode="after")
    def _positive_total(self) -> MixSection:
        if not sum(self.mix.values()) > 0:
            raise ValueError("at least one weight of `mix` must be above 0")
        return self


class CptSection(MixSection):
    """Continual pretraining of an adapter."""


class SftSection(TrainSection):
    """Supervised fine-tuning on instruction sources; every epoch sees all their records."""

    data: str | list[str]
    epochs: Annotated[float, Field(gt=0)] | Auto = "auto"
    loss_on: Literal["response", "all"] | Fraction = "response"
    max_truncated_fraction: Fraction = 0.05
    packing: bool = True  # False: one record per row, and records of like length share a batch

    @property
    def sources(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data


class ClassifySection(TrainSection):
    """A classification head on the last token of every document of one source with a `label` column, and an adapter
    under it. A branch: later stages, the merge and the evaluation go on from before it."""

    data: str
    epochs: Annotated[float, Field(gt=0)] | Auto = "auto"
    class_weights: Literal["none", "balanced"] = "none"  # balanced: as often wrong, as rare (n / (classes x count))
    multi_label: bool = False  # a label is a list, or a text with `,` or `;` between labels
    train_earlier: bool = False  # with `adapter: new`: the stages' adapters below it are trained too

    @property
    def sources(self) -> list[str]:
        return [self.data]


class PretrainSection(MixSection):
    """From scratch, all parameters, small models only; the tiny base is made by it."""


class StageSection(Section):
    """A single-key mapping: `- cpt: {...}`."""

    pretrain: PretrainSection | None = None
    cpt: CptSection | None = None
    sft: SftSection | None = None
    classify: ClassifySection | None = None

    @model_validator(mode="after")
    def _one(self) -> StageSection:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a stage is one of `cpt`, `sft`, `pretrain`, `classify`")
        return self

    @property
    def kind(self) -> str:
        return "cpt" if self.cpt else "sft" if self.sft else "classify" if self.classify else "pretrain"

    @property
    def full(self) -> bool:
        """All parameters are trained: the stage leaves a model, not an adapter."""
        return self.kind == "pretrain" or self.section.adapter == "none"

    @property
    def section(self) -> CptSection | SftSection | PretrainSection | ClassifySection:
        return getattr(self, self.kind)

    @property
    def sources(self) -> list[str]:
        section = self.section
        if isinstance(section, SftSection | ClassifySection):
            return section.sources
        return [name for name, weight in section.mix.items() if weight > 0]


class ValidateSection(Section):
    every: Positive | Auto = "auto"
    on: list[str] = []
    keep_best: bool = False
    max_tokens: Positive = 20_000

    def interval(self, steps: int) -> int:
        """Optimiser steps from one validation to the next, in a stage of `steps`."""
        return max(10, steps // 5) if self.every == "auto" else self.every


class SaveSection(Section):
    every: Positive | Auto = "auto"
    keep: Annotated[int, Field(ge=1)] = 2

    def interval(self, steps: int) -> int:
        """Optimiser steps from one checkpoint to the next, in a stage of `steps`."""
        return max(20, steps // 10) if self.every == "auto" else self.every


class VerifySection(Section):
    max_kl: Annotated[float, Field(gt=0)] | None = None  # nats per token; the proof itself has no threshold


class MergeSection(Section):
    """rounding: auto = nearest, or stochastic where that loses more than a hundredth of what was learnt
    weights: how much of a stage is merged, by its name (`01-cpt`); 1 where none is given
    """

    base: Literal["full16", "nf4"] = "full16"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    rounding: Literal["nearest", "stochastic"] | Auto = "auto"
    verify: VerifySection = VerifySection()
    weights: dict[str, Annotated[float, Field(ge=0, le=2)]] = {}

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Recipes without weights are written, and keyed, as before there were any."""
        told = write(self)
        return {key: value for key, value in told.items() if key != "weights" or value}


class TaskSection(Section):
    """A benchmark over local files: `{task: pubmedqa, path: ori_pqal.json}`; `facts` is built in.

    Examples are drawn `shot_seeds` times; `shots_from` defaults to the folder's training split, else the task's items.
    """

    task: str
    path: str | None = None
    limit: Positive | None = None
    split: Literal["test", "dev", "train"] | None = None
    metric: str | None = None  # in place of the task's usual one
    bertscore: str | None = None  # a local encoder's folder, for summaries
    shots: Annotated[int, Field(ge=0, le=32)] = 0
    shot_seeds: Annotated[int, Field(ge=3, le=20)] = 3
    shots_from: str | None = None
    prompts: Literal["own", "me_llama"] = later("own")  # who words the questions
    extraction: Literal["stated", "me_llama"] = later("stated")  # how a generated answer is read

    @property
    def label(self) -> str:
        """The name of its scores and files: a task may be there zero-shot and few-shot, in several words."""
        parts = [self.task]
        if self.prompts != "own":
            parts.append(self.prompts)
        if self.extraction != "stated":
            parts.append(f"{self.extraction}_reading")
        if self.shots:
            parts.append(f"{self.shots}shot")
        return "-".join(parts)


class EvaluateSection(Section):
    tasks: list[TaskSection] = []  # in a recipe, a task of which nothing is said may stand as its bare name
    perplexity: list[str] = []
    precision: Literal["delivered", "nf4", "full16"] = "delivered"  # of base and result: as merged, as trained, 16 bit
    generate: bool = True
    batch: Positive | Auto = "auto"
    template: str | None = None  # to ask with; default: the one of training
    items_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = later(None)  # draws items and examples; None: `seed`
    against: list[str] = later([])  # models that the result is held against, as `qmedtune compare` does

    @field_validator("tasks", mode="before", json_schema_input_type=list[str | TaskSection])
    @classmethod
    def _bare_names(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        sections: list[object] = []
        for task in cast(list[object], value):
            sections.append({"task": task} if isinstance(task, str) else task)
        return sections

    @field_serializer("tasks", mode="wrap")
    def _as_written(self, tasks: list[TaskSection], write: SerializerFunctionWrapHandler) -> list[object]:
        """Bare names again, so that keys and records are what they were when sections were made later."""
        told: list[object] = write(tasks)
        for place, task in enumerate(tasks):
            if task == TaskSection(task=task.task):
                told[place] = task.task
        return told


class AuditSection(Section):
    """Canaries (data/synthetic/canaries.py), planted before training and looked for after every stage (audit.py).

    source: a clinical corpus; prompts: an instruction source, whose prompts hold canaries without a loss on them
    repeats: copies of each canary; canaries: so many per number of copies; references: numbers each is ranked among
    max_exposure: bits, the mean of a row; max_extracted: share of a row. Beyond them the run fails before the merge.
    """

    source: str
    prompts: str | None = None
    repeats: Annotated[list[Positive], Field(min_length=1)] = [1, 4, 16]
    canaries: Annotated[int, Field(gt=0, le=1000)] = 8
    references: Annotated[int, Field(ge=15, le=4095)] = 127
    max_exposure: Annotated[float, Field(gt=0)] | None = None
    max_extracted: Fraction | None = None


class AblateSection(Section):
    """Arms of `qmedtune ablate`: `arms` times `corpora`; each value of the other lists is one change to the recipe.

    corpora: sources of the cpt mix, each alone at the same number of tokens, or `both`: all of them as in the recipe
    replay: share of `kind: general` in the tokens of cpt, the other weights keeping their ratio
    r: alpha keeps its ratio to r; lr_factor: times every learning rate; template: asked with, not trained with
    seeds: so many, from the recipe's seed on, or a list
    """

    arms: list[Literal["base", "sft", "cpt", "cpt+sft"]] = ["base", "sft", "cpt", "cpt+sft"]
    corpora: list[str] = []
    replay: list[Annotated[float, Field(ge=0, lt=1)]] = []
    adapter: list[Literal["continue", "merge_then_new", "new"]] = []
    r: list[Positive] = []
    lr_factor: list[Annotated[float, Field(gt=0, le=100)]] = []
    template: list[str] = []
    seeds: Annotated[int, Field(ge=1, le=100)] | list[Annotated[int, Field(ge=0, lt=2**32)]] = 3


class Recipe(Section):
    """A whole run. References between sections are checked here, all at once."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    deterministic: bool = False
    memory: Annotated[float, Field(gt=0)] | Auto = "auto"  # GiB that training may take; auto = the card's
    workers: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"  # processes that clean text; auto = cores, by size
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: dict[Name, SourceSection]
    hygiene: HygieneSection = HygieneSection()
    stages: Annotated[list[StageSection], Field(min_length=1)]
    validation: Annotated[ValidateSection, Field(alias="validate")] = ValidateSection()
    save: SaveSection = SaveSection()
    merge: MergeSection = MergeSection()
    evaluate: EvaluateSection = EvaluateSection()
    audit: AuditSection | None = None
    ablate: AblateSection | None = None

    @property
    def memory_gib(self) -> float | None:
        """What training may take; None: all that the card has."""
        return None if self.memory == "auto" else self.memory

    @property
    def items_seed(self) -> int:
        """What draws the items of a `limit` and the examples before questions."""
        chosen = self.evaluate.items_seed
        return self.seed if chosen is None else chosen

    def stage_names(self) -> list[str]:
        """`01-cpt`, `02-sft` ...: the names of stage folders and of `run.json` entries."""
        return [f"{i:02d}-{stage.kind}" for i, stage in enumerate(self.stages, start=1)]

    def judged_by(self, index: int) -> list[str]:
        """Sources of `validate.on` whose held-out loss says which step of stage `index` is best: an sft stage is for
        its instructions, the others for texts."""
        stage, on = self.stages[index], self.validation.on
        if stage.sft:
            return [name for name in on if name in stage.sources]
        return [name for name in on if self.data[name].kind != "instructions"]

    def adapter_of(self, index: int) -> AdapterSection:
        """The adapter that stage `index` trains: its own `lora`, else the recipe's."""
        own = self.stages[index].section.lora
        if own is None:
            return self.adapter
        chosen = self.adapter.train_embeddings if own.train_embeddings == "auto" else own.train_embeddings
        return own.model_copy(update={"train_embeddings": chosen})

    def paths(self) -> list[str]:
        """Of all sources, in their order."""
        return [path for source in self.data.values() for path in source.paths]

    def used_sources(self) -> list[str]:
        """Sources that any stage, validation or perplexity reads, in the order of `data:`."""
        named = {s for stage in self.stages for s in stage.sources}
        named |= set(self.validation.on) | set(self.evaluate.perplexity)
        return [name for name in self.data if name in named]
