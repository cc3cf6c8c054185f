"""The report of a run: report.html, report.md, and the model card of the merged model.

Everything is taken from run.json and metrics.jsonl, so that `qmedtune report RUN` renders the same page again at any
time, in well under a second and without torch.

Deliberately does not: verify hashes (store.py), recompute results, or show text of any record.
"""

import re
from pathlib import Path

import yaml

from qmedtune import disk
from qmedtune.reporting import duels, live, tables
from qmedtune.reporting import page as report_html
from qmedtune.reporting.facts import ALL, Metrics, base_name, comparisons, outcome, precision_words
from qmedtune.reporting.page import DISCLAIMER
from qmedtune.reporting.tables import Table

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


def write_report(run_dir: Path) -> dict:
    """Write report.html and report.md into `run_dir`; returns their names and sizes in bytes."""
    run = live.read_run(run_dir)
    metrics = live.read_metrics(run_dir, run)
    written = {
        "report.html": report_html.page(run, metrics),
        "report.md": markdown(run, metrics),
    }
    for name, text in written.items():
        disk.write_atomic(run_dir / name, text)
    return {name: len(text.encode()) for name, text in written.items()}


def markdown(run: dict, metrics: Metrics) -> str:
    """The report as text: the same tables as the page, without charts."""
    warnings = [f"- {_plain(text)}" for text in run.get("warnings", [])] or ["None."]
    left_out = f"{metrics.left_out:,} lines or losses of metrics.jsonl are unreadable or not finite."
    parts = [
        f"# {_plain(run['name'])}",
        f"{_plain(outcome(run))}",
        f"Status: {run['status']}. Base: {_plain(base_name(run))}.",
        _section(tables.evaluation(run)),
        _section(tables.perplexity(run)),
        _section_if_any(tables.quantisation(run)),
        _section_if_any(duels.head_to_head(run)),
        "\n".join(f"- {_plain(sentence)}" for sentence in duels.claims(run)),
        _section_if_any(tables.classification(run)),
        _section(tables.audit(run)) if run.get("audit") else "",
        _section(tables.stages(run)),
        left_out if metrics.left_out else "",
        _section(tables.mixture(run)),
        _section(tables.tokens(run)),
        _section(tables.records(run)),
        _section(tables.reading(run)),
        _section(tables.findings(run)),
        _section(tables.merge(run)),
        _section(tables.steps(run)),
        "## Warnings\n\n" + "\n".join(warnings),
        _section(tables.choices(run)) if run.get("resolved") else "",
        _section(tables.provenance(run)),
        f"## Recipe\n\n{_fenced(run['recipe_text'])}" if run.get("recipe_text") else "",
        DISCLAIMER,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(run: dict) -> str:
    """README.md of the merged model: YAML front matter, then what it is, how it was made, how sure, and its limits.

    Meant to be shared: a base that is a local folder is named by its last part, and no path appears.
    """
    clinical = [name for name, source in run.get("data", {}).items() if source.get("kind") == "clinical"]
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(run), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(run['name'])}",
        f"{_plain(base_name(run))}, adapted to medicine with qmedtune: {_plain(_procedure(run))}. "
        f"{_plain(outcome(run)) if run['status'] == 'finished' else ''}".strip(),
        "## Data\n\n" + _markdown_table(tables.sources(run)),
        _markdown_table(tables.records(run)),
        "## Training\n\n" + _markdown_table(tables.stages(run)),
        _markdown_table(tables.mixture(run)),
        "## Merge\n\n" + _markdown_table(tables.merge(run)),
        "## Evaluation\n\n" + _markdown_table(tables.evaluation(run)),
        _markdown_table(tables.perplexity(run)),
        _markdown_table(tables.quantisation(run)),
        _section(tables.audit(run)) if run.get("audit") else "",
        "## Use\n\n" + _use(run),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(run, clinical)),
        f"Recipe sha256: `{run.get('recipe_sha256', 'unknown')}`, seed {run.get('seed', 'unknown')}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(run: dict) -> str:
    name = (run.get("evaluation") or {}).get("template")
    form = f" (`{_plain(name)}`)" if name else ""
    ask = "`apply_chat_template(..., add_generation_prompt=True)`"
    return (
        f"Ask with the tokenizer's chat template{form}, {ask}: it gives the tokens of the training. The marks that end "
        "an answer stand in `generation_config.json`; end there, or the model talks on."
    )


def _front_matter(run: dict) -> dict:
    base, scored = base_name(run), [c for c in comparisons(run) if c.part == ALL and c.final is not None]
    facts: dict = {"library_name": "transformers", "pipeline_tag": "text-generation", "language": ["en"]}
    if "/" in base:  # a Hub id; anything else is no link for the Hub
        facts |= {"base_model": base, "base_model_relation": "finetune"}
    facts |= {"license": "other", "license_name": "base-model-and-data-terms"}
    facts["tags"] = ["medical", "qlora", "qmedtune", *(stage["kind"] for stage in run.get("stages", []))]
    if scored:
        words = precision_words(run)
        results = [
            {
                "task": {"type": "question-answering"},
                "dataset": {"name": c.task, "type": c.task},
                "metrics": [_front_metric(c.final.value, words)],
            }
            for c in scored
            if c.final is not None
        ]
        facts["model-index"] = [{"name": run["name"], "results": results}]
    return facts


def _front_metric(value: float, words: str) -> dict:
    metric: dict = {"type": "accuracy", "value": round(value, 4)}
    return {**metric, "name": f"accuracy, {words}"} if words else metric


def _procedure(run: dict) -> str:
    kinds = [STAGE_WORDS.get(str(stage["kind"]), str(stage["kind"])) for stage in run.get("stages", [])]
    quantized = run.get("recipe", {}).get("model", {}).get("quantization") == "nf4"
    how = " as LoRA over an NF4 base" if quantized else ""
    return (", then ".join(kinds) if kinds else "no training stage") + how


def _weakest_phi(recipe: dict, names: list[str]) -> str:
    """What was at least done about identifiers in all of these sources; each may say so itself."""
    general = recipe.get("hygiene", {}).get("phi", "off")
    sources = recipe.get("data", {})
    return min((sources.get(name, {}).get("phi") or general for name in names), key=list(PHI_WORDS).index)


def _limits(run: dict, clinical: list[str]) -> list[str]:
    lines = [DISCLAIMER, "Scores hold for the items that were asked, not for patients, other languages or other sites."]
    if clinical:
        phi = _weakest_phi(run.get("recipe", {}), clinical)
        lines += [
            f"Trained on clinical notes ({_plain(', '.join(clinical))}). {PHI_WORDS[phi]} Finding identifiers by "
            "program misses some: this is no de-identification under HIPAA, Safe Harbor or otherwise.",
            "A language model can repeat text it was trained on. Treat these weights as you must treat the notes: "
            "share them only where the terms of the data allow it.",
        ]
    else:
        lines.append("A language model can repeat text it was trained on: the terms of the data apply to the weights.")
    lines.append("The licence of the base model and the terms of every source above apply.")
    return lines


def _section(table: Table) -> str:
    return f"## {table.title}\n\n{_markdown_table(table)}"


def _section_if_any(table: Table) -> str:
    return _section(table) if table.rows else ""


def _markdown_table(table: Table) -> str:
    if not table.rows:
        return table.note
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    drawn = "\n".join(_markdown_row(line) for line in lines)
    return f"{drawn}\n\n{table.note}" if table.note else drawn


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no cell borders, no line breaks."""
    shown = str(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    for sign in "*_`[]":
        shown = shown.replace(sign, f"\\{sign}")
    return " ".join(shown.split())


def _fenced(text: str) -> str:
    """A recipe as a code block that nothing in it can close: its fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}"
