"""Two thousand optimiser steps with a checkpoint every 20, on the CPU: do memory, file handles or disk grow?

    python tests/soak.py --steps 2000 --every 20

Prints one JSON object: the slope of the resident memory over the second half (bytes per 100 steps, least squares), open
file handles and bytes in the attempt's folder at the same points, and seconds. The base is the micro recipe's.
About 2 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

RECIPE = Path(__file__).parent.parent / "recipes" / "micro.yaml"


class Watch(TrainerCallback):
    """Looks after every checkpoint that was saved."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: list[dict[str, int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        # The metrics grow by a line of about 200 bytes with every step, and so do their copies in checkpoints.
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
        size = {path.stat().st_ino: path.stat().st_size for path in files}  # best weights have several names
        self.seen.append(
            {
                "step": state.global_step,
                "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
                "handles": len(os.listdir("/proc/self/fd")),
                "disk_bytes": sum(size.values()),
                "files": len(files),
            }
        )


def soak(steps: int, every: int, folder: Path) -> dict[str, Any]:
    from qmedtune import train
    from qmedtune.parsing.loader import load_recipe
    from qmedtune.run import run

    # The loop is what is watched, not the model: two rows of 32 tokens, adapters on one layer type.
    settings = [f"stages[0].cpt.tokens={steps * 2 * 32}", "stages[0].cpt.seq_len=32", "stages[0].cpt.batch=2"]
    settings += [f"save.every={every}", "validate.every=100", "validate.keep_best=true", "validate.max_tokens=200"]
    settings += ["adapter.targets=[q_proj]", "adapter.train_embeddings=false", "stages[0].cpt.max_repeats=10000"]
    loaded = load_recipe(RECIPE, settings)
    watch, make = Watch(folder / ".building" / "01-cpt"), train.QTrainer

    def watched(*given: Any) -> Any:
        trainer = make(*given)
        trainer.add_callback(watch)
        return trainer

    train.QTrainer = watched  # type: ignore[assignment,misc]
    began = time.monotonic()
    run(loaded.recipe, loaded.text, folder, offline=True, until="01-cpt")
    return summary(watch.seen) | {"seconds": round(time.monotonic() - began, 1)}


def summary(seen: list[dict[str, int]]) -> dict[str, Any]:
    """The first half is warm-up: allocators and caches fill."""
    second = seen[len(seen) // 2 :]
    slope = np.polyfit([s["step"] for s in second], [s["resident_bytes"] for s in second], 1)[0]
    return {
        "steps": seen[-1]["step"],
        "checkpoints": len(seen),
        "bytes_per_100_steps": round(100 * float(slope)),
        "resident_bytes": [second[0]["resident_bytes"], second[-1]["resident_bytes"]],
        "handles": sorted({s["handles"] for s in second}),
        "disk_bytes": [min(s["disk_bytes"] for s in second), max(s["disk_bytes"] for s in second)],
        "files": sorted({s["files"] for s in second}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(options.steps, options.every, Path(folder) / "run")))


if __name__ == "__main__":
    main()
