"""`qmedtune bench eval`: log-likelihoods of options, ours against lm-evaluation-harness's, on one loaded model.

Both get the same prompts and options as text and give a log-likelihood per option, tokenised the same way; what is
timed is that and nothing around it (no loading, no task files, no report), in turns, several rounds. Beside the speed
stands how far the scores are apart, so that a fast wrong contender is seen.
Deliberately absent: generation (the harness's is transformers' own), other harnesses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from qmedtune import ui
from qmedtune.bench.result import BenchResult, Row
from qmedtune.data.packing.framing import Prompt
from qmedtune.errors import RecipeError
from qmedtune.evaluation.harness import harness_model
from qmedtune.evaluation.measure import parts
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.scoring import choice_logprobs, encode_choice, padded_batches, prompt_texts
from qmedtune.recipe import TaskSection
from qmedtune.record import device_name, versions
from qmedtune.tasks import Item, Task, load_task

BATCH = 8
CONTENDERS = {
    "lm-eval-default": "lm-evaluation-harness as it is by default: one option at a time",
    "lm-eval": f"lm-evaluation-harness, {BATCH} options at a time",
    "qmedtune": f"qmedtune, as many tokens at a time as {BATCH} questions have",
}
Scores = list[list[float]]


@dataclass(frozen=True)
class BenchmarkCase:
    """One benchmark as text. `batch_tokens`: of BATCH average questions; `batches` that ours then makes of them."""

    task: Task
    prompts: list[Prompt]
    batch_tokens: int
    batches: int

    @property
    def items(self) -> list[Item]:
        return self.task.asked


@dataclass
class CaseRuns:
    """A benchmark by the name it was given, and what contenders took for it and answered; seconds: of each round."""

    name: str
    case: BenchmarkCase
    seconds: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)


def bench_eval(
    *,
    model: str = "builtin:tiny",
    tasks: Sequence[str] = ("facts", "facts-3shot"),
    rounds: int = 3,
    limit: int | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
) -> BenchResult:
    """Measure; returns {"bench", "device", "versions", "rows"}: `value` in questions per second (median of rounds).

    tasks: `facts`, `pubmedqa=FILE` ..., each also as `facts-3shot`. `ratio` is over the harness at the same batch,
    `over_default` over its default, each the median over rounds; `max_difference` in nats against the harness.
    Raises RecipeError for an unknown contender, and where lm-evaluation-harness is absent and asked for.
    """
    for contender in contenders:
        if contender not in CONTENDERS:
            raise RecipeError(f"bench eval: no contender {contender!r}\nallowed: {', '.join(CONTENDERS)}")
    if find_spec("lm_eval") is None and set(contenders) - {"qmedtune"}:
        raise RecipeError(
            "bench eval: lm-evaluation-harness is not installed\n"
            "pip install 'qmedtune[lm-eval]', or time ours alone: --contenders qmedtune"
        )
    opened = open_model(locate(model, template="alpaca", offline=True))
    if not torch.cuda.is_available():
        opened.model.float()  # in bfloat16 batches of different shapes differ by tenths of a nat, the harness's own too
    rows = []
    with ui.progress_bar("bench eval", len(tasks) * rounds * len(contenders), "runs") as bar:
        for name in tasks:
            case = _case(opened, name, limit)
            runs = CaseRuns(name, case)
            for _ in range(rounds):
                for contender in contenders:
                    seconds, runs.scores[contender] = _timed(_work(contender, opened, case))
                    runs.seconds.setdefault(contender, []).append(seconds)
                    bar.update(bar.completed + 1, note=f"{name}, {contender}")
            for contender in contenders:
                rows.append(_row(runs, contender))
    return {"bench": "eval", "device": device_name(), "versions": versions(), "rows": rows}


def _case(opened: OpenModel, name: str, limit: int | None) -> BenchmarkCase:
    task, _, path = name.partition("=")
    task, _, shots = task.partition("-")
    section = TaskSection(task=task, path=path or None, limit=limit, shots=int(shots.removesuffix("shot") or 0))
    loaded = load_task(section, seed=0)
    items = loaded.asked
    prompts = prompt_texts(opened.tokenizer, opened.template, [item.messages for item in items])
    room = opened.model.config.max_position_embeddings
    costs, cut = [], 0
    for prompt, item in zip(prompts, items, strict=True):
        encoded = encode_choice(opened.tokenizer, prompt, item.options, room, boundary="joint")
        costs.append(encoded.cost_tokens)
        cut += encoded.truncated
    if cut:
        ui.note(f"{name}: {cut} prompts are longer than the model's {room} positions; each contender cuts its own way")
    budget, batches = BATCH * sum(costs) // len(costs), 0
    for part in parts(items, prompts):
        batches += len(list(padded_batches([costs[index] for index in part], budget)))
    return BenchmarkCase(loaded, prompts, budget, batches)


def _work(contender: str, opened: OpenModel, case: BenchmarkCase) -> Callable[[], Scores]:
    if contender == "qmedtune":
        return lambda: _ours(opened, case)
    batch = BATCH
    if contender == "lm-eval-default":
        batch = 1
    model = harness_model(opened, batch, "joint")
    instance = import_module("lm_eval.api.instance").Instance
    requests = []
    for prompt, item in zip(case.prompts, case.items, strict=True):
        for option in item.options:
            requests.append(instance("loglikelihood", {}, (prompt.text, option), len(requests)))
    return lambda: _by_item(model.loglikelihood(requests, disable_tqdm=True), case)


def _ours(opened: OpenModel, case: BenchmarkCase) -> Scores:
    found: Scores = [[] for _ in case.items]
    for part in parts(case.items, case.prompts):
        options = [case.items[i].options for i in part]
        texts = [case.prompts[i] for i in part]
        scored = choice_logprobs(
            opened.model, opened.tokenizer, texts, options, batch_tokens=case.batch_tokens, boundary="joint"
        )
        for index, scores in zip(part, scored, strict=True):
            found[index] = scores.sums
    return found


def _by_item(answers: list[tuple[float, bool]], case: BenchmarkCase) -> Scores:
    scores, start = [], 0
    for item in case.items:
        end = start + len(item.options)
        scores.append([logprob for logprob, _ in answers[start:end]])
        start = end
    return scores


def _timed(work: Callable[[], Scores]) -> tuple[float, Scores]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    scores = work()
    return time.perf_counter() - start, scores


def _row(runs: CaseRuns, contender: str) -> Row:
    name, case, scores = runs.name, runs.case, runs.scores
    seconds = runs.seconds[contender]
    row: Row = {
        "case": name.partition("=")[0],
        "contender": contender,
        "value": round(len(case.items) / statistics.median(seconds), 1),
        "unit": "questions/s",
        "spread": [round(len(case.items) / max(seconds), 1), round(len(case.items) / min(seconds), 1)],
        "questions": len(case.items),
        "what": CONTENDERS[contender],
    }
    if contender == "qmedtune":
        row["rows_per_batch"] = round(len(case.items) / case.batches, 1)
    for key, other in (("ratio", "lm-eval"), ("over_default", "lm-eval-default")):
        row[key] = None
        if other in runs.seconds:
            pairs = zip(runs.seconds[other], seconds, strict=True)
            row[key] = round(statistics.median(theirs / ours for theirs, ours in pairs), 2)
    if "lm-eval" in scores:
        apart, same = 0.0, 0
        for ours, theirs in zip(scores[contender], scores["lm-eval"], strict=True):
            apart = max(apart, float(np.abs(np.array(ours) - np.array(theirs)).max()))
            same += int(np.argmax(ours) == np.argmax(theirs))
        row |= {"max_difference": round(apart, 5), "same_choice": same / len(case.items)}
    return row


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for ui.table."""
    columns = ["case", "contender", "questions/s", "over lm-eval", "over its default", "same choice", ""]
    rows = []
    for row in result["rows"]:
        ratios, same = [], "-"
        for key in ("ratio", "over_default"):
            if row[key] is None:
                ratios.append("-")
            else:
                ratios.append(f"{row[key]:.2f}")
        if "same_choice" in row:
            same = f"{row['same_choice']:.3f}"
        rows.append([row["case"], row["contender"], f"{row['value']:,.1f}", *ratios, same, row["what"]])
    return columns, rows
