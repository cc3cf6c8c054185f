"""What a run found, as hashes: to see that a change of the code changed nothing else.

`python tests/fingerprint.py RUN ...` prints for each finished run folder the sha256 of run.json (without times, speeds,
memory, paths and provenance), of the losses in metrics.jsonl, and of every weight file. Equal lines mean an equal run.
`--show` prints the facts that were hashed, for a diff.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

# Differ between two runs of the same code, or name the machine or the version; so do all names in _s and _seconds.
# `privacy` tells again what other entries tell, with sizes of files.
VOLATILE = {
    "seconds", "path", "provenance", "key", "data_share", "host_peak_bytes", "peak_memory_bytes", "privacy",
    "recipe_text",
}  # fmt: skip
METRICS = ("stage", "step", "loss", "lr", "grad_norm", "tokens", "val_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    for run in options.runs:
        facts = steady(json.loads((run / "run.json").read_text()))
        facts.pop("sha256", None)  # of run.json itself
        if options.show:
            print(json.dumps(facts, indent=1, sort_keys=True))
        print(f"{run.name} run.json {sha256(facts)}")
        print(f"{run.name} losses {sha256(losses(run))}")
        for path in sorted(run.rglob("*.safetensors")):
            print(f"{run.name} {path.relative_to(run)} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")


def steady(value: Any) -> Any:
    """The facts without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {key: steady(part) for key, part in value.items() if not is_volatile(key)}
    if isinstance(value, list):
        return [steady(part) for part in value if not is_before_training(part)]
    return value


def is_before_training(line: Any) -> bool:
    """The held-out losses before the first step, which runs of version 0.1 have not: the base's, not training's."""
    return isinstance(line, dict) and line.get("step") == 0 and "warning" not in line


def is_volatile(key: str) -> bool:
    return key in VOLATILE or key.endswith(("_s", "_seconds"))


def losses(run: Path) -> list[list[Any]]:
    """Of every logged step of every stage, what training computed."""
    rows = []
    for path in sorted(run.rglob("metrics.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if is_before_training(row):
                continue
            rows.append([row.get(name) for name in METRICS])
    return rows


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
