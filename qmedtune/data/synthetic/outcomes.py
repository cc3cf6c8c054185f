"""The built-in labelled notes (`builtin:outcomes`): did what a drug did to a patient bring that patient back?

Each text is the beginning of a note of the built-in world, up to where it would say the effect; the label follows from
that effect alone. So a model that read notes can tell the label of a drug that no labelled note is about, and another
can only guess: an AUROC over drugs that are held out is near .5 for it. world.py is left as it is, because bases are
known by it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from qmedtune.data.synthetic import world as worlds
from qmedtune.data.synthetic.world import EFFECTS, World

NAME = "outcomes"
CORPORA = (*worlds.CORPORA, NAME)

# The beginnings of world.NOTE_OPENINGS that do not tell the effect.
OPENINGS = (
    "HPI: {n} yo {sex} started {drug} {weeks} days ago.",
    "Subjective: took {drug} as prescribed.",
    "Nursing note: after the dose of {drug}.",
    "ED note: {n} yo {sex} on {drug}.",
    "Progress note: day {weeks} of {drug}.",
)
SERIOUS = frozenset(EFFECTS[::2])
LABELS = {True: "arrived", False: "clinic"}  # words of the world, so that they mean nothing else to its model


def locate(path: str) -> tuple[World, str]:
    """The world and the corpus of a `builtin:` path, the labelled one included. DataError where there is none."""
    world, _, corpus = path.removeprefix("builtin:").rpartition("/")
    if corpus != NAME:
        return worlds.locate(path)
    return worlds.locate(f"builtin:{world}/notes" if world else "builtin:notes")[0], NAME


def builtin_records(path: str) -> Iterator[dict]:
    """All records of a built-in source, in a fixed order."""
    world, corpus = locate(path)
    if corpus == NAME:
        return records(world)
    found = worlds.records(corpus, world)
    if corpus == "instructions":
        return (_unmarked(record) for record in found)
    return found


def _unmarked(record: dict) -> dict:
    """The world marks no instruction as held out; `holdout` does, as in every other source."""
    found = {}
    for key, value in record.items():
        if key != "held_out":
            found[key] = value
    return found


def records(world: World) -> Iterator[dict]:
    """{"id", "text", "label", "patient", "held_out"}; held out are the drugs that instructions never name either."""
    for drug in world.new:
        rng = random.Random(f"outcomes-{drug.name}")
        for i, opening in enumerate(OPENINGS):
            text = opening.format(
                drug=drug.name, n=rng.choice((24, 36, 48, 57, 63, 72)), weeks=rng.choice((2, 3, 4, 6, 8)),
                sex=rng.choice(("man", "woman")),
            )  # fmt: skip
            label, held_out = LABELS[drug.effect in SERIOUS], drug in world.held_out
            patient = f"out-{drug.name}"
            yield {"id": f"{patient}-{i}", "text": text, "label": label, "patient": patient, "held_out": held_out}
