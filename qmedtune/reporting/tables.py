"""The tables of the report as plain data, so that report.html, report.md and the model card tell the same figures.

Deliberately does not: know HTML or Markdown; every cell is text that the renderer escapes.
"""

import math
from dataclasses import dataclass

from qmedtune.reporting.facts import comparisons, nf4_perplexities, perplexities, precision_words
from qmedtune.units import count, digits3, duration, size

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`note` explains the columns or, when there are no rows, says what is missing and why."""

    title: str
    columns: Row
    rows: list[Row]
    note: str = ""


def evaluation(run: dict) -> Table:
    rows = []
    for c in comparisons(run):
        scores = [s for s in (c.final, c.base) if s is not None]
        items = next((f"{s.n:,}" for s in scores if s.n), "–")
        commonest = next((f"{s.majority:.2f}" for s in scores if s.majority is not None), "–")
        both = str(c.base or "–"), str(c.final or "–")
        rows.append((c.label, *both, c.change or "–", commonest, items, c.reading or "–"))
    note = (
        f"{_scored_in(run)}{_asked_in(run)}"
        "Share of items answered correctly unless another metric is named, with 95% intervals. Base and final "
        "answered the same items; a change is called noise when its paired test gives p ≥ 0.05. Commonest: "
        f"what always the commonest answer scores, without any knowledge.{_methods(run)}"
        if rows
        else "No task was scored in this run."
    )
    return Table("Scores", ("Task", "Base", "Final", "Change", "Commonest", "Items", "Reading"), rows, note)


def _methods(run: dict) -> str:
    """Which intervals the scores and changes carry, by name."""
    tasks = (run.get("evaluation") or {}).get("tasks", {}).values()
    parts = [task.get(name) or {} for task in tasks for name in ("base", "final", "difference")]
    names = dict.fromkeys(part["ci95_method"] for part in parts if "ci95_method" in part)
    return f" Intervals: {'; '.join(names)}." if names else ""


def _asked_in(run: dict) -> str:
    name = (run.get("evaluation") or {}).get("template")
    return f"Asked in the template {name}. " if name else ""


def _scored_in(run: dict) -> str:
    return f"In {words}. " if (words := precision_words(run)) else ""


def perplexity(run: dict) -> Table:
    rows = []
    for source, values in perplexities(run).items():
        rows.append(_perplexity_row(source, *values))
    for source, values in nf4_perplexities(run).items():
        rows.append(_perplexity_row(f"{source}, in NF4 as trained", *values))
    window = (run.get("evaluation") or {}).get("window_tokens")
    texts = f"Whole documents, in windows of {window:,} tokens where they are longer. " if window else ""
    note = (
        f"{_scored_in(run)}Per token of held-out text, lower is better. {texts}"
        "Point estimates: no interval is computed."
        if rows
        else "No perplexity was measured in this run."
    )
    return Table("Perplexity", ("Text", "Base", "Final", "Change"), rows, note)


def _perplexity_row(source: str, base: float | None, final: float | None) -> Row:
    changed = change(base, final) if base and final else "–"
    return (source, *("–" if value is None else digits3(value) for value in (base, final)), changed)


def change(before: float, after: float) -> str:
    """Of a perplexity, in per cent with its sign."""
    return f"{after / before - 1:+.1%}".replace("-", "−")


def quantisation(run: dict) -> Table:
    """What NF4 costs the base, and how much of what training gained in NF4 is left in what is delivered."""
    delivered = perplexities(run)
    rows = []
    for source, (nf4_base, nf4_final) in nf4_perplexities(run).items():
        base, final = delivered[source]
        if base and final:
            changes = change(base, nf4_base), change(nf4_base, nf4_final), change(base, final)
            repaired = math.log(nf4_base / nf4_final) - math.log(base / final)
            rows.append((source, *changes, f"{repaired:+.3f}".replace("-", "−")))
    note = "Changes of perplexity. Repaired: nats per token that training gained in NF4 and the delivered model does "
    note += "not keep, because they only made good what rounding to NF4 had cost."
    columns = ("Text", "NF4 costs the base", "Training, in NF4", "Training, as delivered", "Only repaired")
    return Table("Quantisation", columns, rows, note if rows else "")


def audit(run: dict) -> Table:
    """Rows of the memorisation audit; none where the recipe asks for no audit."""
    facts = run.get("audit") or {"stages": {}, "references": 0}
    rows = [
        (
            stage,
            row["source"] + (", masked prompts" if row["masked"] else ""),
            f"{row['repeats']}×" if row["repeats"] else "never (control)",
            "–" if row["passes"] is None else f"{row['repeats'] * row['passes']:.0f}×",
            f"{row['exposure']:.1f} bits",
            f"{row['extracted']} of {row['canaries']}",
        )
        for stage, found in facts["stages"].items()
        for row in found
    ]
    note = (
        "Invented secrets, planted as often as told. Exposure: how far up the secret ranks among "
        f"{facts['references'] + 1} numbers of its form, on average; 1.4 bits is chance, "
        f"{math.log2(facts['references'] + 1):.1f} the most that can be seen. Extracted: written word for word by "
        "greedy decoding behind the words in front of it. Low figures are no proof of privacy."
    )
    columns = ("After", "Planted in", "Copies", "Trained on", "Exposure", "Extracted")
    return Table("Memorisation", columns, rows, note if rows else "No audit was asked for.")


def classification(run: dict) -> Table:
    """Empty where no stage classifies."""
    found = [(stage, stage["classification"]) for stage in run.get("stages", []) if stage.get("classification")]
    rows = [
        (
            stage["name"],
            _score(facts),
            _three(facts.get("auprc")),
            _three(facts.get("micro_f1")),
            _three(facts.get("macro_f1")),
            _exact(facts["n"]),
            _exact(facts["patients"]),
            _exact(facts["scored_labels"]),
            _exact(facts["labels"]),
            _exact(facts["unknown"]),
        )
        for stage, facts in found
    ]
    counts = ("Documents", "Patients", "Labels scored", "Labels", "Of unknown label")
    columns = ("Stage", "AUROC", "AUPRC", "Micro F1", "Macro F1", *counts)
    note = "Areas and macro F1 are means over labels, on documents held out, with the 95% interval over patients; an "
    note += "AUROC of 0.5 is chance, an AUPRC of the label's share. F1 of the labels that are chosen."
    return Table("Classification", columns, rows, note)


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _score(facts: dict) -> str:
    if facts["auroc"] is None:
        return "–"
    return f"{facts['auroc']:.3f} ({facts['ci95'][0]:.3f}–{facts['ci95'][1]:.3f})"


def stages(run: dict) -> Table:
    rows = [
        (
            stage["name"],
            stage["kind"],
            _count(stage.get("tokens", {}).get("trained")),
            _steps(stage),
            _first_last(stage.get("loss")),
            _count(stage.get("tokens_per_s")),
            size(stage["peak_memory_bytes"]) if stage.get("peak_memory_bytes") else "–",
            duration(stage["seconds"]) if stage.get("seconds") is not None else "–",
            (stage.get("adapter") or {}).get("sha256", "–")[:12],
        )
        for stage in run.get("stages", [])
    ]
    columns = ("Stage", "Kind", "Tokens trained", "Steps", "Loss", "Tokens/s", "Peak memory", "Time", "Adapter")
    return Table("Stages", columns, rows, _waited(run) if rows else "No stage was trained.")


def _waited(run: dict) -> str:
    """What kept training from computing: rows to come, checkpoints to be on the disk."""
    stages = [stage for stage in run["stages"] if stage.get("step_s")]
    if not stages:
        return ""
    share = max(stage["data_share"] for stage in stages)
    steps = max(stage["slowest_save_s"] / stage["step_s"] for stage in stages)
    return f"Waiting for rows took at most {share:.2%} of a stage; the slowest checkpoint as long as {steps:.1f} steps."


def tokens(run: dict) -> Table:
    names = ("read", "kept", "split", "dropped", "supervised", "trained")
    rows: list[Row] = []
    for stage in run.get("stages", []):
        if ledger := stage.get("tokens"):
            rows.append((stage["name"], *(_exact(ledger.get(name)) for name in names)))
    columns = ("Stage", *(name.capitalize() for name in names))
    note = (
        "Read: tokens of the records. Kept: what is left after cuts. Dropped: read less kept. Trained: tokens that "
        "went through the model, repeats included; supervised: those with a loss; split: those that continue, in "
        "another row, a document begun before."
        if rows
        else "No stage has a token ledger."
    )
    return Table("Token ledger", columns, rows, note)


def packing(stage: str, mixture: dict) -> Table:
    """Tokens of one packed stage, exact, and what its tokenizer makes of each source's words."""
    rows = [
        (
            source,
            _exact(part["read"]),
            _exact(part["kept"]),
            _exact(part["dropped"]),
            _exact(part["tokens"]),
            _exact(part["never_sampled"]),
            f"{part['repeats']:.2f}",
            f"{part['fertility']['tokens_per_word']:.2f}",
            f"{part['fertility']['share_of_words_whole']:.0%}",
        )
        for source, part in mixture.items()
        if "fertility" in part
    ]
    columns = ("Source", "Read", "Kept", "Dropped", "Trained", "Never sampled", "Passes", "Tokens/word", "Whole words")
    return Table(f"Tokens of {stage}", columns, rows, "")


def mixture(run: dict) -> Table:
    rows = [
        (
            stage["name"],
            source,
            _part(part.get("asked_share")),
            _part(part["share"]),
            _exact(part["tokens"]),
            _repeats(part.get("repeats")),
        )
        for stage in run.get("stages", [])
        for source, part in (stage.get("mixture") or {}).items()
    ]
    columns = ("Stage", "Source", "Asked", "Realised", "Tokens", "Repeats")
    return Table("Mixture", columns, rows, "Shares of tokens." if rows else "No stage has a mixture.")


def records(run: dict) -> Table:
    names = ("read", "kept", "rejected", "duplicates", "contaminated", "refused")
    rows: list[Row] = []
    for name, source in run.get("data", {}).items():
        counts = [_exact(source.get("records", {}).get(column)) for column in names]
        rows.append((name, source.get("kind", "–"), *counts, _exact(source.get("held_out"))))
    columns = ("Source", "Kind", *(name.capitalize() for name in names), "Held out")
    note = "Held out: the part of kept that is never trained on." if rows else "No data was read."
    return Table("Record ledger", columns, rows, note)


def reading(run: dict) -> Table:
    """What the files of each source were recognised as, and what of them was not read."""
    rows: list[Row] = []
    for name, source in run.get("data", {}).items():
        rows += [(name, f"read as {what}", f"{_exact(n)} files") for what, n in source.get("recognised", {}).items()]
        for key, unit in (("columns_unread", "records"), ("files_unread", "files")):
            shown = "column or key not read" if key == "columns_unread" else "files not read"
            rows += [(name, f"{shown}: {what}", f"{_exact(n)} {unit}") for what, n in source.get(key, {}).items()]
    return Table("What was read as what", ("Source", "What", "Count"), rows)


def findings(run: dict) -> Table:
    """Counts of what hygiene met in each source: why records went, identifiers by class, benchmark items."""
    rows: list[Row] = []
    for name, source in run.get("data", {}).items():
        rows += [(name, f"record left out: {reason}", _exact(n)) for reason, n in source.get("reasons", {}).items()]
        if source.get("near_duplicates"):
            rows.append((name, "near duplicates, among the duplicates", _exact(source["near_duplicates"])))
        if of_earlier := source.get("near", {}).get("of_earlier_sources"):
            rows.append((name, "near duplicates of an earlier source", _exact(of_earlier)))
        if cleaned := source.get("cleaned", {}).get("records"):
            rows.append((name, "records changed by cleaning", _exact(cleaned)))
        phi = source.get("phi") or {}
        rows += [(name, f"identifier: {kind} ({phi['mode']})", _exact(n)) for kind, n in phi.get("classes", {}).items()]
        for task, overlap in source.get("contamination", {}).items():
            rows.append((name, f"items of {task} found, of {overlap['items']:,}", _exact(len(overlap["found"]))))
    return Table("Findings", ("Source", "What", "Count"), rows, "" if rows else "Nothing to report.")


def sources(run: dict) -> Table:
    rows = [
        (name, source.get("kind", "–"), source.get("license") or "not stated", source.get("terms") or "–")
        for name, source in run.get("data", {}).items()
    ]
    return Table("Licences and terms", ("Source", "Kind", "Licence", "Terms"), rows)


def merge(run: dict) -> Table:
    facts = run.get("merge")
    if not facts:
        return Table("Merge", ("Check", "Value"), [], "Nothing was merged in this run.")
    onto = {"full16": "the 16-bit base", "nf4": "the dequantised NF4 base"}.get(facts["base"], facts["base"])
    shift = facts.get("shift_from_nf4") or {}
    refused = facts.get("status") == "refused"
    rows = [
        ("Published", "no: the proof has failed" if refused else "–"),
        ("Why", facts["error"].splitlines()[0] if refused else "–"),
        ("Kept as", str(facts.get("path") or "–") if refused else "–"),
        ("Merged onto", str(onto)),
        ("Written as", str(facts.get("dtype", "–"))),
        ("Rounding", _rounding(facts)),
        ("Elements checked, one by one", _exact(facts.get("elements"))),
        ("Elements that are not base + adapters", _exact(facts.get("violations"))),
        ("Adapters folded in", _exact(facts.get("adapters"))),
        ("Modules changed", _exact(facts.get("modules"))),
        ("Lost of the change by rounding (KL)", _loss(facts.get("lost"))),
        ("Changed elements that rounding left as they were", _share(facts.get("swallowed"))),
        ("KL divergence, merged against the same base + adapters", _tiny(facts.get("kl"))),
        ("Same top token", _share(facts.get("top1"))),
        ("Largest logit difference", _tiny(facts.get("max_abs_logit_diff"))),
        ("Largest weight error, relative to its norm", _tiny(facts.get("max_weight_error"))),
        ("KL divergence from the NF4 model that was trained", _tiny(shift.get("kl"))),
        ("Same top token as the NF4 model", _share(shift.get("top1"))),
        ("sha256", str(facts.get("sha256", "–"))),
    ]
    return Table(
        "Merge", ("Check", "Value"), [row for row in rows if row[1] != "–"], " ".join(facts.get("warnings", []))
    )


def _rounding(facts: dict) -> str:
    if "rounding" not in facts:  # runs of version 0.1
        return "–"
    seed = f", seed {facts['rounding_seed']}" if facts.get("rounding_seed") is not None else ""
    return f"{facts['rounding']}{seed}: {facts['rounding_why']}"


def _loss(lost: float | None) -> str:
    return "–" if lost is None else f"{lost:.3%}"


def steps(run: dict) -> Table:
    rows = [
        (step["name"], step["status"], duration(step["seconds"]) if step.get("seconds") is not None else "–")
        for step in run.get("steps", [])
    ]
    return Table("Steps", ("Step", "Status", "Time"), rows, "" if rows else "No step was recorded.")


def choices(run: dict) -> Table:
    rows = [(each["key"], _setting(each["value"]), each["why"]) for each in run.get("resolved", [])]
    return Table("Chosen automatically", ("Key", "Value", "Why"), rows)


def provenance(run: dict) -> Table:
    facts = {"recipe_sha256": run.get("recipe_sha256"), "seed": run.get("seed"), "offline": run.get("offline")}
    facts |= {f"data.{name}.sha256": source.get("sha256") for name, source in run.get("data", {}).items()}
    rows = [row for row in _flat(facts | run.get("provenance", {})) if row[1] != "None"]
    return Table("Provenance", ("What", "Value"), rows)


def _flat(facts: dict, prefix: str = "") -> list[Row]:
    rows: list[Row] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def _setting(value: object) -> str:
    """As a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(f"{k} {_setting(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _count(value: float | None) -> str:
    return "–" if value is None else count(value)


def _exact(value: int | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _part(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _tiny(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _repeats(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _steps(stage: dict) -> str:
    steps, kept = stage.get("steps"), stage.get("kept_step")
    if steps is None:
        return "–"
    by = ", ".join(stage.get("kept_by") or ())
    told = f" (best by {by})" if by else ""
    return f"{steps:,}{told}" if kept in (None, steps) else f"{kept:,} kept of {steps:,}{told}"


def _first_last(loss: dict | None) -> str:
    return f"{loss['first']:.3f} → {loss['last']:.3f}" if loss else "–"
