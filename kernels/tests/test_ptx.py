"""The compiled kernels, executed from their PTX (kernels/tests/ptx), against float64; faults planted into it; and the
executor's own instructions. In processes of their own: Triton compiles only where TRITON_INTERPRET was never set.

Every variant on every target: `pytest -m slow kernels/tests/test_ptx.py`; the tables: `python -m ptx table|faults`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(*arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ptx", *arguments]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_right(rows: list[dict]) -> None:
    wrong = [row for row in rows if not row["right"] or row.get("hazards")]
    assert not wrong, "\n".join(json.dumps(row) for row in wrong)


def assert_caught(rows: list[dict], least: int) -> None:
    """Nine of ten, and of what is not caught the reason is known."""
    planted = [row for row in rows if row["planted"]]
    missed = [row for row in planted if not row["caught"]]
    assert len(planted) >= least
    assert len(missed) <= 0.1 * len(planted), missed
    assert all(row["how"] for row in missed), missed


def test_compiled_kernels_compute_what_float64_does():
    rows = run("table", "--fast")
    assert_right(rows)
    kernels = {kernel for row in rows for kernel in row["kernels"]}
    assert kernels >= {
        "_dequantize_words", "_dequantize_pairs", "_dequantize_bytes", "_forward", "_backward", "_few_rows", "_reduce",
        "_backward_rows", "_dweight_partial", "_rotate", "_rows",
    }  # fmt: skip
    assert {row["target"] for row in rows} == {"sm_75", "sm_80", "sm_86", "sm_90", "sm_120"}


def test_planted_faults_are_caught():
    assert_caught(run("faults", "--fast"), 30)


@pytest.mark.slow
def test_every_variant_on_every_target():
    rows = run("table")
    assert_right(rows)
    assert {row["target"] for row in rows} == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"}


@pytest.mark.slow
def test_every_planted_fault():
    assert_caught(run("faults"), 100)


# --------------------------------------------------------------------------------------------- the executor itself

PROGRAM = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid %d
{
	.reg .pred 	%%p<9>;
	.reg .b16 	%%rs<9>;
	.reg .b32 	%%r<20>;
	.reg .b64 	%%rd<9>;
	ld.param.b64 	%%rd0, [kernel_param_0];
	mov.u32 	%%r0, %%tid.x;
	mad.wide.u32 	%%rd1, %%r0, 4, %%rd0;
	mov.b32 	%%r9, global_smem;
	shl.b32 	%%r8, %%r0, 2;
	add.s32 	%%r8, %%r9, %%r8;
	%s
	st.global.b32 	[ %%rd1 + 0 ], { %%r1 };
	ret;
}
"""


def executed(body: str, threads: int = 64, room: int | None = None):
    """(int32 [threads] that `%r1` of each thread was, hazards) of one block with 1 KB of shared memory."""
    import numpy as np
    import torch
    from ptx.machine import Machine
    from ptx.memory import Global
    from ptx.program import parse

    out = torch.zeros(threads if room is None else room, dtype=torch.int32)
    program = parse(PROGRAM % (threads, body))
    machine = Machine(program, {"kernel_param_0": out.data_ptr()}, Global([out]), [(0, 0, 0)], (1, 1, 1), 1024)
    machine.run()
    return out.numpy().view(np.uint32), list(machine.hazards)


EXCHANGE = "st.shared.b32 [ %r8 + 0 ], %r0; {barrier} xor.b32 %r7, %r8, {mask}; ld.shared.b32 %r1, [%r7+0];"


@pytest.mark.parametrize(
    ("barrier", "mask", "hazards"),
    [
        ("bar.sync 0;", 128, 0), ("", 128, 1), ("bar.warp.sync 0xffffffff;", 128, 1),
        ("bar.warp.sync 0xffffffff;", 4, 0), ("", 4, 1),
    ],
)  # fmt: skip
def test_threads_that_exchange_values_need_a_barrier_as_wide_as_the_exchange(barrier, mask, hazards):
    values, found = executed(EXCHANGE.format(barrier=barrier, mask=mask))
    assert len(found) == hazards and (values == [i ^ mask // 4 for i in range(64)]).all()


COPY = "cp.async.ca.shared.global [ %r8 + 0 ], [ %rd1 + 0 ], 0x4, {size}; {commit} {wait} ld.shared.b32 %r1, [%r8+0];"


@pytest.mark.parametrize(
    ("commit", "wait", "hazards"),
    [
        ("cp.async.commit_group;", "cp.async.wait_group 0;", 0), ("", "cp.async.wait_all;", 0),
        ("cp.async.commit_group;", "cp.async.wait_group 1;", 1), ("", "cp.async.wait_group 0;", 1),
        ("cp.async.commit_group;", "", 1),
    ],
)  # fmt: skip
def test_asynchronous_copies_have_arrived_when_their_group_was_waited_for(commit, wait, hazards):
    assert len(executed(COPY.format(size=4, commit=commit, wait=wait))[1]) == hazards


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("prmt.b32 %r1, 0x44332211, 0x88776655, 0x0074;", 0x11118855),
        ("prmt.b32 %r1, 0x00000080, 0x0, 0x0008;", 0x808080FF),
        ("lop3.b32 %r1, 0xF0, 0xCC, 0xAA, 0xEA;", 0xEA),
        ("bfe.s32 %r1, 0x00000F00, 8, 4;", 0xFFFFFFFF),
        ("bfe.u32 %r1, 0x00000F00, 8, 4;", 0xF),
        ("shr.s32 %r1, -8, 40;", 0xFFFFFFFF),
        ("shl.b32 %r1, 1, 32;", 0),
        ("mul.hi.u32 %r1, 0xFFFFFFFF, 0x10;", 0xF),
        ("div.s32 %r1, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r1, -7, 2;", 0xFFFFFFFF),
        ("max.f32 %r1, 0f3F800000, 0f40000000;", 0x40000000),
        ("mov.b32 %r2, 0f40400000; max.f32 %r1, 0f3F800000, 0f40000000, %r2;", 0x40400000),
        ("mov.b32 %r2, 0f40400000; min.f32 %r3, 0f40000000, 0f41000000, %r2; mov.b32 %r1, %r2;", 0x40400000),
        ("cvt.rn.bf16x2.f32 %r1, 0f40000000, 0f3F800000;", 0x40003F80),
        ("cvt.rn.bf16.f32 %rs1, 0f3F808000; cvt.u32.u16 %r1, %rs1;", 0x3F80),  # a tie goes to the even one
        ("cvt.rn.bf16.f32 %rs1, 0f3F818000; cvt.u32.u16 %r1, %rs1;", 0x3F82),
        ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),  # 2^-46, which two roundings lose
        ("shfl.sync.idx.b32 %r1, %r0, 5, 0x1f, 0xffffffff; and.b32 %r1, %r1, 31;", 5),
        ("mov.b32 %r1, 7; { .reg .pred p; setp.lt.s32 p, %r0, 0; @p mov.b32 %r1, 9; @!p add.s32 %r1, %r1, 1; }", 8),
        ("atom.global.add.u32 %r2, [ %rd0 + 0 ], 1; mov.b32 %r1, 3;", 3),
    ],
)  # fmt: skip
def test_instructions_of_which_the_values_are_told_by_the_isa(body, wanted):
    values, hazards = executed(body)
    assert not hazards and [hex(value) for value in values] == [hex(wanted)] * 64


def test_lanes_that_part_meet_again():
    loop = "mov.b32 %r1, 0; again: add.s32 %r1, %r1, 2; setp.lt.s32 %p1, %r1, %r0; @%p1 bra again; bar.sync 0;"
    values, hazards = executed(loop)
    assert not hazards and (values == [max(2, i + i % 2) for i in range(64)]).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd1, %rd1, 4; mov.b32 %r1, 1;", "out of bounds: st.global"),
        ("add.s64 %rd1, %rd1, 2; mov.b32 %r1, 1;", "misaligned"),
        ("ld.shared.b32 %r1, [%r8+1000];", "out of bounds in shared memory"),
        ("setp.lt.s32 %p1, %r0, 32; @%p1 ret; bar.sync 0; mov.b32 %r1, 1;", "a barrier that not all threads"),
        ("mov.b32 %r1, %r0; and.b64 %rd1, %rd1, -8;", "two threads write different values"),
        ("again: bra again; mov.b32 %r1, 1;", "a loop does not end"),
    ],
)
def test_what_stops_a_kernel_stops_it_here(body, message):
    from ptx.memory import Fault

    with pytest.raises(Fault, match=message):
        executed(body)


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r1, %r0;",
        "add.sat.s32 %r1, %r0, 1;",
        "add.s32 %r1, %r0, 1, %r0;",
        "max.s32 %r1, %r0, 1, %r0;",
        "cvt.rz.bf16x2.f32 %r1, 0f0, 0f0;",
        "mma.sync.aligned.m8n8k4 %r1;",
    ],
)
def test_an_instruction_that_is_not_known_is_named_before_anything_runs(body):
    from ptx.program import UnknownInstruction

    with pytest.raises(UnknownInstruction, match=body.split(" ")[0]):
        executed("mov.b32 %r1, 1;" + body)
