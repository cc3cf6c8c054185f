"""What Presidio with a spaCy model adds to the search for names, as docs/privacy.md has it.

    python tests/phi_presidio.py MODEL      # an installed package, or a folder

Of names that nothing announces (phi_running.txt), of sentences in which nobody is named (phi_running_kept.txt), and of
the look-alikes of the other sets.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from phi_cases import KEPT

from qmedtune.data.hygiene import phi
from qmedtune.data.hygiene.presidio import Finder, person_finder

HERE = Path(__file__).parent


def named() -> list[tuple[str, str]]:
    """(text, name)"""
    found = []
    for line in (HERE / "phi_running.txt").read_text(encoding="utf-8").splitlines():
        marked = line.partition("|")[2]
        name = re.search("<(.*?)>", marked)
        assert name
        found.append((re.sub("[<>]", "", marked), name[1]))
    return found


def whole_and_half(finder: Finder | None) -> tuple[int, int]:
    whole = half = 0
    for text, name in named():
        inside = {place for span in phi.find(text, finder) for place in range(span.start, span.end)}
        start = text.index(name)
        wanted = [place for place in range(start, start + len(name)) if text[place].isalnum()]
        found = sum(place in inside for place in wanted)
        whole += found == len(wanted)
        half += 0 < found < len(wanted)
    return whole, half


def main() -> None:
    finder = person_finder(sys.argv[1])
    nobody = (HERE / "phi_running_kept.txt").read_text(encoding="utf-8").splitlines()
    others = list(KEPT)
    for name in ("third", "fourth"):
        others += (HERE / f"phi_{name}_kept.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join(nobody + [each for each, _ in named()]) * 10
    print("| search | names whole | half | no name, left alone | other look-alikes | characters/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for label, each in (("patterns", None), ("patterns and Presidio", finder)):
        whole, half = whole_and_half(each)
        alone = sum(not phi.find(line, each) for line in nobody)
        left = sum(not phi.find(line, each) for line in others)
        begin = time.process_time()
        phi.find(text, each)
        speed = len(text) / (time.process_time() - begin)
        cells = [f"{whole} of {len(named())}", half, f"{alone} of {len(nobody)}", f"{left} of {len(others)}"]
        print(f"| {label} | " + " | ".join(map(str, cells)) + f" | {speed:,.0f} |")


if __name__ == "__main__":
    main()
