"""Matrix instructions: ldmatrix, stmatrix, mma.sync (fp16, bf16, tf32) and wgmma with its operands in shared memory.

Fragments as PTX ISA's figures of m16n8k8 and m16n8k16 draw them: g = lane / 4 names a row (of A and the result) or a
column (of B), t = lane % 4 a pair of elements. Products are exact, summed in fp64 and rounded once to fp32 with the
accumulator: a GPU's order of sums is not told.
"""

from __future__ import annotations

import re

import numpy as np

from .machine import Machine
from .numbers import bf16_values
from .program import Instruction, UnknownInstruction

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def _warps(machine: Machine, ins: Instruction, mask) -> np.ndarray:
    """Indices [warps, 32] of the warps that are here; all their lanes must be."""
    here = (machine.everyone if mask is None else mask).reshape(-1, 32)
    if (here.any(axis=1) != here.all(axis=1)).any():
        machine.hazards[f"not all lanes of a warp take part: {ins.text[:80]}"] += 1
    return np.arange(machine.lanes).reshape(-1, 32)[here.all(axis=1)]


def _fragments(machine: Machine, operand, warps: np.ndarray) -> np.ndarray:
    """Bits [warps, 32, registers]."""
    return np.stack([machine.full(machine.read(part, "b32"))[warps] for part in operand.elements], axis=-1)


def _write(machine: Machine, operand, warps: np.ndarray, values: np.ndarray, mask) -> None:
    """fp32 or bits [warps, 32, registers] into the operand's registers."""
    for number, part in enumerate(operand.elements):
        full = np.zeros(machine.lanes, dtype=values.dtype)
        full[warps] = values[..., number]
        machine.write(part, full, mask)


# --------------------------------------------------------------------------------------------- matrices of 8 x 8


def _matrices(ins: Instruction) -> int:
    return next(int(modifier[1]) for modifier in ins.modifiers if re.fullmatch("x[124]", modifier))


def _rows(machine: Machine, operand, warps: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(lanes, addresses) [warps, matrices, 8]: lane 8 i + r holds the address of row r of matrix i."""
    addresses = machine.address(operand, "u32")
    lanes = warps[:, : 8 * count].reshape(-1, count, 8)
    return lanes, addresses[lanes]


def ldmatrix(machine: Machine, ins: Instruction, mask) -> None:
    count, warps = _matrices(ins), _warps(machine, ins, mask)
    lanes, addresses = _rows(machine, ins.operands[1], warps, count)
    data = machine.shared.load(lanes.ravel(), addresses.ravel(), 16, ins.text)
    rows = data.view(np.uint16).reshape(-1, count, 8, 8)  # [warps, matrix, row, column]
    if "trans" in ins.modifiers:
        rows = rows.swapaxes(2, 3)
    pairs = np.ascontiguousarray(rows).view(np.uint32)  # [warps, matrix, row, pair]
    _write(machine, ins.operands[0], warps, pairs[:, :, G, T].swapaxes(1, 2), mask)


def stmatrix(machine: Machine, ins: Instruction, mask) -> None:
    count, warps = _matrices(ins), _warps(machine, ins, mask)
    lanes, addresses = _rows(machine, ins.operands[0], warps, count)
    pairs = _fragments(machine, ins.operands[1], warps)
    rows = np.empty((len(warps), count, 8, 4), dtype=np.uint32)
    rows[:, :, G, T] = pairs.swapaxes(1, 2)
    data = rows.view(np.uint16)
    if "trans" in ins.modifiers:
        data = np.ascontiguousarray(data.swapaxes(2, 3))
    machine.shared.store(lanes.ravel(), addresses.ravel(), data.view(np.uint8).reshape(-1, 16), ins.text)


# -------------------------------------------------------------------------------------------------------- products


def _values(bits: np.ndarray, type_: str) -> np.ndarray:
    """fp64 values of operand elements: two 16-bit ones a register, or one of 32 bits (whose low bits tf32 drops)."""
    if type_ == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
    return (bf16_values(halves) if type_ == "bf16" else halves.view(np.float16)).astype(np.float64)


def _left(fragments: np.ndarray, type_: str) -> np.ndarray:
    """A [warps, 16, k]: registers go down 8 rows first, then on by half of k."""
    values = _values(fragments, type_)
    count, per = values.shape[2], values.shape[3]
    a = np.empty((len(values), 16, 4 * per * count // 2))
    for register in range(count):
        row, column = 8 * (register % 2), 4 * per * (register // 2)
        for element in range(per):
            a[:, G + row, per * T + column + element] = values[:, :, register, element]
    return a


def _right(fragments: np.ndarray, type_: str) -> np.ndarray:
    """B [warps, k, 8]."""
    values = _values(fragments, type_)
    count, per = values.shape[2], values.shape[3]
    b = np.empty((len(values), 4 * per * count, 8))
    for register in range(count):
        for element in range(per):
            b[:, per * T + 4 * per * register + element, G] = values[:, :, register, element]
    return b


def _tile(fragments: np.ndarray) -> np.ndarray:
    """C [warps, 16, 8 n] of fp32 registers, four for each eight columns."""
    values = fragments.view(np.float32)
    tile = np.empty((len(values), 16, 2 * values.shape[2]), dtype=np.float32)
    for register in range(values.shape[2]):
        block, place = divmod(register, 4)
        tile[:, G + 8 * (place // 2), 8 * block + 2 * T + place % 2] = values[:, :, register]
    return tile


def _registers(tile: np.ndarray) -> np.ndarray:
    """The inverse of `_tile`: fp32 [warps, 32, registers]."""
    count = tile.shape[2] // 2
    values = np.empty((len(tile), 32, count), dtype=np.float32)
    for register in range(count):
        block, place = divmod(register, 4)
        values[:, :, register] = tile[:, G + 8 * (place // 2), 8 * block + 2 * T + place % 2]
    return values


def mma(machine: Machine, ins: Instruction, mask) -> None:
    """mma.sync.aligned.m16n8k{8,16}.row.col.f32.TYPE.TYPE.f32"""
    type_, warps = ins.modifiers[-2], _warps(machine, ins, mask)
    a, b, c = (_fragments(machine, source, warps) for source in ins.operands[1:])
    total = _left(a, type_) @ _right(b, type_) + _tile(c)
    _write(machine, ins.operands[0], warps, _registers(total.astype(np.float32)), mask)


def wgmma(machine: Machine, ins: Instruction, mask) -> None:
    match ins.modifiers[0]:
        case "fence":
            machine.products.touched.clear()
            machine.products.fenced = True
        case "commit_group":
            machine.products.groups.append(machine.products.open)
            machine.products.open = ([], [])
        case "wait_group":
            _arrive(machine, int(ins.operands[0].text, 0), mask)
        case _:
            _multiply(machine, ins, mask)


def _arrive(machine: Machine, pending: int, mask) -> None:
    products = machine.products
    while len(products.groups) > pending:
        registers, read = products.groups.pop(0)
        for grains, warpgroup in read:
            machine.shared.multiplied_done(grains, warpgroup)
        later = {name for names, _ in (*products.groups, products.open) for name in names}
        for name in registers:
            if name not in later and name in products.results:
                result = products.results.pop(name)
                old = machine.registers[name]
                machine.registers[name] = result if mask is None else np.where(mask, result, old)


def _multiply(machine: Machine, ins: Instruction, mask) -> None:
    """D (+)= A B for each warpgroup; D arrives in its registers with wait_group."""
    columns, type_ = int(ins.modifiers[3][4:-3]), ins.modifiers[-1]
    accumulators, a, b, keep, scale_a, scale_b, *transposed = ins.operands
    if (scale_a.text, scale_b.text) != ("1", "1"):
        raise UnknownInstruction(ins.text)
    flips = [part.text == "1" for part in transposed]
    warps = _warps(machine, ins, mask)
    groups = warps.reshape(-1, 4, 32)
    lanes = groups.reshape(len(groups), 128)
    if a.kind == "vector":
        rows = _left(_fragments(machine, a, warps), type_).reshape(len(groups), 64, 16)
    else:
        rows = _operand(machine, a, lanes, 64, type_, flips[-2], ins)
    others = _operand(machine, b, lanes, columns, type_, flips[-1], ins)
    held = _accumulators(machine, accumulators, ins).transpose(1, 0)[warps]
    before = _tile(np.ascontiguousarray(held)).reshape(len(groups), 64, columns)
    kept = machine.full(machine.read(keep, "pred"))[lanes[:, 0]]
    total = np.where(kept[:, None, None], before, 0) + rows @ others.swapaxes(1, 2)
    values = _registers(total.astype(np.float32).reshape(-1, 16, columns))
    for number, part in enumerate(accumulators.parts):
        full = np.zeros(machine.lanes, dtype=np.uint32)
        full[warps] = values[..., number].view(np.uint32)
        machine.products.results[part.text] = full
        machine.products.open[0].append(part.text)


def _accumulators(machine: Machine, operand, ins: Instruction) -> np.ndarray:
    """Bits [registers, lanes]: results in flight of the same registers, or what they hold: fenced since written, or a
    constant (LLVM moves the zeros of a first product behind the fence; ptxas makes them the instruction's own)."""
    products = machine.products
    names = [part.text for part in operand.parts]
    late = products.touched - products.results.keys() - products.constants
    if not products.fenced or any(name in late for name in names):
        machine.hazards[f"accumulators written after the last wgmma.fence: {ins.text[:60]}"] += 1
    held = (products.results.get(name) for name in names)
    return np.stack([
        bits if bits is not None else machine.full(machine.read(part, "b32"))
        for bits, part in zip(held, operand.parts, strict=True)
    ])  # fmt: skip


def _operand(machine: Machine, descriptor, lanes, length: int, type_: str, flipped: bool, ins) -> np.ndarray:
    """[warpgroups, length, 16] of a matrix in shared memory, by its descriptor (one for the warpgroup)."""
    bits = machine.full(machine.read(descriptor, "b64"))[lanes]
    if (bits != bits[:, :1]).any():
        machine.hazards[f"threads of a warpgroup disagree about a descriptor: {ins.text[:60]}"] += 1
    at = np.stack([element_offsets(int(one), length, flipped, ins) for one in bits[:, 0]])
    flat, first = at.reshape(len(at), -1), lanes[:, 0]
    place = machine.shared.place(np.repeat(first, flat.shape[1]), flat.ravel(), 2, ins.text[:80])
    grains = (place // machine.shared.grain).reshape(len(at), -1)
    for group, read in zip(lanes, grains, strict=True):
        machine.products.open[1].append((machine.shared.watch_multiply(group, read, ins.text[:80]), group))
    data = machine.shared.bytes[place[:, None] + np.arange(2)].view(np.uint16).reshape(at.shape)
    values = bf16_values(data) if type_ == "bf16" else data.view(np.float16)
    return values.astype(np.float64)


def element_offsets(descriptor: int, length: int, flipped: bool, ins: Instruction) -> np.ndarray:
    """Shared addresses [length, 16] of the elements (row or column i, contraction k) of a 16-bit operand.

    Atoms of the canonical layouts: 8 lines of `swizzle` bytes. K-major (not flipped): a line is one i, atoms follow
    each other along i by the stride offset. Flipped: a line is one k, atoms follow each other along i by the leading
    offset, along k by the stride offset. Swizzling adds (xor) the address bits from 7 on to those from 4 on.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    if mode == 0 or descriptor >> 49 & 7:
        raise UnknownInstruction(f"descriptor {descriptor:#x} of {ins.text[:80]}")
    swizzle = {1: 128, 2: 64, 3: 32}[mode]
    i, k = np.arange(length)[:, None], np.arange(16)[None, :]
    if flipped:
        across = swizzle // 2
        at = start + i // across * leading + k // 8 * stride + k % 8 * swizzle + i % across * 2
    else:
        at = start + i // 8 * stride + i % 8 * swizzle + k * 2
    return at ^ ((at >> 7) & (swizzle // 16 - 1)) << 4
