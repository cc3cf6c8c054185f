"""Evaluation of a run (base against final on the same items, perplexity by domain) and of any one model.

A killed evaluation goes on where it was; a task is summed up only when all of its items are there.
Deliberately absent: scoring (measure.py, scoring.py), intervals (summary.py), benchmarks (tasks/).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qmedtune import model as models
from qmedtune import peers, record, store, ui
from qmedtune.allowed import Quantization
from qmedtune.data.packing import templates
from qmedtune.data.packing.framing import codec_of, frame_of
from qmedtune.data.reading.sources import source_files
from qmedtune.disk import owner_only
from qmedtune.errors import RecipeError
from qmedtune.evaluation import halves
from qmedtune.evaluation.measure import MeasuredModel, ModelToMeasure, Settings, measure_model, num_parts, text_rows
from qmedtune.evaluation.open_model import check_template, fingerprint, locate, open_model
from qmedtune.evaluation.scoring import BATCH_TOKENS, max_positions
from qmedtune.evaluation.summary import overlap_result, task_result, write_items
from qmedtune.evaluation.turns import Turns
from qmedtune.model_files import read_json
from qmedtune.model_stack import ModelStack
from qmedtune.modeling.collation import Rows
from qmedtune.modeling.quiet import quiet_libraries
from qmedtune.planning import precision
from qmedtune.recipe import Recipe, SourceSection, TaskSection
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import BaseAndFinal, Evaluation, Merge, ModelScores, Source, Text
from qmedtune.tasks import BUILTIN_TASKS, Task, check_twice, load_task

TEXTS = "perplexity"
FORMAT = 6  # of what is kept with `out`: an evaluation in an older one is made again
DOCUMENT_TOKENS = 8192  # an 8B LLaMA in 16 bit holds .5 GB of one layer's activations for so many
WINDOW_TOKENS = 2048  # of texts without a packing: 131,072 positions of LLaMA-3.2 would not fit a card


@dataclass(frozen=True)
class EvaluatedModels:
    """The two models of a run and the texts for both. trained: what the stages left; merged: what of it is delivered,
    None: it was refused. It is compared with its own base, or with `origin` where earlier adapters are folded into
    that, or, trained from scratch, with random weights of the shape of the folder `untrained`. mixed: what is merged is
    more than the adapters on their base. validation: folder of packed held-out rows per source; sources: data folders
    whose benchmark items are scored apart."""

    trained: ModelStack
    merged: Path | None = None
    mixed: bool = False
    origin: Path | None = None
    untrained: Path | None = None
    validation: Path | None = None
    sources: Sequence[Path] = ()

    @property
    def first(self) -> Path:
        return self.untrained or self.origin or self.trained.base


def evaluate_step(recipe: ResolvedRecipe, inputs: EvaluatedModels, out: Path) -> Evaluation:
    """Base against final of a resolved recipe, in the precision that precision.py decides.

    Delivered is the merged folder; without one, the base plus its adapters in the merge's dtype.
    Writes <task>.items.jsonl and evaluation.json below `out`, where an interrupted evaluation is continued.
    """
    scoring, measured, in_nf4 = _within_memory(_scoring_of(recipe, inputs, out), out)
    taken = scoring.taken
    found = write_results(scoring.tasks, measured, recipe.seed, out, overlapping=_overlapping(inputs.sources))
    told = {"template": scoring.settings.template.name, "window_tokens": document_window(inputs.trained.base)}
    found = found.model_copy(update=taken.facts(recipe.evaluate.precision) | told)
    if in_nf4:
        texts = {}
        for source, text in found.perplexity.items():
            base, final = in_nf4["base"].perplexity[source], in_nf4["final"].perplexity[source]
            beside = BaseAndFinal(base=base.perplexity, final=final.perplexity)
            texts[source] = text.model_copy(update={"nf4": beside})
        found = found.model_copy(update={"perplexity": texts})
    found = found.model_copy(update={"warnings": _warnings(inputs, taken, found)})
    store.write_json(out / "evaluation.json", found.as_json())
    return found


BothModels = dict[str, MeasuredModel]
"""Base and result by label."""


def _within_memory(scoring: Scoring, out: Path) -> tuple[Scoring, BothModels, BothModels]:
    """Both models, and both in NF4 where that stands beside; and as what they were scored: all in NF4 where memory runs
    out in 16 bit, as it does on a card that others use too."""
    instead = precision.after_no_room(scoring.recipe, scoring.taken)
    try:
        with peers.scoring(scoring.recipe, scoring.inputs, out, worth=scoring.num_parts() > 1) as turns:
            measured, in_nf4 = scoring.measure(turns)
        return scoring, measured, in_nf4
    except torch.OutOfMemoryError:
        if instead is None:
            raise
    ui.warn(f"evaluation: {instead.why}; base and result are scored in NF4")
    # What was kept of the other precision stays apart from this.
    scoring = replace(scoring, taken=instead, folder=out / store.SCRATCH / instead.folder)
    measured, in_nf4 = scoring.measure(Turns())
    return scoring, measured, in_nf4


def score_along(recipe: ResolvedRecipe, inputs: EvaluatedModels, out: Path, turns: Turns) -> None:
    """This process's turns of an evaluation that another leads: what it scores is written below `out`."""
    with owner_only():
        _scoring_of(recipe, inputs, out).measure(turns)


@dataclass(frozen=True)
class Scoring:
    """What the two models of a run are asked, in the precision `taken`; each part is kept below `folder`."""

    recipe: ResolvedRecipe
    inputs: EvaluatedModels
    tasks: list[Task]
    held_out: Mapping[str, Rows]
    settings: Settings
    taken: precision.Precision
    folder: Path

    def num_parts(self) -> int:
        """How many parts there are to share with other processes, of one model."""
        return sum(num_parts(task) for task in self.tasks) + len(self.held_out)

    def measure(self, turns: Turns) -> tuple[BothModels, BothModels]:
        """Base and result by label; and, where what is delivered is not what was trained, their perplexities in NF4, as
        trained: what quantisation costs, what training only repaired. Of texts alone: they cost seconds, where tasks
        would cost the evaluation again."""
        measured, in_nf4 = {}, {}
        for contender in contenders(self.inputs, self.taken):
            measured[contender.label] = self._one(contender, contender.label, self.tasks, turns)
        trained = precision.trained(self.recipe)
        if self.taken.name == "delivered" and trained.quantised and self.inputs.trained.adapters and self.held_out:
            for contender in contenders(self.inputs, trained):
                in_nf4[contender.label] = self._one(contender, f"{contender.label}-nf4", [], turns)
        return measured, in_nf4

    def _one(self, contender: Contender, label: str, tasks: list[Task], turns: Turns) -> MeasuredModel:
        """The model is let go before the next is loaded: two would be 2 x 16 GB for an 8B base in 16 bit."""
        model, tokenizer = open_contender(self.recipe, contender)
        asked = ModelToMeasure(model, tokenizer, label, self.settings, self.folder, turns)
        return measure_model(asked, tasks, self.held_out)


def _scoring_of(recipe: ResolvedRecipe, inputs: EvaluatedModels, out: Path) -> Scoring:
    tasks, stack = halves.scored_tasks(recipe), inputs.trained
    held_out: Mapping[str, Rows] = {}
    if inputs.validation is not None:
        held_out = halves.texts_of(recipe, inputs.validation, document_window(stack.base), "scored")
    settings = settings_of(recipe, stack)
    check_prompts(models.load_tokenizer(stack.base), settings.template, tasks)
    taken = precision.decide(recipe, delivered_dtype(stack))
    return Scoring(recipe, inputs, tasks, held_out, settings, taken, out / store.SCRATCH / taken.folder)


def _warnings(inputs: EvaluatedModels, taken: precision.Precision, found: Evaluation) -> list[str]:
    warned = []
    if inputs.merged is not None:
        sealed = store.read_seal(inputs.merged)
        if sealed and (shift := precision.shift_warning(Merge.model_validate(sealed.facts))):
            warned.append(shift)
    if taken.why:
        warned.append(f"scored in NF4, not as delivered: {taken.why}")
    for source, text in found.perplexity.items():
        if text.nf4 and (note := precision.quantisation_note(source, text, text.nf4)):
            warned.append(note)
    return warned


def document_window(base: Path) -> int:
    """Tokens of a text that are read at once: whole documents, as far as the model's positions and memory go."""
    config = read_json(base / "config.json")
    return min(int(config["max_position_embeddings"]), DOCUMENT_TOKENS)


def _overlapping(sources: Sequence[Path]) -> dict[str, set[str]]:
    """Per task, items that some source holds; sources are given with `contaminated: split`."""
    found: dict[str, set[str]] = {}
    for folder in sources:
        sealed = store.read_seal(folder)
        if sealed:
            for task, overlap in Source.model_validate(sealed.facts).contamination.items():
                found.setdefault(task, set()).update(overlap.found)
    return found


def write_results(
    tasks: list[Task], measured: dict[str, MeasuredModel], seed: int, out: Path,
    *, overlapping: Mapping[str, set[str]] = {},  # noqa: B006 - nothing changes it
) -> Evaluation:  # fmt: skip
    """Write <task>.items.jsonl below `out`; scores per task, perplexity per source.

    overlapping: ids per benchmark that stand in training text; such a task is scored in two parts as well.
    """
    scores = {}
    for task in tasks:
        rows = {label: found.tasks[task.name] for label, found in measured.items()}
        write_items(out / f"{task.name}.items.jsonl", task, rows)
        found = task_result(task, rows, seed)
        known = overlapping.get(task.name.partition("-")[0])  # of pubmedqa-3shot: pubmedqa; None: it was not looked for
        if known is not None:
            found = found.model_copy(update={"overlap": overlap_result(task, rows, seed, known)})
        scores[task.name] = found
    texts = {}
    for source in next(iter(measured.values())).perplexity:
        texts[source] = _text_result(source, measured)
    return Evaluation(tasks=scores, perplexity=texts)


def _text_result(source: str, measured: dict[str, MeasuredModel]) -> Text:
    """Perplexity of each model over one source's held-out text."""
    perplexities, ends = {}, {}
    tokens = marks = 0
    for label, each in measured.items():
        found = each.perplexity[source]
        perplexities[label] = found.perplexity
        tokens, marks = found.tokens, found.marks  # the same for all: they read the same rows
        if marks:
            ends[label] = round(-found.mark_nll / marks, 4)
    result = Text(**perplexities, tokens=tokens, marks=marks)
    if not marks:
        return result
    return result.model_copy(update={"ends": BaseAndFinal(**ends)})


def check_prompts(tokenizer: Any, template: templates.Template, tasks: list[Task]) -> None:
    """Refuse, before anything is scored, a template that does not fit the model or a task's conversations."""
    frame = frame_of(template, codec_of(tokenizer))
    for task in tasks:
        frame.ask([item.messages for item in task.asked])


def settings_of(recipe: ResolvedRecipe, trained: ModelStack) -> Settings:
    template, seq_len = _asked_with(recipe, trained), recipe.stages[-1].section.seq_len
    return Settings(template, recipe.evaluate.generate, recipe.evaluate.batch * seq_len)


def _asked_with(recipe: Recipe, trained: ModelStack) -> templates.Template:
    """The recipe's template, else that of training, else that of the model which is mixed in, else the base's own."""
    asked = recipe.evaluate.template or trained.template
    if not asked and recipe.merge.other is not None:
        return locate(recipe.merge.other, offline=True).template
    if asked:
        template = templates.load(asked, trained.base)
    else:
        template = templates.default(None, trained.base)
    if trained.template:
        return replace(template, cleaning=templates.load(trained.template).cleaning)
    return templates.for_base(template)


@dataclass(frozen=True)
class Contender:
    """One of the two models of a run, in a precision. random: untrained weights of its base's shape."""

    label: str
    stack: ModelStack
    taken: precision.Precision
    random: bool = False


def contenders(inputs: EvaluatedModels, taken: precision.Precision) -> list[Contender]:
    """Base and final. The merged folder stands for base + adapters where it is there; in NF4, as trained, only where it
    is another model than these."""
    final, merged = inputs.trained, inputs.merged
    wanted = taken.name != "nf4" or inputs.mixed
    if wanted and merged is not None and (merged / "config.json").is_file():
        final = ModelStack(merged)
    base = Contender("base", ModelStack(inputs.first), taken, inputs.untrained is not None)
    return [base, Contender("final", final, taken)]


def open_contender(recipe: Recipe, contender: Contender) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). Nothing else should be held on the device."""
    quiet_libraries()
    gc.collect()
    torch.cuda.empty_cache()
    taken = contender.taken
    stored = taken.weights
    if taken.quantised:
        stored = taken.computed_in
    section = recipe.model.model_copy(update={"compute_dtype": stored})
    base = contender.stack.base
    tokenizer = models.load_tokenizer(base)
    if not contender.random:
        stack, computed_in = contender.stack, taken.computed_in
        return models.load_stack(stack, section, quantize=taken.quantised, computed_in=computed_in), tokenizer
    torch.manual_seed(recipe.seed)  # no base to compare with: chance is what random weights reach
    model: Any = models.from_scratch(base, section)
    models.cast_weights(model, models.DTYPES[taken.computed_in])
    models.install_kernels(model, section.kernels)
    return model.eval(), tokenizer


def delivered_dtype(trained: ModelStack) -> str | None:
    """What a folder that is delivered as it was trained, without a merge, is stored in; None: `merge.dtype`."""
    if trained.adapters:
        return None
    config = read_json(trained.base / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored not in models.DTYPES:
        return None
    return stored


# ---- any one model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelJob:
    """One model and what it is asked; `qmedtune.evaluate_model` says what each is."""

    name: str
    tasks: Sequence[str | TaskSection]
    data: Path | None = None
    base: str | None = None
    template: str | None = None
    out: Path | None = None
    limit: int | None = None
    generate: bool = True
    batch_tokens: int | None = None
    quantization: Quantization | None = None
    seed: int = 17
    offline: bool = False


def evaluate_model(job: ModelJob) -> ModelScores:
    """Score a base, a finished run, an adapter folder (with its base) or a merged model. Texts are scored in bits per
    byte too, which unlike perplexity compares models of different tokenizers."""
    seed, quantization = job.seed, job.quantization
    sections, texts = parse_tasks(job.tasks, job.data, job.limit)
    location = locate(job.name, base=job.base, template=job.template, offline=job.offline)
    check_template(location)
    loaded = [load_task(section, seed, location.world) for section in sections]
    settings = Settings(location.template, job.generate, job.batch_tokens or BATCH_TOKENS)

    def work(folder: Path) -> ModelScores:
        check_prompts(models.load_tokenizer(location.base), location.template, loaded)
        opened = open_model(location, quantization)
        window = min(max_positions(opened.model), WINDOW_TOKENS)
        rows, sizes = {}, {}
        for path in texts:
            rows[str(path)], sizes[str(path)] = text_rows(opened.tokenizer, path, window)
        asked = ModelToMeasure(opened.model, opened.tokenizer, "model", settings, folder / store.SCRATCH)
        found = measure_model(asked, loaded, rows)
        scores = write_results(loaded, {"model": found}, seed, folder)
        weights = opened.computed_in
        if opened.quantization == "nf4":
            weights = "nf4"
        perplexity: dict[str, Text] = {}
        for path, text in scores.perplexity.items():
            bits = found.perplexity[path].nll / math.log(2) / sizes[path]
            perplexity[path] = text.model_copy(update={"bits_per_byte": bits})
        result = ModelScores(
            model=job.name,
            template=location.template.name,
            quantization=opened.quantization,
            computed_in=opened.computed_in,
            weights=weights,
            tasks=scores.tasks,
            perplexity=perplexity,
        )
        store.write_json(folder / "evaluation.json", result.as_json())
        return result

    if job.out is None:
        with TemporaryDirectory() as folder:
            return work(Path(folder))
    asked = [section.model_dump() for section in sections]
    files = [fingerprint(path) for path in (location.base, *location.adapters, *texts)]
    prompts = []
    for task in loaded:
        for item in task.asked:
            prompts.append([item.id, item.messages, item.options, task.write(item)])
    given = [asked, files, prompts, asdict(location.template), quantization, job.generate, seed]
    key = store.sha256_json([FORMAT, given, record.code_versions()])
    return _sealed(job.out, key, work)


def _sealed(out: Path, key: str, work: Callable[[Path], ModelScores]) -> ModelScores:
    """The facts of <out>/evaluation: as they are when sealed with this key, else made or continued now."""
    folder = out / "evaluation"
    store.check_stamped(folder)
    with owner_only(), store.lock(out):
        sealed = store.intact(folder, key) or store.complete(folder, out, key)
        if sealed is None:
            building = store.begin(folder, out, key, {}, keep_partial=True)
            sealed = store.publish(building, folder, out, key, work(building).as_json())
        return ModelScores.model_validate(sealed.facts)


def parse_tasks(
    tasks: Sequence[str | TaskSection], data: Path | None, limit: int | None
) -> tuple[list[TaskSection], list[Path]]:
    """`facts`, `pubmedqa` (read from `data`) or `pubmedqa=FILE`; files of `perplexity` come apart, as second result."""
    sections, texts = [], []
    for entry in tasks:
        if isinstance(entry, TaskSection):
            sections.append(entry)
            continue
        name, path = named_file(entry, data)
        if name == TEXTS:
            texts += source_files(SourceSection(path=_required(path, name), kind="general"))
        else:
            sections.append(TaskSection(task=name, path=path, limit=limit))
    check_twice("--tasks", [section.label for section in sections])
    return sections, texts


def named_file(entry: str, data: Path | None) -> tuple[str, str | None]:
    """`pubmedqa=FILE` -> its two parts; the file is `data` where none is named and the task is read from one."""
    name, _, given = entry.partition("=")
    if given or name in BUILTIN_TASKS or not data:
        return name, given or None
    return name, str(data)


def _required(path: str | None, name: str) -> str:
    if path is None:
        raise RecipeError(f"--tasks {name}: no file of texts was given\nwrite {name}=FILE, or add --data FILE")
    return path
