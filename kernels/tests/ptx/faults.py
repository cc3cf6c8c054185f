"""Faults planted into the PTX, to see that the executor and the comparison catch them.

Each is a change of one place of one kernel's text, as a compiler's or an author's slip would leave it. Caught means:
the executor stops, names a hazard, or the answer is wrong. HARMLESS says which changes cannot be seen, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .memory import Fault
from .program import UnknownInstruction
from .work import Sizes, Work, all_work, multiplied, multiplied_backward, perform

RAGGED = Sizes(33, n=100, k=512, bias=True)
FEW = Sizes(9, n=100, k=512, bias=True)
# No processors to fill: the contraction is not split, and the loops have the steps that show a wait or a stage too few.
WHOLE = {
    "forward 64": lambda: multiplied(RAGGED),
    "forward 16": lambda: multiplied(FEW),
    "backward 64": lambda: multiplied_backward(Sizes(33, n=500, k=192)),
    "backward 16": lambda: multiplied_backward(Sizes(9, n=1000, k=192)),
    "many scales": lambda: multiplied(Sizes(16, 300, 512)),
    "few rows": lambda: multiplied(Sizes(3, 40, 512, dtype=torch.float16), "few_rows"),
}
WORK = {name: Work(name, run, processors=0) for name, run in WHOLE.items()}
WORK["split"] = Work("split", lambda: multiplied(Sizes(9, 100, 1024, bias=True)), processors=16)


@dataclass(frozen=True)
class Planted:
    """One fault: in the n-th match of `pattern` in `kernel`'s text (None: in all), `pattern` becomes `instead`."""

    what: str
    work: str
    arch: int
    kernel: str
    pattern: str
    instead: str
    nth: int | None = 0


def change(fault: Planted, text: str) -> str:
    """Raises LookupError where the text has no such place."""
    found = list(re.finditer(fault.pattern, text))
    if fault.nth is None and found:
        return re.sub(fault.pattern, fault.instead, text)
    if fault.nth is None or not -len(found) <= fault.nth < len(found):
        raise LookupError(f"{fault.what}: {len(found)} matches of {fault.pattern}")
    place = found[fault.nth]
    return text[: place.start()] + place.expand(fault.instead) + text[place.end() :]


BARRIER = r"bar\.sync\s+0;"


def planted() -> Iterator[Planted]:
    yield from _pipelines()
    yield from _decodes()
    yield from _addresses()
    yield from _elementwise()


def _pipelines() -> Iterator[Planted]:
    """Barriers, waits, fences and stages of the products' loops."""
    wait, commit = r"cp\.async\.wait_group\s+([1-9]\d*);", r"cp\.async\.commit_group;"
    stage = r"setp\.gt\.s32(\s+%p\d+, %r\d+), ([12]);"
    for work, arch, kernel, barriers in (
        ("forward 64", 86, "_forward", (1, 2)), ("forward 64", 90, "_forward", (1, 2, 3, 4)),
        ("forward 16", 86, "_forward", (1, 2)), ("backward 64", 86, "_backward", (1, 2, 3, 4)),
        ("backward 64", 90, "_backward", (2, 3, 4)), ("backward 16", 90, "_backward", (0, 1, 2, 3)),
    ):  # fmt: skip
        for nth in barriers:
            yield Planted(f"barrier {nth} out", work, arch, kernel, BARRIER, "", nth)
        yield Planted("a wait out", work, arch, kernel, wait, "")
        yield Planted("a wait for too few groups", work, arch, kernel, wait, "cp.async.wait_group 9;")
        yield Planted("a commit out of the loop", work, arch, kernel, commit, "", -1)
        yield Planted("a stage too few", work, arch, kernel, stage, r"setp.ge.s32\1, \2;", -1)
        yield Planted("a stage not loaded ahead", work, arch, kernel, stage, r"setp.gt.s32\1, 99;")
    for what, pattern, instead in (
        ("no fence for the async proxy", r"fence\.proxy\.async\.shared::cta;", ""),
        ("no wgmma.fence", r"wgmma\.fence\.sync\.aligned;", ""),
        ("no wait for wgmma", r"wgmma\.wait_group\.sync\.aligned 0;", ""),
        ("wgmma forgets what it has", r"mov\.pred(\s+%p\d+), -1;", r"mov.pred\1, 0;"),
        ("wgmma's second step starts wrong", r"add\.s64(\s+%rd\d+, %rd\d+, 46116862933052\d+);", r"add.s64\g<1>2;"),
        ("wgmma reads B across", r"(%p\d+, 1, 1), 0, 0;", r"\1, 0, 1;"),
    ):
        yield Planted(what, "forward 64", 90, "_forward", pattern, instead)
    for arch in (86, 120):
        flip = r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans"
        yield Planted("W not transposed", "backward 64", arch, "_backward", flip, "ldmatrix.sync.aligned.m8n8.x4")
    product = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}), \{ (%r\d+), (%r\d+) \}"
    yield Planted("halves of B exchanged", "forward 16", 86, "_forward", product, r"\1, { \3, \2 }")


def _decodes() -> Iterator[Planted]:
    """Tables, selectors, nibbles and scales."""
    for work, arch in (("forward 16", 86), ("forward 16", 90)):
        for what, pattern, instead in (
            ("a selector of pairs", "0x4051", "0x5140"), ("the other selector", "0x6273", "0x6372"),
            ("the choice of eight codes", r"0x32103210, 0xEA", "0x32103210, 0xE8"),
            ("a table's high byte", "0xbebfbfbf", "0xbebfbfbe"), ("the mask of selectors", "0x77777777", "0x70777777"),
        ):  # fmt: skip
            yield Planted(what, work, arch, "_forward", pattern, instead)
    yield Planted(
        "a table's last bit", "both products of 16 rows of the identity", 86, "_forward", "0xca063280", "0xca063281"
    )
    shuffled = r"(cvt\.rn\.bf16x2\.f32 %r\d+), ([%\w@]+), ([%\w@]+);"
    for work, arch, kernel in (
        ("dequantise shuffle nested bf16", 86, "_dequantize_words"),
        ("backward 64", 90, "_backward"),
    ):
        yield Planted("a pair's halves exchanged", work, arch, kernel, shuffled, r"\1, \3, \2;", 5)
        yield Planted("a nibble's shift", work, arch, kernel, r"(shr\.b32 n, %r\d+), 12;", r"\1, 16;")
        yield Planted("a lane's code", work, arch, kernel, r"and\.b32 l, l, 15;", "and.b32 l, l, 7;")
        yield Planted("a product without scale", work, arch, kernel, r"mul\.rn\.f32 x, x, %r\d+;", "")
    made = r"selp\.b32 c2, b, a, p;"
    yield Planted("a made table's upper half", "forward 64", 86, "_forward", made, "selp.b32 c2, a, b, p;")
    outer = r"shr\.s32(\s+%r\d+, %r\d+), 8;"
    yield Planted("the index of the outer scale", "many scales", 86, "_forward", outer, r"shr.s32\1, 7;")
    offset = r"fma\.rn\.f32(\s+%r\d+, %r\d+, %r\d+), %r\d+;"
    yield Planted("the offset of the scales", "forward 16", 86, "_forward", offset, r"mul.f32\1;")


def _addresses() -> Iterator[Planted]:
    """Masks, bounds, offsets, widths of indices."""
    masked = r"selp\.b32(\s+%r\d+), (%r\d+), 0, (%p\d+);"
    for work, arch, kernel in (("forward 16", 86, "_forward"), ("backward 64", 90, "_backward")):
        yield Planted("a store without its mask", work, arch, kernel, r"@%p\d+ (st\.global)", r"\1", -1)
    bound = r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+);"
    yield Planted("the mask of one row more", "forward 16", 86, "_forward", bound, r"setp.le.s32\1;")
    yield Planted("a copy without its mask", "forward 16", 86, "_forward", masked, r"mov.b32\1, \2;")
    shared = r"(st\.shared\.v4\.b32 \[ %r\d+) \+ 0"
    yield Planted("a shared store 16 bytes on", "backward 64", 90, "_backward", shared, r"\1 + 16")
    held = r"min\.s32(\s+%r\d+), (%r\d+), %r\d+;"
    yield Planted("rows not held at the last", "forward 16", 86, "_forward", held, r"mov.b32\1, \2;", 3)
    pointer = r"(add\.s64\s+%rd\d+, %rd\d+), 32;"
    yield Planted("a pointer moved on by half", "forward 16", 86, "_forward", pointer, r"\1, 16;")
    first = r"shl\.b32(\s+%r\d+, %r\d+), 6;"
    yield Planted("the first step of a split", "split", 86, "_forward", first, r"shl.b32\1, 5;")
    wide, short = (
        r"mad\.wide\.[su]32(\s+%rd\d+), (%r\d+), 4, (%rd\d+);",
        (r"{ .reg .b32 q; .reg .b64 w; shl.b32 q, \2, 2; cvt.s64.s32 w, q; add.s64 \1, w, \3; }"),
    )
    for path, kernel in (("gather", "_dequantize_pairs"), ("shuffle", "_dequantize_words")):
        name = f"dequantise {path}, rows far apart"
        yield Planted("an index of 32 bits", name, 86, kernel, wide, short, None)
    product, cut = (
        r"mul\.lo\.s64(\s+)(%rd\d+), (%rd\d+), (%rd\d+);",
        (r"mul.lo.s64 \2, \3, \4; { .reg .b32 q; cvt.u32.u64 q, \2; cvt.s64.s32 \2, q; }"),
    )
    name = "dequantise ragged, rows far apart"
    yield Planted("an index of 32 bits, any shape", name, 86, "_dequantize_bytes", product, cut, None)


def _elementwise() -> Iterator[Planted]:
    for name, kernel in (("add-norm D 576 bf16", "_forward"), ("add-norm D 576 bf16", "_backward_rows")):
        for nth in range(2):
            yield Planted(f"barrier {nth} out of {kernel}", name, 86, kernel, BARRIER, "", nth)
        yield Planted(
            f"a step of {kernel}'s sum", name, 86, kernel, r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 8,", r"\1, 4,"
        )
        mean = r"div\.full\.f32(\s+%r\d+), (%r\d+), %r\d+;"
        yield Planted(f"the mean of {kernel}", name, 86, kernel, mean, r"mov.b32\1, \2;")
    yield Planted("the sign of a gradient", "SwiGLU I 1536 bf16", 86, "_backward", r"sub\.f32", "add.f32")
    minus = r"(mov\.b16\s+%rs\d+), (0xBF80|-16512);"
    yield Planted("the turn of a head", "RoPE D 64 bf16", 86, "_rotate", minus, r"\1, 0x3F80;")
    for nth in (0, 1):
        yield Planted(f"barrier {nth} out", "few rows", 75, "_few_rows", BARRIER, "", nth)
    yield Planted(
        "a step of a row's sum", "few rows", 75, "_few_rows", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 1,"
    )


# Faults that nothing can show, because the kernel is right without what was taken out.
HARMLESS = {
    (
        "barrier 3 out",
        "forward 64",
        90,
    ): "after wgmma's wait: the copies that follow go to a stage that was read before the barrier at the loop's head",
    ("barrier 1 out", "forward 16", 86): "between the copies ahead of the loop: their stages are different memory",
    ("barrier 0 out", "backward 16", 90): "between the copies ahead of the loop: their stages are different memory",
}


def rows(only: str = "", fast: bool = False) -> Iterator[dict]:
    """One for each fault; fast: every third. planted: false where this Triton's PTX has no such place."""
    known = {work.name: work for work in all_work()} | WORK
    chosen = [fault for fault in planted() if only in f"{fault.what} {fault.work} sm_{fault.arch}"]
    for fault in chosen[:: 3 if fast else 1]:
        row = {"fault": fault.what, "work": fault.work, "target": f"sm_{fault.arch}"}
        try:
            how = _caught(known[fault.work], fault)
            yield row | {
                "planted": True,
                "caught": bool(how),
                "how": how or HARMLESS.get((fault.what, fault.work, fault.arch), ""),
            }
        except LookupError as error:
            yield row | {"planted": False, "caught": False, "how": str(error)}


def _caught(work: Work, fault: Planted) -> str:
    def changed(name: str, text: str) -> str:
        return change(fault, text) if name == fault.kernel else text

    try:
        result = perform(work, fault.arch, changed)
    except (Fault, UnknownInstruction) as error:
        return f"{type(error).__name__}: {error}"[:160]
    if result.hazards:
        return result.hazards[0][:160]
    return "" if result.right else f"wrong by {result.error:.1e}"
