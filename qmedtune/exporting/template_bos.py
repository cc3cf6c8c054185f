"""The chat template for a program that puts bos before a prompt by itself, as llama.cpp does where a file asks for it.

A template that writes bos too gives two: the model then meets a beginning that it was never trained on. Deliberately no
understanding of Jinja: a change counts once it renders to the same text without the bos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmedtune.data.packing.chat_template import ChatSource, renderer
from qmedtune.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

ASKED = ({"role": "user", "content": "x"},)
LONGER = (*ASKED, {"role": "assistant", "content": "y"}, *ASKED)


def without_bos(source: str, bos: str, eos: str) -> str:
    """The same template without the bos that opens its text. RecipeError where it cannot be taken out."""
    if not bos or not _rendered(source, bos, eos, ASKED).startswith(bos):
        return source
    for candidate in _candidates(source, bos):
        if all(
            _rendered(candidate, bos, eos, told) == _rendered(source, bos, eos, told).removeprefix(bos)
            for told in (ASKED, LONGER)
        ):
            return candidate
    raise RecipeError(
        f"the chat template writes {bos!r} itself, and so would the program that reads the file: two of them\n"
        "it could not be taken out of the template; write one without it into chat_template.jinja"
    )


def _candidates(source: str, bos: str) -> Iterator[str]:
    yield source.replace(bos, "", 1)
    yield source.replace("{{ bos_token }}", "", 1)
    yield source.replace("{{- bos_token }}", "", 1)
    yield "{%- set bos_token = '' -%}" + source
    yield "{%- set bos_token = '' -%}" + source.replace(bos, "", 1)


def _rendered(source: str, bos: str, eos: str, messages: tuple[dict[str, str], ...]) -> str:
    """In the process that renders templates of others: within its bounds."""
    tokens = (("bos_token", bos), ("eos_token", eos))
    [text] = renderer(ChatSource(source, tokens)).render([(list(messages), True)])
    return text
