"""The plan of a run, before anything is paid for: stages, tokens, steps, memory, disk and time.

Loads no weights and no torch, reads a few records per source, answers in under 3 s. Everything that is predicted or
sampled is marked; what is sealed is told exactly. A card or data that are not on this machine are planned for all the
same, and said to be absent. Deliberately not here: drawing (planning/view.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from qmedtune import base, fetch, gguf_folder, preflight, step_status, store, track, units
from qmedtune.batches import batch_rows, steps_in, too_few_steps
from qmedtune.errors import DataError, DoesNotFit, QmedtuneError
from qmedtune.lineage import final_model, lineage_of
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning import capacity, data_time, evaluation_time, exchange, fit, memory, precision, rows, speed
from qmedtune.planning.estimate import Estimate, SampledEstimate, count_with, estimate_source
from qmedtune.planning.machine import CARDS_GIB, GIB, Machine, card_of, this_machine
from qmedtune.planning.memory import Setup
from qmedtune.planning.missing import what_is_missing
from qmedtune.planning.plan_facts import (
    Decision,
    Plan,
    PlannedBase,
    PlannedEvaluation,
    PlannedMachine,
    PlannedSource,
    PlannedStage,
    PlannedStep,
)
from qmedtune.planning.resolve import refuse_half_on_cpu, resolve
from qmedtune.planning.rows import StageTokens
from qmedtune.planning.sample import Sample, sample_source
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Packing
from qmedtune.tasks import Task
from qmedtune.tasks.item_parts import part_of

__all__ = ["BaseFacts", "base_facts", "make_plan", "resolve"]

# Files larger than this in sum are not hashed for the sake of a plan; then the data stages' status is unknown.
HASHED_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Subject:
    """What is planned: a resolved recipe on its base, for a machine; `run_dir` may hold a part of it already. folder:
    of the base's tokenizer, where that is here."""

    recipe: ResolvedRecipe
    facts: BaseFacts
    machine: Machine
    run_dir: Path | None
    folder: Path | None


def make_plan(recipe: Recipe, run_dir: Path | None = None, *, cards: int = 1) -> Plan:
    """Plan `recipe` (as loaded, with its `auto`s) for the machine it is meant for, with `cards` GPUs of one kind;
    `run_dir` adds what is cached.

    Raises DoesNotFit (exit 4) for GPU memory, host memory or disk, RecipeError for an unknown
    base, and what preflight.py finds in base, tokenizer, templates, evaluation files and a sample of each source.
    Sources that are absent here are told in "data" and "notes", not raised.
    """
    track.check(recipe)
    facts = base_facts(recipe.model)
    resolved, decisions, machine = _for_its_machine(recipe, facts, cards)
    refuse_half_on_cpu(resolved, machine)
    precision.refuse_unscorable(resolved, machine)
    folder = _tokenizer_folder(facts)
    samples, missing = _samples(resolved)
    benchmarks = _checked(resolved, facts, folder, samples)
    subject = Subject(resolved, facts, machine, run_dir, folder)
    measured = _measure_sources(subject, samples, missing)
    estimates = {name: measured[name].estimate for name in resolved.used_sources()}
    steps, notes = _status(recipe, run_dir, machine, estimates)
    stages: list[PlannedStage] = []
    setups: list[Setup] = []
    taken: list[Setup] = []  # with micro-batches no larger than the batch
    for index in range(len(resolved.stages)):
        stage = _stage(subject, index, measured, steps)
        setup = fit.setup_of(resolved, index)
        stages.append(stage)
        setups.append(setup)
        taken.append(replace(setup, micro_batch=stage["micro_batch"]))
    host = capacity.host_phases(facts, taken, gpu=machine.is_gpu)
    disk = _disk(resolved, facts, setups, estimates)
    evaluation = _evaluation(subject, benchmarks.tasks, estimates)
    times = {"data": _data_seconds(subject, steps, estimates), **_times(subject, steps, stages, evaluation)}
    borders = _borders(folder)
    making_s = _making_seconds(facts, machine)
    base_told = {**asdict(facts), "parameters": facts.parameters, "bytes": facts.file_bytes, "making_s": making_s}
    plan: Plan = {
        "recipe": recipe.name,
        "base": cast(PlannedBase, base_told),
        "machine": cast(PlannedMachine, asdict(machine)),
        "decisions": decisions,
        "data": [cast(PlannedSource, {"source": name, **asdict(found)}) for name, found in estimates.items()],
        "steps": steps,
        "stages": stages,
        "host": {"parts": host, "needed_bytes": max(host.values()), "there_bytes": machine.host_bytes},
        "disk": {
            "parts": disk,
            "needed_bytes": sum(disk.values()),
            "free_bytes": capacity.free_bytes(run_dir or Path()),
        },
        "evaluation": evaluation,
        "times": times,
        "seconds": sum(times.values()),
        "missing": what_is_missing(resolved, facts, estimates, evaluation["unknown"] if evaluation else ()),
        "borders": borders,
        "notes": [*_notes(machine, facts, estimates), *_length_notes(resolved, facts), *_few(facts, stages)],
    }
    plan["notes"] += [*_mixed_notes(resolved), *benchmarks.left, *_scoring_notes(resolved, evaluation, cards)]
    plan["notes"] += [*_border_notes(borders), *notes]
    _check_room(plan, present=machine.present)
    return plan


# ---- the machine -----------------------------------------------------------------------------------------------------


def _for_its_machine(recipe: Recipe, facts: BaseFacts, cards: int) -> tuple[ResolvedRecipe, list[Decision], Machine]:
    """The resolved recipe and the machine it is planned for: this one; without a GPU here, for a base that wants one,
    the card that `memory:` states, else the smallest standard card that fits."""
    here = replace(this_machine(), cards=cards, cards_here=cards)
    wants_gpu = not facts.builtin and (facts.parameters >= capacity.GPU_PARAMETERS or recipe.memory_gib is not None)
    if here.is_gpu or not wants_gpu:
        return *resolve(recipe, here), here
    bf16 = recipe.model.compute_dtype != "float16"
    if recipe.memory_gib is not None:
        card = replace(card_of(recipe.memory_gib, bf16=bf16), cards=cards, cards_here=cards)
        return *resolve(recipe, card), card
    for gib in CARDS_GIB[:-1]:
        card = replace(card_of(gib, bf16=bf16), cards=cards, cards_here=cards)
        try:
            resolved, decisions = resolve(recipe, card)
        except DoesNotFit:
            continue
        if not any(fit.choose(facts, fit.draft_of(resolved, i), card).tight for i in range(len(resolved.stages))):
            return resolved, decisions, card
    largest = replace(card_of(CARDS_GIB[-1], bf16=bf16), cards=cards, cards_here=cards)
    return *resolve(recipe, largest), largest


def _notes(machine: Machine, facts: BaseFacts, estimates: Mapping[str, Estimate]) -> list[str]:
    notes: list[str] = []
    if not machine.present:
        notes.append(f"no GPU on this machine: planned for {machine.name}; a run here would use the CPU")
    if machine.is_gpu:
        notes.append("GPU memory and times are predicted; no GPU has confirmed the prediction yet")
    if machine.cards > 1:
        notes.append(
            f"{machine.cards} processes, one a GPU (of one kind, connected by PCIe 4): computed, not measured on cards"
        )
    if machine.used_bytes > GIB:
        notes.append(f"other processes hold {units.size(machine.used_bytes)} of the card now; end them before the run")
    if not facts.builtin and facts.folder is None:
        notes.append(f"{facts.name} is not on this machine as a model folder: {_on_its_way(facts)}")
    if seconds := _making_seconds(facts, machine):
        notes.append(
            f"{facts.name} is pretrained first, once on this machine: about {units.duration(seconds)} (assumed)"
        )
    for name, estimate in estimates.items():
        if estimate.missing:
            notes.append(f"{name}: not found here ({estimate.missing})")
    return notes


def _mixed_notes(recipe: Recipe) -> list[str]:
    other = recipe.merge.other
    if other is None or other.startswith(base.BUILTIN) or Path(other).expanduser().exists():
        return []
    return [
        f"merge.with: {other} is no folder here: a run has to be made before, a Hub id is fetched when this one starts"
    ]


def _making_seconds(facts: BaseFacts, machine: Machine) -> float:
    """Of the pretraining of a built-in base that is not in the cache; 0 where nothing is to be made."""
    if not facts.builtin or (base.builtin_folder(facts.name) / "01-pretrain" / store.SEAL).is_file():
        return 0.0
    return round(speed.pretraining_seconds(facts, machine), 1)


def _on_its_way(facts: BaseFacts) -> str:
    """What has to happen before it is there."""
    if fetch.packed(facts.name):
        return f"fetch it first: qmedtune fetch {facts.name.removeprefix(base.BUILTIN)}"
    if gguf_folder.is_gguf(facts.name):
        return f"the run unpacks it once, {units.size(facts.file_bytes)} in the cache"
    return f"shape from the {facts.source}, {units.size(facts.file_bytes)} to fetch"


def _length_notes(recipe: ResolvedRecipe, facts: BaseFacts) -> list[str]:
    beyond = f"is beyond the {facts.max_positions} positions that {facts.name} was made for"
    notes: list[str] = []
    for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True):
        length = stage.section.seq_len
        if length > facts.max_positions:
            notes.append(f"{name}: seq_len {length} {beyond}")
    return notes


def _measure_sources(
    subject: Subject, samples: Mapping[str, Sample], missing: Mapping[str, str]
) -> dict[str, SampledEstimate]:
    """The tokens of each source; none of those that are `missing`, with the reason."""
    recipe, facts, folder = subject.recipe, subject.facts, subject.folder
    measured: dict[str, SampledEstimate] = {}
    for name, sample in samples.items():
        source = recipe.data[name]
        counting = count_with(folder, facts.vocab, source, builtin_base=facts.builtin, builtin_text=source.is_builtin)
        measured[name] = estimate_source(sample, source, counting)
    for name, why in missing.items():
        measured[name] = SampledEstimate(Estimate(0, 0, 0.0, missing=why))
    if folder is not None:
        preflight.check_truncation(recipe, measured, samples)
    return measured


# ---- data ------------------------------------------------------------------------------------------------------------


def _borders(folder: Path | None) -> dict[str, str | None] | None:
    """The marks around documents and why; None where the tokenizer is not on this machine."""
    from qmedtune.data.packing import borders
    from qmedtune.data.packing.tokens import load_codec

    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return borders.described(load_codec(folder))


def _border_notes(found: dict[str, str | None] | None) -> list[str]:
    return [f"documents: {found['why']}"] if found else []


def _samples(recipe: Recipe) -> tuple[dict[str, Sample], dict[str, str]]:
    """A look at each source that is here, and why there is none at the others."""
    samples: dict[str, Sample] = {}
    missing: dict[str, str] = {}
    for name in recipe.used_sources():
        try:
            samples[name] = sample_source(recipe.data[name])
        except DataError as error:
            missing[name] = str(error).splitlines()[0]
    return samples, missing


def _checked(
    recipe: ResolvedRecipe, facts: BaseFacts, folder: Path | None, samples: Mapping[str, Sample]
) -> preflight.Benchmarks:
    """Raise what a run would stumble over; returns the benchmarks, and what could not be looked at."""
    preflight.check_damage(recipe, samples)
    if folder is not None:
        if not facts.builtin:
            preflight.check_base(recipe, folder)
        preflight.check_tokenizer(folder)
        preflight.check_templates(recipe, folder, samples)
    found = preflight.check_evaluation(recipe, folder, within_bytes=preflight.PARSED_BYTES)
    if folder is None and not facts.builtin:
        found.left.insert(0, "the base's tokenizer is not here: templates and lengths are not checked")
    return found


def _few(facts: BaseFacts, stages: list[PlannedStage]) -> list[str]:
    """Stages with too few steps to learn from; the built-in bases are made to be taught in few."""
    if facts.builtin:
        return []
    notes: list[str] = []
    for stage in stages:
        if stage["trained"] and (note := too_few_steps(stage["name"], stage["steps"])):
            notes.append(note)
    return notes


def _tokenizer_folder(facts: BaseFacts) -> Path | None:
    if facts.builtin:
        folder = base.blank_folder(facts.name)
        return folder if folder.is_dir() else None
    return Path(facts.folder) if facts.folder else None


def _sealed_tokens(
    recipe: ResolvedRecipe, index: int, run_dir: Path | None, steps: list[PlannedStep]
) -> StageTokens | None:
    """The exact ledger of a stage whose packing is sealed and current."""
    name = f"data/{recipe.stage_names()[index]}"
    if run_dir is None or not _is_cached(steps, name):
        return None
    sealed = store.read_seal(run_dir / name)
    if sealed is None:
        return None
    section, packed = recipe.stages[index].section, Packing.model_validate(sealed.facts)
    rows, trained = packed.rows, packed.tokens.trained or 0
    return StageTokens(trained, rows, batch_rows(section, rows), steps_in(section, rows), 0.0)


def _is_cached(steps: list[PlannedStep], name: str) -> bool:
    return any(step["name"] == name and step["status"] == "cached" for step in steps)


# ---- stages ----------------------------------------------------------------------------------------------------------


def _stage(
    subject: Subject, index: int, measured: Mapping[str, SampledEstimate], steps: list[PlannedStep]
) -> PlannedStage:
    recipe, facts, machine, run_dir = subject.recipe, subject.facts, subject.machine, subject.run_dir
    name, section = recipe.stage_names()[index], recipe.stages[index].section
    setup = fit.setup_of(recipe, index)
    tokens = _sealed_tokens(recipe, index, run_dir, steps) or rows.planned(recipe, index, measured)
    if tokens.rows:
        setup = replace(setup, micro_batch=min(setup.micro_batch, tokens.batch))
    timed = speed.last_tokens_per_s(run_dir, name)
    trained = memory.trained_parameters(facts, setup)
    crossing = exchange.StepTime(0.0, exchange.exchange_bytes(trained), _gathered(facts, setup, machine, tokens.batch))
    tokens_per_s = timed or _assumed_speed(subject, setup, tokens.batch, crossing)
    parts = memory.step_memory(facts, setup, gpu=machine.is_gpu)
    return {
        "name": name,
        "kind": recipe.stages[index].kind,
        "trained": tokens.trained,
        "rows": tokens.rows,
        "batch": tokens.batch,
        "steps": tokens.steps,
        "spread": tokens.spread,
        "note": tokens.note,
        "seq_len": setup.seq_len,
        "micro_batch": setup.micro_batch,
        "lr": section.lr,
        "dtype": setup.compute_dtype,
        "attention": setup.attention,
        "trained_parameters": trained,
        "exchange_bytes": crossing.exchanged_bytes,
        "gathered_bytes": crossing.gathered_bytes,
        "sharded": setup.sharded,
        "memory": parts,
        "peak_bytes": sum(parts.values()),
        "budget_bytes": fit.budget_bytes(machine, recipe),
        "frees": fit.remedies(facts, setup, gpu=machine.is_gpu)[:4],
        "tokens_per_s": round(tokens_per_s, 1),
        "measured": timed is not None,
        "seconds": _seconds(tokens, tokens_per_s, cached=_is_cached(steps, name)),
    }


def _gathered(facts: BaseFacts, setup: Setup, machine: Machine, batch: int) -> int:
    """Of a sharded base, received by each card in a step; 0 where each holds it whole."""
    if not setup.sharded or not batch:
        return 0
    rows = -(-batch // setup.cards)
    size = memory.gathered_bytes(facts, setup, gpu=machine.is_gpu)
    return exchange.gathered_bytes(size, setup.cards, -(-rows // setup.micro_batch))


def _assumed_speed(subject: Subject, setup: Setup, batch: int, crossing: exchange.StepTime) -> float:
    """Tokens/s of all cards together; processes of one CPU share its cores."""
    alone = speed.tokens_per_s(subject.facts, setup, subject.machine)
    if setup.cards == 1 or not batch or not subject.machine.is_gpu:
        return alone
    step = replace(crossing, seconds=batch * setup.seq_len / alone)
    return alone * exchange.times_as_fast(step, setup.cards, exchange.ASSUMED_LINK)


def _seconds(tokens: StageTokens, tokens_per_s: float, *, cached: bool) -> float | None:
    """None while nobody knows how many tokens there are."""
    if cached:
        return 0.0
    if not tokens.trained:
        return None
    return round(tokens.trained / tokens_per_s, 1)


def _status(
    recipe: Recipe, run_dir: Path | None, machine: Machine, estimates: Mapping[str, Estimate]
) -> tuple[list[PlannedStep], list[str]]:
    """Each step with its state, and what could not be told."""
    todo: list[PlannedStep] = [{"name": name, "status": "to do", "why": ""} for name in recipe.stage_names()]
    size = sum(estimate.read_bytes for estimate in estimates.values())
    if not machine.present or any(estimate.missing for estimate in estimates.values()):
        return todo, []
    if size > HASHED_BYTES and not (run_dir and (run_dir / ".hashes.json").is_file()):
        return todo, [f"{units.size(size)} of data were never hashed here: every step is taken as to do"]
    try:
        return step_status.status(recipe, run_dir or Path("runs") / recipe.name, machine=machine), []
    except QmedtuneError as error:
        return todo, [str(error).splitlines()[0]]


# ---- scores and time ----------------------------------------------------------------------------------------------


def _evaluation(subject: Subject, tasks: list[Task], estimates: Mapping[str, Estimate]) -> PlannedEvaluation | None:
    recipe, facts = subject.recipe, subject.facts
    if not recipe.evaluate.tasks and not recipe.evaluate.perplexity:
        return None
    ids = preflight.asking(recipe, subject.folder, builtin=facts.builtin)
    readings: list[evaluation_time.BenchmarkCost] = []
    for task in tasks:
        scored = part_of(task, recipe, "scored")
        readings.append(evaluation_time.reading(scored, ids, generate=recipe.evaluate.generate))
    taken = precision.decide(recipe, machine=subject.machine)
    read = evaluation_time.EvaluationInputs(readings, estimates, taken)
    return evaluation_time.planned(recipe, facts, subject.machine, read)


def _times(
    subject: Subject, steps: list[PlannedStep], stages: list[PlannedStage], evaluation: PlannedEvaluation | None
) -> dict[str, float]:
    """Seconds that are left, by what they go to. What is cached takes none. The base is loaded once for all stages that
    train on it, and once for every fold."""
    recipe, facts = subject.recipe, subject.facts
    times = {"loading": 0.0, "training": 0.0, "merging": 0.0, "evaluation": 0.0}
    for stage, line in zip(stages, lineage_of(recipe), strict=True):
        if _is_cached(steps, stage["name"]):
            continue
        times["training"] += speed.STAGE_SECONDS + (stage["seconds"] or 0.0)
        if not times["loading"] or line.folds_into:
            times["loading"] += speed.load_seconds(facts)
        if line.folds_into:
            times["merging"] += speed.merge_seconds(facts)
    if final_model(recipe).adapters and not _is_cached(steps, "merged"):
        times["merging"] += speed.merge_seconds(facts)
    if recipe.merge.sweep is not None and not _is_cached(steps, "sweep"):
        times["merging"] += len(recipe.merge.sweep.shares) * speed.merge_seconds(facts)
    if evaluation is not None and not _is_cached(steps, "evaluation"):
        times["evaluation"] = evaluation["seconds"]
    if any(times.values()):
        times["loading"] += speed.START_SECONDS
    return times


def _data_seconds(subject: Subject, steps: list[PlannedStep], estimates: Mapping[str, Estimate]) -> float:
    done = {step["name"].removeprefix("data/") for step in steps if step["status"] == "cached"}
    return data_time.data_seconds(subject.recipe, estimates, subject.machine.cores, done=done)


def _scoring_notes(recipe: Recipe, evaluation: PlannedEvaluation | None, cards: int) -> list[str]:
    """What the scores are of where it is not what the recipe asks for, and what takes time that is not told."""
    notes: list[str] = []
    if evaluation and evaluation["why"]:
        notes.append(f"scores will be those of the NF4 model, not of what is delivered: {evaluation['why']}")
    if evaluation and evaluation["processes"] < cards:
        notes.append(f"scores are of too few parts for {cards} processes: {evaluation['processes']} of them score")
    untimed: list[str] = []
    if recipe.evaluate.against:
        untimed.append("evaluate.against")
    if recipe.audit:
        untimed.append("audit")
    if recipe.merge.sweep is not None:
        untimed.append("scores of merge.sweep")
    if untimed:
        notes.append(f"not timed: {', '.join(untimed)}")
    return notes


# ---- room ------------------------------------------------------------------------------------------------------------


def _disk(recipe: Recipe, facts: BaseFacts, setups: list[Setup], estimates: Mapping[str, Estimate]) -> dict[str, int]:
    text = packed = 0
    for name, estimate in estimates.items():
        text += capacity.text_bytes(recipe.data[name])
        if not estimate.read_bytes:
            text += capacity.BUILTIN_BYTES * estimate.tokens
        packed += estimate.tokens
    return memory.disk_bytes(facts, setups, capacity.kept_of(recipe, text, packed))


def _check_room(plan: Plan, *, present: bool) -> None:
    """Host memory and disk; GPU memory was checked when the recipe was resolved. A machine that is only planned for
    is not judged by this one's RAM and disk."""
    host, disk = plan["host"], plan["disk"]
    if not present:
        return
    capacity.refuse_too_little_memory(host["parts"], host["there_bytes"])
    capacity.refuse_too_little(disk["parts"], 0, disk["free_bytes"])
