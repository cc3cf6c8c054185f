"""Chooses per layer what becomes of its activations, so that a step is the fastest that fits a budget of bytes.

Four ways, all layers being alike: keep everything; recompute only elementwise results (norm outputs, silu, product);
recompute the whole layer from its input; move that input to pinned host memory and recompute. A pure function over
budgets; the trainer uses only whole-layer recomputation so far, for all layers or none. Times are modelled, not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from qmedtune import units
from qmedtune.errors import DoesNotFit
from qmedtune.planning.memory import Setup, backward_bytes_per_token, kept_bytes_per_token
from qmedtune.planning.shapes import BaseFacts

WAYS = ("keep", "cheap", "recompute", "offload")
# FLOPs done in the time of one byte of memory traffic: achievable matrix throughput over achievable bandwidth, 184 on
# H200, 174 on RTX 4090, 149 on A100, 93 on T4 (the limits of the kernel notes, section 7).
FLOPS_PER_BYTE = 170
# The same for one byte over PCIe 4.0 x16 at 25 GB/s beside 160 TFLOP/s (RTX 4090).
FLOPS_PER_LINK_BYTE = 6400
# Issuing and waiting for copies, in forward passes of the layer. Assumed.
OFFLOAD_OVERHEAD = 0.02


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


@dataclass(frozen=True)
class Way:
    """Per layer and token: bytes on the card and on the host, extra time in forward passes of the layer."""

    device_bytes: float
    host_bytes: float
    extra_forwards: float


def ways(facts: BaseFacts, setup: Setup) -> dict[str, Way]:
    """What each way costs per layer and token."""
    size = setup.element_bytes
    kept, stream = kept_bytes_per_token(facts, setup), facts.hidden * size
    dropped = (2 * facts.hidden + facts.intermediate) * size
    # Making them again reads x twice, gate and up, and writes two norms and the product.
    traffic = (4 * facts.hidden + 3 * facts.intermediate) * size
    forward_flops = 2 * facts.linear_parameters / facts.layers
    # Out in the forward pass, back during the backward pass: hidden while the layers around it compute (3 forwards).
    transfer = 2 * stream * FLOPS_PER_LINK_BYTE / forward_flops
    return {
        "keep": Way(kept, 0, 0.0),
        "cheap": Way(kept - dropped, 0, traffic * FLOPS_PER_BYTE / forward_flops),
        "recompute": Way(stream, 0, 1.0),
        "offload": Way(0, stream, 1.0 + OFFLOAD_OVERHEAD + max(transfer - 3.0, 0.0)),
    }


def choose_activation_plan(
    facts: BaseFacts, seq_len: int, micro_batch: int, budget_bytes: int, setup: Setup | None = None
) -> ActivationPlan:
    """The fastest plan whose activations fit `budget_bytes` (what weights, optimiser, loss and context leave over).

    One constraint over identical layers: the best mix uses at most two of the ways, up to one layer's rounding.
    `setup` gives rank, dtype and attention (default: r 16, bf16, variable-length attention). DoesNotFit when even
    offloading everything does not fit.
    """
    shape = setup or Setup(seq_len, micro_batch, True, "adamw", "bfloat16", attention="flex_attention")
    tokens = seq_len * micro_batch
    costs = ways(facts, shape)
    plans = [_plan(facts, shape, tokens, costs, counts) for counts in _mixes(facts.layers)]
    fitting = [plan for plan in plans if plan.device_bytes <= budget_bytes]
    if not fitting:
        least = min(plan.device_bytes for plan in plans)
        raise DoesNotFit(
            f"activations of {micro_batch} x {seq_len} tokens on {facts.name} need {units.size(least)} with every "
            f"layer input offloaded; {units.size(budget_bytes)} are left for them\nremedy: a shorter seq_len"
        )
    return min(fitting, key=lambda plan: (plan.slowdown, plan.host_bytes, plan.device_bytes))


def _mixes(layers: int) -> Iterator[dict[str, int]]:
    for first, second in combinations(WAYS, 2):
        for count in range(layers + 1):
            yield {**dict.fromkeys(WAYS, 0), first: count, second: layers - count}


def _plan(facts: BaseFacts, setup: Setup, tokens: int, costs: dict[str, Way], counts: dict[str, int]) -> ActivationPlan:
    """Bytes and time of one mix. A layer that is recomputed needs its kept set again while it is differentiated, and
    offloaded inputs two buffers to be fetched into."""
    kept, stream = costs["keep"].device_bytes, costs["recompute"].device_bytes
    working = backward_bytes_per_token(facts, setup) + 3 * stream
    redone = [way for way in WAYS if counts[way] and way != "keep"]
    working += max((kept - (costs["cheap"].device_bytes if way == "cheap" else 0) for way in redone), default=0)
    working += 2 * stream if counts["offload"] else 0
    saved = sum(counts[way] * costs[way].device_bytes for way in WAYS)
    extra = sum(counts[way] * costs[way].extra_forwards for way in WAYS) / facts.layers
    host = sum(counts[way] * costs[way].host_bytes for way in WAYS)
    # Forward and input gradients are two forward passes' worth of time: LoRA needs no weight gradients.
    return ActivationPlan(
        **counts, device_bytes=int(tokens * (saved + working)), host_bytes=int(tokens * host), slowdown=1 + extra / 2
    )
