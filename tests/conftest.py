"""Shared by all tests: no network, a cache of their own, and the micro recipe's data and base, made once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qmedtune.process import prepare

if TYPE_CHECKING:
    from qmedtune.train import StageInputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
prepare()  # as the command line does, before a test loads torch
ROOT = Path(__file__).parent.parent
MICRO = ROOT / "recipes" / "micro.yaml"


# Minutes each, some a single test: begun last (xdist's own order is by count), one process would end with them alone.
LONG = ("test_kill.py", "test_calls.py", "test_notebooks.py", "test_train.py", "test_evaluate.py", "test_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@dataclass(frozen=True)
class MicroRun:
    """A run of the micro recipe in which data is packed and nothing is trained yet."""

    folder: Path
    base: Path

    def inputs(self, stage: str = "01-cpt", *adapters: Path) -> StageInputs:
        """What a stage reads that is trained on the base with these adapters."""
        from qmedtune.model_stack import ModelStack
        from qmedtune.train import StageInputs

        data = self.folder / "data"
        return StageInputs(ModelStack(self.base, adapters), data / stage, data / "validation")


@pytest.fixture(autouse=True)
def warned_anew():
    """Each test hears the warnings that are shown once per command, whatever ran before it in this process."""
    from qmedtune import ui

    ui.forget_warnings()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Built-in bases of the tests are made in, and stay in, a folder of this test session."""
    folder = os.environ.get("QMEDTUNE_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    before = os.environ.get("QMEDTUNE_CACHE")
    os.environ["QMEDTUNE_CACHE"] = folder
    os.environ["QMEDTUNE_SECRETS"] = str(tmp_path_factory.mktemp("secrets"))
    yield Path(folder)
    os.environ.pop("QMEDTUNE_CACHE")
    os.environ.pop("QMEDTUNE_SECRETS")
    if before is not None:
        os.environ["QMEDTUNE_CACHE"] = before


@pytest.fixture(scope="session")
def micro_run(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> MicroRun:
    from qmedtune import base as bases
    from qmedtune.parsing.loader import load_recipe
    from qmedtune.run import run

    folder = tmp_path_factory.mktemp("micro") / "run"
    loaded = load_recipe(MICRO)
    run(loaded.recipe, loaded.text, folder, offline=True, until="data/01-cpt")
    base = bases.builtin_folder("builtin:micro") / "01-pretrain" / "model"
    return MicroRun(folder, base)


@pytest.fixture(scope="session")
def hard_run(micro_run: MicroRun) -> MicroRun:
    """The micro run with both stages packed for stages.HARD."""
    from stages import HARD

    from qmedtune.parsing.loader import load_recipe
    from qmedtune.run import run

    loaded = load_recipe(MICRO, HARD)
    folder = micro_run.folder.with_name("hard")
    run(loaded.recipe, loaded.text, folder, offline=True, until="data")
    return MicroRun(folder, micro_run.base)


@pytest.fixture(scope="session")
def uninterrupted(hard_run: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Both of its stages, trained in one go."""
    from stages import train_hard

    folder = tmp_path_factory.mktemp("uninterrupted")
    train_hard(hard_run, 0, folder / "cpt")
    train_hard(hard_run, 1, folder / "sft", folder / "cpt" / "adapter")
    return [folder / "cpt", folder / "sft"]
