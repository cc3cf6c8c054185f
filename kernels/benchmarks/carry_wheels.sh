#!/usr/bin/env bash
# Wheels for a machine with a CUDA build of torch and no package index: what qmedtune needs besides, in one folder.
#   kernels/benchmarks/carry_wheels.sh WHEELS      # here; then there: pip install --no-index --no-deps WHEELS/*.whl
# bitsandbytes brings a library for each CUDA version (60 MB); only that of CUDA 13.0 is carried (3.9 MB packed).
set -euo pipefail
folder=${1:?where to put the wheels}
cuda=${CUDA:-130}
python=${PYTHON:-python3}
mkdir -p "$folder"
"$python" -m pip download -q --no-deps --only-binary :all: -d "$folder" \
    bitsandbytes peft trl accelerate transformers datasets pytest pytest-xdist hypothesis liger-kernel
"$python" - "$folder" "$cuda" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("bitsandbytes-*.whl"):
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            library = re.search(r"libbitsandbytes_(?:cuda|rocm|xpu)(\w*)\.so$", entry.filename)
            if not library or library[0] == f"libbitsandbytes_cuda{cuda}.so":
                target.writestr(entry, source.read(entry))
    small.replace(wheel)
PYTHON
du -sh "$folder"
