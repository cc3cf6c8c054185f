"""`qmedtune bench`: measured against the limit and against installed peers, in one run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from qmedtune.commands.common import JsonOption, TimeLimitOption, emit

if TYPE_CHECKING:
    from qmedtune.bench.result import BenchResult

ContendersOption = Annotated[
    str | None, typer.Option("--contenders", metavar="A,B", help="Names, the reference first; default: all.")
]
STATIC_COLUMNS = ("kernel", "target", "regs", "spills", "shared", "ins_per_element")
MEASURED_COLUMNS = ("kernel", "shape", "contender", "value", "unit", "ratio", "of_limit", "skipped")


def _made(context: typer.Context, folder: Path | None) -> Path | None:
    """The folder of `--scratch`, made where it is missing; not while a shell completes the line."""
    if folder is not None and not context.resilient_parsing:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


ShapeOption = Annotated[str, typer.Option("--shape", metavar="NAME", help="A model shape, e.g. 1.1b.")]
RoomOption = Annotated[Path | None, typer.Option("--scratch", metavar="DIR", help="Room for twice the model.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds, contenders in turn; medians are told.")]


def kernels(
    static: Annotated[bool, typer.Option("--static", help="Read the machine code; needs no GPU.")] = False,
    only: Annotated[str, typer.Option(metavar="NAME", help="Kernels whose name contains this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
    results: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep finished rows here; resume.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Each kernel against its limit and against installed peers."""
    from qmedtune.bench import kernels as bench_kernels
    from qmedtune.errors import RunError

    facts = bench_kernels.bench_kernels(static=static, out=results, quick=quick, only=only)
    if as_json:
        emit(facts)
    else:
        _show_rows(facts, STATIC_COLUMNS if static else MEASURED_COLUMNS)
    if broken := bench_kernels.failures(facts):
        raise RunError("\n".join(["bench kernels --static: limits are broken", *broken[:5]]))


def train(
    shape: Annotated[str, typer.Option(metavar="NAME", help="tiny, builtin:smollm2, 1b, 8b, 13b or 70b.")] = "tiny",
    contenders: ContendersOption = None,
    rounds: RoundsOption = 3,
    seq_len: Annotated[int | None, typer.Option(min=16, help="Tokens per packed row.")] = None,
    document: Annotated[int | None, typer.Option(min=1, help="Tokens per document in a row.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows per optimiser step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows at a time.")] = None,
    rank: Annotated[int | None, typer.Option("--r", min=1, help="Of the adapters; alpha is twice that.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Optimiser steps, warm-up included.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--keep", help="Recompute every layer, or none.")
    ] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Of the card, enforced for everybody.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Of the steps: not counted.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Each at the micro-batch and checkpointing it is fastest with, searched.")
    ] = False,
    context: Annotated[
        str | None, typer.Option("--context", metavar="GIB,GIB", help="Instead: the longest row that trains in each.")
    ] = None,
    results: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep finished rows here; resume.")] = None,
    scratch: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the random model here.")] = None,
    time_limit: TimeLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Training speed beside TRL + PEFT and a bare PyTorch loop; or the longest context."""
    from qmedtune.bench import context as bench_context
    from qmedtune.bench import train as bench_train
    from qmedtune.bench.job import job_of

    chosen = {"seq_len": seq_len, "micro_batch": micro_batch, "rows": rows, "steps": steps, "document": document}
    chosen |= {
        "warmup_steps": warmup,
        "checkpointing": checkpointing,
        "memory_gib": memory,
        "r": rank,
        "alpha": rank and 2.0 * rank,
    }
    job = job_of(shape, {name: value for name, value in chosen.items() if value is not None})
    limit = time_limit or bench_train.TIME_LIMIT_S
    if context:
        budgets = [float(gib) for gib in context.split(",")]
        return _show(
            bench_context,
            bench_context.bench_context(job, budgets, results=results, time_limit_s=limit, models=scratch),
            as_json,
        )
    names = _names(contenders, bench_train)
    _show(
        bench_train,
        bench_train.bench_train(
            job, names, rounds=rounds, results=results, time_limit_s=limit, models=scratch, best=best
        ),
        as_json,
    )


def load(
    shape: Annotated[str, typer.Option(metavar="NAME", help="tiny, 1b, 1.1b, 8b, 13b or 70b.")] = "tiny",
    cases: Annotated[str, typer.Option(metavar="A,B", help="16-bit, nf4.")] = "16-bit,nf4",
    rounds: RoundsOption = 3,
    scratch: Annotated[Path | None, typer.Option(metavar="DIR", callback=_made, help="Room for the model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How long a GPU waits: for the base, the next stage, a checkpoint."""
    from qmedtune.bench import load as bench_load

    _show(bench_load, bench_load.bench_load(shape, tuple(cases.split(",")), rounds, scratch), as_json)


def data(
    cases: Annotated[
        str | None, typer.Option(metavar="A,B", help="tokenise, jats, near, decontaminate; memory.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON lines; default: made text.")] = None,
    rounds: RoundsOption = 3,
    sizes: Annotated[str, typer.Option(metavar="MB,MB", help="memory: sizes of the made corpora.")] = "64,256,1024",
    as_json: JsonOption = False,
) -> None:
    """Reading, tokenising, deduplicating beside installed peers."""
    from qmedtune.bench import data as bench_data

    sizes_mb = [int(size) for size in sizes.split(",")]
    facts = bench_data.bench_data(
        cases=cases.split(",") if cases else None, rounds=rounds, corpus=corpus, sizes_mb=sizes_mb
    )
    _show(bench_data, facts, as_json)


def merge(
    shape: ShapeOption = "1.1b",
    contenders: ContendersOption = None,
    rounds: RoundsOption = 3,
    scratch: RoomOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of a merge beside PEFT's."""
    from qmedtune.bench import merge as measured

    names = tuple(_names(contenders, measured))
    _show(measured, measured.bench_merge(shape, names, rounds, scratch), as_json)


def export(
    shape: ShapeOption = "1.1b",
    contenders: ContendersOption = None,
    rounds: RoundsOption = 3,
    scratch: RoomOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of a GGUF export beside copying the bytes."""
    from qmedtune.bench import export as measured

    names = tuple(_names(contenders, measured))
    _show(measured, measured.bench_export(shape, names, rounds, scratch), as_json)


def evaluation(
    model: Annotated[str, typer.Option(metavar="MODEL", help="What `qmedtune eval` takes.")] = "builtin:tiny",
    tasks: Annotated[str, typer.Option(metavar="A,B=FILE", help="Choices; also as facts-3shot.")] = "facts,facts-3shot",
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items of each task.")] = None,
    contenders: ContendersOption = None,
    rounds: RoundsOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Scoring of choices beside lm-evaluation-harness."""
    from qmedtune.bench import evaluate as bench_evaluate

    names = _names(contenders, bench_evaluate)
    _show(
        bench_evaluate,
        bench_evaluate.bench_eval(model=model, tasks=tasks.split(","), rounds=rounds, limit=limit, contenders=names),
        as_json,
    )


def _show_rows(facts: BenchResult, columns: tuple[str, ...]) -> None:
    from qmedtune import ui

    rows = []
    for row in facts["rows"]:
        values = [row.get(column) for column in columns]
        rows.append(["" if value is None else str(value) for value in values])
    ui.table(f"bench {facts['bench']} on {facts['device']}", columns, rows)


def _names(asked: str | None, module: ModuleType) -> list[str]:
    return asked.split(",") if asked else list(module.CONTENDERS)


def _show(module: ModuleType, result: BenchResult, as_json: bool) -> None:
    if as_json:
        return emit(dict(result))
    from qmedtune import ui

    columns, rows = module.render(result)
    ui.table(f"bench {result['bench']} on {result['device']}", columns, rows)
