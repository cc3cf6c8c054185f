"""Every kernel against its limit and its peers on this CUDA device; the same as `qmedtune bench kernels --json`."""

import argparse
import json
from pathlib import Path

from qmedtune.bench.kernels import TIME_LIMIT_S, bench_kernels


def main(only: str = "") -> None:
    """Measure the kernels whose name contains `only`, print a line each, and write --out where given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="results file; rows already in it are kept")
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--only", default=only, help="kernels whose name contains this")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds; the next call goes on")
    arguments = parser.parse_args()
    result = bench_kernels(
        out=arguments.out, quick=arguments.quick, only=arguments.only, time_limit_s=arguments.time_limit
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        value = row.get("value", row.get("skipped"))
        shares = row.get("of_limit", ""), row.get("ratio", "")
        print(row["kernel"], row.get("shape", ""), row["contender"], value, *shares)


if __name__ == "__main__":
    main()
