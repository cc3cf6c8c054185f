"""Recipes and runs for tests, built once for all of them. No figure in a run here was measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from qmedtune.evaluation import statistics
from qmedtune.recipe import Recipe
from qmedtune.results import (
    AdapterEntry,
    AutoChoice,
    Change,
    Difference,
    Evaluation,
    Facts,
    Identifiers,
    Loss,
    Merge,
    Overlap,
    Part,
    Provenance,
    Records,
    Run,
    Score,
    Scores,
    Shift,
    Source,
    Stage,
    StepEntry,
    TaskScores,
    Text,
    TokenLedger,
)

KINDS = {"literature": "literature", "notes": "clinical", "general": "general", "instructions": "instructions"}


def unknown_keys(value: object, place: str = "") -> list[str]:
    """Keys that no model names: what a step writes and nothing reads by name."""
    found: list[str] = []
    if isinstance(value, Facts):
        if "__pydantic_extra__" not in type(value).__annotations__:  # metrics, losses by source
            found += [f"{place}.{key}" for key in value.model_extra or ()]
        for name in type(value).model_fields:
            found += unknown_keys(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, dict):
        for key, part in value.items():
            found += unknown_keys(part, f"{place}.{key}")
    elif isinstance(value, list):
        for part in value:
            found += unknown_keys(part, place)
    return found


# ---- recipes ---------------------------------------------------------------------------------------------------------


def make_recipe(
    data: dict[str, Any], stages: list[dict[str, Any]], base: str = "builtin:tiny", **sections: Any
) -> Recipe:
    """Checked as a file is; `sections` are those of a recipe, `model` beside its base."""
    model = {"base": base, **sections.pop("model", {})}
    return Recipe.model_validate({"name": "t", "model": model, "data": data, "stages": stages, **sections})


def pack_recipe(stages: list[dict[str, Any]], seed: int = 3, **data: Any) -> Recipe:
    """Of sources that are packed without being read: notes, chats, literature and general say their kind."""
    kinds = {**KINDS, "chats": "instructions"}
    sources = {name: {"path": "unused", "kind": kinds[name], **section} for name, section in data.items()}
    return make_recipe(sources, stages, seed=seed)


def folders(tmp_path, **records):
    made = {}
    for name, rows in records.items():
        made[name] = tmp_path / name
        made[name].mkdir(parents=True)
        lines = [json.dumps({"id": str(i), **({"text": r} if isinstance(r, str) else r)}) for i, r in enumerate(rows)]
        for file in ("train.jsonl", "heldout.jsonl"):
            (made[name] / file).write_text("".join(line + "\n" for line in lines))
    return made


def packed(tmp_path, recipe, tokenizer_dir, inputs, index=0):
    from qmedtune.data.packing.pack import PackedRows, StageToPack, pack_stage

    out = tmp_path / f"packed-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    return pack_stage(StageToPack(recipe, index, tokenizer_dir, inputs), out).as_json(), PackedRows(out)


# ---- a run -----------------------------------------------------------------------------------------------------------


def make_score(accuracy: float, n: int, chance: float = 0.05, unparsed: int | None = None) -> Score:
    """With Wilson's interval; with `unparsed`, what was written is judged beside it."""
    generation = None
    if unparsed is not None:
        said = round(accuracy * n) - unparsed
        generation = Score(ci95=statistics.wilson(said, n), n=n, unparsed=unparsed, cut=0, **{"accuracy": said / n})
    interval = statistics.wilson(round(accuracy * n), n)
    return Score(ci95=interval, n=n, truncated=0, chance=chance, generation=generation, **{"accuracy": accuracy})


def make_change(gained: int, lost: int, n: int) -> Change:
    """Of n items `gained` are right in final alone, `lost` in base alone; tested as an evaluation does."""
    before = [False] * gained + [True] * lost + [True] * (n - gained - lost)
    after = [True] * gained + [False] * lost + [True] * (n - gained - lost)
    difference = Difference(value=(gained - lost) / n, ci95=statistics.tango(gained, lost, n))
    return Change(difference=difference, paired=statistics.mcnemar(before, after))


def make_scores(base: Score, final: Score, gained: int, lost: int) -> Scores:
    assert final.n is not None
    change = make_change(gained, lost, final.n)
    return Scores(base=base, final=final, difference=change.difference, paired=change.paired)


def make_task(base: Score, final: Score, gained: int, lost: int) -> TaskScores:
    scores = make_scores(base, final, gained, lost)
    return TaskScores(base=scores.base, final=scores.final, difference=scores.difference, paired=scores.paired)


def make_evaluation(**changes: Any) -> Evaluation:
    """`facts` got better as a whole, by facet and in what was written; `pubmedqa` did not change beyond noise."""
    whole = make_scores(make_score(0.055, 240, unparsed=9), make_score(0.8125, 240, unparsed=2), 185, 3)
    facts = TaskScores(
        base=whole.base,
        final=whole.final,
        difference=whole.difference,
        paired=whole.paired,
        generation=make_change(170, 4, 240),
        facets={
            "treats": make_scores(make_score(0.05, 120), make_score(0.825, 120), 94, 1),
            "adverse effect": make_scores(make_score(0.06, 120), make_score(0.80, 120), 91, 2),
        },
    )
    pubmedqa = make_task(make_score(0.53, 200, 1 / 3), make_score(0.555, 200, 1 / 3), 21, 16)
    texts = {
        "literature": Text(base=61.4, final=7.92),
        "notes": Text(base=118.2, final=6.05),
        "general": Text(base=5.31, final=5.44),
    }
    found = Evaluation(tasks={"facts": facts, "pubmedqa": pubmedqa}, perplexity=texts)
    return found.model_copy(update=changes)


def make_stages() -> list[Stage]:
    cpt = Stage(
        name="01-cpt",
        kind="cpt",
        status="sealed",
        key="c1" * 32,
        steps=600,
        kept_step=550,
        loss=Loss(first=4.812, last=1.377),
        tokens_per_s=8630.0,
        peak_memory_bytes=1_240_000_000,
        tokens=TokenLedger(read=212_044, kept=211_380, split=10_020, dropped=664, supervised=598_212, trained=600_000),
        mixture={
            "literature": Part(share=0.401, asked_share=0.4, tokens=240_600, repeats=3.02),
            "notes": Part(share=0.399, tokens=239_400, repeats=2.97),
            "general": Part(share=0.2, tokens=120_000, repeats=1.0),
        },
        seconds=71.4,
        adapter=AdapterEntry(path="01-cpt/adapter", sha256="9f" * 32),
    )
    sft = Stage(
        name="02-sft",
        kind="sft",
        status="sealed",
        key="5f" * 32,
        loss=Loss(first=2.204, last=0.613),
        tokens_per_s=7120.0,
        peak_memory_bytes=1_310_000_000,
        tokens=TokenLedger(read=88_310, kept=88_310, split=4_410, dropped=0, supervised=19_208, trained=264_930),
        mixture={"instructions": Part(share=1.0, tokens=264_930, repeats=3.0)},
        seconds=24.9,
        adapter=AdapterEntry(path="02-sft/adapter", sha256="ab" * 32),
    )
    return [cpt, sft]


def make_source(kind: str) -> Source:
    is_clinical = kind == "clinical"
    return Source(
        records=Records(read=1200, kept=1184, rejected=3, duplicates=9, contaminated=4, refused=0),
        near_duplicates=5,
        held_out=58,
        sha256="77" * 32,
        kind=kind,
        license="Apache-2.0",
        terms="patient data, site agreement" if is_clinical else None,
        reasons={"no text": 3},
        phi=Identifiers(mode="report", classes={"date": 41}) if is_clinical else Identifiers(),
        contamination={"facts": Overlap(items=240, found=["a", "b"])},
    )


def make_steps() -> list[StepEntry]:
    seconds = {"data/notes": 3.1, "01-cpt": 71.4, "02-sft": 24.9, "merged": 2.6, "evaluation": 18.8}
    return [StepEntry(name=name, kind="-", status="sealed", seconds=s, key="aa") for name, s in seconds.items()]


def make_run(**changes: Any) -> Run:
    """A finished run with every part that the report knows; `changes` replace parts of it."""
    made = Run(
        name="cpt_then_sft",
        status="finished",
        recipe_sha256="1d" * 32,
        seed=17,
        offline=True,
        stages=make_stages(),
        data={name: make_source(kind) for name, kind in KINDS.items()},
        merge=Merge(
            path="merged",
            status="sealed",
            base="full16",
            dtype="bfloat16",
            modules=21,
            kl=1.43e-5,
            top1=0.9993,
            max_abs_logit_diff=0.078,
            shift_from_nf4=Shift(kl=8.7e-4, top1=0.987),
            sha256="e0" * 32,
        ),
        audit=None,
        evaluation=make_evaluation(),
        steps=make_steps(),
        warnings=[
            "triton is not used on a CPU: the reference kernels ran",
            "stages[1].sft.lr 2e-5 is a full-parameter value; LoRA usually needs 1e-4 to 4e-4",
        ],
        resolved=[
            AutoChoice(key="stages[0].cpt.seq_len", value=256, why="95% of the records fit"),
            AutoChoice(key="stages[0].cpt.lr", value=0.002, why="builtin:tiny, LoRA r=32"),
            AutoChoice(key="model.compute_dtype", value="float32", why="no GPU"),
        ],
        recipe={"model": {"base": "builtin:tiny", "quantization": "nf4"}, "hygiene": {"phi": "report"}},
        recipe_text="name: cpt_then_sft\nseed: 17\nstages:\n  - cpt: {mix: {literature: 8, notes: 8, general: 4}}\n"
        "  - sft: {data: instructions, epochs: 3}\n",
        provenance=Provenance(
            qmedtune="0.2.0",
            versions={"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
            python="3.11.9",
            device="cpu, 2 cores",
            base_revision=None,
            base_sha256="b4" * 32,
            git="d611782",
        ),
    )
    return made.model_copy(update=changes)


def make_metrics() -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of two stages with a validation every 50 steps: exponential decay with noise."""
    dice = random.Random(0)
    lines: list[dict[str, Any]] = []
    for stage, steps, start, end in (("01-cpt", 600, 4.8, 1.35), ("02-sft", 150, 2.2, 0.6)):
        for step in range(1, steps + 1):
            mean = end + (start - end) * math.exp(-5 * step / steps)
            line = {"stage": stage, "step": step, "loss": mean + dice.gauss(0, 0.12), "grad_norm": 0.8, "lr": 2e-3}
            lines.append(line | {"tokens": step * 1000, "tokens_per_s": 8600.0, "memory": 10**9})
            if step % 50 == 0:
                losses = {"literature": mean + 0.12 + dice.gauss(0, 0.02), "notes": mean - 0.18 + dice.gauss(0, 0.02)}
                lines.append({"stage": stage, "step": step, "validation": losses})
    return lines


def write_run(folder: Path, run: Run, lines: list[dict[str, Any]]) -> Path:
    """As far as a report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run.as_json()), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
