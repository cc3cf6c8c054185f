"""Chooses per layer what becomes of its activations, so that a step is the fastest that fits a budget of bytes.

Four ways, all layers being alike: keep everything; make elementwise results again (norm outputs, the SwiGLU product);
recompute the whole layer from its input; move that input to pinned host memory and recompute. Pure functions over
budgets; modeling/activations.py does what is chosen here. Times are modelled, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from qmedtune import units
from qmedtune.errors import DoesNotFit
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning.memory import (
    TILE_TOKENS,
    WAYS,
    Setup,
    activation_bytes,
    layers_by_way,
    offloaded_bytes,
)

# FLOPs done in the time of one byte of memory traffic: achievable matrix throughput over achievable bandwidth, 184 on
# H200, 174 on RTX 4090, 149 on A100, 93 on T4 (the limits of the kernel notes, section 7).
FLOPS_PER_BYTE = 170
# The same for one byte over PCIe 4.0 x16 at 25 GB/s beside 160 TFLOP/s (RTX 4090).
FLOPS_PER_LINK_BYTE = 6400
# Issuing and waiting for copies, in forward passes of the layer. Assumed.
OFFLOAD_OVERHEAD = 0.02

MLP = ("gate_proj", "up_proj", "down_proj")

Counts = tuple[int, int, int, int]  # of layers, in the order of WAYS


@dataclass(frozen=True)
class ActivationPlan:
    """How many layers are treated in which way. Bytes of activations on the card (the working set of the layer in
    its backward pass included) and in host memory; `slowdown`: time of the step, 1.0 when everything is kept."""

    keep: int
    cheap: int
    recompute: int
    offload: int
    device_bytes: int
    host_bytes: int
    slowdown: float

    @property
    def ways(self) -> tuple[int, int, int, int]:
        return self.keep, self.cheap, self.recompute, self.offload


def extra_forwards(facts: BaseFacts, setup: Setup) -> dict[str, float]:
    """What each way costs in time, in forward passes of the layer."""
    size = setup.element_bytes
    # Making them again reads x twice, gate and up, and writes two norms and the product.
    traffic = (4 * facts.hidden + 3 * facts.intermediate) * size
    forward_flops = 2 * facts.linear_parameters / facts.layers
    # Out in the forward pass, back during the backward pass: hidden while the layers around it compute (3 forwards).
    transfer = 2 * facts.hidden * size * FLOPS_PER_LINK_BYTE / forward_flops
    return {
        "keep": 0.0,
        "cheap": traffic * FLOPS_PER_BYTE / forward_flops,
        "recompute": 1.0,
        "offload": 1.0 + OFFLOAD_OVERHEAD + max(transfer - 3.0, 0.0) + _tiles(facts, setup),
    }


def _tiles(facts: BaseFacts, setup: Setup) -> float:
    """Over long rows an offloaded layer makes its MLP once more, a tile at a time: its share of the forward pass."""
    if setup.tokens <= TILE_TOKENS:
        return 0.0
    mlp = 0
    for name in MLP:
        inputs, outputs = facts.linear_shapes[name]
        mlp += inputs * outputs
    return facts.layers * mlp / facts.linear_parameters


def slowdown(facts: BaseFacts, setup: Setup) -> float:
    """Time of a step over that of one which keeps everything. Forward and input gradients are two forward passes'
    worth: LoRA needs no weight gradients."""
    extra, counts = extra_forwards(facts, setup), layers_by_way(facts, setup)
    return 1 + sum(counts[way] * extra[way] for way in WAYS) / facts.layers / 2


def choose_activation_plan(
    facts: BaseFacts, setup: Setup, budget_bytes: float, allowed: tuple[str, ...] = WAYS
) -> ActivationPlan:
    """The fastest plan whose activations fit `budget_bytes` (what weights, optimiser, loss and context leave over).

    `setup` gives lengths, rank, dtype and attention; its own ways do not matter. One constraint over identical layers:
    the best mix uses at most two of the `allowed` ways, up to one layer's rounding. DoesNotFit when no mix fits.
    """
    extra = extra_forwards(facts, setup)
    costs: list[tuple[float, int, Counts]] = []
    for counts in _mixes(facts, allowed):
        costs.append((_time(counts, extra), _bytes(facts, setup, counts), counts))
    for _, device_bytes, counts in sorted(costs):
        if device_bytes <= budget_bytes:
            return _plan(facts, setup, counts)
    least = min(device_bytes for _, device_bytes, _ in costs)
    raise DoesNotFit(
        f"activations of {setup.micro_batch} x {setup.seq_len} tokens on {facts.name} need "
        f"{units.size(least)} at least; {units.size(round(budget_bytes))} are left for them\n"
        "remedy: a shorter seq_len"
    )


def _mixes(facts: BaseFacts, allowed: tuple[str, ...]) -> Iterator[Counts]:
    for first, second in combinations(allowed, 2):
        for count in range(facts.layers + 1):
            named = {first: count, second: facts.layers - count}
            keep, cheap, recompute, offload = (named.get(way, 0) for way in WAYS)
            yield keep, cheap, recompute, offload


def _time(counts: Counts, extra: dict[str, float]) -> float:
    return sum(count * extra[way] for count, way in zip(counts, WAYS, strict=True))


def _bytes(facts: BaseFacts, setup: Setup, counts: Counts) -> int:
    return sum(activation_bytes(facts, replace(setup, ways=counts)).values())


def _plan(facts: BaseFacts, setup: Setup, counts: Counts) -> ActivationPlan:
    chosen = replace(setup, ways=counts)
    host = offloaded_bytes(facts, chosen)
    return ActivationPlan(*counts, _bytes(facts, setup, counts), host, slowdown(facts, chosen))
