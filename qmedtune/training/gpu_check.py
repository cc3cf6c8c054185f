"""Before a stage loads weights: can torch use the card there is, and is the memory that the plan counts on free?

A run must not fall back to a CPU in silence, nor die in the middle because another process sits on the card.
Deliberately not here: whether the plan fits the card at all (planning/fit.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmedtune import units
from qmedtune.errors import DoesNotFit, RunError
from qmedtune.planning.machine import Machine, this_machine

LOWEST = 7.5  # T4: below it neither the kernels nor current builds of torch and bitsandbytes run


@dataclass(frozen=True)
class Card:
    """What torch and the driver say of the first card; bytes."""

    name: str
    capability: float
    total_bytes: int
    free_bytes: int
    reserved_bytes: int  # of it by this process


def this_card() -> Card | None:
    """None where torch can use no card."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return Card(torch.cuda.get_device_name(), major + minor / 10, total, free, torch.cuda.memory_reserved())


def check_card(peak_bytes: int, machine: Machine | None = None, card: Card | None = None) -> None:
    """RunError where the driver shows a card that torch cannot use, DoesNotFit where others hold its memory.

    `peak_bytes`: what the stage is predicted to take. Nothing to check on a machine without a card.
    """
    machine, card = machine or this_machine(), card or this_card()
    if not machine.is_gpu:
        return
    if card is None:
        built = torch.version.cuda
        why = f"this torch ({torch.__version__}) is built for CUDA {built}" if built else "this torch is a CPU build"
        remedy = "update the driver, or install the torch build for it" if built else "install a CUDA build of torch"
        raise RunError(
            f"the driver shows {machine.name}, but torch cannot use it: {why}\n"
            f"{remedy} (`qmedtune doctor` shows both); to train on the CPU on purpose: CUDA_VISIBLE_DEVICES=-1"
        )
    if card.capability < LOWEST:
        raise RunError(
            f"{card.name} has compute capability {card.capability}; needed is {LOWEST} (Turing) or later\n"
            "take another card (CUDA_VISIBLE_DEVICES), or train a small base on the CPU: CUDA_VISIBLE_DEVICES=-1"
        )
    there = card.free_bytes + card.reserved_bytes
    if peak_bytes > there:
        others = card.total_bytes - there
        raise DoesNotFit(
            f"{card.name}: {units.size(peak_bytes)} are needed, {units.size(there)} are free; other processes hold "
            f"{units.size(others)}\n"
            f"end them (nvidia-smi lists them), or plan for what is left: --set memory={there / 2**30:.0f}"
        )
