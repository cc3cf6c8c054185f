"""How long the scores of a run take: what its questions and texts make each model read and write, and how fast.

Base and result are loaded and asked one after the other; texts are read once more by both in NF4 where 16 bit is what
is delivered (evaluate.py). Assumed speeds, like those of training (speed.py). Deliberately not here: parsing benchmarks
and prompts (preflight.py), which precision is taken (precision.py), `evaluate.against` and `audit` (not timed).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qmedtune.lineage import final_model
from qmedtune.llama_shape import BaseFacts
from qmedtune.planning import speed
from qmedtune.planning.estimate import Estimate
from qmedtune.planning.machine import Machine
from qmedtune.planning.plan_facts import PlannedEvaluation, PlannedTask
from qmedtune.planning.precision import Precision
from qmedtune.recipe import Recipe
from qmedtune.tasks import Item, Task

PART_QUESTIONS = 256  # what one of several processes scores at a time, as in evaluation/measure.py
SAMPLED_ITEMS = 40  # of a benchmark, tokenised: few-shot prompts of 3,000 tokens make a tenth of a second
# LLaMA-2 needs 1.47 tokens for a word of medical text, LLaMA-3.1 1.27 (docs/data.md); for where no tokenizer is here.
TOKENS_PER_WORD = 1.4

Ids = Callable[[Item], Sequence[object]]
"""What a model reads before it answers, one entry a token."""


@dataclass(frozen=True)
class BenchmarkCost:
    """What one pass over a benchmark takes from one model. read: tokens of prompts and options, what all prompts begin
    with counted once; answers: questions that are answered in writing, in `new_tokens` tokens at most."""

    name: str
    questions: int
    read: int
    passes: int
    answers: int
    new_tokens: int
    answer_read: int


def words_of(item: Item, per_word: float) -> list[str]:
    """Stands for the tokens of a prompt where no tokenizer is here."""
    words: list[str] = []
    for message in item.messages:
        words += re.findall(r"\w+|[^\w\s]", f"{message['content']} {message.get('input', '')}")
    return words + words[: round(len(words) * (per_word - 1))]


def reading(task: Task, ids: Ids, *, generate: bool) -> BenchmarkCost:
    """What a benchmark makes a model do, from SAMPLED_ITEMS of its questions."""
    asked = task.asked
    every = max(1, len(asked) // SAMPLED_ITEMS)
    sample = asked[::every]
    prompts = [ids(item) for item in sample]
    shared = _shared(sample, prompts)
    own = options = 0
    for item, prompt in zip(sample, prompts, strict=True):
        own += len(prompt) - shared
        for option in item.options:
            options += len(re.findall(r"\w+", option)) - 1
    scale = len(asked) / len(sample)
    chosen = bool(asked[0].options)
    written = generate or not chosen
    read = round(own * scale) + shared
    return BenchmarkCost(
        task.name,
        questions=len(asked),
        read=read + round(options * scale) if chosen else 0,
        passes=len(asked) if chosen else 0,
        answers=len(asked) if written else 0,
        new_tokens=task.max_new_tokens if written else 0,
        answer_read=read if written else 0,
    )


def _shared(sample: Sequence[Item], prompts: Sequence[Sequence[object]]) -> int:
    """Tokens that few-shot prompts of one draw begin with; they are read once (modeling/forward.py)."""
    if not sample[0].shots:
        return 0
    first = [list(prompt) for item, prompt in zip(sample, prompts, strict=True) if item.shots == sample[0].shots]
    shared = 0
    for tokens in zip(*first, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        shared += 1
    return shared


@dataclass(frozen=True)
class EvaluationInputs:
    """What was looked at: benchmarks that are here, and the sources; and the precision that both models are scored
    in."""

    readings: Sequence[BenchmarkCost]
    sources: Mapping[str, Estimate]
    precision: Precision


def planned(recipe: Recipe, facts: BaseFacts, machine: Machine, found: EvaluationInputs) -> PlannedEvaluation:
    """The evaluation of a resolved recipe. Where a benchmark is not here, `seconds` is a lower bound, and `unknown`
    names it."""
    section, taken = recipe.evaluate, found.precision
    pace = speed.scoring_pace(facts, machine, taken.computed_in, taken.weights)
    rows = int(section.batch) * int(recipe.stages[-1].section.seq_len)
    tasks: list[PlannedTask] = []
    for each in found.readings:
        tasks.append(
            {
                "name": each.name,
                "questions": each.questions,
                "read": each.read + each.answer_read,
                "written": each.answers * each.new_tokens,
                "seconds": round(2 * _task_seconds(each, pace, rows), 1),
            }
        )
    texts = 0
    for name in section.perplexity:
        texts += _held_out(recipe, name, found.sources[name])
    models = 2
    if taken.name == "delivered" and recipe.model.quantization == "nf4" and final_model(recipe).adapters and texts:
        models = 4  # texts in NF4 beside it
    loading = models * speed.load_seconds(facts)
    reading_texts = models * pace.read(texts, max(1, texts // rows))
    told = {each["name"] for each in tasks}
    scoring, parts = reading_texts, len(section.perplexity)
    for task in tasks:
        scoring += task["seconds"]
        parts += -(-task["questions"] // PART_QUESTIONS)
    # Each process loads the models, and takes the parts in turn.
    seconds = loading + scoring * -(-parts // machine.cards) / max(1, parts)
    return {
        "processes": max(1, min(parts, machine.cards)),
        "precision": taken.name,
        "weights": taken.weights,
        "computed_in": taken.computed_in,
        "why": taken.why,
        "tasks": tasks,
        "unknown": [each.label for each in section.tasks if each.label not in told],
        "text_tokens": texts,
        "text_seconds": round(reading_texts, 1),
        "models_loaded": models,
        "load_seconds": round(loading, 1),
        "seconds": round(seconds, 1),
    }


def _task_seconds(each: BenchmarkCost, pace: speed.Pace, batch_tokens: int) -> float:
    """One model over one benchmark."""
    seconds = pace.read(each.read, each.passes)
    if each.answers:
        # Prompts and answers of a batch fill so many tokens; one step writes a token of each (generation.py).
        batches = max(1, round((each.answer_read + each.answers * each.new_tokens) / batch_tokens))
        seconds += pace.read(each.answer_read, each.answers)
        seconds += batches * each.new_tokens * pace.step(each.answers / batches)
    return seconds


def _held_out(recipe: Recipe, name: str, found: Estimate) -> int:
    """Tokens of a source's held-out text, of which so many are read at most; without what a choice is made on."""
    share = recipe.data[name].holdout
    if not found.tokens or not share:
        return 0
    there = min(found.tokens * share / (1 - share), recipe.validation.max_tokens)
    return round(there * (1 - recipe.development))
