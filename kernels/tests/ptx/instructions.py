"""What each PTX instruction does to the lanes of a Machine: arithmetic, moves, memory, warps, atomics.

A handler is named in HANDLERS and takes (machine, instruction, mask); mask None is all lanes. The last modifier is the
type in most of PTX's instructions; where it is not, the handler says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from . import tensor_cores
from .machine import Machine
from .numbers import SIGNED, UNSIGNED, bf16_values, dtype_of, fma32, from_half, to_half
from .program import Instruction, UnknownInstruction

Mask = np.ndarray | None
HALVES = ("f16", "bf16")


# ------------------------------------------------------------------------------------------------------- arithmetic


def _float_operation(machine: Machine, ins: Instruction, mask: Mask, compute: Callable) -> None:
    """`compute` on fp32 (or fp64) values of the type's elements, rounded once to it."""
    type_ = ins.modifiers[-1]
    target, *sources = ins.operands
    if type_ in ("f32", "f64"):
        values = [machine.read(source, type_) for source in sources]
        machine.write(target, compute(*values).astype(dtype_of(type_)), mask)
        return
    if type_ == "f32x2":
        pairs = [_pieces(machine, source, "f4") for source in sources]
        machine.write(target, _whole(compute(*pairs), "u8"), mask)
        return
    half, bits = type_.removesuffix("x2"), "u4" if type_.endswith("x2") else "u2"
    pairs = [from_half(_pieces(machine, source, "u2", bits), half) for source in sources]
    machine.write(target, _whole(to_half(_shaped(compute, pairs), half), bits), mask)


def _shaped(compute: Callable, pairs: list[np.ndarray]) -> np.ndarray:
    return compute(*pairs).astype(np.float32).reshape(pairs[0].shape)


def _pieces(machine: Machine, source, dtype: str, whole: str = "u8") -> np.ndarray:
    """[lanes, pieces] of a packed register."""
    bits = machine.full(machine.read(source, f"b{8 * np.dtype(whole).itemsize}"))
    return np.ascontiguousarray(bits).view(dtype).reshape(machine.lanes, -1)


def _whole(pieces: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(pieces).view(dtype)[:, 0]


def _is_float(ins: Instruction) -> bool:
    return ins.modifiers[-1].startswith(("f", "bf"))


def _two(name: str, integer: Callable, real: Callable):
    """An operation of two operands, on integers (wrapping) or on floats."""

    def handler(machine: Machine, ins: Instruction, mask: Mask) -> None:
        if ins.modifiers[-2:-1] == ("f32",):  # mixed: a 16-bit value and an fp32 one
            a = from_half(machine.full(machine.read(ins.operands[1], "b16")), ins.modifiers[-1])
            return machine.write(ins.operands[0], real(a, machine.read(ins.operands[2], "f32")), mask)
        if _is_float(ins):
            return _float_operation(machine, ins, mask, real)
        a, b = (machine.read(source, ins.modifiers[-1]) for source in ins.operands[1:])
        machine.write(ins.operands[0], integer(a, b), mask)

    handler.__name__ = name
    return handler


def _of_all(two: Callable) -> Callable:
    """`two` for fp32 minima and maxima, which from sm_100 on take three values. numpy would take a third for `out`."""
    return lambda *values: reduce(two, values)


def _one(name: str, integer: Callable | None, real: Callable):  # no integer form: FORMS refuses it
    def handler(machine: Machine, ins: Instruction, mask: Mask) -> None:
        if _is_float(ins):
            return _float_operation(machine, ins, mask, real)
        assert integer
        machine.write(ins.operands[0], integer(machine.read(ins.operands[1], ins.modifiers[-1])), mask)

    handler.__name__ = name
    return handler


def _product(machine: Machine, ins: Instruction, a, b, type_: str):
    """mul of integers by mode: lo, hi or wide (twice the bits)."""
    dtype = dtype_of(type_)
    bits = 8 * dtype.itemsize
    table = SIGNED if dtype.kind == "i" else UNSIGNED
    if "lo" in ins.modifiers:
        return a * b
    assert bits <= 32
    wide = table[2 * bits]
    whole = np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
    return whole if "wide" in ins.modifiers else (whole >> wide.type(bits)).astype(dtype)


def mul(machine: Machine, ins: Instruction, mask: Mask) -> None:
    if _is_float(ins):
        return _float_operation(machine, ins, mask, np.multiply)
    a, b = (machine.read(source, ins.modifiers[-1]) for source in ins.operands[1:])
    machine.write(ins.operands[0], _product(machine, ins, a, b, ins.modifiers[-1]), mask)


def mad(machine: Machine, ins: Instruction, mask: Mask) -> None:
    type_ = ins.modifiers[-1]
    a, b = (machine.read(source, type_) for source in ins.operands[1:3])
    bits = 8 * dtype_of(type_).itemsize * (2 if "wide" in ins.modifiers else 1)
    c = machine.read(ins.operands[3], f"{type_[0]}{bits}")
    machine.write(ins.operands[0], _product(machine, ins, a, b, type_) + c, mask)


def fma(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """Also the mixed form fma.rn.f32.bf16: products of 16-bit values onto an fp32 one."""
    if ins.modifiers[-2:-1] == ("f32",):
        half = ins.modifiers[-1]
        a, b = (from_half(machine.full(machine.read(source, "b16")), half) for source in ins.operands[1:3])
        return machine.write(ins.operands[0], fma32(a, b, machine.read(ins.operands[3], "f32")), mask)
    _float_operation(machine, ins, mask, fma32)


def _division(a, b):
    """C's division: towards zero; by zero is not told by PTX."""
    if np.any(b == 0):
        raise UnknownInstruction("division by zero")
    quotient = np.abs(a.astype(object) if a.dtype.itemsize == 8 else a.astype("i8")) // np.abs(b.astype("i8"))
    return (quotient.astype("i8") * np.where((a < 0) != (b < 0), -1, 1)).astype(a.dtype)


def div(machine: Machine, ins: Instruction, mask: Mask) -> None:
    if _is_float(ins):
        return _float_operation(machine, ins, mask, lambda a, b: np.divide(a, b, dtype=np.float64))
    a, b = (machine.full(machine.read(source, ins.modifiers[-1])) for source in ins.operands[1:])
    if mask is not None:
        b = np.where(mask, b, b.dtype.type(1))
    machine.write(ins.operands[0], _division(a, b), mask)


def rem(machine: Machine, ins: Instruction, mask: Mask) -> None:
    a, b = (machine.full(machine.read(source, ins.modifiers[-1])) for source in ins.operands[1:])
    if mask is not None:
        b = np.where(mask, b, b.dtype.type(1))
    machine.write(ins.operands[0], a - _division(a, b) * b, mask)


def _shift(left: bool):
    def handler(machine: Machine, ins: Instruction, mask: Mask) -> None:
        type_ = ins.modifiers[-1]
        dtype = dtype_of(type_)
        value = machine.read(ins.operands[1], type_)
        by = np.asarray(machine.read(ins.operands[2], "u32")).astype("u8")
        bits = 8 * dtype.itemsize
        within = np.minimum(by, bits - 1).astype(dtype)
        shifted = value << within if left else value >> within
        if dtype.kind != "i" or left:  # an arithmetic shift fills with the sign, however far
            shifted = np.where(by >= bits, dtype.type(0), shifted)
        machine.write(ins.operands[0], shifted, mask)

    return handler


def _bitwise(compute: Callable):
    def handler(machine: Machine, ins: Instruction, mask: Mask) -> None:
        values = [machine.read(source, ins.modifiers[-1]) for source in ins.operands[1:]]
        machine.write(ins.operands[0], compute(*values), mask)

    return handler


def lop3(machine: Machine, ins: Instruction, mask: Mask) -> None:
    a, b, c, table = (machine.read(source, "b32") for source in ins.operands[1:])
    result = np.zeros(machine.lanes, dtype=np.uint32)
    for minterm in range(8):
        if int(table) >> minterm & 1:
            parts = [value if minterm >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result = result | (parts[0] & parts[1] & parts[2])
    machine.write(ins.operands[0], result, mask)


def prmt(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """The default mode: four selectors of four bits, the highest of which repeats the byte's sign."""
    a, b, selector = (machine.full(machine.read(source, "b32")).astype("u8") for source in ins.operands[1:])
    both, result = a | b << np.uint64(32), np.zeros(machine.lanes, dtype=np.uint64)
    for byte in range(4):
        nibble = selector >> np.uint64(4 * byte)
        value = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), sign, value) << np.uint64(8 * byte)
    machine.write(ins.operands[0], result.astype(np.uint32), mask)


def bfe(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """The field of `length` bits at `position`; of signed types its highest bit (or the value's) is the sign."""
    type_ = ins.modifiers[-1]
    dtype = dtype_of(type_)
    bits = 8 * dtype.itemsize
    value = machine.full(machine.read(ins.operands[1], type_)).astype("i8" if dtype.kind == "i" else "u8")
    position, length = (int(machine.read(source, "u32")) & 255 for source in ins.operands[2:])
    if dtype.kind == "u":
        field = value >> np.uint64(min(position, 63)) & np.uint64((1 << min(length, bits)) - 1)
    else:
        top = min(position + length, bits) - 1
        field = (value << np.int64(63 - top)) >> np.int64(63 - top + position)
    machine.write(ins.operands[0], field.astype(dtype), mask)


def bfi(machine: Machine, ins: Instruction, mask: Mask) -> None:
    a, b = (machine.read(source, ins.modifiers[-1]) for source in ins.operands[1:3])
    position, length = (int(machine.read(source, "u32")) & 255 for source in ins.operands[3:])
    dtype = dtype_of(ins.modifiers[-1])
    field = dtype.type(((1 << length) - 1) << position & (2 ** (8 * dtype.itemsize) - 1))
    machine.write(ins.operands[0], (b & ~field) | (a << dtype.type(position) & field), mask)


def shf(machine: Machine, ins: Instruction, mask: Mask) -> None:
    low, high, by = (machine.full(machine.read(source, "b32")).astype("u8") for source in ins.operands[1:])
    by = by & np.uint64(31) if "wrap" in ins.modifiers else np.minimum(by, 32)
    both = low | high << np.uint64(32)
    shifted = both << by >> np.uint64(32) if "l" in ins.modifiers else both >> by
    machine.write(ins.operands[0], shifted.astype(np.uint32), mask)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def setp(machine: Machine, ins: Instruction, mask: Mask) -> None:
    compare, *middle, type_ = ins.modifiers
    a, b = (machine.read(source, type_) for source in ins.operands[1:3])
    if compare in COMPARE:
        found = COMPARE[compare](a, b)
    else:
        found = COMPARE[compare.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b)
    for name in middle:
        found = COMBINE[name](found, machine.read(ins.operands[3], "pred"))
    machine.write(ins.operands[0], found, mask)


def selp(machine: Machine, ins: Instruction, mask: Mask) -> None:
    a, b = (machine.read(source, ins.modifiers[-1]) for source in ins.operands[1:3])
    machine.write(ins.operands[0], np.where(machine.read(ins.operands[3], "pred"), a, b), mask)


def mov(machine: Machine, ins: Instruction, mask: Mask) -> None:
    target, source = ins.operands
    machine.write(target, machine.read(source, ins.modifiers[-1]), mask)
    if mask is None and (source.kind == "number" or source.text in machine.products.constants):
        machine.products.constants.add(target.text)


def cvt(machine: Machine, ins: Instruction, mask: Mask) -> None:
    *rounding, to, source_type = ins.modifiers
    if to in ("bf16x2", "f16x2"):
        high, low = (machine.full(machine.read(source, "f32")) for source in ins.operands[1:3])
        halves = np.stack([to_half(value, to.removesuffix("x2")) for value in (low, high)], axis=1)
        return machine.write(ins.operands[0], _whole(halves, "u4"), mask)
    value = machine.full(machine.read(ins.operands[1], "b16" if source_type == "bf16" else source_type))
    machine.write(ins.operands[0], _converted(value, source_type, to, set(rounding)), mask)


def _converted(value: np.ndarray, source: str, to: str, rounding: set[str]) -> np.ndarray:
    value = bf16_values(value) if source == "bf16" else value
    if to in HALVES:
        return to_half(value, to)
    dtype = dtype_of(to)
    if value.dtype.kind == "f" and dtype.kind in "iu":
        how = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        limits, chosen = np.iinfo(dtype), next(how[name] for name in how if name in rounding)
        return np.clip(np.nan_to_num(chosen(value)), limits.min, limits.max).astype(dtype)
    return value.astype(dtype)


# ---------------------------------------------------------------------------------------------------------- memory


def ld(machine: Machine, ins: Instruction, mask: Mask) -> None:
    type_, target = ins.modifiers[-1], ins.operands[0]
    dtype = dtype_of(type_)
    if "param" in ins.modifiers:
        value = machine.arguments[ins.operands[1].parts[0].text]
        return machine.write(target, np.full(machine.lanes, value).astype(dtype), mask)
    registers, lanes = target.elements, machine.chosen(mask)
    width = dtype.itemsize * len(registers)
    if "shared" in _spaces(ins):
        data = machine.shared.load(lanes, machine.address(ins.operands[1], "u32")[lanes], width, ins.text)
    else:
        data = machine.memory.load(machine.address(ins.operands[1])[lanes], width, ins.text)
    values = data.view(dtype)
    for number, register in enumerate(registers):
        full = np.zeros(machine.lanes, dtype=dtype)
        full[lanes] = values[:, number]
        machine.write(register, full, mask)


def _spaces(ins: Instruction) -> set[str]:
    return {modifier.split("::")[0] for modifier in ins.modifiers}


def st(machine: Machine, ins: Instruction, mask: Mask) -> None:
    dtype = dtype_of(ins.modifiers[-1])
    registers, lanes = ins.operands[1].elements, machine.chosen(mask)
    values = [machine.full(machine.read(register, ins.modifiers[-1]))[lanes] for register in registers]
    data = np.stack(values, axis=1).view(np.uint8).reshape(len(lanes), dtype.itemsize * len(registers))
    if "shared" in _spaces(ins):
        machine.shared.store(lanes, machine.address(ins.operands[0], "u32")[lanes], data, ins.text)
    else:
        machine.memory.store(machine.address(ins.operands[0])[lanes], data, ins.text)


def cp(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.chosen(mask)
    if "commit_group" in ins.modifiers:
        return machine.shared.commit(lanes)
    if "wait_group" in ins.modifiers:
        return machine.shared.wait(lanes, int(ins.operands[0].text, 0))
    if "wait_all" in ins.modifiers:
        return machine.shared.wait(lanes, None)
    width = int(ins.operands[2].text, 0)
    given = ins.operands[3] if len(ins.operands) > 3 else ins.operands[2]
    sizes = machine.full(machine.read(given, "u32"))[lanes]
    source, target = machine.address(ins.operands[1])[lanes], machine.address(ins.operands[0], "u32")[lanes]
    data = np.zeros((len(lanes), width), dtype=np.uint8)  # what lies beyond the source's size is zero
    for size in np.unique(sizes):
        if size:
            data[sizes == size, :size] = machine.memory.load(source[sizes == size], int(size), ins.text)
    machine.shared.copy(lanes, target, data, ins.text)


# ----------------------------------------------------------------------------------------------- warps, barriers


def shfl(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """b and c say from which lane; where that one is out of its segment a lane keeps its own value."""
    target, a, b, c, members = ins.operands
    value = machine.full(machine.read(a, "b32"))
    by = machine.full(machine.read(b, "u32")).astype(np.int64) & 31
    clamp = machine.full(machine.read(c, "u32")).astype(np.int64)
    lane = (machine.thread % 32).astype(np.int64)
    segment = clamp >> 8 & 31
    most = (lane & segment) | (clamp & 31 & ~segment)
    match ins.modifiers[1]:
        case "idx":
            source = (lane & segment) | (by & ~segment)
            within = source <= most
        case "bfly":
            source = lane ^ by
            within = source <= most
        case "down":
            source = lane + by
            within = source <= most
        case _:
            source = lane - by
            within = source >= most
    source = np.where(within, source, lane)
    warp = np.arange(machine.lanes) // 32 * 32
    _all_of_warp(machine, ins, members, mask)
    machine.write(target, value[warp + source], mask)


def _all_of_warp(machine: Machine, ins: Instruction, members, mask: Mask) -> None:
    """The lanes named must all be here: else a GPU waits for ever, or reads what is undefined."""
    named = machine.full(machine.read(members, "u32"))
    lane = machine.thread % np.uint32(32)
    wanted = (named >> lane & np.uint32(1)).astype(bool)
    here = machine.everyone if mask is None else mask
    warps = np.arange(machine.lanes) // 32
    missing = np.bincount(warps, weights=wanted & ~here) > 0
    if (missing & (np.bincount(warps, weights=here) > 0)).any():
        machine.hazards[f"not all lanes of its mask take part: {ins.text}"] += 1


def bar(machine: Machine, ins: Instruction, mask: Mask) -> None:
    machine.shared.warp_barrier(machine.chosen(mask))


def fence(machine: Machine, ins: Instruction, mask: Mask) -> None:
    if ins.modifiers[0] == "proxy":
        machine.shared.fence_proxy(machine.chosen(mask))


def atom(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """One lane after another, in their order; `red` is the same without a result."""
    type_ = ins.modifiers[-1]
    operation = next(modifier for modifier in ins.modifiers if modifier in ATOMICS)
    operands = ins.operands if ins.name == "red" else ins.operands[1:]
    addresses, dtype = machine.address(operands[0]), dtype_of(type_)
    values = [machine.full(machine.read(source, type_)) for source in operands[1:]]
    old = np.zeros(machine.lanes, dtype=dtype)
    for lane in machine.chosen(mask):
        at = addresses[lane : lane + 1]
        before = machine.memory.load(at, dtype.itemsize, ins.text).view(dtype)[:, 0]
        after = ATOMICS[operation](before, *(value[lane : lane + 1] for value in values)).astype(dtype)
        machine.memory.store(at, after[:, None].view(np.uint8), ins.text)
        old[lane] = before[0]
    if ins.name == "atom":
        machine.write(ins.operands[0], old, mask)


ATOMICS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}  # fmt: skip


def nothing(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """Hints: where in a cache, how soon the next kernel may start."""


def createpolicy(machine: Machine, ins: Instruction, mask: Mask) -> None:
    machine.write(ins.operands[0], np.zeros(machine.lanes, dtype=np.uint64), mask)


HANDLERS: dict[str, Callable[[Machine, Instruction, Mask], None]] = {
    "add": _two("add", np.add, np.add), "sub": _two("sub", np.subtract, np.subtract),
    "min": _two("min", np.minimum, _of_all(np.fmin)), "max": _two("max", np.maximum, _of_all(np.fmax)),
    "mul": mul, "mad": mad, "fma": fma, "div": div, "rem": rem,
    "neg": _one("neg", np.negative, np.negative), "abs": _one("abs", np.abs, np.abs),
    "ex2": _one("ex2", None, lambda x: np.exp2(x.astype(np.float64))),
    "lg2": _one("lg2", None, lambda x: np.log2(x.astype(np.float64))),
    "rcp": _one("rcp", None, lambda x: 1.0 / x.astype(np.float64)),
    "sqrt": _one("sqrt", None, lambda x: np.sqrt(x.astype(np.float64))),
    "rsqrt": _one("rsqrt", None, lambda x: 1.0 / np.sqrt(x.astype(np.float64))),
    "tanh": _one("tanh", None, lambda x: np.tanh(x.astype(np.float64))),
    "shl": _shift(True), "shr": _shift(False), "and": _bitwise(np.bitwise_and), "or": _bitwise(np.bitwise_or),
    "xor": _bitwise(np.bitwise_xor), "not": _bitwise(np.invert), "popc": _bitwise(np.bitwise_count),
    "lop3": lop3, "prmt": prmt, "bfe": bfe, "bfi": bfi, "shf": shf, "setp": setp, "selp": selp, "mov": mov, "cvt": cvt,
    "ld": ld, "st": st, "cp": cp, "atom": atom, "red": atom, "shfl": shfl, "bar": bar, "fence": fence,
    "membar": nothing, "griddepcontrol": nothing, "prefetch": nothing, "createpolicy": createpolicy,
    "ldmatrix": tensor_cores.ldmatrix, "stmatrix": tensor_cores.stmatrix, "mma": tensor_cores.mma,
    "wgmma": tensor_cores.wgmma,
}  # fmt: skip
