"""The house as numbers: floors, circles and density of the package's own code. `python tests/house.py` prints them.

The floors are the import contract in pyproject.toml. Counted are all imports, those inside functions too; an import
under `if TYPE_CHECKING` is none. Exits with 1 where a limit below is broken.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "qmedtune"

# Of the whole package. Densities are per 1,000 lines of code, neither empty nor a comment.
MAX_CIRCLES = 0
MAX_UPWARD = 0
MAX_NESTED = 0  # comprehensions inside another, counted
MAX_DOUBLE = 25  # comprehensions with a second `for`, counted
MAX_COMPREHENSIONS = 25.0
MAX_TERNARIES = 20.0
MAX_RESULT_KEYS = 0  # results read by a string, outside results/
MAX_ANY_DICTS = 48  # `dict[str, Any]`, counted, with the aliases for what others wrote
# Functions of five or more parameters by position, counted: beyond four a frozen dataclass, or an option that must be
# named at the call. Not counted are commands, whose parameters are their options.
MAX_WIDE = 1
# Nor are signatures that another library calls by position.
CALLED_BY_OTHERS = {
    "qmedtune.modeling.attention varlen": "transformers' attention interface",
    "qmedtune.modeling.cpu_attention forward": "autograd.Function.apply",
    "qmedtune.bench.contenders forward": "autograd.Function.apply",
    "qmedtune.modeling.fused forward": "transformers' decoder layer calls its attention",
}

# Facts of a seal, or a result as JSON, that are looked up in place of an attribute of their model.
RESULT_KEY = re.compile(r"((?<!self)\.facts|\.as_json\(\))(\[|\.get\()")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Module:
    """One file of the package by its dotted name."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def code_lines(self) -> int:
        lines = [line.strip() for line in self.text.splitlines()]
        return len([line for line in lines if line and not line.startswith("#")])


def modules_of(package: Path = ROOT / PACKAGE) -> dict[str, Module]:
    """Every file below `package`, by dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = Module(name, path)
    return found


def imports_of(module: Module, known: dict[str, Module]) -> dict[str, int]:
    """The modules of the package that one imports anywhere in its text, and the line of each."""
    found: dict[str, int] = {}
    for node in _run_nodes(module.tree):
        for name in _imported(node, known):
            if name in known and name != module.name:
                found.setdefault(name, node.lineno)
    return found


def _run_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that are ever run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _run_nodes(other)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from _run_nodes(node)


def _imported(node: ast.Import | ast.ImportFrom, known: dict[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
        return
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        yield submodule if submodule in known else str(node.module)


Graph = dict[str, dict[str, int]]


def graph_of(modules: dict[str, Module]) -> Graph:
    return {name: imports_of(module, modules) for name, module in modules.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of files that can each be reached from each other (strongly connected, by reachability)."""
    reached = {name: _reachable(graph, name) for name in graph}
    left, found = set(graph), []
    for name in graph:
        group = {other for other in reached[name] & left if name in reached[other]}
        if len(group) > 1:
            found.append(sorted(group))
            left -= group
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()]:
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    return seen


def floors() -> list[list[str]]:
    """Modules and packages by floor, the highest first, as the contract in pyproject.toml names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [contract] = [each for each in settings["contracts"] if each["type"] == "layers"]
    found = []
    for layer in contract["layers"]:
        names = layer.replace("|", ":").split(":")
        found.append([name.strip(" ()") for name in names])
    return found


def floor_of(name: str, order: list[list[str]]) -> int | None:
    """How far down a module stands; None for the package itself and for what no floor names."""
    for number, names in enumerate(order):
        for floor in names:
            if name == floor or name.startswith(f"{floor}."):
                return number
    return None


def upward(graph: Graph) -> list[str]:
    """Imports of a module that stands higher, as `file:line imports module`."""
    order, found = floors(), []
    for name, imports in graph.items():
        here = floor_of(name, order)
        for other, line in imports.items():
            there = floor_of(other, order)
            if here is not None and there is not None and there < here:
                found.append(f"{name}:{line} imports {other}")
    return found


def without_floor(graph: Graph) -> list[str]:
    """Modules that the contract does not place."""
    order = floors()
    return [name for name in graph if name != PACKAGE and floor_of(name, order) is None]


@dataclass
class Density:
    """What makes text hard to read, counted over all modules."""

    code_lines: int = 0
    comprehensions: int = 0
    nested: int = 0
    double: int = 0
    ternaries: int = 0
    any_dicts: int = 0
    result_keys: int = 0

    def per_1000(self, count: int) -> float:
        return 1000 * count / self.code_lines


def density_of(modules: dict[str, Module]) -> Density:
    found = Density()
    for module in modules.values():
        found.code_lines += module.code_lines
        found.any_dicts += module.text.count("dict[str, Any]")
        if not module.name.startswith(f"{PACKAGE}.results"):
            found.result_keys += len(RESULT_KEY.findall(module.text))
        for node in ast.walk(module.tree):
            found.ternaries += isinstance(node, ast.IfExp)
            if isinstance(node, COMPREHENSIONS):
                found.comprehensions += 1
                found.nested += _holds_another(node)
                found.double += len(node.generators) > 1
    return found


def _holds_another(node: ast.AST) -> bool:
    inside = [other for other in ast.walk(node) if isinstance(other, COMPREHENSIONS)]
    return len(inside) > 1


def wide_functions(modules: dict[str, Module]) -> list[str]:
    """`module:line name` of every function that takes five or more parameters by position."""
    found = []
    for module in modules.values():
        if module.name.startswith(f"{PACKAGE}.commands"):
            continue
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            if f"{module.name} {node.name}" in CALLED_BY_OTHERS:
                continue
            if len(names) - (names[:1] in (["self"], ["cls"])) >= 5:
                found.append(f"{module.name}:{node.lineno} {node.name}")
    return found


def problems() -> list[str]:
    """Every broken limit in words; prints the figures."""
    modules = modules_of()
    graph = graph_of(modules)
    rings, climbing, lost, found = circles(graph), upward(graph), without_floor(graph), density_of(modules)
    comprehensions, ternaries = found.per_1000(found.comprehensions), found.per_1000(found.ternaries)
    print(f"{len(modules)} files, {found.code_lines} lines of code")
    print(f"circles {len(rings)}, imports upward {len(climbing)}, without a floor {len(lost)}")
    print(f"per 1,000 lines: comprehensions {comprehensions:.1f}, ternaries {ternaries:.1f}")
    print(f"nested comprehensions {found.nested}, with a second `for` {found.double}")
    wide = len(wide_functions(modules))
    print(f"dict[str, Any]: {found.any_dicts}, results read by a string: {found.result_keys}")
    print(f"functions of five or more parameters by position: {wide}")
    broken = [f"circle: {', '.join(ring)}" for ring in rings] if len(rings) > MAX_CIRCLES else []
    broken += climbing if len(climbing) > MAX_UPWARD else []
    broken += [f"{name} stands on no floor of [tool.importlinter] in pyproject.toml" for name in lost]
    for what, number, limit in (
        ("nested comprehensions", found.nested, MAX_NESTED),
        ("comprehensions with a second `for`", found.double, MAX_DOUBLE),
        ("comprehensions per 1,000 lines", comprehensions, MAX_COMPREHENSIONS),
        ("ternaries per 1,000 lines", ternaries, MAX_TERNARIES),
        ("dict[str, Any]", found.any_dicts, MAX_ANY_DICTS),
        ("results read by a string", found.result_keys, MAX_RESULT_KEYS),
        ("functions of five or more parameters by position", wide, MAX_WIDE),
    ):
        if number > limit:
            broken.append(f"{what}: {number:.1f}, allowed {limit:.0f}")
    return broken


def main() -> None:
    broken = problems()
    print("\n".join(broken))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
