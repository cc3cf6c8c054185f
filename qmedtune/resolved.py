"""A resolved recipe: the sections of recipe.py with plain values where a recipe may say `auto`.

`planning/resolve.py` makes it; packing, planning, training and scoring take it, so none of them asks for `auto` again.
Its JSON is that of the recipe with the same values. Deliberately not here: what only packed rows decide (`cpt.tokens`
over real text, the intervals of validation and saving), and how a value is chosen.
"""

# Fields are narrowed and lose their default `auto`: sound, because sections are frozen and are built by name alone.
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from qmedtune.allowed import FloatDtype
from qmedtune.fields import Positive, Rate, later
from qmedtune.recipe import (
    AdapterSection,
    ClassifySection,
    CptSection,
    EvaluateSection,
    LayersSection,
    ModelSection,
    PretrainSection,
    Recipe,
    SftSection,
    StageSection,
    TrainSection,
    WarmupSection,
)


@dataclass(frozen=True)
class Numerics:
    """Mixed-precision settings of a stage.

    `dtype`: of matrix products and activations. `autocast`: weights are fp32 masters, products run in `dtype`.
    `scaled`: the loss is scaled, because gradients in fp16 underflow. `attention`: transformers' name."""

    dtype: str
    autocast: bool
    scaled: bool
    attention: str


@dataclass(frozen=True)
class Cards:
    """`number` of GPUs that a stage's rows are shared out to, `here` of them on this machine; sharded: they hold the
    frozen base together."""

    number: int = 1
    here: int = 1
    sharded: bool = False


class ResolvedModel(ModelSection):
    """`kernels` may be `auto` still: the kernels' own dispatch decides by shape. What attends is in Numerics."""

    compute_dtype: FloatDtype


class ResolvedAdapter(AdapterSection):
    train_embeddings: bool


class ResolvedTraining(TrainSection):
    """What all resolved training stages share: rows of `seq_len` tokens, `batch` of them at most in an optimiser step,
    `micro_batch` at a time."""

    seq_len: Annotated[int, Field(ge=16)]
    batch: Positive
    min_steps: Positive
    micro_batch: Positive
    lr: Rate
    embedding_lr: Rate
    warmup: WarmupSection
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
    gradient_checkpointing: bool | LayersSection


class ResolvedPretrain(ResolvedTraining, PretrainSection):
    """From scratch."""


class ResolvedCpt(ResolvedTraining, CptSection):
    """Continual pretraining."""


class ResolvedSft(ResolvedTraining, SftSection):
    """Supervised fine-tuning."""

    epochs: Annotated[float, Field(gt=0)]


class ResolvedClassify(ResolvedTraining, ClassifySection):
    """A classification head."""

    epochs: Annotated[float, Field(gt=0)]


ResolvedSection = ResolvedPretrain | ResolvedCpt | ResolvedSft | ResolvedClassify


class ResolvedStage(StageSection):
    """One stage, and what it computes in and attends with on the machine that it was resolved for."""

    pretrain: ResolvedPretrain | None = None
    cpt: ResolvedCpt | None = None
    sft: ResolvedSft | None = None
    classify: ResolvedClassify | None = None
    numerics: Annotated[Numerics, Field(exclude=True)]  # of the machine: in no key and no record
    cards: Annotated[Cards, Field(exclude=True)] = Cards()  # the same

    @property
    def section(self) -> ResolvedSection:
        return getattr(self, self.kind)


class ResolvedEvaluate(EvaluateSection):
    batch: Positive


class ResolvedRecipe(Recipe):
    """A whole run without `auto`, but for what the module's first lines name."""

    shard: bool = later(False)
    model: ResolvedModel
    adapter: ResolvedAdapter
    stages: list[ResolvedStage]
    evaluate: ResolvedEvaluate
