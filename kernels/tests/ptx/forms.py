"""Which instructions are executed, told apart by all of their modifiers."""

from __future__ import annotations

import re

from .program import Instruction, UnknownInstruction

# What is executed, modifiers as one text. Anything else is refused before a program runs: an instruction that is taken
# for a similar one gives numbers that look right.
_INTEGER, _BITS, _REAL = r"[su](16|32|64)", r"b(16|32|64)", r"(f32|f64|f32x2|f16|bf16|f16x2|bf16x2)"
_ROUND, _MIXED = r"(rn\.)?(ftz\.)?", r"(f32\.)?"
_ANY, _HINTS = r"[su](8|16|32|64)", r"(L[12]::\w+(::\w+)?\.)*"
_COMPARE = r"(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)"
_MATRIX = r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"
_MMA = "|".join(
    rf"m16n8k{k}\.row\.col\.f32\.{t}\.{t}\.f32"
    for k, t in ((8, "tf32"), (8, "bf16"), (8, "f16"), (16, "bf16"), (16, "f16"))
)
_ATOMIC = r"((acq_rel|relaxed|gpu|cta|sys)\.)*global\.((acq_rel|relaxed|gpu|cta|sys)\.)*"
FORMS = {
    "add": rf"({_INTEGER}|{_ROUND}{_MIXED}{_REAL})", "sub": rf"({_INTEGER}|{_ROUND}{_MIXED}{_REAL})",
    "min": rf"({_INTEGER}|(ftz\.)?f(32|64))", "max": rf"({_INTEGER}|(ftz\.)?f(32|64))",
    "mul": rf"(lo\.{_INTEGER}|(hi|wide)\.[su](16|32)|{_ROUND}{_REAL})",
    "mad": rf"(lo\.{_INTEGER}|(hi|wide)\.[su](16|32))", "fma": rf"rn\.(ftz\.)?{_MIXED}{_REAL}",
    "div": rf"({_INTEGER}|(full|approx|rn)\.(ftz\.)?f32)", "rem": _INTEGER,
    "neg": rf"(s(16|32|64)|(ftz\.)?{_REAL})", "abs": rf"(s(16|32|64)|(ftz\.)?{_REAL})",
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"), r"(approx|rn)\.(ftz\.)?f32"),
    "shl": _BITS, "shr": r"[bsu](16|32|64)", **dict.fromkeys(("and", "or", "xor", "not"), rf"({_BITS}|pred)"),
    "popc": "b32", "lop3": "b32", "prmt": "b32", "bfe": r"[su](32|64)", "bfi": r"b(32|64)",
    "shf": r"[lr]\.(wrap|clamp)\.b32",
    "setp": rf"({_COMPARE}|(eq|ne|lt|le|gt|ge)u)\.((and|or|xor)\.)?([bsu](16|32|64)|(ftz\.)?f(32|64))",
    "selp": r"([bsu](16|32|64)|f(32|64))", "mov": r"([bsu](16|32|64)|f(32|64)|pred)",
    "cvt": rf"({_ROUND}{_REAL}\.({_REAL}|{_ANY})|{_ANY}\.{_ANY}|r[nzmp]i\.(ftz\.)?[su](32|64)\.f(32|64))",
    "ld": rf"(param|shared(::cta)?|(volatile\.)?global)\.(nc\.)?{_HINTS}(v[24]\.)?([bsu](8|16|32|64)|f(32|64))",
    "st": rf"(shared(::cta)?|global)\.{_HINTS}(v[24]\.)?([bsu](8|16|32|64)|f(32|64))",
    "cp": r"async\.(c[ag]\.shared(::cta)?\.global(\.L2::\w+)*|commit_group|wait_group|wait_all)",
    "atom": rf"{_ATOMIC}(add|min|max|and|or|xor|exch|cas)\.([bsu](32|64)|f32)",
    "red": rf"{_ATOMIC}(add|min|max|and|or|xor)\.([bsu](32|64)|f32)",
    "shfl": r"sync\.(idx|bfly|up|down)\.b32", "bar": r"(sync|warp\.sync)", "barrier": r"sync(\.aligned)?",
    "fence": r"(proxy\.async(\.shared::cta)?|(acq_rel|sc)\.\w+)", "membar": r"\w+", "griddepcontrol": r"\w+",
    "createpolicy": r"fractional\.L2::\w+\.b64", "prefetch": r".*", "bra": r"(uni)?", "ret": "", "exit": "",
    "ldmatrix": _MATRIX, "stmatrix": _MATRIX, "mma": rf"sync\.aligned\.({_MMA})",
    "wgmma": r"((fence|commit_group|wait_group)\.sync\.aligned|"
    r"mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16))",
}  # fmt: skip


# Operands, the result among them, where a handler would pass others on: a form with one more is another instruction.
OPERANDS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rem", "shl", "shr", "and", "or", "xor"), (3,)),
    **dict.fromkeys(("mad", "fma", "prmt", "bfe", "shf", "selp"), (4,)), **dict.fromkeys(("lop3", "bfi"), (5,)),
    **dict.fromkeys(("neg", "abs", "not", "popc", "mov"), (2,)), "min": (3, 4), "max": (3, 4),
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"), (2,)), "cvt": (2, 3), "setp": (3, 4),
}  # fmt: skip


def refuse_unknown(instructions: list[Instruction]) -> None:
    """UnknownInstruction, with its text, for the first one that is not executed here."""
    for ins in instructions:
        form = FORMS.get(ins.name)
        pairs = any(operand.kind == "pair" for operand in ins.operands)
        if form is None or not re.fullmatch(form, ".".join(ins.modifiers)) or pairs:
            raise UnknownInstruction(ins.text)
        count = len(ins.operands)
        three_integers = ins.name in ("min", "max") and count == 4 and ins.modifiers[-1] != "f32"
        if count not in OPERANDS.get(ins.name, (count,)) or three_integers:
            raise UnknownInstruction(ins.text)
