"""Cards that cannot be used: each is one clear message with what to do, never a silent CPU run."""

from dataclasses import replace

import pytest
import torch

from qmedtune.errors import DoesNotFit, RunError
from qmedtune.planning.machine import GIB, Machine
from qmedtune.training.gpu_check import Card, check_card

GPU = Machine("cuda", "NVIDIA L4", 24 * GIB, 64 * GIB, 8, bf16=True, capability=8.9)
CPU = Machine("cpu", "a CPU", 16 * GIB, 16 * GIB, 2, bf16=True)
L4 = Card("NVIDIA L4", 8.9, 24 * GIB, 22 * GIB, 1 * GIB)


def test_a_usable_card_and_a_machine_without_one_pass():
    check_card(20 * GIB, GPU, L4)
    check_card(23 * GIB, GPU, L4)  # what this process has reserved is its own
    check_card(99 * GIB, CPU)


@pytest.mark.parametrize(
    ("built_for", "remedy"), [("12.8", "update the driver, or install"), (None, "install a CUDA build of torch")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the card here")
def test_a_card_that_torch_cannot_use_does_not_become_a_cpu_run(built_for, remedy, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(
        RunError, match="(?s)shows NVIDIA L4, but torch cannot use it.*CUDA_VISIBLE_DEVICES=-1"
    ) as caught:
        check_card(GIB, GPU)
    assert remedy in str(caught.value)


def test_an_old_card_is_named():
    with pytest.raises(RunError, match="compute capability 6.1; needed is 7.5"):
        check_card(GIB, GPU, replace(L4, capability=6.1))


def test_memory_that_others_hold_is_named_with_what_is_left():
    with pytest.raises(DoesNotFit, match=r"(?s)20.0 GiB are needed, 10.0 GiB are free; .* hold 14.0 GiB.*memory=10"):
        check_card(20 * GIB, GPU, replace(L4, free_bytes=9 * GIB))
