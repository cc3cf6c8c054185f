"""The tables of how a run went: training, data, merge, cost, choices; page, text and card tell the same figures.

Deliberately does not: know HTML or Markdown; every cell is text that the renderer escapes.
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

from qmedtune.reporting.cells import UNKNOWN, Row, Table, counted, exact, shown, size_cell, time_cell
from qmedtune.results import Loss, Merge, Number, Part, Run, Shift, Source, Stage, TokenLedger


def stages(run: Run) -> Table:
    columns = ("Stage", "Kind", "Tokens trained", "Steps", "Loss", "Tokens/s", "Peak memory", "Time", "Adapter")
    rows: list[Row] = []
    for stage in run.stages:
        rows.append(
            (
                stage.name,
                stage.kind,
                counted(stage.tokens.trained),
                _steps(stage),
                _first_last(stage.loss),
                counted(stage.tokens_per_s),
                size_cell(stage.peak_memory_bytes),
                time_cell(stage.seconds),
                _adapter(stage),
            )
        )
    return Table("Stages", columns, rows, _waited(run)).or_say("No stage was trained.")


def _waited(run: Run) -> str:
    """What kept training from computing: rows to come, checkpoints to be on the disk."""
    shares: list[Number] = []
    saves: list[Number] = []
    for stage in run.stages:
        if stage.step_s:
            shares.append(stage.data_share or 0)
            saves.append((stage.slowest_save_s or 0) / stage.step_s)
    if not shares:
        return ""
    return (
        f"Waiting for rows took at most {max(shares):.2%} of a stage; "
        f"the slowest checkpoint as long as {max(saves):.1f} steps."
    )


def tokens(run: Run) -> Table:
    columns = ("Stage", "Read", "Kept", "Split", "Dropped", "Supervised", "Trained")
    rows: list[Row] = []
    for stage in run.stages:
        if stage.tokens.trained is not None:
            rows.append(_ledger_row(stage.name, stage.tokens))
    note = (
        "Read: tokens of the records. Kept: what is left after cuts. Dropped: read less kept. Trained: tokens that "
        "went through the model, repeats included; supervised: those with a loss; split: those that continue, in "
        "another row, a document begun before."
    )
    return Table("Token ledger", columns, rows, note).or_say("No stage has a token ledger.")


def _ledger_row(stage: str, ledger: TokenLedger) -> Row:
    return (
        stage,
        exact(ledger.read),
        exact(ledger.kept),
        exact(ledger.split),
        exact(ledger.dropped),
        exact(ledger.supervised),
        exact(ledger.trained),
    )


def packing(stage: str, mixture: dict[str, Part]) -> Table:
    """Tokens of one packed stage, exact, and what its tokenizer makes of each source's words."""
    columns = ("Source", "Read", "Kept", "Dropped", "Trained", "Never sampled", "Passes", "Tokens/word", "Whole words")
    rows: list[Row] = []
    for source, part in mixture.items():
        if part.fertility is not None:
            rows.append(
                (
                    source,
                    exact(part.read),
                    exact(part.kept),
                    exact(part.dropped),
                    exact(part.tokens),
                    exact(part.never_sampled),
                    shown(part.repeats, ".2f"),
                    f"{part.fertility.tokens_per_word:.2f}",
                    f"{part.fertility.share_of_words_whole:.0%}",
                )
            )
    return Table(f"Tokens of {stage}", columns, rows)


def mixture(run: Run) -> Table:
    rows: list[Row] = []
    for stage in run.stages:
        for row in mixture_of(stage).rows:
            rows.append((stage.name, *row))
    columns = ("Stage", "Source", "Asked", "Realised", "Tokens", "Repeats")
    return Table("Mixture", columns, rows, "Shares of tokens.").or_say("No stage has a mixture.")


def mixture_of(stage: Stage) -> Table:
    """That of one stage."""
    rows: list[Row] = []
    for source, part in stage.mixture.items():
        repeats = shown(part.repeats, ".2f", "×")
        rows.append((source, shown(part.asked_share, ".1%"), shown(part.share, ".1%"), exact(part.tokens), repeats))
    return Table("Mixture", ("Source", "Asked", "Realised", "Tokens", "Repeats"), rows, "Shares of tokens.")


def records(run: Run) -> Table:
    rows: list[Row] = []
    for name, source in run.data.items():
        counts = source.records
        rows.append(
            (
                name,
                source.kind or UNKNOWN,
                exact(counts.read),
                exact(counts.kept),
                exact(counts.rejected),
                exact(counts.duplicates),
                exact(counts.contaminated),
                exact(counts.refused),
                exact(source.held_out),
            )
        )
    columns = ("Source", "Kind", "Read", "Kept", "Rejected", "Duplicates", "Contaminated", "Refused", "Held out")
    note = "Held out: the part of kept that is never trained on."
    return Table("Record ledger", columns, rows, note).or_say("No data was read.")


def reading(run: Run) -> Table:
    """What the files of each source were recognised as, and what of them was not read."""
    rows: list[Row] = []
    for name, source in run.data.items():
        for what, number in source.recognised.items():
            rows.append((name, f"read as {what}", f"{exact(number)} files"))
        for what, number in source.columns_unread.items():
            rows.append((name, f"column or key not read: {what}", f"{exact(number)} records"))
        for what, number in source.files_unread.items():
            rows.append((name, f"files not read: {what}", f"{exact(number)} files"))
    return Table("What was read as what", ("Source", "What", "Count"), rows)


def findings(run: Run) -> Table:
    """Counts of what hygiene met in each source: why records went, identifiers by class, benchmark items."""
    rows: list[Row] = []
    for name, source in run.data.items():
        for what, number in _findings_of(source):
            rows.append((name, what, exact(number)))
    return Table("Findings", ("Source", "What", "Count"), rows).or_say("Nothing to report.")


def _findings_of(source: Source) -> Iterator[tuple[str, int]]:
    for reason, number in source.reasons.items():
        yield f"record left out: {reason}", number
    if source.near_duplicates:
        yield "near duplicates, among the duplicates", source.near_duplicates
    if source.near.of_earlier_sources:
        yield "near duplicates of an earlier source", source.near.of_earlier_sources
    if source.cleaned.records:
        yield "records changed by cleaning", source.cleaned.records
    for kind, number in source.phi.classes.items():
        yield f"identifier: {kind} ({source.phi.mode})", number
    for task, overlap in source.contamination.items():
        yield f"items of {task} found, of {overlap.items:,}", len(overlap.found)


def sources(run: Run) -> Table:
    rows: list[Row] = []
    for name, source in run.data.items():
        rows.append((name, source.kind or UNKNOWN, source.license or "not stated", source.terms or UNKNOWN))
    return Table("Licences and terms", ("Source", "Kind", "Licence", "Terms"), rows)


def _adapter(stage: Stage) -> str:
    if stage.adapter is None:
        return UNKNOWN
    return stage.adapter.sha256[:12]


def _steps(stage: Stage) -> str:
    if stage.steps is None:
        return UNKNOWN
    told = f"{stage.steps:,}"
    if stage.kept_step not in (None, stage.steps):
        told = f"{stage.kept_step:,} kept of {told}"
    if stage.kept_by:
        told += f" (best by {', '.join(stage.kept_by)})"
    if stage.processes:
        told += f", {len(stage.processes)} processes"
    return told


def _first_last(loss: Loss | None) -> str:
    if loss is None:
        return UNKNOWN
    return f"{loss.first:.3f} → {loss.last:.3f}"


# ---- merge, cost, provenance -----------------------------------------------------------------------------------------


def merge(run: Run) -> Table:
    columns = ("Check", "Value")
    if run.merge is None:
        return Table("Merge", columns, [], "Nothing was merged in this run.")
    rows: list[Row] = []
    for row in (*_refusal_rows(run.merge), *_merge_rows(run.merge)):
        if row[1] != UNKNOWN:
            rows.append(row)
    return Table("Merge", columns, rows, " ".join(run.merge.warnings))


def _refusal_rows(found: Merge) -> Iterator[Row]:
    if found.refused:
        yield "Published", "no: the proof has failed"
        yield "Why", (found.error or "").partition("\n")[0]
        yield "Kept as", found.path or UNKNOWN


def _merge_rows(found: Merge) -> Iterator[Row]:
    shift = found.shift_from_nf4 or Shift()
    yield "Merged onto", {"full16": "the 16-bit base", "nf4": "the dequantised NF4 base"}.get(str(found.base), UNKNOWN)
    yield "Mixed with", _mixed(found)
    yield "Written as", found.dtype or UNKNOWN
    yield "Rounding", _rounding(found)
    yield "Elements checked, one by one", exact(found.elements)
    yield "Elements that are not base + adapters", exact(found.violations)
    yield "Adapters folded in", exact(found.adapters)
    yield "Modules changed", exact(found.modules)
    yield "Lost of the change by rounding (KL)", shown(found.lost, ".3%")
    yield "Changed elements that rounding left as they were", shown(found.swallowed, ".2%")
    yield "KL divergence, merged against the same base + adapters", shown(found.kl, ".2g")
    yield "Same top token", shown(found.top1, ".2%")
    yield "Largest logit difference", shown(found.max_abs_logit_diff, ".2g")
    yield "Largest weight error, relative to its norm", shown(found.max_weight_error, ".2g")
    yield "KL divergence from the NF4 model that was trained", shown(shift.kl, ".2g")
    yield "Same top token as the NF4 model", shown(shift.top1, ".2%")
    yield "sha256", found.sha256 or UNKNOWN


def _mixed(found: Merge) -> str:
    if found.mixed_with is None:
        return UNKNOWN
    how = f"{Path(found.mixed_with.name).name}, {found.method}, lambda {shown(found.share, 'g')}"
    if found.on_sphere is None:
        return how
    return f"{how} ({found.on_sphere:,} tensors on the sphere, the others are nearly parallel)"


def _rounding(found: Merge) -> str:
    if found.rounding is None:  # runs of version 0.1
        return UNKNOWN
    how = found.rounding
    if found.rounding_seed is not None:
        how += f", seed {found.rounding_seed}"
    return f"{how}: {found.rounding_why}"


def steps(run: Run) -> Table:
    rows: list[Row] = []
    for step in run.steps:
        rows.append((step.name, step.status, time_cell(step.seconds)))
    return Table("Steps", ("Step", "Status", "Time"), rows).or_say("No step was recorded.")


def choices(run: Run) -> Table:
    rows: list[Row] = []
    for choice in run.resolved:
        rows.append((choice.key, _setting(choice.value), choice.why))
    return Table("Chosen automatically", ("Key", "Value", "Why"), rows)


def provenance(run: Run) -> Table:
    known: dict[str, JsonValue] = {
        "recipe_sha256": run.recipe_sha256,
        "seed": run.seed,
        "offline": run.offline,
    }
    for name, source in run.data.items():
        known[f"data.{name}.sha256"] = source.sha256
    known |= run.provenance.as_json()
    rows: list[Row] = []
    for row in _flat(known):
        if row[1] != "None":
            rows.append(row)
    return Table("Provenance", ("What", "Value"), rows)


def _flat(facts: dict[str, JsonValue], prefix: str = "") -> Iterator[Row]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(str(each) for each in value)
        else:
            yield f"{prefix}{key}", str(value)


def _setting(value: JsonValue) -> str:
    """As a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{key} {_setting(each)}" for key, each in value.items())
    return str(value)
