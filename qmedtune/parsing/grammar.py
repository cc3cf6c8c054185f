"""What the schema allows at a place, in words, and the nearest right word to a wrong one.

Everything is read from the JSON Schema of `Recipe` (what `qmedtune schema` prints), so that messages cannot drift from
the models. Deliberately not here: any knowledge of single keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from qmedtune.parsing.strict_yaml import KeyPath
from qmedtune.recipe import Recipe

Schema = dict[str, Any]


@cache
def json_schema() -> Schema:
    """The JSON Schema of a recipe, as editors read it."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def key_paths() -> list[tuple[str, ...]]:
    """Every key of the schema with its section path; `*` stands for a name, `[]` for a list item."""
    return list(_walk(json_schema(), ()))


def _walk(schema: Schema, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for option in _options(schema):
        for key, child in option.get("properties", {}).items():
            yield (*path, key)
            yield from _walk(child, (*path, key))
        if isinstance(child := _named(option), dict):
            yield from _walk(child, (*path, "*"))
        if "items" in option:
            yield from _walk(option["items"], (*path, "[]"))


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed; a plain schema is its own only one."""
    while "$ref" in schema:
        schema = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return [option for part in schema["anyOf"] for option in _options(part)]
    return [schema]


def _named(schema: Schema) -> Schema | None:
    """The schema of the values of a mapping with free names, such as `data:` or `mix:`."""
    patterns = list(schema.get("patternProperties", {}).values())
    extra = schema.get("additionalProperties")
    return patterns[0] if patterns else extra if isinstance(extra, dict) else None


def schemas_at(path: KeyPath) -> list[Schema]:
    """The alternatives that the schema allows at `path`; empty where the path is unknown."""
    options = _options(json_schema())
    for key in path:
        options = [leaf for option in options for child in [_child(option, key)] if child for leaf in _options(child)]
    return options


def _child(schema: Schema, key: str | int) -> Schema | None:
    if isinstance(key, int):
        fixed = schema.get("prefixItems", [])
        return fixed[key] if key < len(fixed) else schema.get("items")
    return schema.get("properties", {}).get(key) or _named(schema)


def keys_at(path: KeyPath) -> list[str]:
    """The keys of the section at `path`."""
    return [key for option in schemas_at(path) for key in option.get("properties", {})]


def words_at(path: KeyPath) -> list[str]:
    """The fixed words that may stand at `path`."""
    return [str(word) for option in schemas_at(path) for word in [*option.get("enum", []), option.get("const", "")]]


def homes_of(key: str) -> list[str]:
    """The sections that have `key`, as people write them: `stages[].cpt`."""
    sections = [".".join(path[:-1]).replace(".[]", "[]") for path in key_paths() if path[-1] == key]
    return [section or "the top level" for section in sections]


def allowed(path: KeyPath) -> str:
    """What may stand at `path`, in words: `a number in (0, 1] or auto`."""
    words = [_describe(option) for option in schemas_at(path)]
    return _either(dict.fromkeys(word for word in words if word))


def _describe(schema: Schema) -> str:
    if "enum" in schema:
        return _either(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"]).lower() if isinstance(schema["const"], bool) else str(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _interval(schema, "a whole number" if kind == "integer" else "a number")
    if kind == "string":
        return "letters, digits, `_`, `-`, `.` (first a letter or digit)" if "pattern" in schema else "text"
    if kind == "array":
        return _list_of(schema)
    if kind == "object":
        return _section(schema)
    return {"boolean": "true or false"}.get(str(kind), "")


def _interval(schema: Schema, noun: str) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    left = f"({above:.10g}" if above is not None else f"[{low:.10g}" if low is not None else "("
    right = f"{below:.10g})" if below is not None else f"{high:g}]" if high is not None else ")"
    if left != "(" and right != ")":
        return f"{noun} in {left}, {right}"
    return f"{noun} above {above:g}" if above is not None else f"{noun} from {low:g} up" if low is not None else noun


def _list_of(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} numbers"
    return f"a list of {_either(_describe(option) for option in _options(schema['items']))}"


def _section(schema: Schema) -> str:
    if (named := _named(schema)) is not None:
        return f"names with {_either(_describe(option) for option in _options(named))} each"
    keys = list(schema.get("properties", {}))
    return "a section with " + ", ".join(keys[:4]) + (" ..." if len(keys) > 4 else "")


def _either(words: Iterable[str]) -> str:
    *first, last = list(words) or [""]
    return f"{', '.join(first)} or {last}" if first else last


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known words at the smallest edit distance, if that is small enough to be a slip of the hand."""
    distances = {candidate: edit_distance(word.lower(), candidate.lower()) for candidate in known}
    best = min(distances.values(), default=99)
    if best > max(1, min(3, len(word) // 2)):
        return []
    return [candidate for candidate, distance in distances.items() if distance == best]


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment)."""
    a, b = a[:64], b[:64]
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean `a` or `b`?`, or nothing."""
    found = nearest(word, known)
    return f"; did you mean {_either(f'`{name}`' for name in found)}?" if found else ""
