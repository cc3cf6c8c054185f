"""Chooses micro-batch, checkpointing and optimiser precision: the fastest training step that fits.

Only these depend on the machine; what changes results (lengths, batch, learning rates) is in resolve.py.
Deliberately not here: the prediction itself (memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from qmedtune import units
from qmedtune.errors import DoesNotFit
from qmedtune.llama_shape import LINEARS, BaseFacts
from qmedtune.planning import layers, memory
from qmedtune.planning.machine import CARDS_GIB, GIB, Machine
from qmedtune.planning.memory import Setup
from qmedtune.planning.numerics import Numerics, numerics
from qmedtune.recipe import LayersSection, Recipe, TrainSection

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
HOST_RESERVE_BYTES = GIB  # for the system, when the "card" is the RAM


@dataclass(frozen=True)
class Choice:
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
    return there if recipe.memory == "auto" else min(there, round(recipe.memory * GIB))


def numerics_of(recipe: Recipe, index: int, machine: Machine) -> Numerics:
    """What stage `index` computes in and attends with; its lengths and the compute dtype are resolved."""
    stage = recipe.stages[index]
    return numerics(recipe.model, full=stage.full, seq_len=int(stage.section.seq_len), machine=machine)


def setup_of(recipe: Recipe, index: int, machine: Machine) -> Setup:
    """The memory-relevant part of stage `index`, its lengths and the compute dtype resolved; what is still `auto`
    (micro-batch, checkpointing, optimiser) stands at its smallest."""
    section, stages = recipe.stages[index].section, recipe.stages
    full = stages[index].full
    stacked = [stage.section.adapter == "new" for stage in stages[1 : index + 1]]
    headed = section.adapter == "frozen"  # a head alone is trained: its few thousand weights are not counted
    adapter = recipe.adapter_of(index)
    targets = adapter.targets
    decided = numerics_of(recipe, index, machine)
    return Setup(
        seq_len=int(section.seq_len),
        micro_batch=1 if section.micro_batch == "auto" else section.micro_batch,
        checkpointing=section.gradient_checkpointing in ("auto", True),
        ways=ways_of(section),
        dropout=adapter.dropout > 0,
        optimizer="paged_adamw_8bit" if section.optimizer == "auto" else section.optimizer,
        compute_dtype=decided.dtype,
        quantized=recipe.model.quantization == "nf4",
        double_quantization=recipe.model.double_quantization,
        rank=0 if headed else adapter.r,
        targets=LINEARS if targets == "all-linear" else tuple(targets),
        train_embeddings=adapter.train_embeddings is True and not full,
        frozen_adapters=sum(stacked) + headed,
        full=full,
        attention=decided.attention,
    )


def ways_of(section: TrainSection) -> tuple[int, int, int, int] | None:
    """The counts that a section states for its layers; None where it says all, none or `auto`."""
    stated = section.gradient_checkpointing
    if not isinstance(stated, LayersSection):
        return None
    return stated.keep, stated.cheap, stated.recompute, stated.offload


def options(section: TrainSection, smallest: Setup, machine: Machine) -> list[Setup]:
    """Every micro-batch and optimiser that the section's explicit values allow; checkpointing as in `smallest`."""
    batch = int(section.batch)
    rows = [2**i for i in range(batch.bit_length()) if 2**i <= batch] + [batch]
    allowed = [n for n in rows if n == 1 or n * smallest.seq_len <= ENOUGH_TOKENS[machine.kind]]
    micro = allowed if section.micro_batch == "auto" else [min(section.micro_batch, batch)]
    automatic = ("adamw", "adamw_8bit", "paged_adamw_8bit") if machine.is_gpu else ("adamw",)
    optimizers = automatic if section.optimizer == "auto" else (section.optimizer,)
    return [replace(smallest, micro_batch=n, optimizer=o) for n, o in product(sorted(set(micro)), optimizers)]


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
    if setup.full:
        return replace(setup, checkpointing=True)
    try:
        allowed = memory.WAYS if machine.is_gpu else memory.WAYS[:3]
        plan = layers.choose_activation_plan(facts, kept, room, allowed)
    except DoesNotFit:
        return replace(kept, ways=(0, 0, 0, facts.layers)) if machine.is_gpu else replace(setup, checkpointing=True)
    return replace(setup, checkpointing=True) if plan.recompute == facts.layers else replace(kept, ways=plan.ways)


def relative_time(facts: BaseFacts, setup: Setup, machine: Machine) -> float:
    """Time per token in forward passes over the frozen weights: forward and input gradients are 2, recomputing makes
    it 3 (LoRA needs no weight gradients); each pass pays the decoding of NF4 once per micro-batch."""
    passes = 2 * layers.slowdown(facts, setup)
    return passes * (1 + DECODE_TOKENS[machine.kind] / setup.tokens) + OPTIMIZER_COST[setup.optimizer]


def choose(facts: BaseFacts, recipe: Recipe, index: int, machine: Machine) -> Choice:
    """The fastest setup of stage `index` that fits. DoesNotFit names the three cheapest remedies."""
    budget, section = budget_bytes(machine, recipe), recipe.stages[index].section
    setups = options(section, setup_of(recipe, index, machine), machine)
    if section.gradient_checkpointing == "auto":
        setups = [with_layers(facts, setup, machine, FILLED * budget) for setup in setups]
    peaks = {setup: memory.peak_bytes(facts, setup, gpu=machine.is_gpu) for setup in setups}
    roomy = [setup for setup, peak in peaks.items() if peak <= FILLED * budget]
    if roomy:
        best = min(roomy, key=lambda setup: (relative_time(facts, setup, machine), peaks[setup]))
    else:
        best = min(peaks, key=lambda setup: peaks[setup])
    if peaks[best] > budget:
        raise DoesNotFit(_does_not_fit(facts, recipe, index, best, peaks[best], budget, machine))
    return Choice(best, peaks[best], budget)


def remedies(facts: BaseFacts, setup: Setup, *, gpu: bool) -> list[tuple[str, int]]:
    """What could be changed and the bytes it frees, from what costs nothing but time to what changes the result."""
    widest = setup.element_bytes == 4 and (gpu or not setup.full)  # a CPU trains all parameters in fp32 (numerics.py)
    changes = [
        ("gradient_checkpointing: true", {"checkpointing": True, "ways": None}),
        ("micro_batch: 1", {"micro_batch": 1}),
        (
            f"gradient_checkpointing: {{offload: {facts.layers}}}",
            {"ways": (0, 0, 0, facts.layers)} if gpu and not setup.full else {},
        ),
        ("optimizer: paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"} if gpu else {}),
        ("model.quantization: nf4", {"quantized": True} if gpu else {}),
        ("model.double_quantization: true", {"double_quantization": True}),
        ("model.compute_dtype: bfloat16", {"compute_dtype": "bfloat16"} if widest else {}),
        ("adapter.train_embeddings: false", {"train_embeddings": False}),
        (f"seq_len: {setup.seq_len // 2}", {"seq_len": setup.seq_len // 2}),
        (f"adapter.r: {max(setup.rank // 2, 1)}", {"rank": max(setup.rank // 2, 1)}),
    ]
    now = memory.peak_bytes(facts, setup, gpu=gpu)
    freed = [(text, now - memory.peak_bytes(facts, replace(setup, **change), gpu=gpu)) for text, change in changes]
    return [(text, size) for text, size in freed if size > 0]


def _does_not_fit(
    facts: BaseFacts, recipe: Recipe, index: int, setup: Setup, peak: int, budget: int, machine: Machine
) -> str:
    missing = peak - budget
    useful = [(text, size) for text, size in remedies(facts, setup, gpu=machine.is_gpu) if size >= 0.02 * missing]
    enough = [remedy for remedy in useful if remedy[1] >= missing]
    ordered = (enough + sorted((r for r in useful if r[1] < missing), key=lambda r: -r[1]))[:3]
    larger = [gib for gib in CARDS_GIB if peak <= gib * GIB]
    where = f"a card of {larger[0]} GiB" if larger else "several cards"
    if len(ordered) < 3:
        ordered.append(("a smaller base: this much is missing;", missing))
    return "\n".join(
        [
            f"{recipe.stage_names()[index]} of {facts.name} does not fit: {units.size(peak)} predicted, "
            f"{units.size(budget)} there ({machine.name})",
            f"at its smallest: {setup.micro_batch} x {setup.seq_len} tokens, {setup.optimizer}, "
            f"checkpointing {'on' if setup.checkpointing or setup.ways else 'off'}; it would fit {where}; remedies:",
            *(f"  {text} frees {units.size(size)}" for text, size in ordered[:3]),
        ]
    )
