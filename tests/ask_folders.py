"""Which command line gives a hostile folder to each command, and what of the outcome is not as promised."""

from __future__ import annotations

from pathlib import Path

from attack import Outcome, refusal_complaints
from hostile_folders import ADAPTERS, OWNED, Case, Good

COMMANDS = ("plan", "run", "eval", "predict", "chat", "merge", "export")
OF_ADAPTERS = ("eval", "predict", "chat", "merge", "export")
# What `export` makes of a folder, in turn. A template is the business of those that write one down.
FORMS, WITH_TEMPLATE = ("gguf", "transformers", "vllm", "ollama"), ("vllm", "ollama")
ADAPTER_FORMS = ("gguf-adapter", "vllm")
SECONDS = 30  # of a refusal; a template that does not end takes ten, the rest under one
BYTES = 1 << 30  # of a process that holds PyTorch and a tiny model: 0.5 GB
RECIPE = """\
name: attacked
model: {{base: {base}}}
data: {{asked: {{path: builtin:micro/instructions, kind: instructions, max_records: 30, template: {template}}}}}
stages: [{{sft: {{data: asked, epochs: 1}}}}]
evaluate: {{tasks: []}}
"""


def words_of(command: str, case: Case, folder: Path, good: Good, here: Path) -> list[str]:
    """The command line that gives the folder to a command."""
    here.mkdir(parents=True, exist_ok=True)
    (here / "questions.jsonl").write_text('{"instruction": "What is aspirin?"}\n')
    (here / "r.yaml").write_text(
        RECIPE.format(base=folder, template="chat" if case.asked and "plan" in case.asked else "alpaca")
    )
    is_adapter = (folder / "adapter_config.json").exists() or case in ADAPTERS
    base = ["--base", str(good.model)] if is_adapter and "base" not in case.name.split() else []
    if command == "merge":
        adapter = folder if is_adapter else good.adapter
        onto = base if is_adapter else ["--base", str(folder)]
        return ["merge", str(adapter), *onto, "--out", str(here / "merged"), "--offline"]
    if command == "export":
        forms = ADAPTER_FORMS if is_adapter else WITH_TEMPLATE if case.asked else FORMS
        form = forms[sum(case.name.encode()) % len(forms)]
        return ["export", str(folder), "--as", form, *base, "--out", str(here / "exported"), "--offline"]
    return {
        "plan": ["plan", str(here / "r.yaml")],
        "run": ["run", str(here / "r.yaml"), "--out", str(here / "run"), "--offline"],
        "eval": ["eval", str(folder), "--tasks", "facts", "--limit", "16", *base, "--offline"],
        "predict": ["predict", str(folder), "--data", str(here / "questions.jsonl"), "--out", str(here / "a.jsonl"),
                    "--max-new-tokens", "4", *base, "--offline"],
        "chat": ["chat", str(folder), *base, "--offline"],
    }[command]  # fmt: skip


def complaints(case: Case, outcome: Outcome, folder: Path, here: Path) -> list[str]:
    """What did not hold."""
    found = [f"executed {event}" for event in outcome.executed]
    if any(place.joinpath(OWNED).exists() for place in (folder, here, Path.cwd())):
        found.append("code of the folder has run")
    if outcome.code == 0 and not case.harmless:
        found.append("loaded in silence")
    if outcome.code != 0:
        found += refusal_complaints(outcome, folder.name)
    if outcome.seconds > SECONDS or outcome.peak_bytes > BYTES:
        found.append(f"took {outcome.seconds:.0f} s and {outcome.peak_bytes >> 20} MiB")
    return found
