"""Turns every `auto` of a recipe into a value with a one-sentence reason.

What changes results (lengths, batch, learning rates, epochs, intervals) follows from the recipe and the base alone, so
that a run is the same run on another machine; micro-batch, checkpointing, optimiser precision and compute dtype follow
from the machine (fit.py), and so does what a stage attends with (numerics.py). `auto` stays where more must be known:
`cpt.tokens` over real text (packing counts it), `validate.every` and `save.every` (a share of each stage's steps), and
`model.kernels` (their dispatch decides by shape).
"""

from __future__ import annotations

from typing import Any, TypeVar

from qmedtune import units
from qmedtune.batches import MIN_STEPS
from qmedtune.errors import DoesNotFit, RecipeError
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning import fit
from qmedtune.planning.layers import slowdown
from qmedtune.planning.machine import Machine, this_machine
from qmedtune.planning.memory import WAYS, Setup, trained_parameters
from qmedtune.planning.numerics import numerics, why_dtype
from qmedtune.planning.plan_facts import Decision
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import (
    LayersSection,
    Recipe,
    Section,
    SftSection,
    StageSection,
    TrainSection,
    WarmupSection,
)
from qmedtune.resolved import Cards, Numerics, ResolvedRecipe

Proposals = dict[str, tuple[Any, str]]
Decisions = list[Decision]
S = TypeVar("S", bound=Section)

# Base size in parameters -> tokens per row. PMC-LLaMA and Meditron-7B trained on 2048; small bases meet small machines.
SEQ_LEN = ((0.5e9, 512), (2e9, 1024), (float("inf"), 2048))
# Tokens per optimiser step. CPT: Clinical LLaMA's 64 x 512; SFT: rows of 250-token records hold 64 records, within the
# 16 (QLoRA) to 128 (MedAlpaca, AlpaCare) that the field used.
STEP_TOKENS = {"cpt": 32_768, "sft": 16_384, "pretrain": 32_768, "classify": 16_384}
LARGE = 30e9  # from here QLoRA's own recipe halves the learning rate (Dettmers et al. 2023: 2e-4 to 13B, 1e-4 from 33B)


def resolve(
    recipe: Recipe, machine: Machine | None = None, *, judged: bool = False
) -> tuple[ResolvedRecipe, Decisions]:
    """The recipe without `auto` (see above for what stays) and the decisions as {"key", "value", "why"}.

    `machine` defaults to this one. judged: another process has resolved this recipe before, and a `shard: true` in it
    can be what it made of `auto`: of the stages that can be sharded. Raises DoesNotFit when a stage
    cannot fit, RecipeError when the base is unknown.
    """
    machine = machine or this_machine()
    if recipe.shard != "auto":
        if recipe.shard and not judged:
            _refuse_to_shard(recipe)
        return _resolve(recipe, machine, sharded=recipe.shard and machine.cards > 1)
    try:
        return _resolve(recipe, machine, sharded=False)
    except DoesNotFit:
        if machine.cards == 1 or not any(stage.can_shard for stage in recipe.stages):
            raise
    resolved, decisions = _resolve(recipe, machine, sharded=True)
    why = f"the base does not fit one GPU with its training: {machine.cards} hold it together (FSDP2)"
    return resolved, [{"key": "shard", "value": True, "why": why}, *decisions]


def _refuse_to_shard(recipe: Recipe) -> None:
    for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True):
        if not stage.can_shard:
            what = "trains all parameters" if stage.full else "trains a head on documents"
            raise RecipeError(
                f"shard: true given, but {name} {what}, which is not sharded\n"
                "allowed: shard: auto or false; cpt and sft stages with an adapter are sharded"
            )


def _resolve(recipe: Recipe, machine: Machine, *, sharded: bool) -> tuple[ResolvedRecipe, Decisions]:
    facts = base_facts(recipe.model)
    decisions: Decisions = []
    model = _fill(recipe.model, "model", _dtype(machine), decisions)
    adapter = _fill(recipe.adapter, "adapter", _embeddings(recipe, facts), decisions)
    recipe = _judge_instructions(recipe, decisions)
    recipe = recipe.model_copy(update={"model": model, "adapter": adapter})
    decided: list[tuple[Numerics, Cards]] = []
    for index, stage in enumerate(recipe.stages):
        recipe = _by_base(recipe, index, facts, decisions)
        seq_len = int(recipe.stages[index].section.seq_len)
        computes = numerics(recipe.model, full=stage.full, seq_len=seq_len, machine=machine)
        cards = Cards(machine.cards, machine.cards_here, sharded and stage.can_shard)
        decided.append((computes, cards))
        recipe = _by_machine(fit.Draft(recipe, index, computes, cards), facts, machine, decisions)
    evaluate = _fill(recipe.evaluate, "evaluate", _evaluation_batch(facts), decisions)
    return _typed(recipe.model_copy(update={"evaluate": evaluate, "shard": sharded}), decided), decisions


def _typed(recipe: Recipe, decided: list[tuple[Numerics, Cards]]) -> ResolvedRecipe:
    """The filled recipe with the types that say so. An `auto` that was left where none may be is refused by them."""
    stages: list[dict[str, object]] = []
    for stage, (computes, cards) in zip(recipe.stages, decided, strict=True):
        stages.append({stage.kind: dict(stage.section), "numerics": computes, "cards": cards})
    values: dict[str, object] = dict(recipe)
    values["validate"] = values.pop("validation")  # as recipes call it
    values |= {"model": dict(recipe.model), "adapter": dict(recipe.adapter), "evaluate": dict(recipe.evaluate)}
    return ResolvedRecipe.model_validate(values | {"stages": stages})


def _judge_instructions(recipe: Recipe, decisions: Decisions) -> Recipe:
    """With `keep_best`, validate on the instructions of each sft stage: their loss says which of its steps is best."""
    if not recipe.validation.keep_best:
        return recipe
    added: list[str] = []
    for stage in recipe.stages:
        if not stage.sft:
            continue
        for name in stage.sources:
            if name not in added and name not in recipe.validation.on and recipe.data[name].holdout > 0:
                added.append(name)
    if not added:
        return recipe
    why = f"keep_best: {', '.join(added)} added, because an sft stage's best step goes by held-out instructions"
    on = [*recipe.validation.on, *added]
    decisions.append({"key": "validate.on", "value": ", ".join(on), "why": why})
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"on": on})})


def _fill(section: S, where: str, proposals: Proposals, decisions: Decisions) -> S:
    """Replace the fields that are `auto`, and note each with its reason."""
    chosen: dict[str, object] = {}
    for key, (value, why) in proposals.items():
        if getattr(section, key) != "auto":
            continue
        chosen[key] = value
        shown = value.model_dump(exclude_none=True) if isinstance(value, Section) else value
        decisions.append({"key": f"{where}.{key}", "value": shown, "why": why})
    if not chosen:
        return section
    return section.model_copy(update=chosen)


def _by_base(recipe: Recipe, index: int, facts: BaseFacts, decisions: Decisions) -> Recipe:
    """Stage `index` with what follows from the recipe and its base: lengths, rates, epochs and batch."""
    stage = recipe.stages[index]
    where = f"stages[{index}].{stage.kind}"
    on_builtin_text = all(recipe.data[name].is_builtin for name in stage.sources)
    if facts.builtin:
        proposals = _tiny_stage(facts, stage, on_builtin_text)
    else:
        proposals = _real_stage(facts, recipe, index)
    section = _fill(stage.section, where, proposals, decisions)
    recipe = _with_stage(recipe, index, section)
    section = _fill(section, where, _fewest_steps(section, tuned=facts.builtin and on_builtin_text), decisions)
    if facts.builtin:
        batch = _tiny_batch(facts, section, stage.kind)
    else:
        batch = _real_batch(int(section.seq_len), stage.kind)
    section = _fill(section, where, batch, decisions)
    _check_layers(facts, section.gradient_checkpointing, where)
    return _with_stage(recipe, index, section)


def _by_machine(draft: fit.Draft, facts: BaseFacts, machine: Machine, decisions: Decisions) -> Recipe:
    """The same stage with what follows from the machine: micro-batch, checkpointing and optimiser."""
    stage, decided = draft.recipe.stages[draft.index], draft.numerics
    where = f"stages[{draft.index}].{stage.kind}"
    if stage.full:
        decisions.append({"key": f"{where} computes in", "value": decided.dtype, "why": why_dtype(decided, machine)})
    section = _fill(stage.section, where, _memory(facts, draft, machine), decisions)
    return _with_stage(draft.recipe, draft.index, section)


def _with_stage(recipe: Recipe, index: int, section: Section) -> Recipe:
    stages = list(recipe.stages)
    stages[index] = stages[index].model_copy(update={stages[index].kind: section})
    return recipe.model_copy(update={"stages": stages})


# ---- decided by recipe and base --------------------------------------------------------------------------------------


def _real_stage(facts: BaseFacts, recipe: Recipe, index: int) -> Proposals:
    wanted = next(length for limit, length in SEQ_LEN if facts.parameters < limit)
    size = units.count(facts.parameters)
    seq_len = min(wanted, facts.max_positions)
    why_length = f"a base of {size} parameters; PMC-LLaMA and Meditron trained on 2048, smaller bases on less"
    lr, why_lr = _learning_rate(facts, recipe, index)
    return {
        "seq_len": (seq_len, why_length),
        "lr": (lr, why_lr),
        "embedding_lr": (lr / 10, "a tenth of lr (where embeddings are trained): whole rows move faster"),
        "warmup": (WarmupSection(ratio=0.03), "3 % of the steps, as QLoRA and most systems of the field"),
        "epochs": (3.0, "3 epochs: MedAlpaca, AlpaCare, PMC-LLaMA and Me-LLaMA"),
    }


def _learning_rate(facts: BaseFacts, recipe: Recipe, index: int) -> tuple[float, str]:
    stage, large = recipe.stages[index], facts.parameters >= LARGE
    if stage.section.adapter == "none" and stage.kind != "pretrain":
        return 2e-5, "all parameters: Alpaca, AlpaCare and PMC-LLaMA took 2e-5 for 7B"
    if stage.kind == "pretrain":
        return 3e-4, "all parameters from scratch: GatorTronGPT took 1e-4, small models stand more"
    continues = index > 0 and stage.section.adapter == "continue"
    peak = 1e-4 if large or continues else 2e-4
    span = "QLoRA takes 1e-4 from 30B on" if large else "QLoRA takes 1e-4 to 2e-4 up to 13B"
    kept = "; the lower end keeps what the stage before put into this adapter" if continues else ""
    return peak, f"{span}; full-tuning values (2e-5) starve LoRA{kept}"


def _fewest_steps(section: TrainSection, *, tuned: bool) -> Proposals:
    if section.batch != "auto":
        return {"min_steps": (1, "`batch` is given, which says the steps")}
    if tuned:
        return {"min_steps": (1, "the batch is tuned for this base and its text")}
    return {"min_steps": (MIN_STEPS, f"fewer than {MIN_STEPS} steps at LoRA's rates move the weights too little")}


def _real_batch(seq_len: int, kind: str) -> Proposals:
    rows = max(STEP_TOKENS[kind] // seq_len, 1)
    return {"batch": (rows, f"at most {rows} rows x {seq_len} = {rows * seq_len} tokens per optimiser step")}


def _tiny_stage(facts: BaseFacts, stage: StageSection, on_builtin_text: bool) -> Proposals:
    from qmedtune import tiny

    defaults = tiny.DEFAULTS[facts.name]
    tuned = {"cpt": defaults.cpt, "pretrain": defaults.pretraining}.get(stage.kind, defaults.sft)
    why = f"tuned for {facts.name}"
    real = "real text in a tiny base: unknown words are spelled in bytes, so rows are as long as the base allows"
    proposals: Proposals = {
        "seq_len": (tuned.seq_len, why) if on_builtin_text else (facts.max_positions, real),
        "lr": (tuned.lr, why) if not stage.full or stage.kind == "pretrain" else (3e-4, "a tenth of its pretraining's"),
        "embedding_lr": (getattr(tuned, "embedding_lr", tuned.lr), why),
        "warmup": (WarmupSection(ratio=tuned.warmup_ratio), why),
        "epochs": (float(getattr(tuned, "epochs", 1)), why),
    }
    if on_builtin_text and not isinstance(stage.section, SftSection) and stage.section.epochs is None:
        proposals["tokens"] = (getattr(tuned, "tokens", None), why)
    return proposals


def _tiny_batch(facts: BaseFacts, section: Any, kind: str) -> Proposals:
    from qmedtune import tiny

    defaults = tiny.DEFAULTS[facts.name]
    tuned = {"cpt": defaults.cpt, "pretrain": defaults.pretraining}.get(kind, defaults.sft)
    if kind == "classify":
        rows = max(tuned.batch_rows * tuned.seq_len // (4 * section.seq_len), 1)
        return {"batch": (rows, "a quarter of an sft step's tokens: many short documents share a row")}
    rows = max(tuned.batch_rows * tuned.seq_len // section.seq_len, 1)
    if section.seq_len == tuned.seq_len:
        return {"batch": (rows, f"tuned for {facts.name}")}
    return {"batch": (rows, f"as many tokens per step as tuned for {facts.name}, in rows of {section.seq_len}")}


def _embeddings(recipe: Recipe, facts: BaseFacts) -> Proposals:
    if facts.builtin:
        return {"train_embeddings": (True, "the tiny base meets names it has never seen, each a token of its own")}
    if any(stage.section.adapter == "new" for stage in recipe.stages[1:]):
        return {"train_embeddings": (False, "stacked adapters allow no trained embeddings")}
    rows = 2 * facts.vocab * facts.hidden
    cost = f"trained copies of both embeddings would take {units.size(16 * rows)} with gradients and AdamW states"
    return {"train_embeddings": (False, f"no tokens are added; {cost}")}


def _evaluation_batch(facts: BaseFacts) -> Proposals:
    if facts.builtin:
        rows = 64
    elif facts.parameters < 2e9:
        rows = 16
    elif facts.parameters < LARGE:
        rows = 8
    else:
        rows = 4
    return {"batch": (rows, f"sequences scored at once on a base of {units.count(facts.parameters)} parameters")}


def _check_layers(facts: BaseFacts, stated: object, where: str) -> None:
    if isinstance(stated, LayersSection):
        given = sum(getattr(stated, way) for way in WAYS)
        if given != facts.layers:
            raise RecipeError(
                f"{where}.gradient_checkpointing: counts {given} layers, {facts.name} has {facts.layers}\n"
                f"allowed: counts of {', '.join(WAYS)} that sum to {facts.layers}; true, false or auto"
            )


# ---- decided by the machine ------------------------------------------------------------------------------------------


def _dtype(machine: Machine) -> Proposals:
    if machine.bf16:
        return {"compute_dtype": ("bfloat16", f"{machine.name} has bf16 instructions")}
    if machine.is_gpu:
        why = f"{machine.name} (compute capability {machine.capability}) has no bf16; fp16 with loss scaling"
        return {"compute_dtype": ("float16", why)}
    return {"compute_dtype": ("float32", f"{machine.name} has no bf16 instructions; emulated bf16 is slower than fp32")}


def refuse_half_on_cpu(recipe: Recipe, machine: Machine) -> None:
    """Asked before a model is used, not for data, which is often prepared on a machine without a card.

    torch has no fast fp16 products on a CPU: SmolLM2-135M trained at 1 token/s where bf16 makes 23 (2 cores).
    """
    if recipe.model.compute_dtype == "float16" and not machine.is_gpu:
        raise RecipeError(
            "model.compute_dtype: float16 given, for a run on a CPU; it would take twenty times as long as bfloat16\n"
            "allowed on a CPU: auto, bfloat16, float32; --set model.compute_dtype=auto, or run on a GPU"
        )


def _memory(facts: BaseFacts, draft: fit.Draft, machine: Machine) -> Proposals:
    choice = fit.choose(facts, draft, machine)
    setup = choice.setup
    used = f"{units.size(choice.peak_bytes)} predicted of {units.size(choice.budget_bytes)}"
    trained = units.count(trained_parameters(facts, setup))
    states = {
        "adamw": f"fp32 states of {trained} trained parameters fit",
        "adamw_8bit": f"8-bit states of {trained} trained parameters, so that the rest fits",
        "paged_adamw_8bit": f"states of {trained} trained parameters are paged to host memory, so that the rest fits",
    }
    layers, why_layers = _layers(facts, setup)
    return {
        "micro_batch": (setup.micro_batch, f"{setup.micro_batch} x {setup.seq_len} tokens at a time: {used}"),
        "gradient_checkpointing": (layers, why_layers),
        "optimizer": (setup.optimizer, states[setup.optimizer]),
    }


def _layers(facts: BaseFacts, setup: Setup) -> tuple[bool | LayersSection, str]:
    """What becomes of each layer's activations."""
    if setup.ways is not None:
        cost = slowdown(facts, setup) - 1
        why = (
            f"the fastest mix over {facts.layers} layers that fits; about {cost:.0%} more time than keeping everything"
        )
        return LayersSection(**dict(zip(WAYS, setup.ways, strict=True))), why
    if setup.checkpointing:
        return True, "recomputing each layer costs half as much time again, but keeping its activations does not fit"
    return False, "all activations fit, so nothing is computed twice"
