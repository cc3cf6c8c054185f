"""Bridge to lm-evaluation-harness (extra `lm-eval`): its tasks on our models, and our benchmark files as its tasks.

`medqa_4options` runs a task that the harness ships (its data must be in the local datasets cache when offline), and
`medqa_4options=FILE` the same on a local JSON, CSV or Parquet file with the fields of the harness's own data set;
`pubmedqa=FILE` writes the prompts of our own reader as a local harness task, which needs no network. Either way the
harness scores; a test holds ours equal to it item by item. The harness's own tasks are tokenised its way (prompt and
option together), ours as in training (framing.py).
Deliberately absent: running task folders of others (their YAML can execute Python), uploading results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jinja2 import TemplateError

from qmedtune.allowed import Quantization
from qmedtune.data.packing.framing import codec_of, frame_of
from qmedtune.data.reading.files import plain_suffix
from qmedtune.errors import DataError, QmedtuneError, RecipeError
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.scoring import Boundary, prompt_texts
from qmedtune.model_files import JsonObject
from qmedtune.modeling.forward import causal_model
from qmedtune.recipe import TaskSection
from qmedtune.results import Facts, Number
from qmedtune.tasks import BUILTIN_TASKS, FILE_TASKS, Task, check_twice, load_task
from qmedtune.tasks.items import records

PREFIX = "qmedtune_"
OfHarness = dict[str, int | float | str]
"""What the harness tells of one task: metrics, and its alias."""


class HarnessScores(Facts):
    """Scores by lm-evaluation-harness.

    harness: its version; tasks: by name, each metric and, under `<metric>_stderr`, its standard error.
    """

    harness: str
    template: str
    tasks: dict[str, dict[str, Number]]


# What the harness and its templates raise where a file lacks what a task asks for
UNREACHED = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError)
MISFITS = (LookupError, TypeError, ValueError, StopIteration, TemplateError)


def evaluate_with_harness(
    name: str,
    tasks: Sequence[str],
    *,
    chat: bool = False,
    limit: int | None = None,
    batch: int = 8,
    base: str | None = None,
    template: str | None = None,
    quantization: Quantization | None = None,
    seed: int = 17,
    offline: bool = False,
) -> HarnessScores:
    """Score a model on harness tasks (on their data, or `task=FILE`) and on `task=FILE` benchmarks of ours.

    chat: wrap the harness's own prompts into the trained template (files of ours are always wrapped).
    Raises RecipeError where lm_eval is not installed or knows no such task.
    """
    _require_harness()
    check_twice("--harness", [task.partition("=")[0] for task in tasks])
    own, shipped = [], []
    for task in tasks:
        if _is_ours(task):
            own.append(load_task(_section(task), seed))
        else:
            shipped.append(task)
    opened = open_model(locate(name, base=base, template=template, offline=offline), quantization)
    found: dict[str, OfHarness] = {}
    with TemporaryDirectory() as folder:
        if own:
            names = [write_harness_task(Path(folder), task, opened) for task in own]
            found |= run_harness(opened, names, Path(folder), limit=limit, batch=batch, seed=seed)["results"]
        if shipped:
            found |= run_harness(opened, shipped, None, chat=chat, limit=limit, batch=batch, seed=seed)["results"]
    scores = {}
    for task, each in found.items():
        if numbers := _numbers(each):  # a group's entry has none
            scores[task.removeprefix(PREFIX)] = numbers
    return HarnessScores(harness=version("lm_eval"), template=opened.template.name, tasks=scores)


def _is_ours(task: str) -> bool:
    name, given, _ = task.partition("=")
    return task in BUILTIN_TASKS or (bool(given) and name in FILE_TASKS)


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise RecipeError("--harness needs lm-evaluation-harness\npip install 'qmedtune[lm-eval]'")


def _section(task: str) -> TaskSection:
    name, _, path = task.partition("=")
    return TaskSection(task=name, path=path or None)


def write_harness_task(folder: Path, task: Task, opened: OpenModel) -> str:
    """Write <folder>/<task>.jsonl and .yaml: prompts through the template, options, gold index. Returns its name."""
    if not task.items[0].options:
        raise RecipeError(f"--harness {task.name}: only multiple-choice benchmarks go through the harness")
    name = PREFIX + task.name
    prompts = prompt_texts(opened.tokenizer, opened.template, [item.messages for item in task.asked])
    data = folder / f"{name}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for item, prompt in zip(task.asked, prompts, strict=True):
            line = {"id": item.id, "prompt": prompt.text, "options": list(item.options), "gold": item.gold}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return name


def run_harness(
    opened: OpenModel,
    tasks: list[str],
    folder: Path | None,
    *,
    limit: int | None,
    batch: int,
    seed: int,
    chat: bool = False,
    boundary: Boundary = "segment",
) -> JsonObject:
    """`simple_evaluate` on the loaded model; `folder` holds local tasks, None means the harness's own.

    boundary: how prompts and options of local tasks are tokenised; the harness's own are always `joint`.
    """
    lm_eval, tasks_module = import_module("lm_eval"), import_module("lm_eval.tasks")
    manager = tasks_module.TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    for task in tasks:
        if task.partition("=")[0] not in manager.all_tasks:
            raise RecipeError(f"--harness: lm-evaluation-harness has no task {task!r}\nlist them: lm_eval --tasks list")
    if chat:
        opened.tokenizer.chat_template = frame_of(opened.template, codec_of(opened.tokenizer)).template.jinja()
    model = harness_model(opened, batch, boundary if folder else "joint")
    chosen = []
    for task in tasks:
        chosen.append(_on_file(task) if "=" in task else task)
    try:
        return lm_eval.simple_evaluate(
            model=model,
            tasks=chosen,
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except UNREACHED as error:
        named = ", ".join(task for task in tasks if "=" not in task)
        raise DataError(
            f"--harness {named}: its data is not on this machine, and nothing was fetched ({type(error).__name__})\n"
            "once, where there is a network: the same command without --offline and HF_HUB_OFFLINE;\n"
            f"or a local file with the same fields: --harness {tasks[0].partition('=')[0]}=FILE"
        ) from error
    except MISFITS as error:
        files = ", ".join(task for task in tasks if "=" in task)
        if isinstance(error, QmedtuneError) or not files:
            raise
        missing = f"field {error}" if isinstance(error, KeyError) else type(error).__name__
        raise DataError(
            f"--harness {files}: the harness cannot make its questions of a file ({missing})\n"
            "give it the fields that the task's own data set has"
        ) from error


def _on_file(task: str) -> dict[str, object]:
    """A task of the harness with a local file in place of its data set, whichever split it asks for."""
    name, _, path = task.partition("=")
    if not Path(path).is_file():
        raise DataError(f"--harness {name}: {path}: no such file\ngive a JSON, CSV or Parquet file")
    _check_same_fields(name, Path(path))
    kind = {".jsonl": "json", ".tsv": "csv"}.get(plain_suffix(Path(path)), plain_suffix(Path(path))[1:])
    files = dict.fromkeys(("train", "validation", "test"), path)
    data = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return {"group": f"{PREFIX}{name}", "task": [{"task": name, **data}]}  # only a group's tasks can be overridden


def _check_same_fields(name: str, path: Path) -> None:
    """A field that one record lacks would become the option "None" and be scored. DataError, also of broken lines."""
    if plain_suffix(path) == ".parquet":  # has its columns
        return
    known: set[str] = set()
    for where, fields in records(path):
        if known and fields.keys() != known:
            odd = sorted(known ^ fields.keys())[0]
            raise DataError(f"--harness {name}: {where}: only some records have the field `{odd}`\nmend the file")
        known = set(fields)
    if not known:
        raise DataError(f"--harness {name}: {path}: no record\ngive the split that is to be scored")


def harness_model(opened: OpenModel, batch: int, boundary: Boundary) -> Any:
    """The loaded model as the harness takes it."""
    harness: Any = import_module("lm_eval.models.huggingface").HFLM

    class Segmented(harness):
        """Prompt and option as tokens of the template, as in training."""

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            asked = frame_of(opened.template, codec_of(opened.tokenizer)).asked_text(context)
            return asked.ids, asked.answer(continuation)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns at length that the model is loaded already
    made = Segmented if boundary == "segment" else harness
    return made(pretrained=causal_model(opened.model), tokenizer=opened.tokenizer, batch_size=batch, add_bos_token=True)


def _numbers(scores: OfHarness) -> dict[str, float]:
    """`acc,none` -> `acc`: the filter's name is dropped where there is only the usual one."""
    return {key.removesuffix(",none"): value for key, value in scores.items() if isinstance(value, int | float)}
