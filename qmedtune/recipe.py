"""The recipe: what a run is, as frozen models. Its sections are in sections/, in the order in which people write them.

Below each key stands what it is for: editors (`qmedtune schema`), `qmedtune recipe KEY` and docs/recipe.md show it.
Reading YAML (line numbers, suggestions, `--set`) is in parsing/loader.py; turning `auto` into numbers is in
planning/resolve.py, which leaves the types of resolved.py.
Deliberately absent: dotted import paths, plug-ins, remote code. Every key here has a reader (tests/test_recipe.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qmedtune.fields import Auto, Name, Section, later
from qmedtune.sections.after_training import (
    AblateSection,
    AuditSection,
    EvaluateSection,
    MergeSection,
    SweepSection,
    TaskSection,
    VerifySection,
)
from qmedtune.sections.data import PACKED_AS, DedupSection, HygieneSection, SourceSection
from qmedtune.sections.model import AdapterSection, ModelSection, ShapeSection
from qmedtune.sections.training import (
    ClassifySection,
    CptSection,
    LayersSection,
    MixSection,
    PretrainSection,
    SaveSection,
    SftSection,
    StageSection,
    TrainSection,
    ValidateSection,
    WarmupSection,
)

__all__ = [
    "PACKED_AS",
    "AblateSection",
    "AdapterSection",
    "AuditSection",
    "ClassifySection",
    "CptSection",
    "DedupSection",
    "EvaluateSection",
    "HygieneSection",
    "LayersSection",
    "MergeSection",
    "MixSection",
    "ModelSection",
    "PretrainSection",
    "Recipe",
    "SaveSection",
    "Section",
    "SftSection",
    "ShapeSection",
    "SourceSection",
    "StageSection",
    "SweepSection",
    "TaskSection",
    "TrainSection",
    "ValidateSection",
    "VerifySection",
    "WarmupSection",
]

DEVELOPMENT = 0.5  # of the items, where there is something to choose and the recipe names no share


class Recipe(Section):
    """A whole run. References between sections are checked here, all at once."""

    name: Name
    """Name of the run and of its folder, `runs/<name>`: letters, digits, `_`, `-`, `.`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """What every random choice follows from: held-out records, the order of training, new weights. Change it to see
    how much is chance."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, which is slower. Turn it on to look for the cause of a
    difference."""
    memory: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Memory that training may take, in GiB; `auto`: the card's. Give it where others use the card too."""
    workers: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    """Processes that clean text; `auto`: by cores and size of the corpus. Lower it on a machine that is shared."""
    shard: bool | Auto = later("auto")
    """Hold the frozen base on all GPUs of a run together (FSDP2) instead of whole on each; `auto`: where it does not
    fit one. Slower, and for adapters only; with one GPU nothing is sharded."""
    model: ModelSection
    """The base, and how it is held and computed."""
    adapter: AdapterSection = AdapterSection()
    """The LoRA adapter that is trained."""
    data: Annotated[dict[Name, SourceSection], Field(max_length=500)]
    """The corpora, by names of your own."""
    hygiene: HygieneSection = HygieneSection()
    """What happens to every record before training."""
    stages: Annotated[list[StageSection], Field(min_length=1, max_length=64)]
    """The training, in order: each stage goes on from what the one before it left."""
    validation: Annotated[ValidateSection, Field(alias="validate")] = ValidateSection()
    """Loss on held-out text while a stage trains."""
    save: SaveSection = SaveSection()
    """Checkpoints, from which an interrupted stage goes on."""
    track: Literal["tensorboard", "trackio"] | None = later(None)
    """Also write the curves for this tracker, into a folder of the run with its name (`pip install
    'qmedtune[tensorboard]'`): figures alone, nothing leaves the machine."""
    merge: MergeSection = MergeSection()
    """How adapters are folded into the base."""
    evaluate: EvaluateSection = EvaluateSection()
    """What base and result are asked."""
    audit: AuditSection | None = None
    """Canaries that measure what training learns by heart; without it none are planted."""
    ablate: AblateSection | None = None
    """Arms of `qmedtune ablate`."""

    @property
    def memory_gib(self) -> float | None:
        """What training may take; None: all that the card has."""
        return None if self.memory == "auto" else self.memory

    @property
    def items_seed(self) -> int:
        """What draws the items of a `limit` and the examples before questions."""
        chosen = self.evaluate.items_seed
        return self.seed if chosen is None else chosen

    @property
    def development(self) -> float:
        """The share of items and held-out texts that are not scored at the end, since a choice is made on them."""
        if self.evaluate.development is not None:
            return self.evaluate.development
        return DEVELOPMENT if self.merge.sweep else 0.0

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

    def compared_with(self, name: str) -> list[str]:
        """Earlier sources in which duplicates of source `name` are looked for: texts among texts, instructions among
        instructions. What `classify` reads is compared with no other: several sets of labels are given to the same
        notes."""
        if not self.hygiene.dedup.exact and not self.hygiene.dedup.near:
            return []
        labelled = {stage.classify.data for stage in self.stages if stage.classify}
        if name in labelled:
            return []
        asks = self.data[name].kind == "instructions"
        used = self.used_sources()
        compared: list[str] = []
        for other in used[: used.index(name)]:
            if other not in labelled and (self.data[other].kind == "instructions") == asks:
                compared.append(other)
        return compared
