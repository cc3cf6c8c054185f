"""What the search for identifiers finds, by class: `python tests/phi_table.py` prints the table of docs/privacy.md.

Of the hand-made cases (phi_cases.py), of generated names and numbers (phi_generated.py). All of them are
invented by the people who wrote the patterns: on a hospital's own notes expect less.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from phi_cases import FOUND, KEPT
from phi_generated import header, named, planted

from qmedtune.data.hygiene import phi


def cases() -> Iterator[tuple[str, str, int, int]]:
    """(class, text, start, end) of everything that is to be found."""
    for kind, text, values in FOUND:
        yield from ((f"{kind}, by hand", text, text.index(value), text.index(value) + len(value)) for value in values)
    rng = random.Random(3)
    for _ in range(3000):
        text, name = named(rng)
        yield "name, generated", text, text.index(name), text.index(name) + len(name)
    for _ in range(3000):
        text, marks = header(rng)
        for kind, start, end in marks:
            yield f"{kind} of a header, generated", text, start, end
    for text, start, end, kind in planted(10_000, 0):
        yield f"{kind}, generated", text, start, end


def main() -> None:
    tally: dict[str, Counter[str]] = {}
    for kind, text, start, end in cases():
        inside = {i for span in phi.find(text) for i in range(span.start, span.end)}
        wanted = [i for i in range(start, end) if text[i].isalnum()]
        found = sum(i in inside for i in wanted)
        verdict = "whole" if found == len(wanted) else "half" if found else "missed"
        tally.setdefault(kind, Counter())[verdict] += 1
    print("| class | cases | whole | half | missed |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, counts in sorted(tally.items()):
        print(f"| {kind} | {counts.total():,} | {counts['whole']:,} | {counts['half']:,} | {counts['missed']:,} |")
    print(f"\nLook-alikes left alone: {sum(not phi.find(text) for text in KEPT)} of {len(KEPT)}")


if __name__ == "__main__":
    main()
