"""`python -m ptx table|faults [--fast] [--only TEXT]` from kernels/tests: rows as JSON lines, then a summary."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

from .memory import Fault
from .program import UnknownInstruction
from .work import all_work, perform


def table(fast: bool, only: str) -> Iterator[dict]:
    for work in all_work():
        for arch in work.fast if fast else work.targets:
            if only in f"{work.name} sm_{arch}":
                began = time.perf_counter()
                try:
                    row = asdict(perform(work, arch))
                except (Fault, UnknownInstruction) as error:
                    why = f"{type(error).__name__}: {error}"
                    row = {"work": work.name, "target": f"sm_{arch}", "right": False, "stopped": why}
                yield row | {"seconds": round(time.perf_counter() - began, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="ptx", description=__doc__)
    parser.add_argument("what", choices=("table", "faults"))
    parser.add_argument("--fast", action="store_true", help="the set of CI")
    parser.add_argument("--only", default="", help="rows whose name and target contain this")
    options = parser.parse_args()
    if options.what == "faults":
        from .faults import rows

        found = list(_told(rows(options.only, options.fast)))
        here = [row for row in found if row["planted"]]
        caught = sum(row["caught"] for row in here)
        print(f"{caught} of {len(here)} planted faults caught", file=sys.stderr)
        return 0 if caught >= 0.9 * len(here) else 1
    found = list(_told(table(options.fast, options.only)))
    wrong = [row for row in found if not row["right"] or row.get("hazards")]
    seconds = sum(row["seconds"] for row in found)
    elements = sum(row.get("elements", 0) for row in found)
    print(f"{len(found)} rows, {elements:,} elements, {len(wrong)} wrong, {seconds:.0f} s", file=sys.stderr)
    return 1 if wrong else 0


def _told(rows: Iterator[dict]) -> Iterator[dict]:
    for row in rows:
        print(json.dumps(row), flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
