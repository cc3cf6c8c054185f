#!/usr/bin/env bash
# After first_call.py, four minutes: kernels measured again, then the pages and what dispatch trusts, from the results.
#   kernels/benchmarks/second_call.sh FIRST_CALL_OUT
set -uo pipefail
# RESULTS=DIR: results elsewhere, for a machine whose checkout is thrown away; publish.py fills the pages there later.
first=$(realpath "${1:?the folder that first_call.py wrote}")
results=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
cd "$(dirname "$0")/../.."
python=$(command -v python3 || command -v python)
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET QMEDTUNE_KERNELS
name=$("$python" -c "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-'))") || exit 1
mkdir -p "$results"
cp "$first/tests.junit.xml" "$results/$name.junit.xml" 2>/dev/null || echo "no test report: nothing is refused" >&2
timeout --signal=INT --kill-after=10 220 "$python" kernels/benchmarks/benchmark_all.py --out "$results/$name.json" --seconds 205
timeout 20 "$python" kernels/benchmarks/publish.py "$results/$name.json"
