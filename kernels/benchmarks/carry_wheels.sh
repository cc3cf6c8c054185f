#!/usr/bin/env bash
# Wheels for a machine with a CUDA build of torch and no package index: what qmedtune needs besides, in one folder.
#   kernels/benchmarks/carry_wheels.sh WHEELS      # here; there: pip install --no-index --no-deps --target SITE WHEELS/*.whl
# Taken as there already: torch, triton, numpy, and what usually stands beside them (scikit-learn, pandas, pyarrow, lxml,
# rich, typer, huggingface-hub, tokenizers, pytest, pytest-xdist, hypothesis). PYTHON_VERSION is that of the machine there.
# bitsandbytes brings a library for each CUDA version (60 MB); only that of CUDA 13.0 is carried (3.9 MB packed).
set -euo pipefail
folder=${1:?where to put the wheels}
cuda=${CUDA:-130}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17; do  # pip matches each name exactly
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
mkdir -p "$folder"
rm -f "$folder"/*.whl  # two versions of one package stop the installation
"$python" -m pip download -q --no-deps --only-binary :all: -d "$folder" -c "$root/constraints.txt" \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    bitsandbytes peft trl accelerate transformers datasets gguf pydantic rensa zstandard liger-kernel \
    annotated-types typing-inspection dill multiprocess
# pydantic takes exactly one version of its core.
core=$("$python" - "$folder" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

wheel = next(Path(sys.argv[1]).glob("pydantic-*.whl"))
with zipfile.ZipFile(wheel) as source:
    metadata = next(name for name in source.namelist() if name.endswith(".dist-info/METADATA"))
    print(re.search(r"pydantic-core==[\w.]+", source.read(metadata).decode())[0])
PYTHON
)
"$python" -m pip download -q --no-deps --only-binary :all: -d "$folder" \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 "$core"
"$python" - "$folder" "$cuda" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]


def carried(name: str) -> bool:
    library = re.search(r"libbitsandbytes_(?:cuda|rocm|xpu)(\w*)\.so$", name)
    return not library or library[0] == f"libbitsandbytes_cuda{cuda}.so"


for wheel in folder.glob("bitsandbytes-*.whl"):
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        names = source.namelist()
        if not any(name.endswith(f"libbitsandbytes_cuda{cuda}.so") for name in names):
            raise SystemExit(f"{wheel.name} has no library for CUDA {cuda}: CUDA=... of those it has")
        for name in names:
            content = source.read(name)
            if name.endswith(".dist-info/RECORD"):  # says what there is, or removing the package would stop
                lines = [line for line in content.decode().splitlines() if carried(line.split(",")[0])]
                content = ("\n".join(lines) + "\n").encode()
            if carried(name):
                target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
    small.replace(wheel)
PYTHON
du -sh "$folder"
