"""PTX text to a list of instructions: labels, parameters, registers with their scopes, operands already told apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

DIRECTIVE_LINES = re.compile(r"^\s*\.(loc|file|section|pragma|b8|b32|b64)\b.*$", re.MULTILINE)
NAME = re.compile(r"%?[A-Za-z_$][\w$]*(?:\.[xyz])?")
SCOPED = re.compile(r"(?<![\w%$.])([A-Za-z_][\w]*)(?![\w(])")


class UnknownInstruction(Exception):
    """The executor does not know this instruction; the message is its text."""


@dataclass(frozen=True)
class Operand:
    """kind: register, number, symbol, vector (`parts`), address (`parts[0]` + `offset`), pair (d|p: `parts`)."""

    kind: str
    text: str
    parts: tuple[Operand, ...] = ()
    offset: int = 0

    @property
    def elements(self) -> tuple[Operand, ...]:
        """The registers of a vector; of anything else itself."""
        return self.parts if self.kind == "vector" else (self,)


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate's name, "" for none."""

    text: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str = ""
    negated: bool = False

    @cached_property
    def registers(self) -> frozenset[str]:
        """Names of all registers it mentions."""
        return frozenset(_registers(self.operands))


def _registers(operands: tuple[Operand, ...]):
    for operand in operands:
        if operand.kind == "register":
            yield operand.text
        yield from _registers(operand.parts)


@dataclass
class Program:
    """One entry. widths: bits of each register by name (1 for predicates), or by prefix where declared `%r<9>`."""

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    target: str = ""

    def width(self, register: str) -> int:
        if register in self.widths:
            return self.widths[register]
        return self.widths[register.rstrip("0123456789")]


def parse(text: str) -> Program:
    """The only entry of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+[^\n{]*\n?)*)\s*\{", text, re.DOTALL)
    assert header, "no .entry"
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", header[3])
    target = re.search(r"\.target\s+(\w+)", text)
    assert threads and target
    parameters = re.findall(r"\.param\s+\.(\w+)\s+[^,]*?(\w+)\s*(?:,|$)", header[2].strip())
    program = Program(header[1], [(name, type_) for type_, name in parameters], int(threads[1]), target=target[1])
    _body(DIRECTIVE_LINES.sub("", _braced(text, header.end() - 1)), program)
    return program


def _braced(text: str, start: int) -> str:
    """What stands between the brace at `start` and its partner."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + 1 : index]
    raise ValueError("unbalanced braces")


def _body(text: str, program: Program) -> None:
    """Statements end with `;`; a brace at the start of one opens a scope with registers of its own."""
    scopes: list[dict[str, str]] = []
    opened, position = 0, 0
    start = re.compile(r"\s*(?:([\w$]+):|(\{)|(\})|([^;{]*(?:\{[^}]*\}[^;{]*)*);)")
    while match := start.match(text, position):
        position = match.end()
        label, opens, closes, statement = match.groups()
        if label:
            program.labels[label] = len(program.instructions)
        elif opens:
            opened += 1
            scopes.append({})
        elif closes:
            scopes.pop()
        elif statement.lstrip().startswith(".reg"):
            _declare(statement, program, scopes, opened)
        else:
            names = {name: ours for scope in scopes for name, ours in scope.items()}
            program.instructions.append(instruction(_renamed(statement.strip(), names)))
    assert not text[position:].strip(), f"not understood: {text[position : position + 80]!r}"


def _declare(statement: str, program: Program, scopes: list[dict[str, str]], opened: int) -> None:
    type_, names = re.match(r"\s*\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()  # type: ignore[union-attr]
    bits = 1 if type_ == "pred" else int(re.sub(r"\D", "", type_))
    for name in names.split(","):
        name = name.strip().split("<")[0]
        ours = name
        if scopes:
            ours = scopes[-1][name] = f"%{name}@{opened}_"
        program.widths[ours] = bits


def _renamed(statement: str, names: dict[str, str]) -> str:
    if not names:
        return statement
    opcode, _, operands = statement.partition(" ")
    if opcode.startswith("@"):
        guard = SCOPED.sub(lambda found: names.get(found[1], found[1]), opcode)
        return f"{guard} {_renamed(operands.lstrip(), names)}"
    return f"{opcode} " + SCOPED.sub(lambda found: names.get(found[1], found[1]), operands)


def instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)([%\w@]+)\s+", text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    name, *modifiers = opcode.split(".")
    split = tuple(operand(part) for part in _split(operands))
    return Instruction(text, name, tuple(modifiers), split, guard[2] if guard else "", bool(guard and guard[1]))


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Operand("vector", text, tuple(operand(part) for part in _split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Operand("address", text, (operand(base),), int(offset or "0", 0))
    if "|" in text:
        return Operand("pair", text, tuple(operand(part) for part in text.split("|")))
    if re.match(r"-?(\d|\.\d)", text):
        return Operand("number", text)
    return Operand("register" if text.startswith("%") else "symbol", text)
