"""The head of the report: what came out in a sentence, then figures at a glance: scores, cost, what leaked or was lost.

A run of fifty scores has no fifty tiles: verdicts are counted, and the single figures lie folded below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qmedtune.reporting import score_tables
from qmedtune.reporting.charts import Html, esc
from qmedtune.reporting.facts import (
    DROPPED,
    Comparison,
    base_name,
    both_perplexities,
    dropped_share,
    interval_text,
    outcome,
    precision_words,
    verdicts,
    warnings_of,
    wholes,
)
from qmedtune.results import Number, Run, Score
from qmedtune.units import count, digits3, duration, size

MANY_TILES = 8  # scores and perplexities; of more there is one tile of counts, and the rest folds


def header(run: Run) -> Html:
    status = esc(run.status)
    facts = [f"<span>{esc(fact)}</span>" for fact in _meta(run)]
    meta = " ".join(facts)
    return Html(
        f'<header><div class="eyebrow">qmedtune run <span class="status {status}">{status}</span></div>'
        f'<h1>{esc(run.name)}</h1><p class="outcome">{_together(outcome(run))}</p><div class="meta">{meta}</div>'
        f"{_warning_callout(run)}{tiles(run)}</header>"
    )


def _meta(run: Run) -> Iterator[str]:
    yield f"base {base_name(run)}"
    for stage in run.stages:
        yield stage.name
    if run.provenance.device is not None:
        yield run.provenance.device
    if run.seed is not None:
        yield f"seed {run.seed}"


def _together(text: str) -> Html:
    """Arrows stay in the line of both their ends."""
    return esc(text.replace(" → ", "\u00a0→\u00a0"))


def _warning_callout(run: Run) -> str:
    number = len(warnings_of(run))
    if not number:
        return ""
    word = "1 warning"
    if number > 1:
        word = f"{number} warnings"
    return (
        f'<div class="callout"><a href="#warnings-and-choices">{word}</a> to read before these figures are used.</div>'
    )


def tiles(run: Run) -> str:
    """Scores first; then what it cost, and what leaked or was lost."""
    scores = list(_score_tiles(run))
    folded = ""
    if len(scores) > MANY_TILES:
        folded = f"<details><summary>All {len(scores)} figures</summary>{_grid(scores)}</details>"
        scores = list(_counted_tiles(run))
    return _grid(scores) + folded + _grid([*_cost_tiles(run), *_loss_tiles(run)])


def _grid(cells: Sequence[Html]) -> str:
    if not cells:
        return ""
    return f'<div class="tiles">{"".join(cells)}</div>'


def _score_tiles(run: Run) -> Iterator[Html]:
    words = precision_words(run)
    for whole, final in wholes(run):
        yield _score_tile(whole, final, words)
    for source, text in run.scored.perplexity.items():
        if text.final is not None:
            yield _perplexity_tile(source, text.base, text.final, words)


def _counted_tiles(run: Run) -> Iterator[Html]:
    scored = wholes(run)
    words = precision_words(run)
    if scored:
        found = [whole.verdict for whole, _ in scored]
        better = found.count("better")
        big = Html(f'<span class="good">{better}</span><span class="from"> of {len(scored)}</span>')
        yield _tile("Tasks better", big, verdicts(found), words)
    fell = texts = 0
    for _, base, final in both_perplexities(run):
        texts += 1
        fell += final < base
    if texts:
        big = Html(f'<span class="good">{fell}</span><span class="from"> of {texts}</span>')
        yield _tile("Texts with lower perplexity", big, words)


def _cost_tiles(run: Run) -> Iterator[Html]:
    trained, peak = 0, 0
    for stage in run.stages:
        trained += stage.tokens.trained or 0
        peak = max(peak, stage.peak_memory_bytes or 0)
    seconds, on_gpu = 0.0, 0.0
    for step in run.steps:
        seconds += step.seconds or 0
        if step.kind != "data":  # one GPU for all the others, whether it is busy or not
            on_gpu += step.seconds or 0
    hours, memory_of = "", "of the process, no GPU"
    if _has_gpu(run):
        hours, memory_of = f"{on_gpu / 3600:.1f} GPU-hours", "of the GPU"
    if trained:
        yield _tile("Tokens trained", esc(count(trained)), _stage_words(run))
    if seconds:
        yield _tile("Time", esc(duration(seconds)), hours, f"{len(run.steps)} steps")
    if peak:
        yield _tile("Peak memory", esc(size(peak)), memory_of)


def _has_gpu(run: Run) -> bool:
    """Only there is the memory measured before the first step."""
    return any(stage.memory.measured_bytes for stage in run.stages)


def _loss_tiles(run: Run) -> Iterator[Html]:
    """Dropped tokens, identifiers, benchmark items in the training text: each told where it was looked for, 0 too."""
    shares: list[tuple[float, str]] = []
    for stage in run.stages:
        share = dropped_share(stage)
        if share is not None:
            shares.append((share, stage.name))
    if shares:
        worst, name = max(shares)
        tone = "quiet"
        if worst >= DROPPED:
            tone = "poor"
        yield _tile(
            "Tokens dropped", _toned(f"{worst:.1%}", tone), f"of those read for {name}", "the most of any stage"
        )
    yield from _identifiers_tile(run)
    yield from _contamination_tile(run)


def _identifiers_tile(run: Run) -> Iterator[Html]:
    found, records, modes = 0, 0, set[str]()
    for source in run.data.values():
        if source.phi.mode in (None, "off"):
            continue
        found += source.phi.identifiers
        records += source.phi.records
        modes.add(source.phi.mode)
    tone = "quiet"
    if found:
        tone = "poor"
    if modes:
        how = f"phi: {', '.join(sorted(modes))}"
        yield _tile("Identifiers found", _toned(f"{found:,}", tone), f"in {records:,} records", how)


def _contamination_tile(run: Run) -> Iterator[Html]:
    """An item that several sources hold counts once."""
    looked, left_out, items = 0, 0, set[tuple[str, str]]()
    for source in run.data.values():
        left_out += source.records.contaminated or 0
        for task, overlap in source.contamination.items():
            looked = max(looked, overlap.items)
            items |= {(task, item) for item in overlap.found}
    if looked:
        tone = "quiet"
        if items:
            tone = "poor"
        small = ("in the text of the sources", f"{left_out:,} records left out for it")
        yield _tile("Benchmark items found", _toned(f"{len(items):,}", tone), *small)


def _toned(text: str, tone: str) -> Html:
    return Html(f'<span class="{tone}">{esc(text)}</span>')


def _stage_words(run: Run) -> str:
    parts: list[str] = []
    for stage in run.stages:
        if stage.tokens.trained:
            parts.append(f"{count(stage.tokens.trained)} {stage.kind}")
    return ", ".join(parts)


def _score_tile(whole: Comparison, final: Score, words: str) -> Html:
    task, _, metric = whole.task.removesuffix(")").partition(" (")
    small = [metric or "accuracy", words]
    if final.n:
        small[0] += f", {final.n:,} items"
    if final.ci95 is None:
        small.append("no interval")
    else:
        small.append(f"95% {interval_text(final.ci95)}")
    if whole.chance is not None:
        small.append(f"chance {whole.chance:.2f}")
    if final.majority is not None:
        small.append(f"commonest answer {final.majority:.2f}")
    tone = {"better": "good", "worse": "poor", "noise": "quiet"}.get(whole.verdict, "")
    big = f'<span class="{tone}">{final.value:.2f}</span>'
    if whole.base is not None:
        big = f'<span class="from">{whole.base.value:.2f} → </span>{big}'
    return _tile(task, Html(big), *small)


def _perplexity_tile(source: str, base: Number | None, final: Number, words: str) -> Html:
    if base is None:
        return _tile(source, esc(f"{final:.2f}"), "perplexity", words, "base not measured")
    tone = "quiet"
    if final < base:
        tone = "good"
    big = Html(f'<span class="from">{digits3(base)} → </span><span class="{tone}">{digits3(final)}</span>')
    return _tile(source, big, f"perplexity, {score_tables.change(base, final)}", words, "lower is better")


def _tile(name: str, big: Html, *small: str) -> Html:
    lines = "<br>".join(esc(line) for line in small if line)
    return Html(
        f'<div class="tile"><div class="name">{esc(name)}</div><div class="big">{big}</div>'
        f'<div class="small">{lines}</div></div>'
    )
