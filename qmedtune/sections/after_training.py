"""`merge:`, `evaluate:`, `audit:` and `ablate:`: what is made of a trained model, and what is asked about it."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from qmedtune.allowed import (
    BenchmarkSplit,
    Extraction,
    FloatDtype,
    MergeBase,
    MergeMethod,
    PromptSet,
    RoundingMode,
    ScoringPrecision,
)
from qmedtune.fields import Auto, Fraction, Positive, Section, later


class VerifySection(Section):
    """Limits on the published file; its proof element by element needs none."""

    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Divergence of the published model from base + adapters that fails the run, in nats per token; without it none
    does."""


class SweepSection(Section):
    """Shares of the other model that are tried, and the rule that chooses one, on items that are not scored at the
    end."""

    shares: Annotated[list[Fraction], Field(min_length=2)] = Field([0, 0.25, 0.5, 0.75, 1], alias="lambda")
    """Shares that are tried; each costs a merge and an evaluation on `evaluate.development`."""
    choose: Literal["tasks", "answers", "perplexity"] = "tasks"
    """What the best share has: the highest mean score of the tasks by log-likelihood, the highest by the answers that
    are written, or the lowest mean log perplexity of the texts that are not of kind general. Of equal ones that with
    the least general loss."""
    max_general_loss: Annotated[float, Field(gt=0)] | None = None
    """How far the perplexity of texts of kind general may rise over the base's: 0.05 is 5 %; without it any rise."""


class MergeSection(Section):
    """How adapters are folded into the base, and what the result is mixed with."""

    base: MergeBase = "full16"
    """Into what: the 16-bit base, or its dequantised NF4 values, which training saw."""
    dtype: FloatDtype = "bfloat16"
    """Number format of the merged model. Take float16 for engines without bfloat16."""
    rounding: RoundingMode = "auto"
    """How sums are rounded to `dtype`; `auto`: nearest, or stochastic where that loses more than a hundredth of what
    was learnt."""
    verify: VerifySection = VerifySection()
    """Limits on the published file."""
    weights: dict[str, Annotated[float, Field(ge=0, le=2)]] = {}
    """How much of a stage is merged, by its name: `{01-cpt: 0.7}`; 1 where none is given. To weigh new knowledge
    against old."""
    other: str | None = later(None, alias="with")
    """Another model of the same base that the result is mixed with: a run, a folder or a Hub id. Give the base's
    instruct sibling to bring instruction following back after continual pretraining."""
    method: MergeMethod | None = later(None)
    """How the two are mixed; without it `linear`. `slerp` keeps the length of weights, `task_arithmetic` adds the other
    model's change of the base to that of the adapters."""
    share: Fraction | None = later(None, alias="lambda")
    """How much of the other model: 0 is the plain merge, 1 the other model (`task_arithmetic`: its whole change);
    without it 0.5."""
    sweep: SweepSection | None = later(None)
    """Several shares, of which the best is delivered, in place of `lambda`."""

    @property
    def weighs(self) -> bool:
        """Weights that are all 1 say the same as none."""
        return any(weight != 1.0 for weight in self.weights.values())

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Recipes without weights are written, and keyed, as before there were any."""
        told = write(self)
        return {key: value for key, value in told.items() if key != "weights" or value}


class TaskSection(Section):
    """A benchmark over local files: `{task: pubmedqa, path: ori_pqal.json}`; `facts` is built in."""

    task: str
    """Name of the benchmark: `facts`, `pubmedqa`, `medqa` ... (docs/evaluation.md has them all)."""
    path: str | None = None
    """Its file, folder or pattern, as its authors publish it. Nothing is downloaded."""
    limit: Positive | None = None
    """At most this many items, drawn by the seed; without it all. Give it to save time, at the price of wider
    intervals."""
    split: BenchmarkSplit | None = None
    """Which split of a folder; without it `test`."""
    metric: str | None = None
    """A metric in place of the task's usual one, for example that of a paper."""
    bertscore: str | None = None
    """Folder of a local encoder for BERTScore of summaries (`pip install 'qmedtune[bertscore]'`)."""
    shots: Annotated[int, Field(ge=0, le=32)] = 0
    """Solved examples before each question. Take 3 to 5 to compare with published few-shot numbers."""
    shot_seeds: Annotated[int, Field(ge=3, le=20)] = 3
    """How often the examples are drawn; scores are means over the draws."""
    shots_from: str | None = None
    """File that examples come from; without it the folder's training split, else the task's other items."""
    prompts: PromptSet = later("own")
    """Who words the questions. Take `me_llama` to compare with its published numbers."""
    extraction: Extraction = later("stated")
    """How a generated answer is read: what it states, or as the script of Me-LLaMA does."""

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, object] | str:
        """Its bare name where nothing else is said: in keys and records as it stands in recipes."""
        if self == TaskSection(task=self.task):
            return self.task
        return write(self)

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
    """What base and result are asked, on the same items."""

    tasks: list[TaskSection] = []
    """Benchmarks: names, or sections with the file."""
    perplexity: list[str] = []
    """Sources whose held-out text is scored. Name `general` too, to see what was forgotten."""
    precision: ScoringPrecision = "delivered"
    """What both are scored in: as merged, as trained, or in 16 bits. Only `delivered` is what people get."""
    generate: bool = True
    """Also judge what the model writes, not only the likelihood of the options. Turn it off to save time."""
    batch: Positive | Auto = "auto"
    """Sequences that are scored at once; `auto`: 4 to 64 by the size of the base. Lower it where memory runs out."""
    template: str | None = None
    """Template to ask with; without it the one of training. Only to see what another one does."""
    items_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = later(None)
    """What draws items and examples; without it `seed`. Give it so that runs of several seeds answer the same
    items."""
    against: list[str] = later([])
    """Models that the result is held against, as `qmedtune compare` does: folders or Hub ids."""
    development: Annotated[float, Field(gt=0, le=0.9)] | None = later(None)
    """Share of the items and held-out texts that choices are made on, and that are not scored at the end; without it
    half where `merge.sweep` chooses, else none. Items are drawn one by one, so it is met on average."""

    @field_validator("tasks", mode="before", json_schema_input_type=list[str | TaskSection])
    @classmethod
    def _bare_names(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        sections: list[object] = []
        for task in cast(list[object], value):
            sections.append({"task": task} if isinstance(task, str) else task)
        return sections


class AuditSection(Section):
    """Canaries (data/synthetic/canaries.py), planted before training and looked for after every stage (audit.py)."""

    source: str
    """A clinical corpus of the cpt mix, by its name in `data:`, in which canaries are planted."""
    prompts: str | None = None
    """An instruction source whose prompts hold canaries without a loss on them."""
    repeats: Annotated[list[Positive], Field(min_length=1)] = [1, 4, 16]
    """Copies of each canary, a row of the table each."""
    canaries: Annotated[int, Field(gt=0, le=1000)] = 8
    """Canaries per number of copies, and as many that are planted nowhere. More of them narrow the uncertainty."""
    references: Annotated[int, Field(ge=15, le=4095)] = 127
    """Other numbers that each secret is ranked among: exposure ends at log2(references + 1) bits."""
    max_exposure: Annotated[float, Field(gt=0)] | None = None
    """Mean exposure of a row, in bits, beyond which the run fails before the merge; without it none does."""
    max_extracted: Fraction | None = None
    """Share of a row's secrets that may be extracted before the run fails; without it all."""


class AblateSection(Section):
    """Arms of `qmedtune ablate`: `arms` times `corpora`; each value of the other lists is one change to the recipe."""

    arms: list[Literal["base", "sft", "cpt", "cpt+sft", "merge"]] = ["base", "sft", "cpt", "cpt+sft"]
    """Which stages an arm has; `merge` is the recipe mixed with `merge.with`, which all other arms leave out."""
    corpora: list[str] = []
    """Sources of the cpt mix, each alone at the same number of tokens, or `both`: all of them as in the recipe."""
    replay: list[Annotated[float, Field(ge=0, lt=1)]] = []
    """Shares of `kind: general` in the tokens of cpt; the other weights keep their ratio."""
    adapter: list[Literal["continue", "merge_then_new", "new"]] = []
    """What the stages after the first do with the adapter."""
    r: list[Positive] = []
    """Ranks of the adapter; alpha keeps its ratio to it."""
    lr_factor: list[Annotated[float, Field(gt=0, le=100)]] = []
    """Factors on every learning rate."""
    template: list[str] = []
    """Templates to ask with, in place of the one of training."""
    seeds: Annotated[int, Field(ge=1, le=100)] | list[Annotated[int, Field(ge=0, lt=2**32)]] = 3
    """So many seeds, from the recipe's on, or a list. Fewer than 3 say nothing about chance."""
