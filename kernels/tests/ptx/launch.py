"""Puts the executor under qmedtune_kernels: its own launchers run, each launch compiled for a target and executed.

So tile sizes, grids, strides and the order of launches are the product's; only the device is ours. Triton compiles as
it would at the launch: integers of 1 become constants, multiples of 16 are told to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .machine import Machine
from .memory import Global
from .program import Program, parse

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int64: "*i64",
    torch.int32: "*i32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
BLOCKS_AT_ONCE = 64


@dataclass
class Executed:
    """What a piece of work launched: kernels by name, and the hazards seen in them."""

    kernels: list[str] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Device:
    """A pretended GPU. change: what becomes of each kernel's PTX before it runs (planted faults)."""

    arch: int
    processors: int = 4
    change: Callable[[str, str], str] = lambda name, text: text


def _specialised(value: Any) -> tuple[str, bool]:
    """(type, whether a multiple of 16) of an argument, as Triton's launcher sees it."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0


def compile_for(kernel: Any, bound: dict[str, Any], options: dict[str, Any], arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constant = {kernel.arg_names[i] for i, p in enumerate(kernel.params) if p.is_constexpr}
    kinds = {name: ("constexpr", False) if name in constant else _specialised(bound[name]) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature={name: kind for name, (kind, _) in kinds.items()},
        constexprs={name: bound[name] for name, (kind, _) in kinds.items() if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if kinds[name][1]},
    )
    given = {name: value for name, value in options.items() if value is not None}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=given)


def _bits(value: Any) -> int:
    """A parameter as `ld.param` reads it."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


def execute(program: Program, compiled: Any, names: list[str], bound: dict[str, Any], grid) -> list[str]:
    """Run all blocks; the hazards seen. Parameters of the program are the arguments that are no constants, and two
    scratch pointers that no kernel here uses."""
    constants = {names[path[0]] for path in compiled.src.constants}
    given = [bound[name] for name in names if name not in constants]
    values = [_bits(value) for value in given]
    values += [0] * (len(program.parameters) - len(values))
    arguments = {name: value for (name, _), value in zip(program.parameters, values, strict=True)}
    memory = Global([value for value in given if isinstance(value, Tensor)])
    grid = (*grid, 1, 1)[:3]
    blocks = [place[::-1] for place in np.ndindex(*grid[::-1])]
    hazards: dict[str, None] = {}
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        some = blocks[start : start + BLOCKS_AT_ONCE]
        machine = Machine(program, arguments, memory, some, grid, compiled.metadata.shared)
        machine.run()
        hazards |= dict.fromkeys(machine.hazards)
    return list(hazards)


@contextmanager
def gpu(device: Device) -> Iterator[Executed]:
    """Within it, qmedtune_kernels take CPU tensors for tensors of a card of `device.arch`."""
    from qmedtune_kernels import dispatch, tiles
    from triton.runtime.jit import KernelInterface

    executed, changed = Executed(), []

    def put(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    put(dispatch, "capability", lambda _: device.arch)
    put(tiles, "processors", lambda _: device.processors)
    for check in ("self_check", "asm_check"):  # work of its own: each piece of work would run it again
        put(dispatch, check, lambda _: "")
    put(KernelInterface, "__getitem__", lambda kernel, grid: partial(_launch, kernel, device, executed, grid))
    try:
        yield executed
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)


def _launch(kernel: Any, device: Device, executed: Executed, grid: tuple[int, ...], *arguments: Any, **named: Any):
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    compiled = compile_for(kernel, bound, options, device.arch)
    name = kernel.__name__
    text = device.change(name, compiled.asm["ptx"])
    executed.kernels.append(name)
    hazards = execute(parse(text), compiled, kernel.arg_names, bound, grid)
    executed.hazards += [f"{name}: {hazard}" for hazard in hazards]
