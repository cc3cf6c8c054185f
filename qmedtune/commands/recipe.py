"""The command about the keys of recipes: what each is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qmedtune.commands.common import JsonOption, emit

if TYPE_CHECKING:
    from qmedtune.parsing.described import Key


def recipe(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="lr, cpt.lr, merge ...; default: all.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys as the page docs/recipe.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a key of a recipe is for, what may stand there and its default."""
    from qmedtune.parsing import described

    if markdown:
        return print(described.markdown())
    keys = described.find(key) if key else _all()
    if as_json:
        return emit([_as_json(one) for one in keys])
    if key is None:
        for one in keys:
            print(one.shown)
        return print("\nmore about one: qmedtune recipe KEY")
    for one in keys:
        _show(one)


def _all() -> list[Key]:
    from qmedtune.parsing import described

    keys: list[Key] = []
    for section in described.every_section():
        keys += section.keys
    return keys


def _as_json(key: Key) -> dict[str, str | bool | None]:
    return {
        "key": key.shown,
        "about": key.about,
        "allowed": key.allowed,
        "default": key.default,
        "required": key.default is None,
    }


def _show(key: Key) -> None:
    from qmedtune.terminal import wrapped

    print(key.shown)
    for line in wrapped(key.about, 2):
        print(f"  {line}")
    for line in wrapped(f"allowed: {key.allowed}", 2):
        print(f"  {line}")
    if key.default is None:
        print("  must be given")
    else:
        print(f"  default: {key.default or 'left out'}")
