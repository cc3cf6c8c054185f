"""Every key of a recipe in words: what it is for, what may stand there and what stands there by itself.

Read from the models (recipe.py, sections/), so that `qmedtune recipe KEY` and docs/recipe.md cannot drift from them.
Deliberately not here: drawing on a terminal (commands/recipe.py).
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from qmedtune.errors import RecipeError
from qmedtune.fields import Section
from qmedtune.parsing import grammar
from qmedtune.parsing.loader import show_path
from qmedtune.parsing.strict_yaml import KeyPath
from qmedtune.recipe import Recipe, StageSection

NAME = "NAME"  # stands for a name that the author of a recipe chooses
PREFACE = """# Every key of a recipe

Written by `qmedtune recipe --markdown > docs/recipe.md` from the models that check recipes; one key on a terminal:
`qmedtune recipe lr`. Editors show the same: `qmedtune schema > recipe.schema.json`, and
`# yaml-language-server: $schema=recipe.schema.json` in a recipe's first line. `NAME` is a name that you choose, `KIND`
one of `pretrain`, `cpt`, `sft`, `classify`. What `auto` became in your recipe, and why: `qmedtune plan RECIPE --full`.
"""


@dataclass(frozen=True)
class Key:
    """Documentation of one recipe key.

    `place`: the section, as people write it; `path`: one place in a recipe where the key can stand, with NAME for
    free names and 0 for list items. `default`: as YAML, empty where the key may be left out, None where it must be
    given. `section`: it holds other keys."""

    place: str
    path: KeyPath
    about: str
    allowed: str
    default: str | None
    section: bool

    @property
    def shown(self) -> str:
        """`stages[].KIND.lr`."""
        name = str(self.path[-1])
        return f"{self.place}.{name}" if self.place else name


@dataclass(frozen=True)
class Keys:
    """The keys that one class of section brings, at all places where it may stand."""

    places: tuple[str, ...]
    about: str
    keys: tuple[Key, ...]


def every_section() -> list[Keys]:
    """All sections, each class once and before those that add keys to it, in the order of a recipe."""
    found: dict[type[Section], dict[str, KeyPath]] = {}
    _visit(Recipe, (), found)
    sections: list[Keys] = []
    for cls, places in found.items():
        shown = _merged(list(places))
        path = next(iter(places.values()))
        own = [_key(name, field, shown[0], path) for name, field in _own(cls).items()]
        if own:
            sections.append(Keys(tuple(shown), _about(cls.__doc__), tuple(own)))
    return sections


def _visit(cls: type[Section], path: KeyPath, found: dict[type[Section], dict[str, KeyPath]]) -> None:
    """Put `cls`, the classes it takes keys from and those of its fields into `found`, with the places they stand at."""
    for base in reversed(cls.__mro__):
        if issubclass(base, Section) and base is not Section:
            found.setdefault(base, {}).setdefault(_place(path), path)
    for name, field in cls.model_fields.items():
        for inner, below in _sections_in(field.annotation, (*path, field.alias or name)):
            _visit(inner, below, found)


def _sections_in(annotation: object, path: KeyPath) -> Iterator[tuple[type[Section], KeyPath]]:
    """The section classes that may stand at `path`, each with the path of one of it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, path
        return
    origin = typing.get_origin(annotation)
    if origin is dict:
        path = (*path, NAME)
    elif origin is list:
        path = (*path, 0)
    for part in typing.get_args(annotation):
        yield from _sections_in(part, path)


def _place(path: KeyPath) -> str:
    return show_path(path).replace("[0]", "[]")


def _merged(places: list[str]) -> list[str]:
    """Places that every kind of stage has, as one: `stages[].KIND.lora`."""
    kinds = list(StageSection.model_fields)
    shown: list[str] = []
    for place in places:
        pattern = re.sub(rf"^stages\[\]\.({'|'.join(kinds)})", "stages[].KIND", place)
        everywhere = all(pattern.replace("KIND", kind) in places for kind in kinds)
        word = pattern if everywhere else place
        if word not in shown:
            shown.append(word)
    return shown


def _own(cls: type[Section]) -> dict[str, FieldInfo]:
    """The fields that a class does not take from another section."""
    inherited: set[str] = set()
    for base in cls.__mro__[1:]:
        if issubclass(base, Section):
            inherited |= set(base.model_fields)
    return {name: field for name, field in cls.model_fields.items() if name not in inherited}


def _key(name: str, field: FieldInfo, place: str, path: KeyPath) -> Key:
    path = (*path, field.alias or name)
    section = any(True for _ in _sections_in(field.annotation, path))
    return Key(place, path, _about(field.description), grammar.allowed(path), _default(field), section)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.default
    if isinstance(value, Section):
        return ""
    return "" if value is None else json.dumps(value).strip('"')


def _about(text: str | None) -> str:
    return " ".join((text or "").split())


# ---- one key ---------------------------------------------------------------------------------------------------------


def find(asked: str) -> list[Key]:
    """The keys that `lr`, `cpt.lr`, `stages[0].cpt.lr` or `data.notes.path` may mean: by their last parts, and the one
    alone whose whole path is given. Raises RecipeError with the nearest keys for an unknown one."""
    wanted = re.sub(r"\[\d*\]", "", asked).strip(".").split(".")
    found: list[Key] = []
    exact: list[Key] = []
    for section in every_section():
        for key in section.keys:
            for place in section.places:
                parts = _parts(place, str(key.path[-1]))
                if _ends_with(parts, wanted):
                    found.append(key)
                    if len(parts) == len(wanted) > 1:
                        exact.append(key)
                    break
    if not found:
        raise RecipeError(_unknown(asked, wanted[-1]))
    return exact or found


def _parts(place: str, name: str) -> list[str]:
    parts = place.replace("[]", "").split(".") if place else []
    return [*parts, name]


def _ends_with(parts: list[str], wanted: list[str]) -> bool:
    if len(wanted) > len(parts):
        return False
    kinds = StageSection.model_fields
    for part, word in zip(reversed(parts), reversed(wanted), strict=False):
        if part in (NAME, word) or (part == "KIND" and word in kinds):
            continue
        return False
    return wanted != [] and parts[-1] != NAME


def _unknown(asked: str, last: str) -> str:
    if asked.endswith((".yaml", ".yml")):
        return f"{asked}: a file, not a key\nlook into it with: qmedtune plan {asked}"
    names: dict[str, None] = {}
    for section in every_section():
        for key in section.keys:
            names[str(key.path[-1])] = None
    hint = grammar.did_you_mean(last, names)
    return f"{asked}: no key of a recipe{hint}\nall keys: qmedtune recipe"


# ---- the page --------------------------------------------------------------------------------------------------------


def markdown() -> str:
    """docs/recipe.md: a table for each section."""
    lines = [PREFACE]
    for section in every_section():
        title = ", ".join(f"`{place}`" for place in section.places if place) or "The top level"
        lines += [
            f"## {title}",
            "",
            section.about,
            "",
            "| key | default | allowed | what it is for |",
            "| --- | --- | --- | --- |",
        ]
        for key in section.keys:
            lines.append(_row(key))
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(key: Key) -> str:
    default = f"`{key.default}`"
    if key.default is None:
        default = "must be given"
    elif not key.default:
        default = "–"
    allowed = key.allowed
    if key.section and allowed.startswith("a section"):
        allowed = "a section"
    cells: list[str] = []
    for cell in (f"`{key.path[-1]}`", default, allowed, key.about):
        cells.append(cell.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"
