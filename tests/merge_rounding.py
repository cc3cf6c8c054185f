"""What 16 bit swallows of a trained run, and what stochastic rounding and fp16 keep: perplexity of held-out text.

    python tests/merge_rounding.py RUN [--factors 1 0.3 0.1] [--tokens 2048] [--facts] [--write docs/merging.md]

RUN has trained its last stage, and holds text out (`validate` or `evaluate.perplexity`). Its adapters, and copies of
them at .3 and .1 of their size (what shorter runs or lower rates leave), are merged by the product, proof included, in
each form. Measured are nats per token against the unrounded model (float32), with the standard error of that difference
over tokens; the gain is that of the unrounded model over the base. `--facts` scores the invented world's questions as
well, for runs on a built-in base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_proof import scaled_copy, write_page
from torch import Tensor

from qmedtune.data.packing import templates
from qmedtune.data.packing.pack import PackedRows
from qmedtune.evaluate import write_results
from qmedtune.evaluation.measure import ModelToMeasure, Settings, measure_model
from qmedtune.merge import MergeJob, merge
from qmedtune.merge_folder import MergeInputs, adapters_of_run
from qmedtune.model import load_tokenizer
from qmedtune.recipe import MergeSection, Recipe, TaskSection
from qmedtune.tasks import load_task, world_of

FORMS: dict[str, tuple[MergeSection, int]] = {
    "float32": (MergeSection(dtype="float32"), 0),
    "float16, nearest": (MergeSection(dtype="float16", rounding="nearest"), 0),
    "bfloat16, nearest": (MergeSection(rounding="nearest"), 0),
    "bfloat16, stochastic, seed 1": (MergeSection(rounding="stochastic"), 1),
    "bfloat16, stochastic, seed 2": (MergeSection(rounding="stochastic"), 2),
}
PROBE_TOKENS = 128  # of each source, for the KL of a merge
BEGIN, END = "<!-- merge-rounding begins -->", "<!-- merge-rounding ends -->"


@dataclass(frozen=True)
class Row:
    """One form. nll: by source, fp64 nats of each token; facts: of the merge, and scores."""

    adapter: str
    form: str
    nll: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What is asked for: a run's adapters at `factors` of their size, in `forms`, on `tokens` of each source, and on
    the facts of a built-in world."""

    found: MergeInputs
    run: Path
    factors: list[float]
    tokens: int
    forms: dict[str, tuple[MergeSection, int]]
    world: str | None


def held_out(run: Path, tokens: int) -> dict[str, list[Tensor]]:
    """Rows of ids, by source: the first `tokens` of its held-out text."""
    found: dict[str, list[Tensor]] = {}
    for folder in sorted(path for path in (run / "data" / "validation").iterdir() if path.is_dir()):
        rows, left = PackedRows(folder), tokens
        for index in range(len(rows)):
            ids = rows[index]["input_ids"][:left]
            if len(ids) > 1:
                found.setdefault(folder.name, []).append(torch.from_numpy(np.array(ids)))
            left -= len(ids)
            if left <= 0:
                break
    return found


def nll_of(folder: Path, texts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Nats of each predicted token, by source, in fp32 logits."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return {source: _nll_of_rows(model, rows) for source, rows in texts.items()}


def _nll_of_rows(model: Any, rows: list[Tensor]) -> Tensor:
    return torch.cat([_nll(model, ids) for ids in rows])


def _nll(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()


def measure(job: Measurement, scratch: Path) -> Iterator[Row]:
    found = job.found

    def scores(folder: Path) -> dict[str, Any]:
        return {"scores": _scores(folder, found, job.world, scratch)} if job.world else {}

    texts = held_out(job.run, job.tokens)
    shortest = min(len(rows[0]) for rows in texts.values())
    probe = np.stack([rows[0][: min(shortest, PROBE_TOKENS)].numpy() for rows in texts.values()])
    model = found.model.model_copy(update={"quantization": "none"})  # the shift from NF4 is another question
    yield Row("", "base", nll_of(found.stack.base, texts), scores(found.stack.base))
    for factor in job.factors:
        name = "as trained" if factor == 1 else f"x {factor:g}"
        adapters = tuple(
            scaled_copy(path, scratch / f"{factor}-{n}", factor) for n, path in enumerate(found.stack.adapters)
        )
        for form, (section, seed) in job.forms.items():
            out = scratch / "merged"
            out.mkdir()
            told = merge(MergeJob(replace(found.stack, adapters=adapters), section, model, seed, probe), out).as_json()
            told |= scores(out)
            row = Row(name, form, nll_of(out, texts), told)
            print(f"{name}, {form}: lost {told['lost']}, violations {told['violations']}", file=sys.stderr)
            yield row
            shutil.rmtree(out)


def _scores(folder: Path, found: MergeInputs, world: str, scratch: Path) -> dict[str, Any]:
    """Facts of a built-in world, by log-likelihood; in fp32, or every form would be rounded once more."""
    from transformers import AutoModelForCausalLM

    task = load_task(TaskSection(task="facts"), found.seed, world)
    stack = found.stack
    template = templates.load(stack.template) if stack.template else templates.default(None, stack.base)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = scratch / "scores"
    settings = Settings(template, generate=False, batch_tokens=4096)
    measured = measure_model(ModelToMeasure(model, load_tokenizer(folder), "model", settings, parts), [task], {})
    scores = write_results([task], {"model": measured}, found.seed, parts).tasks["facts"].model
    assert scores is not None
    shutil.rmtree(parts)
    return scores.as_json()


def markdown(rows: list[Row]) -> str:
    base, *merged = rows
    sources = list(base.nll)
    head = ["adapter", "written as", "KL", "lost (KL)", "swallowed"]
    for source in sources:
        head += [f"{source}: perplexity", "nats lost", "of the gain"]
    head += ["facts"] if "scores" in base.facts else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    exact = base
    for row in merged:
        exact = row if row.form == "float32" else exact
        lines.append(f"| {' | '.join(_cells(row, exact, base))} |")
    ends = ["–", "base", "–", "–", "–"]
    for source in sources:
        ends += [f"{float(base.nll[source].mean().exp()):.3f}", "–", "–"]
    ends += [f"{base.facts['scores']['accuracy']:.3f}"] if "scores" in base.facts else []
    return "\n".join([*lines, f"| {' | '.join(ends)} |"])


def _cells(row: Row, exact: Row, base: Row) -> list[str]:
    told = row.facts
    cells = [row.adapter, row.form, f"{told['kl']:.1e}", _share(told["lost"]), _share(told["swallowed"])]
    for source, nll in row.nll.items():
        off = nll - exact.nll[source]
        gain = float((base.nll[source] - exact.nll[source]).mean())
        error = float(off.std() / len(off) ** 0.5)
        cells += [f"{float(nll.mean().exp()):.3f}", f"{float(off.mean()):+.5f} ± {error:.5f}"]
        cells.append(f"{float(off.mean()) / gain:.1%}" if abs(gain) > 1e-4 else "–")
    return [*cells, f"{told['scores']['accuracy']:.3f}"] if "scores" in told else cells


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"


def _world(run: Path) -> str:
    recipe = json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]
    return world_of(Recipe.model_validate(recipe))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--tokens", type=int, default=2048, help="of each source's held-out text")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--write", type=Path, help="a page with the marks of the table")
    asked = parser.parse_args()
    found = adapters_of_run(asked.run, offline=True)
    with tempfile.TemporaryDirectory() as folder:
        forms = {form: FORMS[form] for form in FORMS if form in asked.forms or form == "float32"}
        job = Measurement(
            found, asked.run, asked.factors, asked.tokens, forms, _world(asked.run) if asked.facts else None
        )
        rows = list(measure(job, Path(folder)))
    text = markdown(rows)
    if asked.write:
        write_page(asked.write, text, (BEGIN, END))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
