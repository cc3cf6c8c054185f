"""Runs a program: lanes of many blocks at once, masks where threads part, barriers where they meet again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import Fault, Global, Shared
from .numbers import UNSIGNED, dtype_of, number
from .program import Instruction, Operand, Program, UnknownInstruction

POISON = 0xDEADBEEFDEADBEEF  # what a register holds that nothing has written
MOST_INSTRUCTIONS = 500_000  # more than any block here runs: a loop that does not end


Group = tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]


@dataclass
class Products:
    """Asynchronous products (wgmma) in flight: results by register; group by group the registers they go to, and the
    grains they read with the warpgroup that does."""

    results: dict[str, np.ndarray] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    open: Group = field(default_factory=lambda: ([], []))
    touched: set[str] = field(default_factory=set)  # registers written since the last wgmma.fence
    constants: set[str] = field(default_factory=set)  # registers that hold an immediate
    fenced: bool = False


class Machine:
    """Blocks `blocks` [B, 3] of a launch with `grid`, side by side."""

    def __init__(self, program: Program, arguments: dict[str, int], memory: Global, blocks, grid, shared: int):
        self.program, self.arguments, self.memory, self.grid = program, arguments, memory, grid
        threads = program.threads
        self.lanes = len(blocks) * threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.blocks = np.repeat(np.array(blocks, dtype=np.uint32), threads, axis=0)
        self.block = np.arange(self.lanes) // threads
        self.registers: dict[str, np.ndarray] = {}
        self.shared = Shared(len(blocks), threads, -(-shared // 16) * 16, _grain(program))
        self.products = Products()
        self.everyone = np.ones(self.lanes, dtype=bool)
        self.special = self._special()

    def _special(self) -> dict[str, np.ndarray | np.generic]:
        lane = self.thread % np.uint32(32)
        places = {f"%ctaid.{axis}": self.blocks[:, i].copy() for i, axis in enumerate("xyz")}
        sizes = {f"%nctaid.{axis}": np.uint32(self.grid[i]) for i, axis in enumerate("xyz")}
        zero = np.zeros(self.lanes, dtype=np.uint32)
        threads = {"%tid.x": self.thread, "%tid.y": zero, "%tid.z": zero, "%laneid": lane}
        return {**places, **sizes, **threads, "%warpid": self.thread // 32, "%ntid.x": np.uint32(self.program.threads)}

    # --------------------------------------------------------------------------------------------- control flow

    def run(self) -> None:
        """Until every thread has returned. The lanes furthest behind go first, so that loops finish before what
        follows them; lanes that wait at a barrier go on when all of their block are there."""
        from .forms import refuse_unknown
        from .instructions import HANDLERS

        refuse_unknown(self.program.instructions)
        groups, self.waiting = {0: self.everyone}, np.full(self.lanes, -1)
        self.finished = np.zeros(self.lanes, dtype=bool)
        budget = MOST_INSTRUCTIONS
        while groups:
            at = min(groups)
            mask = groups.pop(at)
            ins = self.program.instructions[at]
            budget -= 1
            if budget < 0:
                raise Fault("a loop does not end")
            for place, lanes in self._step(ins, at, mask, HANDLERS):
                if lanes.any():
                    groups[place] = groups[place] | lanes if place in groups else lanes
        if not self.finished.all():
            raise Fault("a barrier that not all threads of the block reach")

    def _step(self, ins: Instruction, at: int, mask: np.ndarray, handlers):
        """Execute one instruction for the lanes of `mask`; (place, lanes) of what runs next."""
        if self.products.results and ins.name != "wgmma":
            for early in sorted(self.products.results.keys() & ins.registers)[:1]:
                self.shared.hazards[f"{early} used before wgmma.wait_group: {ins.text[:80]}"] += 1
        active = mask
        if ins.guard:
            guard = self.registers[ins.guard]
            active = mask & (~guard if ins.negated else guard)
        if ins.name == "bra":
            return [(self.program.labels[ins.operands[0].text], active), (at + 1, mask & ~active)]
        if ins.name in ("ret", "exit"):
            self.finished |= active
            return [(at + 1, mask & ~active)]
        if ins.name in ("bar", "barrier") and "warp" not in ins.modifiers:
            self.waiting[active] = at
            return [(at + 1, mask & ~active), *self._release()]
        if active is mask or active.any():
            handlers[ins.name](self, ins, None if active is self.everyone or active.all() else active)
        return [(at + 1, mask)]

    def _release(self):
        """Lanes of the blocks in which everybody waits; who has returned will never come, and PTX does not say that he
        counts."""
        threads = self.program.threads
        ready = (self.waiting.reshape(-1, threads) >= 0).all(axis=1)
        if not ready.any():
            return []
        lanes = np.repeat(ready, threads) & (self.waiting >= 0)
        self.shared.barrier(np.flatnonzero(lanes))
        places = [(int(place) + 1, lanes & (self.waiting == place)) for place in np.unique(self.waiting[lanes])]
        self.waiting[lanes] = -1
        return places

    # ----------------------------------------------------------------------------------------------- registers

    def read(self, operand: Operand, type_: str) -> np.ndarray:
        """A value as the numpy type of a PTX type; immediates are scalars."""
        dtype = dtype_of(type_)
        if operand.kind == "number":
            return number(operand.text, dtype)  # type: ignore[return-value]
        if operand.kind == "symbol":
            return dtype.type(Shared.BASE)  # global_smem, the only one
        if operand.kind == "vector":
            return self._joined(operand, dtype)
        bits = self.special[operand.text] if operand.text in self.special else self.registers.get(operand.text)
        if bits is None:
            bits = self._poisoned(operand.text)
        if isinstance(bits, np.generic):
            return dtype.type(bits)
        if bits.itemsize == dtype.itemsize:
            return bits if bits.dtype == dtype else bits.view(dtype)
        if bits.itemsize < dtype.itemsize:
            raise UnknownInstruction(f"{operand.text} read as {type_}")
        return bits.astype(UNSIGNED[8 * dtype.itemsize]).view(dtype)

    def _poisoned(self, name: str) -> np.ndarray:
        dtype = UNSIGNED[self.program.width(name)]
        value = POISON & (2 ** (8 * dtype.itemsize) - 1) if dtype.kind == "u" else False
        return np.full(self.lanes, value, dtype=dtype)

    def _joined(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """{low, ..., high} as one value."""
        bits = 8 * dtype.itemsize // len(operand.parts)
        parts = [self.full(self.read(part, f"b{bits}")) for part in operand.parts]
        return np.stack(parts, axis=1).reshape(self.lanes, -1).view(dtype)[:, 0]

    def full(self, value) -> np.ndarray:
        return np.full(self.lanes, value) if np.size(value) == 1 else value

    def write(self, operand: Operand, value, mask: np.ndarray | None) -> None:
        """A typed value into a register (extended by its own sign where that is wider) or, in pieces, a vector."""
        value = self.full(value)
        if operand.kind == "vector":
            bits = 8 * value.itemsize // len(operand.parts)
            pieces = np.ascontiguousarray(value).view(UNSIGNED[bits]).reshape(self.lanes, -1)
            for part, piece in zip(operand.parts, pieces.T, strict=True):
                self.write(part, np.ascontiguousarray(piece), mask)
            return
        name = operand.text
        if name == "_":
            return
        dtype = UNSIGNED[self.program.width(name)]
        if value.dtype.itemsize == dtype.itemsize:
            value = value if value.dtype == dtype else value.view(dtype)
        else:
            value = value.astype(dtype)
        if mask is not None:
            old = self.registers.get(name)
            value = np.where(mask, value, self._poisoned(name) if old is None else old)
        self.registers[name] = value
        self.products.touched.add(name)
        self.products.constants.discard(name)

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        """Indices of the active lanes."""
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def address(self, operand: Operand, type_: str = "u64") -> np.ndarray:
        base = self.full(self.read(operand.parts[0], type_))
        return base + base.dtype.type(operand.offset)

    @property
    def hazards(self):
        return self.shared.hazards


def _grain(program: Program) -> int:
    """Bytes of the smallest shared access."""
    sizes = [4]
    for ins in program.instructions:
        if "shared" in ins.modifiers and ins.name in ("ld", "st"):
            sizes.append(dtype_of(ins.modifiers[-1]).itemsize)
    return min(sizes)
