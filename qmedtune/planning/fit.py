"""Chooses micro-batch, checkpointing and optimiser precision: the fastest training step that fits.

Only these depend on the machine; what changes results (lengths, batch, learning rates) is in resolve.py.
Deliberately not here: the prediction itself (memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qmedtune import units
from qmedtune.errors import DoesNotFit
from qmedtune.llama_shape import LINEARS, BaseFacts
from qmedtune.planning import layers, memory
from qmedtune.planning.machine import CARDS_GIB, GIB, Machine
from qmedtune.planning.memory import Setup
from qmedtune.recipe import LayersSection, Recipe, TrainSection
from qmedtune.resolved import Cards, Numerics, ResolvedRecipe

# Decoding NF4 costs as much as multiplying by it with this many tokens (2.5 bytes per weight written and read back,
# against 2 FLOPs per token): 110 to 230 on T4, A100, 4090, H200 by the limits in the kernel notes. On a CPU the
# weights are decoded already; what remains is Python's own time per micro-batch.
DECODE_TOKENS = {"cuda": 220, "cpu": 64}
# Beyond these, larger micro-batches gain under 2 % and only cost memory.
ENOUGH_TOKENS = {"cuda": 16_384, "cpu": 4_096}
# Relative slowdown of the optimisers that save memory: assumed, small beside a step of many tokens.
OPTIMIZER_COST = {"adamw": 0.0, "adamw_8bit": 0.002, "paged_adamw_8bit": 0.02}
# Share of the budget that an automatic choice fills: the prediction is meant to be right within 10 %.
FILLED = 0.9
MORE_CARDS = (2, 4, 8)  # of a workstation, and of a node
HOST_RESERVE_BYTES = GIB  # for the system, when the "card" is the RAM


@dataclass(frozen=True)
class FittedSetup:
    """The chosen setup with its predicted peak and the budget, in bytes. `tight`: more than FILLED of the budget."""

    setup: Setup
    peak_bytes: int
    budget_bytes: int

    @property
    def tight(self) -> bool:
        return self.peak_bytes > FILLED * self.budget_bytes


def budget_bytes(machine: Machine, recipe: Recipe) -> int:
    """Memory a training step may take: the card's, or the RAM less a reserve; less where the recipe says so."""
    there = machine.memory_bytes if machine.is_gpu else machine.memory_bytes - HOST_RESERVE_BYTES
    if recipe.memory_gib is None:
        return there
    return min(there, round(recipe.memory_gib * GIB))


@dataclass(frozen=True)
class Draft:
    """Stage `index` of a recipe whose lengths, batches and compute dtype are resolved: what still may be `auto` are
    micro-batch, checkpointing and optimiser. `numerics`: what the stage computes in and attends with; `cards`: on how
    many GPUs."""

    recipe: Recipe
    index: int
    numerics: Numerics
    cards: Cards = Cards()

    @property
    def section(self) -> TrainSection:
        return self.recipe.stages[self.index].section


def draft_of(recipe: ResolvedRecipe, index: int) -> Draft:
    """A resolved stage as one, to be judged anew."""
    return Draft(recipe, index, recipe.stages[index].numerics, recipe.stages[index].cards)


def setup_of(recipe: ResolvedRecipe, index: int) -> Setup:
    """The memory-relevant part of stage `index`."""
    section = recipe.stages[index].section
    setup = with_stated_layers(section, smallest(draft_of(recipe, index)))
    return replace(setup, micro_batch=section.micro_batch, optimizer=section.optimizer)


def smallest(draft: Draft) -> Setup:
    """A stage with one row at a time, every layer recomputed and the optimiser's states in host memory."""
    recipe, section, decided = draft.recipe, draft.section, draft.numerics
    stages = recipe.stages[: draft.index + 1]
    full = stages[-1].full
    headed = section.adapter == "frozen"  # a head alone is trained: its few thousand weights are not counted
    frozen = int(headed)
    for stage in stages[1:]:
        frozen += stage.section.adapter == "new"
    adapter = recipe.adapter_of(draft.index)
    return Setup(
        seq_len=int(section.seq_len),
        micro_batch=1,
        checkpointing=True,
        dropout=adapter.dropout > 0,
        optimizer="paged_adamw_8bit",
        compute_dtype=decided.dtype,
        quantized=recipe.model.quantization == "nf4",
        double_quantization=recipe.model.double_quantization,
        rank=0 if headed else adapter.r,
        targets=LINEARS if adapter.targets == "all-linear" else tuple(adapter.targets),
        train_embeddings=adapter.train_embeddings is True and not full,
        frozen_adapters=frozen,
        full=full,
        attention=decided.attention,
        cards=draft.cards.number,
        cards_here=draft.cards.here,
        sharded=draft.cards.sharded,
    )


def with_stated_layers(section: TrainSection, setup: Setup) -> Setup:
    """`setup` with its layers treated as the section states: all recomputed, all kept, or counts by way."""
    stated = section.gradient_checkpointing
    if not isinstance(stated, LayersSection):
        return replace(setup, checkpointing=stated is True)
    ways = (stated.keep, stated.cheap, stated.recompute, stated.offload)
    return replace(setup, checkpointing=False, ways=ways)


def options(section: TrainSection, least: Setup, machine: Machine) -> list[Setup]:
    """Every micro-batch and optimiser that the section's explicit values allow; checkpointing as in `least`."""
    if section.optimizer != "auto":
        optimizers = (section.optimizer,)
    elif machine.is_gpu:
        optimizers = ("adamw", "adamw_8bit", "paged_adamw_8bit")
    else:
        optimizers = ("adamw",)
    found: list[Setup] = []
    for rows in _micro_batches(section, least, machine):
        for optimizer in optimizers:
            found.append(replace(least, micro_batch=rows, optimizer=optimizer))
    return found


def _micro_batches(section: TrainSection, least: Setup, machine: Machine) -> list[int]:
    """The stated number of rows; else powers of two, and all of the batch that a card gets, while more of them still
    gain speed."""
    batch = -(-int(section.batch) // least.cards)
    if section.micro_batch != "auto":
        return [min(section.micro_batch, batch)]
    allowed = {1}
    rows = 2
    while rows <= batch:
        allowed.add(rows)
        rows *= 2
    allowed.add(batch)
    return sorted(rows for rows in allowed if rows == 1 or rows * least.seq_len <= ENOUGH_TOKENS[machine.kind])


def with_layers(facts: BaseFacts, setup: Setup, machine: Machine, budget: float) -> Setup:
    """`setup` with the fastest treatment of its layers that keeps the peak within `budget` bytes; at its smallest
    where nothing does. Layers that are not ours (training from scratch) are recomputed all or not at all; host memory
    takes no layer inputs where it is the device's own."""
    kept = replace(setup, checkpointing=False)
    passing = sum(memory.activation_bytes(facts, kept).values())
    share = 1 + memory.FRAGMENTATION[machine.kind]
    room = passing + (budget - memory.peak_bytes(facts, kept, gpu=machine.is_gpu)) / share
    if room >= passing:
        return kept
    recomputed = replace(setup, checkpointing=True)
    if setup.full:
        return recomputed
    allowed = memory.WAYS if machine.is_gpu else memory.WAYS[:3]
    try:
        plan = layers.choose_activation_plan(facts, kept, room, allowed)
    except DoesNotFit:
        if machine.is_gpu:
            return replace(kept, ways=(0, 0, 0, facts.layers))
        return recomputed
    if plan.recompute == facts.layers:
        return recomputed
    return replace(kept, ways=plan.ways)


def relative_time(facts: BaseFacts, setup: Setup, machine: Machine) -> float:
    """Time per token in forward passes over the frozen weights: forward and input gradients are 2, recomputing makes
    it 3 (LoRA needs no weight gradients); each pass pays the decoding of NF4 once per micro-batch."""
    passes = 2 * layers.slowdown(facts, setup)
    return passes * (1 + DECODE_TOKENS[machine.kind] / setup.tokens) + OPTIMIZER_COST[setup.optimizer]


def choose(facts: BaseFacts, draft: Draft, machine: Machine) -> FittedSetup:
    """The fastest setup of a stage that fits. DoesNotFit names the three cheapest remedies."""
    budget, section = budget_bytes(machine, draft.recipe), draft.section
    roomy: list[tuple[float, int, Setup]] = []
    crowded: list[tuple[int, Setup]] = []
    for setup in options(section, smallest(draft), machine):
        if section.gradient_checkpointing == "auto":
            setup = with_layers(facts, setup, machine, FILLED * budget)
        else:
            setup = with_stated_layers(section, setup)
        peak = memory.peak_bytes(facts, setup, gpu=machine.is_gpu)
        if peak <= FILLED * budget:
            roomy.append((relative_time(facts, setup, machine), peak, setup))
        else:
            crowded.append((peak, setup))
    if roomy:
        _, peak, setup = min(roomy, key=lambda option: option[:2])
        return FittedSetup(setup, peak, budget)
    peak, setup = min(crowded, key=lambda option: option[0])
    if peak > budget:
        name = draft.recipe.stage_names()[draft.index]
        stage = draft.recipe.stages[draft.index]
        may_shard = draft.recipe.shard is not False and stage.can_shard
        raise DoesNotFit(_does_not_fit(facts, name, FittedSetup(setup, peak, budget), machine, may_shard=may_shard))
    return FittedSetup(setup, peak, budget)


def remedies(facts: BaseFacts, setup: Setup, *, gpu: bool) -> list[tuple[str, int]]:
    """What could be changed and the bytes it frees, from what costs nothing but time to what changes the result."""
    widest = setup.element_bytes == 4 and (gpu or not setup.full)  # a CPU trains all parameters in fp32 (numerics.py)
    changes = [
        ("gradient_checkpointing: true", replace(setup, checkpointing=True, ways=None)),
        ("micro_batch: 1", replace(setup, micro_batch=1)),
    ]
    if gpu and not setup.full:
        offloaded = replace(setup, ways=(0, 0, 0, facts.layers))
        changes.append((f"gradient_checkpointing: {{offload: {facts.layers}}}", offloaded))
    if gpu:
        changes.append(("optimizer: paged_adamw_8bit", replace(setup, optimizer="paged_adamw_8bit")))
        changes.append(("model.quantization: nf4", replace(setup, quantized=True)))
    changes.append(("model.double_quantization: true", replace(setup, double_quantization=True)))
    if widest:
        changes.append(("model.compute_dtype: bfloat16", replace(setup, compute_dtype="bfloat16")))
    rank, length = max(setup.rank // 2, 1), setup.seq_len // 2
    changes += [
        ("adapter.train_embeddings: false", replace(setup, train_embeddings=False)),
        (f"seq_len: {length}", replace(setup, seq_len=length)),
        (f"adapter.r: {rank}", replace(setup, rank=rank)),
    ]
    now = memory.peak_bytes(facts, setup, gpu=gpu)
    found: list[tuple[str, int]] = []
    for text, changed in changes:
        freed = now - memory.peak_bytes(facts, changed, gpu=gpu)
        if freed > 0:
            found.append((text, freed))
    return found


def _does_not_fit(facts: BaseFacts, name: str, least: FittedSetup, machine: Machine, *, may_shard: bool) -> str:
    setup, missing = least.setup, least.peak_bytes - least.budget_bytes
    enough: list[tuple[str, int]] = []
    too_little: list[tuple[str, int]] = []
    for text, freed in remedies(facts, setup, gpu=machine.is_gpu):
        if freed >= missing:
            enough.append((text, freed))
        elif freed >= 0.02 * missing:
            too_little.append((text, freed))
    too_little.sort(key=lambda remedy: -remedy[1])
    named = (enough + too_little)[:3]
    number = _enough_cards(facts, least, machine) if may_shard else None
    if number is not None:
        sharded = memory.peak_bytes(facts, replace(setup, cards=number, sharded=True), gpu=machine.is_gpu)
        named = [*named[:2], (f"--gpus {number} with shard: auto (FSDP2)", least.peak_bytes - sharded)]
    if len(named) < 3:
        named.append(("a smaller base: this much is missing;", missing))
    where = "several cards"
    for gib in reversed(CARDS_GIB):
        if least.peak_bytes <= gib * GIB:
            where = f"a card of {gib} GiB"
    checkpointing = "on" if setup.checkpointing or setup.ways else "off"
    lines = [
        f"{name} of {facts.name} does not fit: {units.size(least.peak_bytes)} predicted, "
        f"{units.size(least.budget_bytes)} there ({machine.name})",
        f"at its smallest: {setup.micro_batch} x {setup.seq_len} tokens, {setup.optimizer}, "
        f"checkpointing {checkpointing}; it would fit {where}; remedies:",
    ]
    for text, freed in named:
        lines.append(f"  {text} frees {units.size(freed)}")
    return "\n".join(lines)


def _enough_cards(facts: BaseFacts, least: FittedSetup, machine: Machine) -> int | None:
    """How many GPUs like this one hold a base together that does not fit one; None: it is no GPU, or more than a node
    has."""
    if not machine.is_gpu:
        return None
    for number in MORE_CARDS:
        setup = replace(least.setup, cards=number, sharded=True)
        if number > machine.cards and memory.peak_bytes(facts, setup, gpu=True) <= least.budget_bytes:
            return number
    return None
