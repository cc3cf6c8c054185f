"""`stages:`, `validate:` and `save:`: what is trained, in which order, for how long and at which rates."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field, field_validator, model_validator

from qmedtune.fields import Auto, Fraction, Positive, Rate, Section, Weight, later
from qmedtune.sections.model import AdapterSection


class WarmupSection(Section):
    """Exactly one of the two, so that 0.03 steps or a ratio of 100 cannot happen."""

    ratio: Fraction | None = None
    """Share of the schedule's steps over which the learning rate rises from 0."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps."""

    @model_validator(mode="after")
    def _one(self) -> WarmupSection:
        if (self.ratio is None) == (self.steps is None):
            raise ValueError("give exactly one of `ratio` (0 to 1) and `steps` (a count)")
        return self


class LayersSection(Section):
    """How many layers are treated in which way; the counts sum to the layers of the base."""

    keep: Annotated[int, Field(ge=0)] = 0
    """Layers that keep all their activations: fastest, most memory."""
    cheap: Annotated[int, Field(ge=0)] = 0
    """Layers that compute the cheap activations again (norms, products of elements)."""
    recompute: Annotated[int, Field(ge=0)] = 0
    """Layers that are computed twice: least memory on the card without host memory."""
    offload: Annotated[int, Field(ge=0)] = 0
    """Layers that are computed twice and whose inputs wait in host memory."""


class TrainSection(Section):
    """What all training stages share."""

    seq_len: Annotated[int, Field(ge=16)] | Auto = "auto"
    """Length of a row in tokens; `auto`: 512 to 2,048 by the size of the base. Raise it for long notes that belong
    together; memory grows with it."""
    batch: Positive | Auto = "auto"
    """Rows of one optimiser step; `auto`: about 32,000 tokens (cpt, pretrain) or 16,000 (sft, classify), less for
    little text."""
    min_steps: Positive | Auto = "auto"
    """Where `batch` is auto it is made smaller until so many optimiser steps are left; `auto`: 100."""
    micro_batch: Positive | Auto = "auto"
    """Rows that are computed at a time; `auto`: what fits. It changes memory and speed, not results."""
    lr: Rate | Auto = "auto"
    """Peak learning rate; `auto`: 2e-4 for a fresh adapter, 1e-4 to go on with one or from 30B on, 2e-5 for all
    parameters. Halve it where the loss jumps."""
    embedding_lr: Rate | Auto = "auto"
    """Peak learning rate of embeddings, where they are trained; `auto`: a tenth of `lr`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up. Take `constant` for a run that shall be continued."""
    warmup: WarmupSection | Auto = "auto"
    """Over how much the learning rate rises from 0; `auto`: 3 % of the steps."""
    min_lr_ratio: Fraction = 0.05
    """Where the schedule ends, as a share of `lr`. Take 0 to end at nothing, 0.1 as many published runs."""
    horizon_steps: Positive | None = None
    """The step at which the schedule ends; without it the stage's last. Give it to repeat a run that was stopped
    early."""
    horizon_ratio: Annotated[float, Field(gt=0, le=100)] | None = None
    """The same as a multiple of the stage's steps: 2 means stopped half-way."""
    weight_decay: Weight = 0.0
    """AdamW's pull of weights to 0, per step and times the learning rate. Adapters need none; 0.01 to 0.1 is usual
    with all parameters."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's memory of gradients and of their squares, as shares kept per step. Take `[0.9, 0.95]` for noisy
    losses."""
    adam_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """What AdamW adds to the root of the squares. Leave it, except to repeat a published run."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it (L2 norm over all). Lower it (0.3, as QLoRA) where the loss
    jumps."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """AdamW with states in fp32, in 8 bits, or in 8 bits and paged to host memory; `auto`: the first that fits."""
    gradient_checkpointing: bool | LayersSection | Auto = "auto"
    """Which layers compute their activations again instead of keeping them: all, none, or counts; `auto`: the fastest
    mix that fits."""
    adapter: Literal["continue", "merge_then_new", "new", "none", "frozen"] = "continue"
    """Which weights: the last adapter on, a new one on its fold into the base, a new one on top, all parameters
    (`none`), or for classify the head alone (`frozen`)."""
    lora: AdapterSection | None = None
    """The adapter of this stage in place of the recipe's `adapter`, where it makes a new one."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(cast(list[object], value)) if isinstance(value, list) else value


class MixSection(TrainSection):
    """Next-token training on a weighted mixture. One of `tokens` and `epochs` sets the budget."""

    mix: dict[str, Weight]
    """How much of each source: `{literature: 8, notes: 8, general: 4}`, relative weights. Give `general` 1 to 20 %
    against forgetting."""
    unit: Literal["tokens", "documents"] = "tokens"
    """What the weights of `mix` count."""
    tokens: Positive | Auto = "auto"
    """How many tokens are trained on; `auto`: as many as read the source of the greatest weight once. Give it to
    compare runs of one size."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """The budget as passes over the mixture, in place of `tokens`."""
    max_repeats: Annotated[float, Field(gt=0)] | None = None
    """How often a source may be repeated to reach its weight; without it 4 where `tokens` is auto, else any number.
    What falls short is told."""

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
    """The instruction sources, by their names in `data:`."""
    epochs: Annotated[float, Field(gt=0)] | Auto = "auto"
    """How often every record is seen; `auto`: 3 on a real base. Lower it where the held-out loss rises."""
    loss_on: Literal["response", "all"] | Fraction = "response"
    """What is learnt: answers with their end marks, prompts too, or prompts with this weight (0 to 1)."""
    max_truncated_fraction: Fraction = 0.05
    """Share of records that may be cut at `seq_len` before the run stops. Raise `seq_len` rather than this."""
    packing: bool = True
    """Several records share a row, kept apart from each other. Turn it off for one record a row."""

    @property
    def sources(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data


class ClassifySection(TrainSection):
    """A classification head on the last token of every document of one source with a `label` column, and an adapter
    under it. A branch: later stages, the merge and the evaluation go on from before it."""

    data: str
    """The source, by its name in `data:`; its `columns` name the `label`."""
    epochs: Annotated[float, Field(gt=0)] | Auto = "auto"
    """How often every document is seen; `auto`: 3 on a real base."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each class in the loss; `balanced`: the rarer, the heavier (n / (classes x count)). For rare
    outcomes."""
    multi_label: bool = False
    """A document may have several labels: a list, or a text with `,` or `;` between them."""
    train_earlier: bool = False
    """With `adapter: new` the adapters of earlier stages below it are trained too."""
    validation: Annotated[float, Field(ge=0, lt=1)] = later(0.0)
    """Share of the training patients that is set apart, neither trained on nor scored: the weights with the lowest loss
    on it are kept. 0 keeps the last. Take 0.1 for many epochs."""

    @property
    def sources(self) -> list[str]:
        return [self.data]


class PretrainSection(MixSection):
    """From scratch, all parameters, small models only; the tiny base is made by it."""


class StageSection(Section):
    """A single-key mapping: `- cpt: {...}`."""

    pretrain: PretrainSection | None = None
    """From random weights, all parameters: only as the first stage, for small models."""
    cpt: CptSection | None = None
    """Continual pretraining: next tokens of a mixture of texts."""
    sft: SftSection | None = None
    """Supervised fine-tuning: answers of instruction sources."""
    classify: ClassifySection | None = None
    """A classification head on documents with labels; a branch, later stages go on from before it."""

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
    def can_shard(self) -> bool:
        """Several GPUs may hold the base: it is frozen, and all processes compute the loss in the same passes."""
        return not (self.full or self.classify)

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
    """Loss on held-out text while a stage trains."""

    every: Positive | Auto = "auto"
    """Optimiser steps between two looks; `auto`: a fifth of the stage, at least 10. Each costs up to `max_tokens` of
    time per source."""
    on: list[str] = []
    """Sources whose held-out part is scored. Name those that the run is about, and `general` to see forgetting."""
    keep_best: bool = False
    """Each stage ends with the weights of its best look instead of its last step. Turn it on for little data and many
    epochs."""
    max_tokens: Positive = 20_000
    """Tokens of each source that a look reads. Raise it for smoother curves."""

    def interval(self, steps: int, epochs: float | None = None) -> int:
        """Optimiser steps from one look to the next, in a stage of `steps`; once an epoch where `epochs` are given."""
        if self.every != "auto":
            return self.every
        if epochs is not None:
            return max(1, round(steps / epochs))
        return max(10, steps // 5)


class SaveSection(Section):
    """Checkpoints, from which an interrupted stage goes on."""

    every: Positive | Auto = "auto"
    """Optimiser steps between two checkpoints; `auto`: a tenth of the stage, at least 20. Lower it on machines that
    stop often."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints of a stage are on disk at a time; none is left at its end. Take 1 where disk is short."""

    def interval(self, steps: int) -> int:
        """Optimiser steps from one checkpoint to the next, in a stage of `steps`."""
        return max(20, steps // 10) if self.every == "auto" else self.every
