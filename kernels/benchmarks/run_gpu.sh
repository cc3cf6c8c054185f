#!/usr/bin/env bash
# Training beside its peers on a CUDA machine, in calls of less than ten minutes each; first_call.py and second_call.sh
# come before. Each can be repeated: what has been measured is kept under kernels/benchmarks/results/ and is not measured
# again.
#   kernels/benchmarks/run_gpu.sh train      training beside the peers: as it comes, nothing recomputed, within 24 GiB
#   kernels/benchmarks/run_gpu.sh best       within 24 GiB, each at the micro-batch and checkpointing it is fastest with
#   kernels/benchmarks/run_gpu.sh memory     longest context, loading, the 70B shape in 48 GiB
#   kernels/benchmarks/run_gpu.sh ablation   kernel by kernel, on the 1B shape
# RESULTS=DIR: results elsewhere, for a machine whose checkout is thrown away; copied to kernels/benchmarks/results later,
# publish.py and publish_training.py fill the pages there without a GPU. SCRATCH=DIR: room for 60 GB of random models, which
# are kept for the next call. Each step is cut at its limit; the exit status says whether any failed.
set -uo pipefail
results=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
cd "$(dirname "$0")/../.."
part=${1:-}
case "$part" in
train | best | memory | ablation) ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
python=$(command -v python3 || command -v python)
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET QMEDTUNE_KERNELS
name=$("$python" -c "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-'))") || exit 1
training="$results/training/$name" scratch=${SCRATCH:-${TMPDIR:-/tmp}/qmedtune-bench}
mkdir -p "$results/training" "$scratch"
failed=0

step() { # step SECONDS COMMAND...
    local limit=$1 status
    shift
    echo "== $*" >&2
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    status=$?
    [[ $status -eq 0 ]] || { failed=1 && echo "== ended with $status: $*" >&2; }
    return $status
}

bench() { # bench SECONDS LABEL OPTIONS...: `qmedtune bench OPTIONS` into results/training/GPU.LABEL.json
    local limit=$1 file="$training.$2.json"
    shift 2
    step "$limit" "$python" -m qmedtune bench "$@" --json --scratch "$scratch" >"$file.new" && mv "$file.new" "$file"
    rm -f "$file.new"
}

train() { # train SECONDS LABEL CONTENDERS OPTIONS...
    local limit=$1 label=$2 contenders=$3
    shift 3
    bench $((limit + 15)) "$label" train --time-limit "${limit}s" --rounds 1 --contenders "$contenders" \
        --results "$training.raw.json" "$@"
}

case "$part" in
train)
    large=(--shape 8b --rows 1)
    train 90 tiny trl-tuned,unsloth,axolotl,qmedtune-reference,qmedtune --shape tiny
    train 240 8b trl-tuned,qmedtune,trl,unsloth,axolotl,trl-liger,trl-compiled "${large[@]}" --checkpointing
    train 90 8b-keep trl-tuned,qmedtune,unsloth "${large[@]}" --keep
    train 90 8b-24gib trl-tuned,qmedtune,unsloth "${large[@]}" --checkpointing --memory 24
    ;;
best)
    train 520 8b-24gib-best trl-tuned,qmedtune,unsloth --shape 8b --rows 4 --memory 24 --best
    ;;
memory)
    bench 260 context train --shape 8b --r 32 --context 8,12,16,24,40,80 --time-limit 240s \
        --results "$training.context.raw.json"
    bench 110 load load --shape 8b --rounds 1
    train 150 70b-48gib qmedtune --shape 70b --rows 1 --memory 48 --steps 6 --warmup 2
    ;;
ablation)
    left_out=without-linears,without-norms,without-rope,without-swiglu,without-loss,without-varlen
    train 520 1b-ablation "qmedtune,qmedtune-reference,$left_out" --shape 1b --rows 1 --keep
    ;;
esac
step 20 "$python" kernels/benchmarks/publish_training.py "$results/training"
exit $failed
