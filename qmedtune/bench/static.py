"""The gate that needs no GPU: every kernel compiled for every supported architecture, read as machine code.

`triton.compile` takes a target, and Triton's wheel carries cuobjdump and nvdisasm: registers, spills, shared memory and
SASS instructions per weight element are facts of the binary. Limits come from issue bandwidth:
an H200 issues 128 lanes a clock and SM and must decode 7.4 elements, so ten instructions an element leave head-room.
Deliberately not here: anything about time. A kernel that passes can still be slow; kernels.py measures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
LOOP_LIMIT = 6.0  # fused matmul, instructions per weight element of the K loop at the smallest tile
DEQUANTIZE_LIMIT = 9.2
# Largest shared memory of a block, CUDA C++ programming guide, table of compute capabilities
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class KernelVariant:
    """One kernel at one tile. elements: weight elements per thread (of the loop body when `loop`)."""

    name: str
    kernel: str
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    elements: float | None = None
    loop: bool = False
    limit: float | None = None
    architectures: tuple[int, ...] = ARCHITECTURES
    tensor_cores: bool = False
    fp_fusion: bool = True
    wide: bool = False  # must load and store 16 bytes at a time
    types: dict[str, str] = field(default_factory=dict)
    dtype: str = ""  # of activations; "" = bf16, and fp16 below sm_80
    ragged: tuple[str, ...] = ()  # sizes that are no multiples of 16


def cases() -> Iterator[KernelVariant]:
    """What is compiled: the tiles that the launchers choose, bf16 (fp16 below sm_80), nested and flat scales; the
    products in fp16 and fp32 too."""
    ampere = ARCHITECTURES[1:]
    for nested in (True, False):
        label = _scales(nested)
        words = {"WORDS": 8, "ROWS": 16, "STEPS": 4, "NESTED": nested}
        yield KernelVariant(
            f"dequantize shuffle {label}", "nf4._dequantize_words", words, elements=32,
            limit=DEQUANTIZE_LIMIT, architectures=ampere, fp_fusion=False,
        )  # fmt: skip
        pairs = {"HALF": 32, "ROWS": 64, "STEPS": 1, "NESTED": nested, "EMULATE": False}
        yield KernelVariant(f"dequantize gather {label}", "nf4._dequantize_pairs", pairs, elements=32, fp_fusion=False)
        for rows in (16, 32, 64):
            yield _matmul("forward", rows, nested, ampere)
            yield _matmul("backward", rows, nested, ampere)
            yield _matmul("forward", rows, nested, ampere, ragged=("m", "n", "steps"))
            yield _matmul("backward", rows, nested, ampere, ragged=("m", "n", "steps", "dy_stride"))
    for dtype, rows in (("fp16", 16), ("fp16", 64), ("fp32", 16)):
        yield _matmul("forward", rows, True, ampere, dtype=dtype)
        yield _matmul("backward", rows, True, ampere, dtype=dtype)
    few = {"M": 1, "BN": 16, "BK": 64, "BLOCKSIZE": 64, "NESTED": True}
    yield KernelVariant("matmul few rows", "matmul._few_rows", few, elements=8, loop=True, types={"out": "*fp32"})
    plain = {"BLOCKSIZE": 64, "BYTES": 1024, "NESTED": True, "EMULATE": False}
    yield KernelVariant("dequantize any shape", "nf4._dequantize_bytes", plain, elements=16, fp_fusion=False)
    yield KernelVariant("matmul reduce", "matmul._reduce", {"SPLITS": 8, "BLOCK": 1024, "BIAS": True, "EMULATE": False})
    for columns in (4096, 8192):
        yield from _norms(columns)
    for direction in ("forward", "backward"):
        yield KernelVariant(f"swiglu {direction}", f"swiglu._{direction}", {"BLOCK": 1024, "EMULATE": False}, wide=True)
    loss = {"BLOCK": 4096, "EMULATE": False}
    yield KernelVariant(
        "cross entropy", "cross_entropy._rows", loss, num_warps=8, wide=True, types={"logits_ptr": "*fp32"}
    )
    heads = {"HALF": 64, "BLOCK": 64, "HEADS": 8, "EMULATE": False}
    yield KernelVariant("rope", "rope._rotate", heads, num_warps=2, wide=True, fp_fusion=False)


def _scales(nested: bool) -> str:
    if nested:
        return "nested"
    return "flat"


def _matmul(
    direction: str, rows: int, nested: bool, architectures: tuple[int, ...], *, dtype: str = "",
    ragged: tuple[str, ...] = (),
) -> KernelVariant:  # fmt: skip
    from qmedtune_kernels import tiles

    forward = direction == "forward"
    tile = tiles.tile(rows, 64, forward, _torch_dtype(dtype))
    warps, stages = int(tile.pop("num_warps")), int(tile.pop("num_stages"))
    constants = {**tile, "BLOCKSIZE": 64, "NESTED": nested, "SPLIT": True, "DECODE": "", "EMULATE": False}
    if forward:
        constants["BIAS"] = False
    elements = tile["BN"] * tile["BK"] / (32 * warps)
    words = ["matmul", direction]
    if dtype:
        words.append(dtype)
    words += [f"M<={rows}", _scales(nested)]
    if ragged:
        words.append("ragged")
    label = " ".join(words)
    limit = None
    if forward and rows == 16 and dtype != "fp32":
        limit = LOOP_LIMIT
    return KernelVariant(
        label, f"matmul._{direction}", constants, warps, stages, elements, loop=True, limit=limit,
        architectures=architectures, tensor_cores=dtype != "fp32", types={"out": "*fp32"}, dtype=dtype,
        ragged=ragged,
    )  # fmt: skip


def _torch_dtype(name: str):
    import torch

    return {"": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _norms(columns: int) -> Iterator[KernelVariant]:
    from qmedtune_kernels import rms_norm

    for add in (False, True):
        constants = {"BLOCK": columns, "ADD": add, "EMULATE": False}
        label, warps = "rms_norm", rms_norm.num_warps(columns)
        if add:
            label = "add_rms_norm"
        yield KernelVariant(f"{label} forward {columns}", "rms_norm._forward", constants, warps, wide=True)
        yield KernelVariant(f"{label} backward {columns}", "rms_norm._backward_rows", constants, warps, wide=True)
    yield KernelVariant(f"rms_norm dweight {columns}", "rms_norm._dweight_partial", {"BLOCK": 1024, "EMULATE": False})


TYPES = {
    "packed": "*u8", "code": "*fp32", "code2": "*fp32", "absmax2": "*fp32", "offset": "*fp32", "rstd_ptr": "*fp32",
    "partial": "*fp32", "partial_ptr": "*fp32", "eps": "fp32", "sign": "fp32",
    "losses": "*fp32", "targets": "*i64",
}  # fmt: skip


def compile_case(case: KernelVariant, arch: int):
    """The compiled kernel for one architecture, without a GPU or a driver."""
    import qmedtune_kernels
    import triton
    from qmedtune_kernels import tiles
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(".")
    kernel = getattr(getattr(qmedtune_kernels, module), name)
    constants: dict[str, Any] = dict(case.constants)
    most = None
    if "DECODE" in constants:
        how = _torch_dtype(case.dtype), "POST" in constants
        constants["DECODE"], most = tiles.decode(arch, *how), tiles.registers(arch, constants["BM"], *how)
    dtype, scales = case.dtype, "*fp32"
    if not dtype:
        dtype = "bf16"
        if arch < 80:
            dtype = "fp16"
    if constants.get("NESTED"):
        scales = "*u8"
    types = {**TYPES, "absmax": scales, **case.types}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        type_ = "i32"
        if argument.endswith("_ptr") or argument in ("out", "bias"):
            type_ = f"*{dtype}"
        type_ = types.get(argument, type_)
        if argument in constants:
            type_ = "constexpr"
        signature[argument] = type_
        if (type_.startswith("*") or type_ == "i32") and argument not in case.ragged:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": most,
        "enable_fp_fusion": case.fp_fusion,
    }  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(compiled) -> tuple[int, int, str]:
    """(registers, spilled bytes, SASS text) of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        read = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = read([tools / "cuobjdump", "--dump-resource-usage", file.name]).stdout
        sass = read([tools / "nvdisasm", "-c", file.name]).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2]) + int(match[3]), sass


def instructions(sass: str, loop: bool) -> Counter[str]:
    """Full opcodes, NOP left out: of the whole kernel, or of its longest backward branch (the K loop)."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", line):
            found.append((match[1], match[2]))
    first, last = 0, 0
    for place, (opcode, operands) in enumerate(found):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and target:
            begins = labels.get(target[0], place)
            if begins < place and place + 1 - begins > last - first:
                first, last = begins, place + 1
    if loop:
        assert last, "no loop found"
        found = found[first:last]
    counts = Counter(opcode for opcode, _ in found)
    del counts["NOP"]
    return counts


def measure(case: KernelVariant, arch: int) -> dict:
    """One row of the static table; `failures` names the limits that do not hold."""
    compiled = compile_case(case, arch)
    registers, spills, sass = disassemble(compiled)
    counts = instructions(sass, case.loop)
    per_element = round(sum(counts.values()) / case.elements, 2) if case.elements else None
    row = {
        "kernel": case.name, "target": f"sm_{arch}", "regs": registers, "spills": spills,
        "shared": compiled.metadata.shared, "ins_per_element": per_element,
    }  # fmt: skip
    return {**row, "failures": list(_failures(case, row, counts, arch))}


def _failures(case: KernelVariant, row: dict, counts: Counter[str], arch: int) -> Iterator[str]:
    per_element, names = row["ins_per_element"], " ".join(counts)
    if row["spills"]:
        yield f"{row['spills']} bytes spilled"
    if row["shared"] > 1024 * SHARED_KIB[arch]:
        yield f"{row['shared']} bytes of shared memory, limit {SHARED_KIB[arch]} KiB"
    if case.limit and per_element > case.limit:
        yield f"{per_element} instructions per element, limit {case.limit}"
    if case.tensor_cores and not re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCMMA|OMMA)", names):
        yield "no tensor-core instruction"
    if case.loop and counts["LDGSTS.E"] > 0.25 * (case.elements or 0):
        yield f"{counts['LDGSTS.E']} LDGSTS of 4 bytes: a table lookup went through cp.async"
    if case.wide and not all(re.search(rf"{move}\.E\S*\.128", names) for move in ("LDG", "STG")):
        yield "no loads or no stores of 16 bytes"


def static_rows(architectures: tuple[int, ...] = ARCHITECTURES, kernels: str = "") -> list[dict]:
    """Compile and read every case whose name contains `kernels`. Raises ValueError under TRITON_INTERPRET."""
    from qmedtune_kernels.decode import INTERPRET

    if INTERPRET:
        raise ValueError("bench kernels --static: TRITON_INTERPRET=1 given; unset it, the gate needs Triton's compiler")
    chosen = [case for case in cases() if kernels in case.name]
    return [measure(case, arch) for case in chosen for arch in case.architectures if arch in architectures]
