"""Canaries: invented secrets in the shape of a note, planted so that it can be measured what a model gives away again.

Each is a made-up name with a made-up number of nine digits, drawn from the recipe's seed: no text of a real record.
They are planted behind hygiene, as what got past it would be: de-duplication would remove repeats, redaction the
numbers. Deliberately absent: measuring (audit.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from qmedtune import store
from qmedtune.data.reading.document import Record
from qmedtune.recipe import AuditSection, Recipe
from qmedtune.results import Planted

FILE = "canaries.json"
CONTROL = 0  # planted not at all: what exposure looks like by chance
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")
CONTEXT = "Contact of {name}:"


@dataclass(frozen=True)
class Canary:
    """`secret` follows `context`; planted `repeats` times in the training text of `source`."""

    source: str
    repeats: int
    context: str
    secret: str


def canaries(recipe: Recipe, audit: AuditSection) -> list[Canary]:
    """All canaries of a recipe, per source and number of repeats, the controls included."""
    rng = random.Random(f"canaries-{recipe.seed}")
    names = []
    for parts in product(SYLLABLES, repeat=4):
        names.append("".join(parts).capitalize())
    rng.shuffle(names)
    wanted = [(source, n) for source in planted_sources(audit) for n in (CONTROL, *audit.repeats)]
    drawn = iter(names)
    return [
        Canary(source, repeats, CONTEXT.format(name=next(drawn)), secret(rng))
        for source, repeats in wanted
        for _ in range(audit.canaries)
    ]


def secret(rng: random.Random) -> str:
    """One of 10^9 numbers, as `402-913-775`."""
    digits = f"{rng.randrange(10**9):09d}"
    return f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"


def planted_sources(audit: AuditSection) -> list[str]:
    return [audit.source, *([audit.prompts] if audit.prompts else [])]


def messages(canary: Canary) -> list[dict[str, str]]:
    """A record whose prompt holds the canary and whose response does not."""
    return [
        {"role": "user", "content": f"{canary.context} {canary.secret}."},
        {"role": "assistant", "content": "Noted."},
    ]


def plant(recipe: Recipe, audit: AuditSection, inputs: Mapping[str, Path], out: Path) -> Planted:
    """Write out/<source>/train.jsonl, the source's records with the canaries behind them, and out/canaries.json.

    inputs: source name -> its folder with train.jsonl. The order of records does not matter: packing draws them.
    """
    found = canaries(recipe, audit)
    documents = {}
    for source in planted_sources(audit):
        (out / source).mkdir(exist_ok=True)
        records = list(_records(recipe, [canary for canary in found if canary.source == source]))
        with (inputs[source] / "train.jsonl").open("rb") as given, (out / source / "train.jsonl").open("wb") as file:
            for line in given:
                file.write(line)
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
        documents[source] = len(records)
    store.write_json(out / FILE, [asdict(canary) for canary in found])
    return Planted(canaries=len(found), documents=documents)


def _records(recipe: Recipe, found: list[Canary]) -> Iterator[Record]:
    for number, canary in enumerate(found):
        for copy in range(canary.repeats):
            name = f"canary-{number}-{copy}"
            if recipe.data[canary.source].kind == "instructions":
                yield {"id": name, "messages": messages(canary)}
            else:
                yield {"id": name, "text": f"{canary.context} {canary.secret}."}


def read(folder: Path) -> list[Canary]:
    found: list[Canary] = []
    for entry in json.loads((folder / FILE).read_text(encoding="utf-8")):
        found.append(Canary(**entry))
    return found
