#!/usr/bin/env bash
# One call on a CUDA machine: correctness, then speed, together under 8 minutes; then table, chart and dispatch table.
# Call it again after an interruption: tests that passed for these sources are not repeated, measured rows are kept.
#   kernels/benchmarks/run_gpu.sh            everything; the shipped dispatch table changes only if correctness passed
#   kernels/benchmarks/run_gpu.sh --quick    one shape of each kernel, for tuning; changes no table
#   RESULTS=DIR kernels/benchmarks/run_gpu.sh   results elsewhere, for a machine whose checkout is thrown away: copy them
#       to kernels/benchmarks/results later and run publish.py there, which needs no GPU
set -euo pipefail
results=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET QMEDTUNE_KERNELS
mkdir -p "$results"
name=$(python -c "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-'))")
stamp=$(python -c "import json; from qmedtune.bench.kernels import sources, versions
print(json.dumps({'sources': sources(), 'versions': versions()}))")

if [[ "$(cat "$results/$name.passed" 2>/dev/null)" != "$stamp" ]]; then
    python -m pytest -m gpu kernels/tests -p no:cacheprovider
    echo "$stamp" > "$results/$name.passed"
fi
if [[ "${1:-}" == "--quick" ]]; then
    python kernels/benchmarks/benchmark_all.py --quick --out "/tmp/$name.quick.json"
    exit
fi
python kernels/benchmarks/benchmark_all.py --out "$results/$name.json" --seconds $((460 - SECONDS))
python kernels/benchmarks/publish.py "$results/$name.json"
