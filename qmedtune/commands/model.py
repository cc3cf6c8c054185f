"""Commands about models: eval, predict, chat, merge. A model is a run, a folder, or a Hub id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmedtune.allowed import (
    BenchmarkSplit,
    Extraction,
    FloatDtype,
    MergeBase,
    MergeMethod,
    PromptSet,
    Quantization,
    RoundingMode,
)
from qmedtune.commands.common import JsonOption, OfflineOption, emit, say

if TYPE_CHECKING:
    from qmedtune.evaluation.harness import HarnessScores
    from qmedtune.predict import DryRun
    from qmedtune.results import ModelScores, Score, Scores


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A run, an adapter or model folder, or a Hub id.")]
BaseOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Base of an adapter folder.")]
TemplateOption = Annotated[str | None, typer.Option(metavar="NAME", help="Instead of the one it was trained with.")]
QuantizationOption = Annotated[
    Quantization | None, typer.Option(help="Default: as its adapter was trained, else 16 bit.")
]


def evaluate(
    model: ModelArgument,
    tasks: Annotated[str | None, typer.Option(metavar="A,B=FILE", help="facts, pubmedqa=FILE, perplexity=FILE")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="File of the tasks that name none.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep items here; resume.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items of each task.")] = None,
    split: Annotated[BenchmarkSplit | None, typer.Option(help="Of a folder as published; default: test.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="In place of the tasks' usual one.")] = None,
    bertscore: Annotated[str | None, typer.Option(metavar="DIR", help="A local encoder, for summaries.")] = None,
    shots: Annotated[int, typer.Option(min=0, max=32, help="Examples before each question.")] = 0,
    shot_seeds: Annotated[int, typer.Option(min=3, max=20, help="Draws of examples; scores are their means.")] = 3,
    shots_from: Annotated[
        str | None, typer.Option(metavar="FILE", help="Default: the folder's training split, else the other items.")
    ] = None,
    prompts: Annotated[PromptSet, typer.Option(help="Who words the questions.")] = "own",
    extraction: Annotated[Extraction, typer.Option(help="How an answer is read.")] = "stated",
    generate: Annotated[bool, typer.Option(help="Also judge what the model writes.")] = True,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: QuantizationOption = None,
    harness: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the items of --limit, and the bootstrap.")] = 17,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on tasks and held-out texts."""
    if (tasks is None) == (harness is None):
        raise typer.BadParameter("give one of --tasks (facts, pubmedqa=FILE ...) and --harness")
    if harness:
        from qmedtune.evaluation.harness import evaluate_with_harness

        found = evaluate_with_harness(
            model, harness.split(","), limit=limit, base=base, template=template, quantization=quantization, seed=seed,
            offline=offline,
        )  # fmt: skip
        return emit(found.as_json()) if as_json else _show_harness(found)
    from qmedtune.evaluate import TEXTS, ModelJob, evaluate_model, named_file
    from qmedtune.recipe import TaskSection

    asked: list[str | TaskSection] = []
    for entry in str(tasks).split(","):
        name, path = named_file(entry, data)
        section = TaskSection(
            task=name, path=path, limit=limit, split=split, metric=metric, bertscore=bertscore,
            shots=shots, shot_seeds=shot_seeds, shots_from=shots_from, prompts=prompts,
            extraction=extraction,
        )  # fmt: skip
        asked.append(entry if name == TEXTS else section)
    job = ModelJob(
        model, asked, data=data, base=base, template=template, out=out, generate=generate, quantization=quantization,
        seed=seed, offline=offline,
    )  # fmt: skip
    scores = evaluate_model(job)
    emit(scores.as_json()) if as_json else _show_scores(scores)


def _show_scores(scores: ModelScores) -> None:
    from qmedtune import ui

    weights = scores.weights
    if weights == "nf4":
        weights = f"NF4 computed in {scores.computed_in}"
    title = f"{scores.model}, template {scores.template}, {weights}"
    ui.table(title, ("task", "metric", "value", "95 % interval", "items", "notes"), list(_score_rows(scores)))


def _show_harness(found: HarnessScores) -> None:
    from qmedtune import ui

    rows: list[tuple[str, ...]] = []
    for task, scores in found.tasks.items():
        for metric, value in scores.items():
            if metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr", float("nan"))
            rows.append((task, metric, f"{value:.4f}", f"{error:.4f}"))
    ui.table(f"lm-evaluation-harness {found.harness}", ("task", "metric", "value", "standard error"), rows)


def _score_rows(scores: ModelScores) -> Iterator[tuple[str, ...]]:
    for name, task in scores.tasks.items():
        parts: dict[str, Scores] = {name: task}
        for facet, part in task.facets.items():
            parts[f"{name}: {facet}"] = part
        for title, part in parts.items():
            assert part.model is not None, "one model was measured"
            yield _score_row(title, part.model)
            if part.model.generation is not None:
                yield _score_row(f"{title}, written", part.model.generation)
    for path, text in scores.perplexity.items():
        bits = f"{text.bits_per_byte:.3f} bits per byte"
        yield path, "perplexity", f"{text.model:.2f}", "", f"{text.tokens:,} tokens", bits


def _score_row(title: str, score: Score) -> tuple[str, ...]:
    interval = ""
    if score.ci95 is not None:
        low, high = score.ci95
        interval = f"{low:.3f} to {high:.3f}"
    return title, score.metric, f"{score.value:.3f}", interval, f"{score.n:,}", ", ".join(_notes(score))


def _notes(score: Score) -> Iterator[str]:
    if score.chance is not None:
        yield f"chance {score.chance:.2f}"
    if score.majority is not None:
        yield f"commonest answer {score.majority:.2f}"
    if score.ties:
        yield f"{score.ties} ties"
    if score.ece is not None:
        yield f"ECE {score.ece:.2f}"
    if score.draws is not None:
        yield f"{len(score.draws)} draws of examples, SD {score.sd_of_draws:.3f}"
    if score.unparsed:
        yield f"{score.unparsed:,} unreadable"
    if score.cut and score.metric != "accuracy":
        yield f"{score.cut:,} answers cut"
    if score.groups:
        yield f"{score.groups:,} groups"
    if score.truncated:
        yield f"{score.truncated:,} prompts cut"


def predict(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(metavar="FILE", help="CSV, TSV, JSON, JSON lines or Parquet.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Answers: .csv, else JSON lines.")] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The field that holds the question.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="Asked about every record.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 256,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: QuantizationOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The tokens that would be asked; reads no weights.")
    ] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer every record of a file; run again to resume."""
    from qmedtune import predict as predictions

    if dry_run:
        asked = predictions.QuestionFile(data, column, instruction)
        found = predictions.dry_run(
            model, asked, base=base, template=template, max_new_tokens=max_new_tokens, offline=offline
        )
        return emit(found.as_json()) if as_json else _show_asked(model, found)
    if out is None:
        raise typer.BadParameter("--out FILE is needed, or --dry-run")

    done = predictions.predict(
        model, data, out, column=column, instruction=instruction, base=base, template=template,
        max_new_tokens=max_new_tokens, quantization=quantization, offline=offline,
    )  # fmt: skip
    told = done.as_json()
    emit(told) if as_json else say(", ".join(f"{key} {value}" for key, value in told.items()))


def _show_asked(model: str, found: DryRun) -> None:
    """Counts alone: the tokens spell the records."""
    from qmedtune import ui

    rows: list[tuple[str, ...]] = []
    for record in found.records:
        if record.error is not None:
            rows.append((record.id, record.error, "", ""))
            continue
        cut = "no"
        if record.truncated:
            cut = "yes"
        rows.append((record.id, f"{len(record.ids):,}", cut, f"{record.end}"))
    ui.table(f"{model}, template {found.template}", ("record", "tokens asked", "cut", "end ids"), rows)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Opens every conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 512,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: QuantizationOption = None,
    offline: OfflineOption = False,
) -> None:
    """Talk to a model with the template it was trained with."""
    from qmedtune import chat as chats

    chats.chat(
        model, base=base, template=template, system=system, max_new_tokens=max_new_tokens,
        quantization=quantization, offline=offline,
    )  # fmt: skip


def merge(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run or an adapter folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The merged model; must not exist.")],
    base: BaseOption = None,
    onto: Annotated[MergeBase, typer.Option(help="The 16-bit base, or its dequantised NF4 values.")] = "full16",
    dtype: Annotated[FloatDtype, typer.Option(help="Of the merged weights.")] = "bfloat16",
    rounding: Annotated[RoundingMode, typer.Option(help="auto: stochastic where nearest loses over 1 %.")] = "auto",
    max_kl: Annotated[float | None, typer.Option(help="Refuse above this divergence (nats). Default: none.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="STAGE=W,...", help="Of a run's stages: 01-cpt=0.7; default: the recipe's.")
    ] = None,
    other: Annotated[
        str | None, typer.Option("--with", metavar="MODEL", help="Mix with a model of the same base; a run, a folder.")
    ] = None,
    method: Annotated[MergeMethod | None, typer.Option(help="How it is mixed in. Default: linear.")] = None,
    share: Annotated[
        float | None, typer.Option("--lambda", min=0, max=1, help="How much of it: 0 nothing, 1 all. Default: 0.5.")
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fold adapters into the base, proven before anything is renamed."""
    from qmedtune.merge_folder import merge_into
    from qmedtune.recipe import MergeSection, VerifySection

    if max_kl is not None and not max_kl > 0:
        raise typer.BadParameter(f"--max-kl: got {max_kl}; allowed: a number above 0")
    section = MergeSection(
        base=onto,
        dtype=dtype,
        rounding=rounding,
        verify=VerifySection(max_kl=max_kl),
        weights=_weights(weights),
    )
    mixed = {"other": other, "method": method, "share": share}
    section = section.model_copy(update=mixed)
    merged = merge_into(model, out, section, base=base, offline=offline)
    if as_json:
        return emit(merged.as_json())
    lost = "nothing to lose"
    if merged.lost is not None:
        lost = f"{merged.lost:.2%} of the change lost"
    if merged.mixed_with is not None:
        say(f"mixed with {merged.mixed_with.name}: {merged.method}, lambda {merged.share:g}")
    say(
        f"{out}: {merged.modules} modules merged, {merged.elements:,} elements proven, "
        f"{merged.rounding} rounding to {merged.dtype}: {lost} (KL {merged.kl:.2g} nats per token)"
    )


def _weights(asked: str | None) -> dict[str, float]:
    """`01-cpt=0.7,02-sft=1` as a mapping."""
    found: dict[str, float] = {}
    for entry in asked.split(",") if asked else ():
        stage, _, weight = entry.partition("=")
        try:
            found[stage] = float(weight)
        except ValueError:
            raise typer.BadParameter(f"--weights: got {entry!r}; allowed: STAGE=NUMBER, 01-cpt=0.7") from None
        if not 0 <= found[stage] <= 2:
            raise typer.BadParameter(f"--weights: got {entry!r}; allowed: 0 to 2")
    return found
