"""Writes recipes/systems/README.md from the recipes beside it, so that the comparison tells what the recipes do.

    python recipes/systems/table.py            # prints it
    python recipes/systems/table.py --write    # replaces README.md; a test compares the two

Figures are read from the recipes; words about the systems without a recipe (closed, or the base itself) stand below.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import MixSection, Recipe, SourceSection, StageSection

HERE = Path(__file__).parent
# In the order in which they appeared.
SYSTEMS = {
    "chatdoctor": "ChatDoctor", "medalpaca": "MedAlpaca", "pmc_llama": "PMC-LLaMA", "gatortrongpt": "GatorTronGPT",
    "clinical_llama": "Clinical LLaMA", "alpacare": "AlpaCare", "meditron": "Meditron", "me_llama": "Me-LLaMA",
}  # fmt: skip
COLUMNS = ("System", "Recipe", "Base", "Stages", "Text read on", "Instructions", "Prompt", "Loss on", "Tokens per row")
TAG = re.compile(r"^\s*(?:- )?(?P<key>[\w.]+):\s*(?P<value>.*?)\s+# \[(?P<tag>fixed|QLoRA)\]\s*(?P<why>.*)$")
TEXT_KINDS = {"literature": "literature", "clinical": "clinical notes", "general": "general text"}

# What a stage's training is told by; its other keys are left to the machine or say where text comes from.
STAGE_KEYS = (
    "seq_len", "batch", "lr", "schedule", "warmup", "min_lr_ratio", "horizon_ratio", "horizon_steps", "weight_decay",
    "betas", "adam_eps", "max_grad_norm", "epochs", "tokens", "max_repeats", "loss_on", "packing", "class_weights",
    "multi_label", "train_earlier", "validation",
)  # fmt: skip
OWN_ADAPTER_KEYS = ("r", "alpha", "dropout", "targets", "rslora")
ADAPTER_KEYS = (*OWN_ADAPTER_KEYS, "train_embeddings")
HYGIENE_KEYS = (
    "decontaminate", "contaminated", "clean", "languages", "min_characters", "max_characters", "shift_dates",
    "presidio",
)  # fmt: skip
# What `auto` comes to for a model of billions on one card.
AUTO = {
    "compute_dtype": "bfloat16", "train_embeddings": False, "optimizer": "adamw, in 8 bits where memory is short",
}  # fmt: skip
# Copies of the same weights go by several names.
BASES = {
    "huggyllama/llama-7b": "LLaMA 7B", "meta-llama/Llama-2-7b-hf": "Llama 2 7B",
    "meta-llama/Llama-2-13b-hf": "Llama 2 13B",
}  # fmt: skip
# What is so in every recipe and no key of one.
ALWAYS = {"documents": "isolated, several in a row", "bos": "each document", "vocabulary": "the base's"}
NO_INPUT = {"medalpaca": "an empty heading"}  # template -> what it prints where a record has no input
MMLU_SUBJECTS = {"mmlu": "all subjects", "mmlu_medical": "six subjects", "mmlu_meditron": "nine subjects"}
NOWHERE = "not in the repository"

INTRODUCTION = """\
# The field as recipes

Every open system that the introduction of the Me-LLaMA paper names, as a recipe that runs on one card. What a recipe
takes from a system, it takes from that system's repository or paper, and each number names the file that it stands in;
what one card changes is marked `[QLoRA]`, what the original got wrong `[fixed]`, what it does not say `[ours]`. Texts
are yours to fetch: locations are environment variables. `--smoke` runs any of them on the built-in base and data, on a
CPU, in about a minute once the tiny base is there:

    qmedtune plan recipes/systems/meditron.yaml
    qmedtune run recipes/systems/meditron.yaml --smoke

None of these recipes claims the scores of the original: those were reached with other hardware, full parameters and
text that is not public. They repeat the *procedure*, so that procedures can be compared on your data.

This page is generated: `python recipes/systems/table.py --write`.
"""
DEPARTURES = """\
Every key of base, data, hygiene and training in which a recipe's effective value, defaults included, is not the
original's, from `originals.yml` beside this page; `?` is what nobody can tell. All recipes keep documents apart in
attention and begin each with the tokenizer's first token, unlike originals that join them. Behind a colon stands a
line, of a PDF a page.
Me-LLaMA's repository holds no trainer; its lab's public one (BIDS-Xu-Lab/LLMindcraft, commit 26581f0) has the same
distinctive numbers and is cited as likely: that it was used is not proven.
"""
CLOSED = (
    "ChatGPT, GPT-4", "none: closed", "not released", "none", "not told", "not told", "their interface", "none", "–",
)  # fmt: skip
CLOSED_NOTE = """\
ChatGPT and GPT-4 have no recipe because none is possible: no weights to train, no tokenizer or corpus to check for
leaked questions, no log-likelihoods to score options by, versions that change, and text that may not leave the building
cannot be sent to them. So nothing here trains, adapts, checks or ranks them.
LLaMA is the base: it is what every run compares with (`base` in its report), and it alone is scored by
`qmedtune eval meta-llama/Llama-2-7b-hf --tasks medqa=FILE`.
"""
BASE = (
    "LLaMA", "`qmedtune eval`", "itself", "none", "general text", "none", "`plain`", "none", "2048 or 4096",
)  # fmt: skip


def page() -> str:
    """The whole of README.md."""
    recipes = {name: load_recipe(HERE / f"{name}.yaml") for name in SYSTEMS}
    rows = [BASE, *(row(SYSTEMS[name], name, loaded.recipe) for name, loaded in recipes.items()), CLOSED]
    changes = [change for name, loaded in recipes.items() for change in changed(SYSTEMS[name], loaded.text)]
    departures = [line for name, loaded in recipes.items() for line in departs(name, loaded.recipe)]
    parts = [
        INTRODUCTION,
        "## Side by side\n",
        markdown(COLUMNS, rows),
        CLOSED_NOTE,
        "## Training, as the recipes have it\n",
        markdown(
            ("System", "Stage", "Weights", "Budget", "Rows per step", "Peak rate", "Schedule", "Warm-up"),
            [line for name, loaded in recipes.items() for line in stages(SYSTEMS[name], loaded.recipe)],
        ),
        "## What differs from the originals\n",
        DEPARTURES,
        markdown(("System", "Key", "Here, in effect", "Original", "Where it stands"), departures),
        "## Why\n",
        "Lines that a recipe marks; defects that take more than a line stand at its head.\n",
        markdown(("System", "Key", "Here", "Why", "Original"), changes),
    ]
    return "\n".join(parts)


def row(title: str, name: str, recipe: Recipe) -> tuple[str, ...]:
    used = [recipe.data[source] for source in recipe.used_sources()]
    texts = dict.fromkeys(TEXT_KINDS[source.kind] for source in used if source.kind in TEXT_KINDS)
    prompts = dict.fromkeys(source.template for source in used if source.template)
    count = sum(source.kind == "instructions" for source in used)
    losses = dict.fromkeys(loss(stage) for stage in recipe.stages)
    lengths = dict.fromkeys(str(stage.section.seq_len) for stage in recipe.stages)
    return (
        title,
        f"[{name}.yaml]({name}.yaml)",
        "its own shape, from scratch" if recipe.model.shape else recipe.model.base.rpartition("/")[2],
        " → ".join(stage.kind for stage in recipe.stages),
        ", ".join(texts) or "none",
        f"{count} source{'s' if count > 1 else ''}" if count else "none",
        ", ".join(f"`{prompt}`" for prompt in prompts) or "none",
        ", ".join(losses),
        ", ".join(lengths),
    )


def loss(stage: StageSection) -> str:
    if stage.classify:
        return "the label"
    if stage.sft is None:
        return "every token"
    weight = stage.sft.loss_on
    return weight if isinstance(weight, str) else f"response, prompt × {weight:g}"


def stages(title: str, recipe: Recipe) -> list[tuple[str, ...]]:
    return [
        (
            title,
            name,
            weights(recipe, stage),
            budget(stage),
            str(stage.section.batch),
            f"{stage.section.lr:g}" if isinstance(stage.section.lr, float) else "auto",
            schedule(stage),
            warmup(stage),
        )
        for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True)
    ]


def weights(recipe: Recipe, stage: StageSection) -> str:
    if stage.full:
        return "all"
    targets = recipe.adapter.targets
    where = targets if isinstance(targets, str) else ", ".join(targets)
    lora = f"LoRA r {recipe.adapter.r} on {where}"
    if stage.section.adapter != "new":
        return {"continue": lora}.get(stage.section.adapter, stage.section.adapter)
    below = "with" if stage.classify and stage.classify.train_earlier else "on the frozen"
    return f"{lora}: a new one {below} the one before"


def budget(stage: StageSection) -> str:
    section = stage.section
    if isinstance(section, MixSection) and section.epochs is None:
        return f"{section.tokens:,} tokens" if isinstance(section.tokens, int) else "auto"
    if isinstance(section.epochs, str) or section.epochs is None:
        return "auto"
    return f"{section.epochs:g} epoch{'s' if section.epochs != 1 else ''}"


def schedule(stage: StageSection) -> str:
    section = stage.section
    horizon = f" over {section.horizon_ratio:g} × the stage" if section.horizon_ratio else ""
    return f"{section.schedule} to {section.min_lr_ratio:g} of the peak{horizon}"


def warmup(stage: StageSection) -> str:
    given = stage.section.warmup
    if isinstance(given, str):
        return given
    return f"{given.steps} steps" if given.steps is not None else f"{given.ratio:.3g} of the horizon"


@cache
def originals() -> dict[str, dict[str, Any]]:
    """originals.yml: {system: {"repository": owner/name, key: [value or null, where it stands]}}; under `all` what
    every system did that has no line of its own for it."""
    return yaml.safe_load((HERE / "originals.yml").read_text(encoding="utf-8"))


def effective(recipe: Recipe) -> dict[str, Any]:
    """What a recipe trains with, defaults included, by the keys of originals.yml."""
    found: dict[str, Any] = {"seed": recipe.seed, **models(recipe)}
    if not all(stage.full for stage in recipe.stages):
        found |= {f"adapter.{key}": told(recipe.adapter, key) for key in ADAPTER_KEYS}
    found |= {f"hygiene.dedup.{key}": getattr(recipe.hygiene.dedup, key) for key in ("exact", "near")}
    found |= {f"hygiene.{key}": getattr(recipe.hygiene, key) for key in HYGIENE_KEYS}
    changes = recipe.hygiene.phi in ("redact", "refuse")
    found["hygiene.phi"] = recipe.hygiene.phi if changes else "no text is changed"
    found |= texts(recipe) | drawn(recipe)
    instructions = [recipe.data[name] for name in recipe.used_sources() if recipe.data[name].kind == "instructions"]
    if instructions:
        held = sorted({source.holdout for source in instructions})
        found["data.holdout"] = held[0] if len(held) == 1 else held
        found["data.template"] = list(dict.fromkeys(str(source.template) for source in instructions))
        found["data.no_input"] = NO_INPUT.get(str(instructions[0].template), "no heading")
        found |= conversations(recipe)
    found |= {"validate.keep_best": recipe.validation.keep_best, **ALWAYS}
    for place, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        found |= {f"{name}.{key}": value for key, value in stage_values(stage).items()}
        if place:
            found[f"{name}.adapter"] = stage.section.adapter
    for task in recipe.evaluate.tasks:
        if task.task in MMLU_SUBJECTS:
            found["evaluate.mmlu"] = MMLU_SUBJECTS[task.task]
    return found


def told(section: Any, key: str) -> Any:
    """A value of a recipe, or what its `auto` comes to."""
    value = getattr(section, key)
    return AUTO[key] if value == "auto" and key in AUTO else value


def models(recipe: Recipe) -> dict[str, str]:
    """The base, its shape where the recipe has its own, and what it is held and computed in."""
    base = BASES.get(recipe.model.base, recipe.model.base)
    found = {
        "model.quantization": recipe.model.quantization,
        "model.compute_dtype": told(recipe.model, "compute_dtype"),
    }
    if recipe.model.quantization == "nf4" and not recipe.model.double_quantization:
        found["model.quantization"] = "nf4, scales in fp32"
    shape = recipe.model.shape
    if shape is None:
        return found | {"model.base": base}
    made = f"LLaMA, {shape.hidden} wide, {shape.layers} layers, {shape.heads} heads"
    sizes = f"{shape.kv_heads or shape.heads} for keys, {shape.intermediate} between, {shape.max_positions} positions"
    return found | {"model.base": f"none, the tokenizer of {base}", "model.shape": f"{made}, {sizes}"}


def drawn(recipe: Recipe) -> dict[str, str]:
    """Which records of each source are read, and what is held out whole."""
    used = recipe.used_sources()
    by_patient = [name for name in used if recipe.data[name].split_by == "patient"]
    limits = []
    for name in used:
        source = recipe.data[name]
        if source.max_records:
            limits.append(f"{name} {source.max_records:,} records")
        if source.max_tokens:
            limits.append(f"{name} {source.max_tokens:,} tokens")
    own = [f"{name} {recipe.data[name].phi}" for name in used if recipe.data[name].phi]
    split = f"by patient: {', '.join(by_patient)}" if by_patient else "by record"
    read = ", ".join(limits) or "all of every source"
    return {"data.split_by": split, "data.read": read, "data.phi": ", ".join(own) or "as hygiene.phi"}


def texts(recipe: Recipe) -> dict[str, str]:
    """How the texts of pretraining are cut into rows, and what is held out of each; nothing where there are none."""
    mixed = [stage.section.mix for stage in recipe.stages if isinstance(stage.section, MixSection)]
    if not mixed:
        return {}
    names = [name for name, weight in mixed[0].items() if weight > 0]
    chunking = dict.fromkeys(cut(recipe.data[name]) for name in names)
    held = [f"{recipe.data[name].holdout:g} of {name}" for name in names]
    return {"data.chunking": ", ".join(chunking), "data.text_holdout": ", ".join(held)}


def cut(source: SourceSection) -> str:
    return f"overlap of {source.overlap:g}" if source.chunking == "overlap" else source.chunking


def conversations(recipe: Recipe) -> dict[str, str]:
    """What becomes of conversations: the white space around a turn, what exceeds a row, the heading of an answer."""
    tuned = [stage.sft for stage in recipe.stages if stage.sft]
    allowed = max(section.max_truncated_fraction for section in tuned)
    learnt = "learnt" if all(section.loss_on == "all" for section in tuned) else "not learnt"
    return {
        "data.white_space": "taken off the ends of every turn",
        "data.cut_records": f"no end token, up to {allowed:.0%} of a source",
        "data.answer_header": learnt,
    }


def stage_values(stage: StageSection) -> dict[str, Any]:
    section = stage.section.model_dump(mode="json", exclude_none=True)
    values = {key: section.get(key) for key in STAGE_KEYS if key in type(stage.section).model_fields}
    values["optimizer"] = told(stage.section, "optimizer")
    if stage.full or stage.section.embedding_lr != "auto":
        values["embedding_lr"] = stage.section.embedding_lr
    if stage.section.batch == "auto":
        values["min_steps"] = 100 if stage.section.min_steps == "auto" else stage.section.min_steps
    if isinstance(stage.section, MixSection):
        shares = ", ".join(f"{name} {share:g}" for name, share in stage.section.mix.items())
        values["mix"] = f"{shares}, by {stage.section.unit}"
    if stage.classify:
        values["keeps"] = "the epoch of the lowest validation loss" if stage.classify.validation else "the last step"
    own = stage.section.lora
    return values | ({f"lora.{key}": getattr(own, key) for key in OWN_ADAPTER_KEYS} if own else {})


def departs(name: str, recipe: Recipe) -> list[tuple[str, ...]]:
    """The rows of one system. What the original does not tell is a departure too: nobody can say that it is none."""
    repository = originals()[name]["repository"]
    rows = []
    for key, here in effective(recipe).items():
        there, where = fact(name, key)
        if there is None and (here is None or where != NOWHERE):  # no horizon of its own on either side
            continue
        if said(here) != said(there):
            place = where if where == NOWHERE or " " in where else f"{repository} {where}"
            rows.append((SYSTEMS[name], f"`{key}`", said(here), "?" if there is None else said(there), place))
    return rows


def fact(name: str, key: str) -> tuple[Any, str]:
    """(what the original has, where it stands): of the system itself, else of all, there also for any stage."""
    facts, common = originals()[name], originals()["all"]
    if key in facts:
        return facts[key]
    return common[key] if key in common else common[re.sub(r"^\d\d-\w+\.", "", key)]


def said(value: Any) -> str:
    """A value as a recipe writes it; numbers alike whatever their type."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(each)}" for key, each in value.items() if each is not None)
    return ", ".join(map(said, value)) if isinstance(value, (list, tuple)) else str(value)


def changed(title: str, text: str) -> list[tuple[str, ...]]:
    """The lines of a recipe that are marked [fixed] or [QLoRA]."""
    found = [match for line in text.splitlines() if (match := TAG.match(line))]
    return [
        (
            title,
            f"`{m['key']}`",
            f"`{m['value']}`",
            {"fixed": "corrected", "QLoRA": "one card"}[m["tag"]],
            m["why"] or "–",
        )
        for m in found
    ]


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(markdown_row(line) for line in lines) + "\n"


def markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        (HERE / "README.md").write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
