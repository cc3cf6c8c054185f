"""The search for identifiers on notes that others made and marked: python tests/phi_public.py FOLDER ...

Each FOLDER holds note.txt beside note.ann (BRAT's stand-off format), as the public synthetic corpus MEDDOCAN has them
(github.com/PlanTL-GOB-ES/SPACCC_MEDDOCAN, corpus/test/brat). Prints, by their classes, how many marks are found whole,
by half and not at all; and how much of what is found lies in no mark. None of the corpus is kept here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qmedtune.data.hygiene import phi

# What this search does not look for: sex, professions, countries, kinship, ages (but over 89).
NOT_LOOKED_FOR = (
    "SEXO_SUJETO_ASISTENCIA", "PROFESION", "PAIS", "FAMILIARES_SUJETO_ASISTENCIA", "OTROS_SUJETO_ASISTENCIA",
    "EDAD_SUJETO_ASISTENCIA",
)  # fmt: skip


def marks(path: Path) -> Iterator[tuple[str, int, int]]:
    """(class, start, end) of the text-bound annotations of a note."""
    for line in path.with_suffix(".ann").read_text(encoding="utf-8").splitlines():
        if line.startswith("T"):
            kind, start, end = line.split("\t")[1].split(" ")[:3]
            yield kind, int(start), int(end.split(";")[0])


def main(folders: list[str]) -> None:
    tallies: dict[str, Counter[str]] = {}
    found_spans = outside = characters = 0
    for folder in folders:
        for path in sorted(Path(folder).glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            spans = phi.find(text)
            marked = list(marks(path))
            inside: set[int] = set()
            for span in spans:
                inside.update(range(span.start, span.end))
            for kind, start, end in marked:
                wanted = [i for i in range(start, end) if text[i].isalnum()]
                found = sum(i in inside for i in wanted)
                verdict = "whole" if found == len(wanted) else "half" if found else "missed"
                tallies.setdefault(kind, Counter())[verdict] += 1
            for span in spans:
                found_spans += 1
                outside += not any(start < span.end and span.start < end for _, start, end in marked)
            characters += len(text)
    print("| class | marks | whole | half | missed |\n| --- | ---: | ---: | ---: | ---: |")
    whole = all_marks = half = 0
    for kind, counts in sorted(tallies.items(), key=lambda item: -item[1].total()):
        print(f"| {kind} | {counts.total():,} | {counts['whole']:,} | {counts['half']:,} | {counts['missed']:,} |")
        if kind not in NOT_LOOKED_FOR:
            whole, half, all_marks = whole + counts["whole"], half + counts["half"], all_marks + counts.total()
    print(f"\nof what is looked for: {whole:,} of {all_marks:,} whole, {half:,} by half")
    print(f"found: {found_spans:,} spans, {outside:,} of them in no mark, in {characters:,} characters")


if __name__ == "__main__":
    main(sys.argv[1:])
