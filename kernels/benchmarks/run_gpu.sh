#!/usr/bin/env bash
# One call on a CUDA machine: correctness, then speed (under 8 minutes, resumable), then table and chart.
#   kernels/benchmarks/run_gpu.sh            everything; the shipped dispatch table changes only if correctness passed
#   kernels/benchmarks/run_gpu.sh --quick    one shape of each kernel, for tuning; changes no table
set -euo pipefail
cd "$(dirname "$0")/../.."
name=$(python -c "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-'))")
results="kernels/benchmarks/results/$name.json"
unset TRITON_INTERPRET

python -m pytest -m gpu kernels/tests -p no:cacheprovider
if [[ "${1:-}" == "--quick" ]]; then
    python kernels/benchmarks/benchmark_all.py --quick --out "/tmp/$name.quick.json"
    exit
fi
python kernels/benchmarks/benchmark_all.py --out "$results"
python kernels/benchmarks/publish.py "$results" --correctness-passed
