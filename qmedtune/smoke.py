"""`--smoke`: the same recipe on the built-in base and data, in small budgets, so that a mistake costs seconds.

What is kept is what can be wrong in a recipe: its sources with their kinds, templates and chunking, its stages with
their adapters, losses and schedules. What belongs to a real base, its text or its card is replaced. Deliberately not
here: anything that the run does differently; a smoke run is an ordinary run of another recipe.
"""

from __future__ import annotations

from collections import Counter

from qmedtune.keys import MODEL_BY_MACHINE
from qmedtune.recipe import MergeSection, MixSection, Recipe, SourceSection, StageSection, TaskSection

BUILTIN = {"literature": "literature", "clinical": "notes", "general": "general", "instructions": "instructions"}
RECORDS = 300  # of the built-in instructions, shared by all sources of that kind
TOKENS = 30_000  # of a `cpt` or `pretrain` stage: some seconds on two cores
SEQ_LEN = 128  # of `sft` rows: the longest prompt of a shipped template and an answer take 110 tokens of the tiny base


def smoke(recipe: Recipe, builtin: str = "builtin:tiny") -> Recipe:
    """The recipe to run in place of `recipe`, on a built-in base and the text of its world."""
    kinds = Counter(source.kind for source in recipe.data.values())
    labelled = {stage.classify.data for stage in recipe.stages if stage.classify}
    where = "builtin:" if builtin == "builtin:tiny" else f"{builtin}/"
    data: dict[str, SourceSection] = {}
    texts: list[str] = []
    for name, source in recipe.data.items():
        corpus = "outcomes" if name in labelled else BUILTIN[source.kind]
        data[name] = _source(source, kinds[source.kind], where + corpus)
        if source.kind != "instructions" and name not in labelled:
            texts.append(name)
    on = [name for name in recipe.validation.on if name not in labelled]
    validate = {"on": on, "keep_best": recipe.validation.keep_best and bool(on)}
    # Limits that are made for real text.
    hygiene: dict[str, object] = {"languages": "any", "min_characters": 0, "max_characters": None, "presidio": None}
    if recipe.hygiene.decontaminate != "off":
        hygiene["decontaminate"] = "evaluation"
    if max(kinds.values()) > 1:  # sources of one kind get the same text: all but the first would be duplicates
        hygiene["dedup"] = recipe.hygiene.dedup.model_copy(update={"exact": False, "near": False})
    # What was chosen for the recipe's card (float16 on a T4, flash attention) need not run on this machine.
    base = {"base": builtin, "revision": None, "shape": None, **dict.fromkeys(MODEL_BY_MACHINE, "auto")}
    scored = [name for name in recipe.evaluate.perplexity if name in texts]
    tasks = [TaskSection(task="facts")] if recipe.evaluate.tasks else []
    evaluate = {"tasks": tasks, "perplexity": scored, "against": []}
    return recipe.model_copy(
        update={
            "memory": "auto",
            "model": recipe.model.model_copy(update=base),
            "data": data,
            "hygiene": recipe.hygiene.model_copy(update=hygiene),
            "stages": [_stage(stage) for stage in recipe.stages],
            "validation": recipe.validation.model_copy(update=validate),
            "evaluate": recipe.evaluate.model_copy(update=evaluate),
            "merge": _merge(recipe.merge, builtin),
        }
    )


def _source(source: SourceSection, alike: int, path: str) -> SourceSection:
    limit = -(-RECORDS // alike) if source.kind == "instructions" else None
    return SourceSection(
        path=path,
        columns={"label": "label"} if path.endswith("outcomes") else {},
        kind=source.kind,
        template=source.template,
        chunking=source.chunking,
        split_by="patient" if source.kind == "clinical" else "record",
        max_records=limit,
    )


def _merge(section: MergeSection, builtin: str) -> MergeSection:
    """The model that is mixed in belongs to the real base: the built-in base, untrained, stands for it."""
    if section.other is None:
        return section
    return section.model_copy(update={"other": builtin})


def _stage(stage: StageSection) -> StageSection:
    section = stage.section
    update: dict[str, object] = dict.fromkeys(("seq_len", "batch", "micro_batch", "lr", "embedding_lr"), "auto")
    update |= {"warmup": "auto", "optimizer": "auto", "min_steps": "auto", "horizon_steps": None}
    if isinstance(section, MixSection):
        update |= {"tokens": TOKENS, "epochs": None}
    else:
        update |= {"seq_len": SEQ_LEN, "epochs": 4.0 if stage.kind == "classify" else 1.0}
    return stage.model_copy(update={stage.kind: section.model_copy(update=update)})
