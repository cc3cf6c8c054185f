"""Run the flagship from an empty cache with sockets blocked, once per seed, and print what its own run.json says.

    python tests/flagship.py --seeds 17 18 19

One JSON object: seconds and accuracy of base and final per facet for every seed, the medians over the seeds, and the
peak memory. The first run makes the built-in base, the others find it in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGSHIP = Path(__file__).parent.parent / "recipes" / "cpt_then_sft.yaml"
BLOCKED = """
import sys
def block(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise OSError(f"the network is cut: {event}")
sys.addaudithook(block)
from qmedtune.cli import invoke
sys.exit(invoke(sys.argv[1:]))
"""


def run_blocked(out: Path, cache: Path, *arguments: str) -> tuple[int, float]:
    """Exit code and seconds of `qmedtune run recipes/cpt_then_sft.yaml` in a process that cannot open a connection."""
    command = [sys.executable, "-c", BLOCKED, "run", str(FLAGSHIP), "--out", str(out), *arguments]
    started = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "QMEDTUNE_CACHE": str(cache)}, stdout=sys.stderr, check=False)
    return done.returncode, time.monotonic() - started


def facets(result: dict) -> dict[str, dict[str, float]]:
    found = result["evaluation"]["tasks"]["facts"]["facets"]
    return {name: {which: score[which]["accuracy"] for which in ("base", "final")} for name, score in found.items()}


def measure(seeds: list[int], folder: Path) -> dict:
    rows = []
    for seed in seeds:
        code, seconds = run_blocked(folder / f"seed-{seed}", folder / "cache", "--set", f"seed={seed}")
        assert code == 0, f"seed {seed}: exit code {code}"
        result = json.loads((folder / f"seed-{seed}" / "run.json").read_text())
        rows.append({"seed": seed, "seconds": round(seconds, 1), "facets": facets(result)})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    medians = {
        facet: {which: statistics.median(row["facets"][facet][which] for row in rows) for which in ("base", "final")}
        for facet in rows[0]["facets"]
    }
    return {"rows": rows, "medians": medians, "peak_memory_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(parser.parse_args().seeds, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
