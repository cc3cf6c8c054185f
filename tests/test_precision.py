"""Real questions on a real model: bfloat16 chooses the option that fp32 chooses, but where the two best are a tie.

    pytest -m slow tests/test_precision.py -s        # prints the counts; about 15 minutes on two cores

Needs the real base of `python tests/assets.py` and benchmark files below $QMEDTUNE_REAL_DATA/eval; skipped, by name,
where they are missing.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from llama_folders import smollm2_folder

from qmedtune.data.packing.framing import Prompt
from qmedtune.evaluation.measure import TIE_NATS, best_option, gap
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.scoring import choice_logprobs, prompt_texts
from qmedtune.recipe import TaskSection
from qmedtune.tasks import Task, load_task

pytestmark = pytest.mark.slow
REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "eval"
FILES = {"pubmedqa": "pubmedqa_train.json", "medqa": "medqa_test_30.jsonl", "medmcqa": "medmcqa_dev_40.json"}
FILES["mmlu"] = "mmlu"
MOST = {"pubmedqa": 130}  # of the 500; of the others all that are there
FEWEST = 200
BATCH_TOKENS = 4096


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    found: list[Task] = []
    for name, file in FILES.items():
        if not (REAL / file).exists():
            pytest.skip(f"{REAL / file} is not there (QMEDTUNE_REAL_DATA)")
        found.append(load_task(TaskSection(task=name, path=str(REAL / file), limit=MOST.get(name)), seed=17))
    return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    torch.set_num_threads(2)
    found = open_model(locate(str(smollm2_folder(tmp_path_factory.mktemp("real")))), "none")
    found.model.to(torch.bfloat16)
    return found


def asked(opened: OpenModel, task: Task) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    prompts = prompt_texts(opened.tokenizer, opened.template, [item.messages for item in task.items])
    return prompts, [item.options for item in task.items]


@dataclass(frozen=True)
class Choices:
    """Options chosen by log-likelihood, and how far the best is before the second (nats)."""

    best: list[int]
    gaps: list[float]


def choose(opened: OpenModel, task: Task) -> Choices:
    prompts, options = asked(opened, task)
    scores = choice_logprobs(opened.model, opened.tokenizer, prompts, options, BATCH_TOKENS)
    best = [best_option(score.sums, item.id) for score, item in zip(scores, task.items, strict=True)]
    return Choices(best, [gap(score.sums) for score in scores])


@pytest.fixture(scope="module")
def in_both(opened: OpenModel, tasks: list[Task]) -> dict[str, tuple[Choices, Choices]]:
    """By task, in bfloat16 and then, with the same weights, in fp32."""
    first = {task.name: choose(opened, task) for task in tasks}
    opened.model.float()
    return {task.name: (first[task.name], choose(opened, task)) for task in tasks}


def test_bfloat16_chooses_as_fp32_does_on_all_that_are_not_ties(in_both):
    total: Counter[str] = Counter()
    for name, (half, full) in in_both.items():
        counts: Counter[str] = Counter()
        for place, tied_by in enumerate(half.gaps):
            tied = tied_by <= TIE_NATS[torch.bfloat16]
            same = half.best[place] == full.best[place]
            counts["items"] += 1
            counts["ties"] += tied
            counts["ties that differ"] += tied and not same
            counts["others that differ"] += not tied and not same
        print(f"\n{name}: {dict(counts)}")
        total.update(counts)
    print(f"all: {dict(total)}")
    assert total["items"] >= FEWEST
    assert total["others that differ"] == 0
    assert 0 < total["ties"] < 0.25 * total["items"]  # a resolution that called everything a tie would prove nothing


def test_fp32_has_no_ties_of_its_own(in_both):
    """What bfloat16 calls a tie is one of its resolution: in fp32 two options differ by more than rounding."""
    for _, full in in_both.values():
        assert min(full.gaps) > TIE_NATS[torch.float32]


@pytest.mark.parametrize("name", ["medqa", "pubmedqa"])
def test_scores_in_fp32_are_the_harness_s(opened: OpenModel, tasks: list[Task], in_both, name: str, tmp_path: Path):
    """Of the model that `in_both` has left in fp32: 30 real questions, item by item."""
    pytest.importorskip("lm_eval")
    from qmedtune.evaluation import harness

    assert in_both and opened.model.dtype == torch.float32
    task = load_task(TaskSection(task=name, path=str(REAL / FILES[name]), limit=30), seed=3)
    written = harness.write_harness_task(tmp_path, task, opened)
    found = harness.run_harness(opened, [written], tmp_path, limit=None, batch=4, seed=1, boundary="segment")
    samples = sorted(found["samples"][written], key=lambda sample: sample["doc_id"])
    prompts, options = asked(opened, task)
    scores = choice_logprobs(opened.model, opened.tokenizer, prompts, options, BATCH_TOKENS)
    worst = 0.0
    for sample, score in zip(samples, scores, strict=True):
        for theirs, ours in zip(sample["filtered_resps"], score.sums, strict=True):
            worst = max(worst, abs(float(theirs[0]) - ours))
    print(f"\n{name}: {len(samples)} items, largest difference to the harness {worst:.1e} nats")
    assert len(samples) == len(task.items) == 30 and worst < 1e-3
