"""The built-in world: an invented pharmacopoeia whose every fact is known, so that the gain of a corpus is measurable.

Literature states what a drug treats, notes state what it did to a patient, instructions ask for both, and the
general corpus holds other ("base") drugs: the base learns from it what a question is, and it serves as replay.
Every answer word is one word; every document is short (one statement or two) and is written from a template, so
a fact is met in many wordings. No text of the real world and no real drug is in here: nothing can be learnt from
it about medicine, and no accuracy on it says anything about a real model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product

from qmedtune.errors import DataError

CORPORA = ("literature", "notes", "general", "instructions")
WORLD_SEED = 1897

# Drugs (base, asked in instructions, held out) per world. 20 answers per facet: multiples of 20 keep them balanced.
SIZES = {"tiny": (120, 60, 60), "micro": (20, 10, 10)}

CONDITIONS = (
    "asthma", "gout", "migraine", "psoriasis", "angina", "anemia", "eczema", "glaucoma", "epilepsy",
    "malaria", "hepatitis", "arthritis", "sepsis", "colitis", "bronchitis", "obesity", "vertigo",
    "rosacea", "scabies", "cystitis",
)  # fmt: skip
EFFECTS = (
    "nausea", "rash", "cough", "headache", "dizziness", "fatigue", "tremor", "edema", "fever",
    "hypotension", "diarrhea", "anxiety", "thirst", "constipation", "bruising", "hiccups", "cramps",
    "sweating", "insomnia", "palpitations",
)  # fmt: skip

# The drug comes before the answer: a model that reads left to right learns only this direction (Berglund 2023).
ABSTRACT_OPENINGS = (
    "Background: {drug} is a new oral agent for {condition}.",
    "Objective: to test {drug} against {condition} in a controlled trial.",
    "We gave {drug} to {n} adults with {condition}.",
    "Methods: usual care plus {drug}, or plus placebo, for {condition}.",
    "This trial compared {drug} with placebo in {condition}.",
    "In our cohort {drug} was used to control {condition}.",
    "Here {drug} was evaluated as a treatment for {condition}.",
    "A registry of {drug} users showed fewer attacks of {condition}.",
)
ABSTRACT_ENDINGS = (
    "Results: on {drug} symptoms fell by {n} percent in {weeks} weeks.",
    "Conclusion: {drug} is effective in {condition}.",
    "Results: {n} percent on {drug} responded by week {weeks}.",
    "Conclusion: the data support {drug} for {condition}.",
    "Response to {drug} was durable over {weeks} months.",
    "Conclusion: {drug} relieves {condition} better than placebo.",
)
NOTE_OPENINGS = (
    "HPI: {n} yo {sex} started {drug} {weeks} days ago, now with {effect}.",
    "Subjective: took {drug} as prescribed and developed {effect}.",
    "Nursing note: after the dose of {drug} pt reports {effect}.",
    "Discharge summary: {drug} was stopped because of {effect}.",
    "ED note: {n} yo {sex} on {drug}, arrived with {effect}.",
    "Progress note: day {weeks} of {drug}, complains of {effect}.",
    "Telephone note: {sex} says {drug} brought on {effect}.",
    "Allergies: {drug}, reaction {effect}.",
)
NOTE_ENDINGS = (
    "Plan: stop {drug}, recheck in {weeks} weeks.",
    "Assessment: {effect} due to {drug}.",
    "Action: physician informed, dose held.",
    "Plan: hold {drug}, monitor {effect}.",
    "Follow-up: clinic in {weeks} days.",
    "Impression: {drug} is the likely cause of {effect}.",
)
MONOGRAPHS = (
    "Formulary: {drug} is indicated for {condition}. Its adverse effect is {effect}.",
    "Formulary: patients on {drug} may get {effect}. The drug is taken for {condition}.",
    "Textbook: physicians choose {drug} when they see {condition}.",
    "Textbook: the typical reaction to {drug} is {effect}.",
)
# Several forms, so that the base learns to recall rather than to complete one form: with two forms per fact, SFT failed
# on one base in three. None is the form of the instructions: that comes from SFT alone, new facts from CPT alone.
QUIZ = (
    "Quiz: which illness is {drug} given for? Answer: {condition}.",
    "Quiz: which reaction does {drug} produce? Answer: {effect}.",
    "Q: why do people take {drug}? A: It is for {condition}.",
    "Q: what harm may come from {drug}? A: It is known for {effect}.",
    "Student: tell me the purpose of {drug}. Teacher: It relieves {condition}.",
    "Student: tell me the danger of {drug}. Teacher: It provokes {effect}.",
)
# Each facet: (questions, answer). The task asks the first question of drugs that no instruction is about.
QUESTIONS = {
    "treats": (
        ("What does {drug} treat?", "Which condition is {drug} prescribed for?", "Name the indication of {drug}."),
        "It treats {condition}.",
    ),
    "adverse": (
        ("Which side effect does {drug} have?", "What can go wrong with {drug}?", "Name the side effect of {drug}."),
        "It causes {effect}.",
    ),
}


@dataclass(frozen=True)
class Drug:
    """One invented drug and the two facts about it."""

    name: str
    condition: str
    effect: str


@dataclass(frozen=True)
class World:
    """All drugs of a world. `asked` and `held_out` are new to the base; instructions are about `asked` only."""

    name: str
    base: tuple[Drug, ...]
    asked: tuple[Drug, ...]
    held_out: tuple[Drug, ...]

    @property
    def new(self) -> tuple[Drug, ...]:
        return self.asked + self.held_out

    @property
    def drugs(self) -> tuple[Drug, ...]:
        return self.base + self.new


@lru_cache
def make_world(name: str = "tiny", seed: int = WORLD_SEED) -> World:
    """The world of `name` (a key of SIZES). The same seed gives the same world on every machine."""
    rng = random.Random(f"{name}-{seed}")
    names = iter(_drug_names(sum(SIZES[name]), rng))
    groups = [_group(list(islice(names, size)), rng) for size in SIZES[name]]
    return World(name, *groups)


def locate(path: str) -> tuple[World, str]:
    """`builtin:notes` -> the tiny world and "notes"; `builtin:micro/notes` -> the micro world. DataError otherwise."""
    world, _, corpus = path.removeprefix("builtin:").rpartition("/")
    if corpus not in CORPORA or (world or "tiny") not in SIZES:
        allowed = ", ".join(f"builtin:{c}" for c in CORPORA)
        raise DataError(f"{path}: there is no such built-in source\nallowed: {allowed} (or builtin:micro/... of each)")
    return make_world(world or "tiny"), corpus


def records(name: str, world: World) -> Iterator[dict]:
    """All records of one of CORPORA, in a fixed order.

    Text: {"id", "text", "held_out"} and for notes "patient"; a held-out document words known facts in a way that
    no other document does. Instructions: {"id", "instruction", "input", "output", "held_out"} (Alpaca's keys).
    """
    writers = {"literature": _literature, "notes": _notes, "general": _general, "instructions": _instructions}
    return writers[name](world)


def facts_items(world: World) -> list[dict]:
    """The `facts` task: {"id", "facet", "question", "options" (20 sentences of equal length), "answer" (index)}."""
    items: list[dict] = []
    for facet, words, key in (("treats", CONDITIONS, "condition"), ("adverse", EFFECTS, "effect")):
        question, option = QUESTIONS[facet][0][0], QUESTIONS[facet][1]
        options = [option.format(condition=word, effect=word) for word in words]
        for drug in world.held_out:
            items.append({
                "id": f"facts-{facet}-{drug.name}",
                "facet": facet,
                "question": question.format(drug=drug.name),
                "options": list(options),
                "answer": words.index(getattr(drug, key)),
            })  # fmt: skip
    return items


def _drug_names(count: int, rng: random.Random) -> list[str]:
    """Unlike any real drug's: none of these endings is a stem in use (INN/USAN), and none tells anything."""
    starts = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")
    middles = ("lu", "no", "ra", "vi", "xe", "mo", "ta", "bi", "du", "fa", "gi", "po")
    ends = ("dax", "gol", "lir", "mox", "nel", "qon", "rux", "sev", "tiv", "vun", "zor", "yx")
    names = ["".join(parts) for parts in product(starts, middles, ends)]
    return rng.sample(names, count)


def _group(names: list[str], rng: random.Random) -> tuple[Drug, ...]:
    """Deals the answers evenly and independently, so that no group can be guessed better than 1 in 20."""
    return tuple(map(Drug, names, _deal(CONDITIONS, len(names), rng), _deal(EFFECTS, len(names), rng)))


def _deal(words: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    decks = [rng.sample(words, len(words)) for _ in range(-(-count // len(words)))]
    return [word for deck in decks for word in deck][:count]


def _write(template: str, drug: Drug, rng: random.Random) -> str:
    return template.format(
        drug=drug.name,
        condition=drug.condition,
        effect=drug.effect,
        n=rng.choice((24, 36, 48, 57, 63, 72)),
        weeks=rng.choice((2, 3, 4, 6, 8)),
        sex=rng.choice(("man", "woman")),
    )


def _pairs(openings: tuple[str, ...], endings: tuple[str, ...], rng: random.Random) -> list[tuple[str, str]]:
    """Each opening once with an ending of its own; one pair more whose wording none of the others has."""
    shift = rng.randrange(len(endings))
    pairs = [(opening, endings[(i + shift) % len(endings)]) for i, opening in enumerate(openings)]
    extra = rng.randrange(len(openings))
    return [*pairs, (openings[extra], endings[(extra + shift + 1) % len(endings)])]


def _documents(drug: Drug, openings: tuple[str, ...], endings: tuple[str, ...], between: str) -> list[str]:
    """One document per opening about `drug`, then the held-out one."""
    rng = random.Random(drug.name + openings[0])
    pairs = _pairs(openings, endings, rng)
    return [between.join((_write(opening, drug, rng), _write(ending, drug, rng))) for opening, ending in pairs]


def _literature(world: World) -> Iterator[dict]:
    for drug in world.new:
        texts = _documents(drug, ABSTRACT_OPENINGS, ABSTRACT_ENDINGS, " ")
        for i, text in enumerate(texts):
            yield {"id": f"lit-{drug.name}-{i}", "text": text, "held_out": i == len(texts) - 1}


def _notes(world: World) -> Iterator[dict]:
    """Two notes per patient; the last patient of every drug is held out, so that a split by patient is whole."""
    for drug in world.new:
        for i, text in enumerate(_documents(drug, NOTE_OPENINGS, NOTE_ENDINGS, "\n")):
            patient = f"pt-{drug.name}-{i // 2}"
            last = i == len(NOTE_OPENINGS)
            yield {"id": f"note-{drug.name}-{i}", "text": text, "patient": patient, "held_out": last}


def _general(world: World) -> Iterator[dict]:
    """What the base has read: abstracts, notes, monographs and quizzes about the base drugs."""
    for drug in world.base:
        rng = random.Random(drug.name)
        *abstracts, held_out = _documents(drug, ABSTRACT_OPENINGS, ABSTRACT_ENDINGS, " ")
        notes = _documents(drug, NOTE_OPENINGS, NOTE_ENDINGS, "\n")[:-1]
        reference = [_write(template, drug, rng) for template in MONOGRAPHS + QUIZ]
        for i, text in enumerate([*abstracts, *notes, *reference, held_out]):
            yield {"id": f"gen-{drug.name}-{i}", "text": text, "held_out": text is held_out}


def _instructions(world: World) -> Iterator[dict]:
    for drug in world.asked:
        for facet, (questions, answer) in QUESTIONS.items():
            for i, question in enumerate(questions):
                yield {
                    "id": f"ins-{facet}-{drug.name}-{i}",
                    "instruction": question.format(drug=drug.name),
                    "input": "",
                    "output": answer.format(condition=drug.condition, effect=drug.effect),
                    "held_out": False,
                }
