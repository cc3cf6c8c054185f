"""The memorisation audit: what of the planted canaries can be got out of the model after each training stage.

Exposure (Carlini et al. 2019, The Secret Sharer): log2(candidates) - log2(rank of the secret among them, by
log-likelihood behind its context), in bits. Candidates are the secret and `references` other numbers of the same form;
a model that learnt nothing gives 1.4 bits on average, one that knows it log2(references + 1). Extracted: greedy
decoding behind the context writes the secret (verbatim extractability, Carlini et al. 2023).
Limits: numbers behind a name, not every kind of text; an attacker with other prompts or samples may get more; exposure
is measured up to log2(references + 1) bits and 8 canaries per row are few: a low figure is no proof of privacy.
Deliberately absent: membership inference, differential privacy.
"""

from __future__ import annotations

import gc
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from qmedtune import model as models
from qmedtune import store, ui
from qmedtune.data.packing.pack import source_template, stage_template
from qmedtune.data.synthetic import canaries
from qmedtune.data.synthetic.canaries import Canary
from qmedtune.errors import RunError
from qmedtune.evaluation.generation import generate
from qmedtune.evaluation.measure import adding
from qmedtune.evaluation.scoring import choice_logprobs, prompt_texts
from qmedtune.model_stack import ModelStack
from qmedtune.recipe import AuditSection, SftSection
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Audit, AuditLimits, Exposure, Json, Trained

RESULT = "audit.json"
SECRET_TOKENS = 16  # a number of nine digits has 5 (LLaMA-3) to 12 tokens


@dataclass(frozen=True)
class StageToAudit:
    """The folder of a stage and the model after it."""

    folder: Path
    model: ModelStack


@dataclass(frozen=True)
class Auditing:
    """What is measured: a recipe, its `audit` section, and its stages by their names."""

    recipe: ResolvedRecipe
    section: AuditSection
    trained: Mapping[str, StageToAudit]


def audit_step(auditing: Auditing, planted: Path, out: Path) -> Audit:
    """Measure a resolved recipe's canaries after every stage that trained on them, or followed one that did.

    planted: folder with canaries.json. Writes audit.json below `out`, where an interrupted audit is continued stage by
    stage.
    """
    recipe, trained = auditing.recipe, auditing.trained
    found = canaries.read(planted)
    rows = {}
    for index, name in enumerate(recipe.stage_names()):
        if name not in trained:  # a classify stage: a branch, the model goes on from before it
            continue
        sources: set[str] = set()
        for stage in recipe.stages[: index + 1]:
            sources.update(stage.sources)
        met = [canary for canary in found if canary.source in sources]
        if met:
            work = partial(_measure_stage, auditing, index, met)
            rows[name] = store.kept(out / store.SCRATCH / f"{name}.json", work)
    result = Audit(stages=rows, references=auditing.section.references)
    store.write_json(out / RESULT, result.as_json())
    return result


def check_limits(audit: AuditSection, audited: Path) -> AuditLimits:
    """RunError where a measurement in the folder `audited` is beyond the section's `max_exposure` or `max_extracted`.

    A step of its own behind the measurement, so that what was measured stays sealed, and before the merge.
    """
    result = Audit.model_validate_json((audited / RESULT).read_bytes())
    for stage, rows in result.stages.items():
        for row in rows:
            beyond = _beyond(audit, row)
            if beyond and row.repeats:
                raise RunError(
                    f"audit: after {stage}, canaries planted {row.repeats}x in {row.source}: {beyond}\n"
                    f"all figures are in {audited / RESULT}; nothing was merged\n"
                    "train less on each note, de-duplicate and redact, or raise the limit: the same command goes on"
                )
    return AuditLimits(max_exposure=audit.max_exposure, max_extracted=audit.max_extracted)


def _beyond(audit: AuditSection, row: Exposure) -> str | None:
    """The first limit that a measurement exceeds, in words."""
    if audit.max_exposure is not None and row.exposure > audit.max_exposure:
        return f"exposure {row.exposure:.1f} bits on average (allowed: {audit.max_exposure:g}, `audit.max_exposure`)"
    if audit.max_extracted is not None and row.extracted / row.canaries > audit.max_extracted:
        return (
            f"{row.extracted} of {row.canaries} extracted word for word "
            f"(allowed: {audit.max_extracted:.0%}, `audit.max_extracted`)"
        )
    return None


def _measure_stage(auditing: Auditing, index: int, found: list[Canary]) -> list[Json]:
    """The rows of one stage as audit.json has them."""
    recipe, trained = auditing.recipe, auditing.trained
    name = recipe.stage_names()[index]
    stack = trained[name].model
    tokenizer = models.load_tokenizer(stack.base)
    disable_progress_bar()
    model = models.load_stack(stack, recipe.model)
    contexts = [context_of(recipe, canary, tokenizer, stack.base) for canary in found]
    audited = AuditedModel(model, tokenizer, name, auditing.section.references, recipe.seed)
    rows = measure(audited, found, contexts)
    passes = _passes(recipe, index, trained)
    del model
    gc.collect()
    told = []
    for row in rows:
        seen = {"passes": passes.get(row.source), "masked": _masked(recipe, row.source)}
        told.append(row.model_copy(update=seen).as_json())
    return told


def _masked(recipe: ResolvedRecipe, source: str) -> bool:
    """Whether the canaries of a source carried no loss."""
    if recipe.data[source].kind != "instructions":
        return False
    for stage in recipe.stages:
        section = stage.section
        answers_alone = isinstance(section, SftSection) and section.loss_on == "response"
        if source in stage.sources and not answers_alone:
            return False
    return True


def _passes(recipe: ResolvedRecipe, index: int, trained: Mapping[str, StageToAudit]) -> dict[str, float]:
    """How often the stages so far went through each source: a canary was seen this often times its repeats."""
    passes: dict[str, float] = {}
    for name in recipe.stage_names()[: index + 1]:
        if name not in trained:
            continue
        sealed = store.read_seal(trained[name].folder)
        if sealed:
            for source, part in Trained.model_validate(sealed.facts).mixture.items():
                passes[source] = round(passes.get(source, 0.0) + (part.repeats or 0.0), 3)
    return passes


def context_of(recipe: ResolvedRecipe, canary: Canary, tokenizer: Any, base: Path) -> str:
    """The text in front of the secret, as in training: the note's beginning, or the prompt in its template."""
    if recipe.data[canary.source].kind != "instructions":
        return canary.context
    if recipe.data[canary.source].template:
        template = source_template(recipe, canary.source, base)
    else:
        template = stage_template(recipe, _first_stage_of(recipe, canary.source), base)
    prompt = prompt_texts(tokenizer, template, [canaries.messages(canary)[:1]])[0].text
    return prompt[: prompt.index(canary.secret)].rstrip()


def _first_stage_of(recipe: ResolvedRecipe, source: str) -> int:
    for index, stage in enumerate(recipe.stages):
        if source in stage.sources:
            return index
    raise AssertionError(f"no stage trains on {source}: it has no canaries")


@dataclass(frozen=True)
class AuditedModel:
    """What a stage left, loaded; `stage` is its name. references: how many other numbers each secret is ranked among,
    drawn by the seed."""

    model: Any
    tokenizer: Any
    stage: str
    references: int
    seed: int


def measure(audited: AuditedModel, found: Sequence[Canary], contexts: Sequence[str]) -> list[Exposure]:
    """A row per source and number of repeats, in the order of the canaries."""
    model, tokenizer = audited.model, audited.tokenizer
    rng = random.Random(f"references-{audited.seed}")
    options = [_candidates(canary.secret, audited.references, rng) for canary in found]
    with ui.progress_bar(f"canaries after {audited.stage}", total=2 * len(found), unit="canaries") as bar:
        scores = choice_logprobs(model, tokenizer, contexts, options, progress=adding(bar), boundary="joint")
        answers = generate(model, tokenizer, contexts, SECRET_TOKENS, progress=adding(bar))
    bits: dict[tuple[str, int], list[float]] = {}
    extracted: Counter[tuple[str, int]] = Counter()
    for canary, score, answer in zip(found, scores, answers, strict=True):
        planted = (canary.source, canary.repeats)
        bits.setdefault(planted, []).append(exposure(score.sums))
        extracted[planted] += answer.text.strip().startswith(canary.secret)
    rows = []
    for planted, each in bits.items():
        source, repeats = planted
        rows.append(
            Exposure(
                source=source,
                repeats=repeats,
                canaries=len(each),
                exposure=sum(each) / len(each),
                highest=max(each),
                extracted=extracted[planted],
                passes=None,
                masked=False,
            )
        )
    return rows


def _candidates(secret: str, references: int, rng: random.Random) -> list[str]:
    """The secret, first, and as many other numbers of its form."""
    others: set[str] = set()
    while len(others) < references:
        others.add(canaries.secret(rng))
        others.discard(secret)
    return [f" {number}" for number in (secret, *sorted(others))]


def exposure(logprobs: Sequence[float]) -> float:
    """Bits, of the first of these log-likelihoods among all of them."""
    rank = 1 + sum(other > logprobs[0] for other in logprobs[1:])
    return math.log2(len(logprobs)) - math.log2(rank)
