"""The report of a run: report.html, report.md, and the model card of the merged model.

Everything is taken from run.json and metrics.jsonl, so that `qmedtune report RUN` renders the same page again at any
time, in well under a second and without torch.

Deliberately does not: verify hashes (store.py), recompute results, or show text of any record.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from qmedtune import disk
from qmedtune.reporting import duels, privacy, score_tables, sweeps, tables, unfinished
from qmedtune.reporting import page as report_html
from qmedtune.reporting.blocks import DISCLAIMER
from qmedtune.reporting.calibration import calibration_table
from qmedtune.reporting.cells import Table
from qmedtune.reporting.facts import Metrics, base_name, outcome, precision_words, warnings_of, wholes
from qmedtune.results import MixedWith, Run, Score

STAGE_WORDS = {
    "cpt": "continual pretraining",
    "sft": "supervised fine-tuning",
    "pretrain": "pretraining from scratch",
    "classify": "classification",
}
PHI_WORDS = {
    "off": "Nothing was looked for: the notes were used as they are.",
    "report": "Identifiers were looked for and counted, and left in place.",
    "redact": "Identifiers that were found were replaced before training.",
    "refuse": "Records in which identifiers were found were left out.",
}


def write_report(run_dir: Path) -> dict[str, int]:
    """Write report.html and report.md into `run_dir`; returns their names and sizes in bytes."""
    run = unfinished.read_run(run_dir)
    metrics = unfinished.read_metrics(run_dir, run)
    written = {"report.html": report_html.page(run, metrics), "report.md": markdown(run, metrics)}
    sizes: dict[str, int] = {}
    for name, text in written.items():
        disk.write_atomic(run_dir / name, text)
        sizes[name] = len(text.encode(errors="backslashreplace"))
    return sizes


def markdown(run: Run, metrics: Metrics) -> str:
    """The report as text: the same tables as the page, without charts."""
    return _joined(_markdown_parts(run, metrics))


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_parts(run: Run, metrics: Metrics) -> Iterator[str]:
    yield f"# {_plain(run.name)}"
    yield _plain(outcome(run))
    yield f"Status: {_plain(run.status)}. Base: {_plain(base_name(run))}."
    yield _section(score_tables.evaluation(run))
    yield _section(score_tables.perplexity(run))
    yield _section_if_any(score_tables.quantisation(run))
    yield _section_if_any(calibration_table(run))
    if run.against is not None:
        yield _section(duels.head_to_head(run.against))
        yield _listed(duels.claims(run.against))
    yield _section_if_any(score_tables.classification(run))
    if run.audit is not None:
        yield _section(score_tables.audit(run))
    yield _section(tables.stages(run))
    if metrics.left_out:
        yield f"{metrics.left_out:,} lines or losses of metrics.jsonl are unreadable or not finite."
    yield _section(tables.mixture(run))
    yield _section(tables.tokens(run))
    yield _section(tables.records(run))
    yield _section(tables.reading(run))
    yield _section(tables.findings(run))
    yield _section(tables.merge(run))
    if run.merge is not None:
        yield _section_if_any(sweeps.table(run.merge))
    yield _section(tables.steps(run))
    yield "## Warnings\n\n" + _listed(warnings_of(run))
    yield from _privacy(run)
    yield _section_if_any(tables.choices(run))
    yield _section(tables.provenance(run))
    if run.recipe_text:
        yield f"## Recipe\n\n{_fenced(run.recipe_text)}"
    yield DISCLAIMER


def _privacy(run: Run) -> Iterator[str]:
    """Nothing of runs that were made before it was told."""
    if run.privacy is None:
        return
    yield "## Privacy"
    yield _listed(privacy.summary(run.privacy))
    for table in privacy.tables(run, run.privacy):
        yield f"### {table.title}\n\n{_markdown_table(table)}"


def _listed(warnings: list[str]) -> str:
    if not warnings:
        return "None."
    return "\n".join(f"- {_plain(text)}" for text in warnings)


# ---- the model card --------------------------------------------------------------------------------------------------


def model_card(run: Run) -> str:
    """README.md of the merged model: YAML front matter, then what it is, how it was made, how sure, and its limits.

    Meant to be shared: a base that is a local folder is named by its last part, and no path appears.
    """
    return _joined(_card_parts(run))


def _card_parts(run: Run) -> Iterator[str]:
    front = yaml.safe_dump(_front_matter(run), sort_keys=False, allow_unicode=True)
    made = f"{_plain(base_name(run))}, adapted to medicine with qmedtune: {_plain(_procedure(run))}."
    yield f"---\n{front}---"
    yield f"# {_plain(run.name)}"
    yield f"{made} {_plain(outcome(run))}" if run.finished else made
    yield "## Data\n\n" + _markdown_table(tables.sources(run))
    yield _markdown_table(tables.records(run))
    yield "## Training\n\n" + _markdown_table(tables.stages(run))
    yield _markdown_table(tables.mixture(run))
    yield "## Merge\n\n" + _markdown_table(tables.merge(run))
    if run.merge is not None and run.merge.sweep:
        yield _markdown_table(sweeps.table(run.merge))
    yield "## Evaluation\n\n" + _markdown_table(score_tables.evaluation(run))
    yield _markdown_table(score_tables.perplexity(run))
    yield _markdown_table(score_tables.quantisation(run))
    if run.audit is not None:
        yield _section(score_tables.audit(run))
    yield "## Use\n\n" + _use(run)
    yield "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(run))
    yield f"Recipe sha256: {_plain(str(run.recipe_sha256))}, seed {run.seed}."


def _use(run: Run) -> str:
    form = ""
    if run.scored.template:
        form = f" (`{_plain(run.scored.template)}`)"
    ask = "`apply_chat_template(..., add_generation_prompt=True)`"
    return (
        f"Ask with the tokenizer's chat template{form}, {ask}: it gives the tokens of the training. The marks that end "
        "an answer stand in `generation_config.json`; end there, or the model talks on."
    )


def _front_matter(run: Run) -> dict[str, object]:
    """As the Hub reads it."""
    base = base_name(run)
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", "language": ["en"]}
    if "/" in base:  # a Hub id; anything else is no link for the Hub
        front |= {"base_model": base, "base_model_relation": "finetune"}
    front |= {"license": "other", "license_name": "base-model-and-data-terms"}
    front["tags"] = ["medical", "qlora", "qmedtune", *(stage.kind for stage in run.stages)]
    words = precision_words(run)
    results: list[dict[str, object]] = []
    for whole, final in wholes(run):
        results.append(
            {
                "task": {"type": "question-answering"},
                "dataset": {"name": whole.task, "type": whole.task},
                "metrics": [_front_metric(final, words)],
            }
        )
    if results:
        front["model-index"] = [{"name": run.name, "results": results}]
    return front


def _front_metric(final: Score, words: str) -> dict[str, object]:
    metric: dict[str, object] = {"type": final.metric, "value": round(final.value, 4)}
    if words:
        metric["name"] = f"{final.metric}, {words}"
    return metric


def _procedure(run: Run) -> str:
    kinds = [STAGE_WORDS.get(stage.kind, stage.kind) for stage in run.stages]
    stages = ", then ".join(kinds) or "no training stage"
    if run.quantised:
        return f"{stages} as LoRA over an NF4 base"
    return stages


def _limits(run: Run) -> Iterator[str]:
    clinical = [name for name in run.data if run.may_identify(name)]
    yield DISCLAIMER
    yield "Scores hold for the items that were asked, not for patients, other languages or other sites."
    if clinical:
        phi = weakest_phi(run, clinical)
        yield (
            f"Trained on clinical notes ({_plain(', '.join(clinical))}). {PHI_WORDS[phi]} Finding identifiers by "
            "program misses some: this is no de-identification under HIPAA, Safe Harbor or otherwise."
        )
        yield (
            "A language model can repeat text it was trained on. Treat these weights as you must treat the notes: "
            "share them only where the terms of the data allow it."
        )
    else:
        yield "A language model can repeat text it was trained on: the terms of the data apply to the weights."
    if run.merge is not None and run.merge.mixed_with is not None:
        yield from _other_limits(run.merge.mixed_with)
    for name, source in run.data.items():
        if source.terms:
            yield f"Terms of {_plain(name)}: {_plain(source.terms)}."
    yield "The licence of the base model and the terms of every source above apply."


def _other_limits(other: MixedWith) -> Iterator[str]:
    """What comes along with the model that was mixed in."""
    name = _plain(Path(other.name).name)
    yield f"Mixed with {name}: its licence, and the terms of the data that it was trained on, apply too."
    if other.clinical:
        yield f"{name} was trained on clinical notes ({_plain(', '.join(other.clinical))}): treat this model likewise."


def weakest_phi(run: Run, sources: list[str]) -> str:
    """What was at least done about identifiers in all of these sources; each may say so itself."""
    order = list(PHI_WORDS)
    return min((run.phi_of(name) for name in sources), key=order.index)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _section(table: Table) -> str:
    return f"## {_plain(table.title)}\n\n{_markdown_table(table)}"


def _section_if_any(table: Table) -> str:
    if not table.rows:
        return ""
    return _section(table)


def _markdown_table(table: Table) -> str:
    note = _plain(table.note)
    if not table.rows:
        return note
    border = ("---",) * len(table.columns)
    drawn = "\n".join(_markdown_row(line) for line in (table.columns, border, *table.rows))
    if note:
        return f"{drawn}\n\n{note}"
    return drawn


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no cell borders, no line breaks, no code, no rule or heading."""
    shown = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    for sign in "*_`[]~#":
        shown = shown.replace(sign, f"\\{sign}")
    return " ".join(shown.split())


def _fenced(text: str) -> str:
    """A recipe as a code block that nothing in it can close: its fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}"
