"""Several processes train what one does: four of them, a real model, sharded bases; minutes each.

pytest -m slow tests/test_agreement.py -s
"""

from __future__ import annotations

from pathlib import Path

import agreement
import pytest
from agreement import Case
from llama_folders import smollm2_folder

pytestmark = pytest.mark.slow
LOSS, ADAPTER = 2e-6, 1e-5


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    work = tmp_path_factory.mktemp("smollm2")
    return str(agreement.cut(smollm2_folder(work), 6, work / "base"))


@pytest.mark.parametrize("sharded", [False, True])
def test_four_processes(tmp_path: Path, sharded: bool):
    apart = agreement.compare(Case("tiny", 4, sharded=sharded), tmp_path)
    print(apart)
    assert apart.loss <= LOSS and apart.weights <= ADAPTER and len(apart.processes) == 4


@pytest.mark.parametrize("sharded", [False, True])
def test_a_real_model(tmp_path: Path, six_layers: str, sharded: bool):
    apart = agreement.compare(Case(six_layers, 2, sharded=sharded), tmp_path)
    print(apart)
    assert apart.loss <= LOSS and apart.weights <= ADAPTER


@pytest.mark.parametrize("sharded", [False, True])
def test_in_bf16_they_agree_within_its_rounding(tmp_path: Path, six_layers: str, sharded: bool):
    """Of losses of two, 8 bits are .008; what a sum in another order moves is below it."""
    apart = agreement.compare(Case(six_layers, 2, "bfloat16", sharded), tmp_path)
    print(apart)
    assert apart.loss <= 0.01
