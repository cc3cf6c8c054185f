"""Recipe files and `--set`: YAML text in, a validated `Recipe` out, or one error that lists everything to mend.

Each line of the error says where (`recipes/x.yaml:14 stages[0].cpt.lr`), what was given and what is allowed.
Deliberately not here: the schema (recipe.py), YAML (strict_yaml.py), cross references (checks.py), `auto` (plan.py).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qmedtune.errors import RecipeError
from qmedtune.parsing import checks, grammar, strict_yaml
from qmedtune.parsing.beside import beside
from qmedtune.parsing.strict_yaml import KeyPath, Problem, Tree, YamlDocument
from qmedtune.recipe import Recipe

MAX_LINES = 6
MAX_PROBLEMS = 500  # that are looked into: six are shown, and the nearest right word to each costs half a millisecond
MAX_LINE_CHARS = 300
REMOTE_CODE = "code from a model folder is never run and cannot be asked for; remove the key"


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and the text it came from; overrides stand at the end of `text` as comments.

    `sha256` is that of `text` in UTF-8. `warnings` are one line each, with the place.
    """

    recipe: Recipe
    text: str
    path: Path
    sha256: str
    warnings: tuple[str, ...]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and validate a recipe.

    `overrides` are `key.path=value` strings, for example `stages[0].cpt.lr=1e-4`; values are YAML.
    Raises RecipeError with at most six lines.
    """
    path = Path(path)
    text = _read(path)
    document = strict_yaml.parse(text)
    places = Places(str(path), document.lines, {})
    if isinstance(document.data, dict):
        for override in overrides:
            _apply(override, document, places)
    recipe = _validate(document, places)
    if elsewhere := [Problem(where, 0, text) for where, text in beside(recipe, path)]:
        raise RecipeError(_listed(elsewhere, places))
    for override in overrides:
        text += f"{strict_yaml.OVERRIDE}{override}\n"
    warnings: list[str] = []
    for where, doubt in sorted(checks.doubts(recipe), key=str):
        warnings.append(places.line_of(where, doubt))
    return LoadedRecipe(recipe, text, path, hashlib.sha256(text.encode()).hexdigest(), tuple(warnings))


@dataclass(frozen=True)
class Places:
    """Where a key path was written: a line of the file, or a `--set`."""

    file: str
    lines: dict[KeyPath, int]
    overridden: dict[KeyPath, str]

    def line_of(self, path: KeyPath, text: str, line: int = 0) -> str:
        """`recipes/x.yaml:14 stages[0].cpt.lr: text`, printable and on one line."""
        for above in _upwards(path):
            if above in self.overridden:
                return _one_line(f"--set {self.overridden[above]}: {text}")
        place = self.file
        if number := line or self.nearest(path):
            place = f"{place}:{number}"
        if path:
            place = f"{place} {show_path(path)}"
        return _one_line(f"{place}: {text}")

    def nearest(self, path: KeyPath) -> int:
        """The line of the path or of the nearest section around it; 0 where neither was written."""
        for above in _upwards(path):
            if above in self.lines:
                return self.lines[above]
        return 0


def _upwards(path: KeyPath) -> Iterator[KeyPath]:
    """A path and the sections around it, the outermost last."""
    for length in range(len(path), 0, -1):
        yield path[:length]


def show_path(path: KeyPath) -> str:
    """`("stages", 0, "cpt", "lr")` as `stages[0].cpt.lr`."""
    shown = ""
    for key in path:
        shown += f"[{key}]" if isinstance(key, int) else f".{key}"
    return shown.lstrip(".")


def _one_line(text: str) -> str:
    flat = ""
    for character in text:
        flat += character if character.isprintable() else character.encode("unicode_escape").decode()
    if len(flat) <= MAX_LINE_CHARS:
        return flat
    return flat[: MAX_LINE_CHARS - 4] + " ..."


def _read(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml") and path.is_file() and (path.parent / "run.json").is_file():
        advice = f"give the recipe that it was made from, with --out {path.parent} to go on with it"
        raise RecipeError(_one_line(f"{path}: a file of a run; {advice}"))
    try:
        with path.open("rb") as file:
            raw = file.read(strict_yaml.MAX_BYTES + 1)
    except OSError as error:
        shown = re.sub(r"^(\w+):/", r"\1://", str(path))  # of an address, of which Path drops a stroke
        raise RecipeError(_one_line(f"{shown}: {_unreadable(path, error)}")) from None
    if len(raw) > strict_yaml.MAX_BYTES:
        raise RecipeError(_one_line(f"{path}: over {strict_yaml.MAX_BYTES // 1024} kB; this is no recipe"))
    raw = raw.removeprefix(codecs.BOM_UTF8)  # Windows' editors write it; it says nothing
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RecipeError(_one_line(f"{path}:1: UTF-16; save the file as UTF-8"))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(_one_line(f"{path}:{line}: a byte that is not UTF-8; save the file as UTF-8")) from None


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        if (path / "run.json").is_file():
            return f"a run; give the recipe that it was made from, with --out {path} to go on with it"
        found = sorted(path.glob("*.yaml"))
        example = f", for example {path / found[0].name}" if found else ""
        return f"a folder; give the recipe file{example}"
    if isinstance(error, FileNotFoundError):
        if re.match(r"\w+:/", str(path)):
            return "recipes are files on this machine; fetch it first"
        beside = [*path.parent.glob("*.yaml"), *Path("recipes").glob("*.yaml")]
        by_name = {recipe.stem: str(recipe) for recipe in beside}
        if near := grammar.nearest(path.stem, by_name):
            return f"no such file; did you mean {by_name[near[0]]}?"
        listed = sorted({str(recipe) for recipe in beside})
        return f"no such file; recipes here: {', '.join(listed[:4]) or 'none'}"
    return f"cannot be read ({error.strerror})"


def _apply(override: str, document: YamlDocument, places: Places) -> None:
    """Put the value of one `--set` into the tree. Sections on the way are made; list items must exist."""
    key, equals, text = override.partition("=")
    steps: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d{1,6})\]", key.strip()):
        steps.append(int(index) if index else name)
    if not (override.isprintable() and equals and steps):
        raise RecipeError(_one_line(f"--set {override}: allowed: key.path=value, e.g. stages[0].cpt.lr=1e-4"))
    value = strict_yaml.parse(text)
    if value.problems:
        raise RecipeError(_one_line(f"--set {override}: {value.problems[0].text}"))
    path: list[str | int] = []
    here: Any = document.data
    while steps:
        step, steps = _next_step(here, steps)
        path.append(step)
        if isinstance(step, int) != isinstance(here, list) or (isinstance(step, int) and not _has(here, step)):
            raise RecipeError(_one_line(f"--set {override}: {_no_item(tuple(path[:-1]), here)}"))
        if not steps:
            here[step] = value.data
        elif not _has(here, step) or not _is_branch(here[step]):
            here[step] = {}
        here = here[step]
    places.overridden[tuple(path)] = override


def _is_branch(node: Any) -> bool:
    return isinstance(node, dict | list)


def _next_step(here: Any, steps: list[str | int]) -> tuple[str | int, list[str | int]]:
    """The key to descend by; names may hold dots (`data.v1.0.path`), so the longest existing one wins."""
    for count in range(len(steps), 1, -1):
        if isinstance(here, dict) and (name := ".".join(map(str, steps[:count]))) in here:
            return name, steps[count:]
    return steps[0], steps[1:]


def _no_item(path: KeyPath, here: Any) -> str:
    if isinstance(here, list):
        return f"{show_path(path)} is a list of {len(here)}; the first item is {show_path((*path, 0))}"
    hint = ""
    if not grammar.schemas_at(path):
        hint = grammar.did_you_mean(str(path[-1]), grammar.keys_at(path[:-1]))
    return f"{show_path(path)} is no list{hint}"


def _validate(document: YamlDocument, places: Places) -> Recipe:
    """The recipe, or RecipeError with every problem of syntax, schema and references at once."""
    problems = list(document.problems)
    findings: list[checks.Finding] = []
    recipe, unread = None, 0
    if isinstance(document.data, dict):
        try:
            recipe = Recipe.model_validate(document.data)
        except ValidationError as error:
            findings += _schema_problems(error, document.data)
            unread = max(0, error.error_count() - MAX_PROBLEMS)
        findings += checks.references(document.data)
    elif not problems:
        problems.append(Problem((), 1, "a recipe is a mapping of sections (`name: ...`, `model: ...`, `data: ...`)"))
    if recipe is not None and not problems and not findings:
        findings += checks.contradictions(recipe)
    for path, text in findings:
        problems.append(Problem(path, 0, text))
    if recipe is None or problems:
        raise RecipeError(_listed(problems, places, unread))
    return recipe


def _listed(problems: list[Problem], places: Places, unread: int = 0) -> str:
    """One line per key, in the order of the file, at most six lines; `unread`: how many more were not looked into."""
    first: dict[object, Problem] = {}
    for problem in problems:
        first.setdefault(problem.path or problem.line, problem)
    ordered = sorted(first.values(), key=lambda p: (p.line or places.nearest(p.path), show_path(p.path)))
    lines = [places.line_of(problem.path, problem.text, problem.line) for problem in ordered]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = [f"... and {len(lines) - MAX_LINES + 1 + unread:,} more"]
    return "\n".join(lines)


def _schema_problems(error: ValidationError, tree: Tree) -> Iterator[tuple[KeyPath, str]]:
    """Pydantic's findings at key paths of the tree: one per path, and none that a deeper one explains."""
    found: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
        path, value = _locate(tree, item["loc"])
        if item["type"] == "missing":
            path = (*path, item["loc"][-1])
        found.setdefault(path, _explain(item, path, value))
    above: set[KeyPath] = set()
    mistyped: set[KeyPath] = set()
    for path in found:
        if path:
            above.update([(), *_upwards(path[:-1])])
        if _is_unknown(path) and len(near := _near_keys(path)) == 1:
            mistyped.add((*path[:-1], near[0]))
    for path, text in found.items():
        if path not in above and not (text.startswith("missing") and path in mistyped):
            yield path, text


def _has(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and key in range(len(node))


def _locate(tree: Any, loc: tuple[str | int, ...]) -> tuple[KeyPath, Any]:
    """Follow pydantic's location through the tree, past the names of union members that it mixes in."""
    path: list[str | int] = []
    here: Any = tree
    for key in loc:
        if _has(here, key):
            path.append(key)
            here = here[key]
    return tuple(path), here


def _explain(item: Any, path: KeyPath, value: Any) -> str:
    if item["type"] == "missing":
        return f"missing; allowed: {grammar.allowed(path)}"
    if item["type"] == "extra_forbidden":
        return _unknown(path)
    if item["type"] == "too_long" and "max_length" in item.get("ctx", {}):
        return f"got {len(item['input']):,} entries; allowed: at most {item['ctx']['max_length']}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["loc"][-1] == "[key]":
        return "a name is made of letters, digits, `_`, `-`, `.`, begins with a letter or digit, and has at most 80"
    hint = ""
    if isinstance(value, str):
        hint = grammar.did_you_mean(value, grammar.words_at(path))
    return f"got {_shown(value)}; allowed: {grammar.allowed(path)}{hint}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:56] + " ..."


def _unknown(path: KeyPath) -> str:
    """For a key that the schema lacks: the nearest key here, the section where it belongs, or all keys here."""
    key = str(path[-1])
    if key in ("trust_remote_code", "auto_map"):
        return REMOTE_CODE
    known = grammar.keys_at(path[:-1])
    hint = grammar.did_you_mean(key, known)
    if homes := grammar.homes_of(key):
        return f"unknown key here{hint}; `{key}` belongs in {' or '.join(homes[:3])}"
    if hint:
        return f"unknown key{hint}"
    ours = grammar.OTHER_NAMES.get(key.lower(), "")
    if homes := grammar.homes_of(ours):
        return f"unknown key; here it is `{ours}`, in {' or '.join(homes[:3])}"
    return f"unknown key; allowed: {', '.join(known)}"


def _is_unknown(path: KeyPath) -> bool:
    return not grammar.schemas_at(path)


def _near_keys(path: KeyPath) -> list[str]:
    return grammar.nearest(str(path[-1]), grammar.keys_at(path[:-1]))
