"""The sets of headers that were written before their author had read a pattern: `python tests/phi_blind.py fifth`.

Prints how many marked identifiers are found whole, by half and not at all, by class and by family of headers, and how
many look-alikes are left alone. In `phi_third.txt` and `phi_fourth.txt` an identifier stands between < and >, its class
is that of the line; in `phi_fifth.txt`, which has markup of its own, it is `{{class:identifier}}`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmedtune.data.hygiene import phi

HERE = Path(__file__).parent
MARKED = re.compile(r"\{\{([a-z_]+):(.*?)\}\}")


@dataclass(frozen=True)
class Case:
    """A header, and which part of it is an identifier."""

    family: str
    kind: str
    text: str
    start: int
    end: int

    def verdict(self) -> str:
        """`whole`, `half` or `none`: how many letters and digits of the identifier are inside what is found."""
        inside: set[int] = set()
        for span in phi.find(self.text):
            inside.update(range(span.start, span.end))
        wanted = [i for i in range(self.start, self.end) if self.text[i].isalnum()]
        found = sum(i in inside for i in wanted)
        if found == len(wanted):
            return "whole"
        return "half" if found else "none"


def cases(name: str) -> Iterator[Case]:
    """The cases of `phi_{name}.txt`."""
    text = (HERE / f"phi_{name}.txt").read_text(encoding="utf-8").strip()
    if "{{" in text:
        for line in text.splitlines():
            family, marked = line.split("|", 1)
            yield from _between_braces(family, marked.replace("\\n", "\n").replace("\\|", "|"))
        return
    for entry in re.split(r"\n(?=[a-z]+\|)", text):
        kind, marked = entry.split("|", 1)
        yield from _between_angles(kind, marked)


def _between_braces(family: str, marked: str) -> Iterator[Case]:
    plain, spans, at = "", [], 0
    for match in MARKED.finditer(marked):
        plain += marked[at : match.start()]
        spans.append((match[1], len(plain), len(plain) + len(match[2])))
        plain += match[2]
        at = match.end()
    plain += marked[at:]
    for kind, start, end in spans:
        yield Case(family, kind, plain, start, end)


def _between_angles(kind: str, marked: str) -> Iterator[Case]:
    plain, spans = "", []
    for part in re.split(r"([<>])", marked):
        if part == "<":
            spans.append((len(plain), len(plain)))
        elif part == ">":
            spans[-1] = (spans[-1][0], len(plain))
        else:
            plain += part
    for start, end in spans:
        yield Case(kind, kind, plain, start, end)


def kept(name: str) -> list[str]:
    """The look-alikes of a set."""
    return (HERE / f"phi_{name}_kept.txt").read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("third", "fourth", "fifth"))
    parser.add_argument("--missed", action="store_true", help="also print what is not found whole")
    options = parser.parse_args()
    tallies: dict[str, Counter[str]] = {}
    for case in cases(options.name):
        verdict = case.verdict()
        for row in (f"class {case.kind}", f"family {case.family}", "all"):
            tallies.setdefault(row, Counter())[verdict] += 1
        if options.missed and verdict != "whole":
            print(f"{verdict:5} {case.family:10} {case.kind:10} {case.text[case.start : case.end]!r} in {case.text!r}")
    for row, counts in sorted(tallies.items()):
        print(
            f"{row:24} {counts['whole']:4} whole {counts['half']:4} half {counts['none']:4} missed of {counts.total()}"
        )
    texts = kept(options.name)
    flagged = [text for text in texts if phi.find(text)]
    print(f"look-alikes left alone: {len(texts) - len(flagged)} of {len(texts)}")
    if options.missed:
        for text in flagged:
            print(f"flagged {text!r} {phi.find(text)}")


if __name__ == "__main__":
    main()
