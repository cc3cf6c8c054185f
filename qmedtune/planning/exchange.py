"""What more GPUs would bring: the bytes that cross between them in a step, and how much of their speed is left.

On paper: nothing here was measured on cards. A ring all-reduce of N processes moves 2 (N - 1) / N times the bytes of
the gradients through each (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), after the backward pass and before
the update, not hidden behind either. Where FSDP2 shards the base, each GPU receives the parts of the others for every
forward and every backward pass besides; that is taken as not hidden too, though the next layer's is on its way while
one computes. Compared with one GPU at the same batch: its rows are shared out.
"""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_BYTES = 4  # fp32: what is trained, and summed
# Bytes/s in one direction: PCIe 4.0 x16 is 31.5 GB/s, NVLink of an H100 450 GB/s (NVIDIA's data sheet), 10-gigabit
# Ethernet 1.25 GB/s. Of that, 60 % are taken to be reached.
REACHED = 0.6
ASSUMED_LINK = "PCIe 4"  # of a workstation
LINKS = {"PCIe 4": 31.5e9 * REACHED, "NVLink": 450e9 * REACHED, "10 GbE": 1.25e9 * REACHED}


@dataclass(frozen=True)
class StepTime:
    """One optimiser step of one GPU. seconds: its time; exchanged_bytes: of gradients; gathered_bytes: of the base,
    which each of several GPUs receives."""

    seconds: float
    exchanged_bytes: int
    gathered_bytes: int = 0


def exchange_bytes(trained_parameters: int) -> int:
    """Bytes of the gradients that every step exchanges."""
    return GRADIENT_BYTES * trained_parameters


def times_as_fast(step: StepTime, gpus: int, link: str) -> float:
    """How many times as fast `gpus` GPUs take the step as one does, connected by `link` of LINKS."""
    crossing = 2 * (gpus - 1) / gpus * step.exchanged_bytes + step.gathered_bytes
    return step.seconds / (step.seconds / gpus + crossing / LINKS[link])


def gathered_bytes(shared_bytes: float, gpus: int, micro_batches: int) -> int:
    """Bytes of a sharded base of so many bytes that a GPU receives in a step of so many micro-batches of its own:
    layer by layer, for the forward pass and again for the backward pass."""
    return round(2 * micro_batches * shared_bytes * (gpus - 1) / gpus)
