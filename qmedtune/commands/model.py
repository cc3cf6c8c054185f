"""Commands about models: eval, predict, chat, merge. A model is a run, a folder, or a Hub id."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qmedtune.commands.common import JsonOption, OfflineOption, emit


class Precision(StrEnum):
    nf4 = "nf4"
    none = "none"


class Split(StrEnum):
    test = "test"
    dev = "dev"
    train = "train"


class Prompts(StrEnum):
    own = "own"
    me_llama = "me_llama"


class Extraction(StrEnum):
    stated = "stated"
    me_llama = "me_llama"


class Onto(StrEnum):
    full16 = "full16"
    nf4 = "nf4"


class Method(StrEnum):
    linear = "linear"
    slerp = "slerp"
    task_arithmetic = "task_arithmetic"


class RoundingChoice(StrEnum):
    auto = "auto"
    nearest = "nearest"
    stochastic = "stochastic"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A run, an adapter or model folder, or a Hub id.")]
BaseOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Base of an adapter folder.")]
TemplateOption = Annotated[str | None, typer.Option(metavar="NAME", help="Instead of the one it was trained with.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Default: as its adapter was trained, else 16 bit.")]


def evaluate(
    model: ModelArgument,
    tasks: Annotated[str | None, typer.Option(metavar="A,B=FILE", help="facts, pubmedqa=FILE, perplexity=FILE")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="File of the tasks that name none.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep items here; resume.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items of each task.")] = None,
    split: Annotated[Split | None, typer.Option(help="Of a folder as published; default: test.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="In place of the tasks' usual one.")] = None,
    bertscore: Annotated[str | None, typer.Option(metavar="DIR", help="A local encoder, for summaries.")] = None,
    shots: Annotated[int, typer.Option(min=0, max=32, help="Examples before each question.")] = 0,
    shot_seeds: Annotated[int, typer.Option(min=3, max=20, help="Draws of examples; scores are their means.")] = 3,
    shots_from: Annotated[
        str | None, typer.Option(metavar="FILE", help="Default: the folder's training split, else the other items.")
    ] = None,
    prompts: Annotated[Prompts, typer.Option(help="Who words the questions.")] = Prompts.own,
    extraction: Annotated[Extraction, typer.Option(help="How an answer is read.")] = Extraction.stated,
    generate: Annotated[bool, typer.Option(help="Also judge what the model writes.")] = True,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: PrecisionOption = None,
    harness: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the items of --limit, and the bootstrap.")] = 17,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on tasks and held-out texts."""
    if (tasks is None) == (harness is None):
        raise typer.BadParameter("give one of --tasks (facts, pubmedqa=FILE ...) and --harness")
    chosen = quantization.value if quantization else None
    if harness:
        from qmedtune.evaluation.harness import evaluate_with_harness

        found = evaluate_with_harness(
            model, harness.split(","), limit=limit, base=base, template=template, quantization=chosen, seed=seed,
            offline=offline,
        )  # fmt: skip
        return emit(found) if as_json else _show_harness(found)
    from qmedtune.evaluate import TEXTS, evaluate_model, named_file
    from qmedtune.recipe import TaskSection

    asked: list[str | TaskSection] = []
    for entry in str(tasks).split(","):
        name, path = named_file(entry, data)
        section = TaskSection(
            task=name, path=path, limit=limit, split=split.value if split else None, metric=metric, bertscore=bertscore,
            shots=shots, shot_seeds=shot_seeds, shots_from=shots_from, prompts=prompts.value,
            extraction=extraction.value,
        )  # fmt: skip
        asked.append(entry if name == TEXTS else section)
    facts = evaluate_model(
        model, asked, data=data, base=base, template=template, out=out, generate=generate, quantization=chosen,
        seed=seed, offline=offline,
    )  # fmt: skip
    emit(facts) if as_json else _show_scores(model, facts)


def _show_scores(model: str, facts: dict[str, Any]) -> None:
    from qmedtune import ui

    weights = f"NF4 computed in {facts['computed_in']}" if facts["weights"] == "nf4" else facts["weights"]
    title = f"{model}, template {facts['template']}, {weights}"
    ui.table(title, ("task", "metric", "value", "95 % interval", "items", "notes"), list(_score_rows(facts)))


def _show_harness(facts: dict[str, Any]) -> None:
    from qmedtune import ui

    rows = [
        (task, metric, f"{value:.4f}", f"{scores.get(metric + '_stderr', float('nan')):.4f}")
        for task, scores in facts["tasks"].items()
        for metric, value in scores.items()
        if not metric.endswith("_stderr")
    ]
    ui.table(f"lm-evaluation-harness {facts['harness']}", ("task", "metric", "value", "standard error"), rows)


def _score_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for task, found in facts["tasks"].items():
        parts = {task: found, **{f"{task}: {facet}": part for facet, part in found.get("facets", {}).items()}}
        for name, part in parts.items():
            yield _score_row(name, part["model"])
            if generated := part["model"].get("generation"):
                yield _score_row(f"{name}, written", generated)
    for text, found in facts["perplexity"].items():
        bits = f"{found['bits_per_byte']:.3f} bits per byte"
        yield text, "perplexity", f"{found['model']:.2f}", "", f"{found['tokens']:,} tokens", bits


def _score_row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    low, high = scores["ci95"]
    value, interval = f"{scores[scores['metric']]:.3f}", f"{low:.3f} to {high:.3f}"
    return name, scores["metric"], value, interval, f"{scores['n']:,}", ", ".join(_notes(scores))


def _notes(scores: dict[str, Any]) -> Iterator[str]:
    if "chance" in scores:
        yield f"chance {scores['chance']:.2f}"
    if "majority" in scores:
        yield f"commonest answer {scores['majority']:.2f}"
    if scores.get("ties"):
        yield f"{scores['ties']} ties"
    if "ece" in scores:
        yield f"ECE {scores['ece']:.2f}"
    if "draws" in scores:
        yield f"{len(scores['draws'])} draws of examples, SD {scores['sd_of_draws']:.3f}"
    if scores.get("unparsed"):
        yield f"{scores['unparsed']:,} unreadable"
    if scores.get("cut") and scores["metric"] != "accuracy":
        yield f"{scores['cut']:,} answers cut"
    if scores.get("groups"):
        yield f"{scores['groups']:,} groups"
    if scores.get("truncated"):
        yield f"{scores['truncated']:,} prompts cut"


def predict(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(metavar="FILE", help="CSV, TSV, JSON, JSON lines or Parquet.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Answers: .csv, else JSON lines.")] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The field that holds the question.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="Asked about every record.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 256,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: PrecisionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The tokens that would be asked; reads no weights.")
    ] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer every record of a file; run again to resume."""
    from qmedtune import predict as predictions

    if dry_run:
        asked = predictions.Questions(data, column, instruction)
        found = predictions.dry_run(
            model, asked, base=base, template=template, max_new_tokens=max_new_tokens, offline=offline
        )
        return emit(found) if as_json else _show_asked(model, found)
    if out is None:
        raise typer.BadParameter("--out FILE is needed, or --dry-run")

    facts = predictions.predict(
        model, data, out, column=column, instruction=instruction, base=base, template=template,
        max_new_tokens=max_new_tokens, quantization=quantization.value if quantization else None, offline=offline,
    )  # fmt: skip
    emit(facts) if as_json else print(", ".join(f"{key} {value}" for key, value in facts.items()))


def _show_asked(model: str, found: dict[str, Any]) -> None:
    """Counts alone: the tokens spell the records."""
    from qmedtune import ui

    rows = [
        (record["id"], record["error"], "", "")
        if "error" in record
        else (record["id"], f"{len(record['ids']):,}", "yes" if record["truncated"] else "no", f"{record['end']}")
        for record in found["records"]
    ]
    ui.table(f"{model}, template {found['template']}", ("record", "tokens asked", "cut", "end ids"), rows)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Opens every conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 512,
    base: BaseOption = None,
    template: TemplateOption = None,
    quantization: PrecisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Talk to a model with the template it was trained with."""
    from qmedtune import chat as chats

    chats.chat(
        model, base=base, template=template, system=system, max_new_tokens=max_new_tokens,
        quantization=quantization.value if quantization else None, offline=offline,
    )  # fmt: skip


def merge(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run or an adapter folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The merged model; must not exist.")],
    base: BaseOption = None,
    onto: Annotated[Onto, typer.Option(help="The 16-bit base, or its dequantised NF4 values.")] = Onto.full16,
    dtype: Annotated[Dtype, typer.Option(help="Of the merged weights.")] = Dtype.bfloat16,
    rounding: Annotated[RoundingChoice, typer.Option(help="auto: stochastic where nearest loses over 1 %.")] = (
        RoundingChoice.auto
    ),
    max_kl: Annotated[float | None, typer.Option(help="Refuse above this divergence (nats). Default: none.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="STAGE=W,...", help="Of a run's stages: 01-cpt=0.7; default: the recipe's.")
    ] = None,
    other: Annotated[
        str | None, typer.Option("--with", metavar="MODEL", help="Mix with a model of the same base; a run, a folder.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="How it is mixed in. Default: linear.")] = None,
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
        base=onto.value,
        dtype=dtype.value,
        rounding=rounding.value,
        verify=VerifySection(max_kl=max_kl),
        weights=_weights(weights),
    )
    mixed = {"other": other, "method": method.value if method else None, "share": share}
    section = section.model_copy(update=mixed)
    merged = merge_into(model, out, section, base=base, offline=offline)
    if as_json:
        return emit(merged.as_json())
    lost = "nothing to lose"
    if merged.lost is not None:
        lost = f"{merged.lost:.2%} of the change lost"
    if merged.mixed_with is not None:
        print(f"mixed with {merged.mixed_with.name}: {merged.method}, lambda {merged.share:g}")
    print(
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
