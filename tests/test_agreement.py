"""Several processes train what one does: four of them, a real model, sharded bases; minutes each.

pytest -m slow tests/test_agreement.py -s
"""

from __future__ import annotations

from pathlib import Path

import agreement
import pytest
from agreement import Case
from conftest import MICRO
from llama_folders import smollm2_folder
from stages import losses

from qmedtune import peers
from qmedtune import run as spine
from qmedtune.parsing.loader import load_recipe

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
    """Cut to six layers it is no model of text: its loss is near 20, where a step of fp32 is 2e-6. So by its share."""
    apart = agreement.compare(Case(six_layers, 2, sharded=sharded), tmp_path)
    print(apart)
    assert apart.loss <= LOSS * apart.first and apart.weights <= ADAPTER


OUTCOMES = "{path: builtin:micro/outcomes, kind: clinical, split_by: patient, columns: {label: label}}"
NOTHING_SCORED = "evaluate={tasks: [], perplexity: []}"
OF_ITS_OWN = {
    "01-pretrain": ("stages=[{pretrain: {mix: {literature: 1}, tokens: 4000, batch: 3, micro_batch: 1}}]",),
    "02-classify": (
        f"data.outcome={OUTCOMES}",
        "stages=[{cpt: {mix: {literature: 1}, tokens: 500, batch: 3}}, "
        "{classify: {data: outcome, epochs: 5, seq_len: 64, batch: 3, micro_batch: 1, validation: 0.2}}]",
        "adapter.train_embeddings=false",
    ),
}


@pytest.mark.parametrize("stage", OF_ITS_OWN)
def test_stages_that_train_all_parameters_or_a_head(tmp_path: Path, stage: str):
    settings = (*OF_ITS_OWN[stage], "model.compute_dtype=float32", NOTHING_SCORED)
    loaded = load_recipe(MICRO, settings)
    spine.run(loaded.recipe, loaded.text, tmp_path / "one", offline=True, until=stage)
    with peers.called("2"):
        spine.run(loaded.recipe, loaded.text, tmp_path / "two", offline=True, until=stage)
    one, two = losses(tmp_path / "one" / stage), losses(tmp_path / "two" / stage)
    print(stage, len(one), max(abs(x - y) for x, y in zip(one, two, strict=True)))
    assert len(one) >= 10 and one == pytest.approx(two, abs=LOSS)


@pytest.mark.parametrize("sharded", [False, True])
def test_in_bf16_they_agree_within_its_rounding(tmp_path: Path, six_layers: str, sharded: bool):
    """A bf16 has 8 bits: .004 of a loss; what a sum in another order moves is below it."""
    apart = agreement.compare(Case(six_layers, 2, "bfloat16", sharded), tmp_path)
    print(apart)
    assert apart.loss <= 0.004 * apart.first
