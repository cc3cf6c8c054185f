"""What more GPUs would bring: the bytes that cross between them in a step, and how much of their speed is left.

On paper: nothing here was measured on cards. A ring all-reduce of N processes moves 2 (N - 1) / N times the bytes of
the gradients through each (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), after the backward pass and before
the update, not hidden behind either. Compared with one GPU at the same batch: its rows are shared out.
"""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_BYTES = 4  # fp32: what is trained, and summed
# Bytes/s in one direction: PCIe 4.0 x16 is 31.5 GB/s, NVLink of an H100 450 GB/s (NVIDIA's data sheet), 10-gigabit
# Ethernet 1.25 GB/s. Of that, 60 % are taken to be reached.
REACHED = 0.6
LINKS = {"PCIe 4": 31.5e9 * REACHED, "NVLink": 450e9 * REACHED, "10 GbE": 1.25e9 * REACHED}


@dataclass(frozen=True)
class StepTime:
    """One optimiser step of one GPU. seconds: its time; exchanged_bytes: of gradients."""

    seconds: float
    exchanged_bytes: int


def exchange_bytes(trained_parameters: int) -> int:
    """Bytes of the gradients that every step exchanges."""
    return GRADIENT_BYTES * trained_parameters


def times_as_fast(step: StepTime, gpus: int, link: str) -> float:
    """How many times as fast `gpus` GPUs take the step as one does, connected by `link` of LINKS."""
    crossing = 2 * (gpus - 1) / gpus * step.exchanged_bytes / LINKS[link]
    return step.seconds / (step.seconds / gpus + crossing)
