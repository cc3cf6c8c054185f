"""Talk to a model with the template it was trained with: streamed answers, the conversation as context.

On a terminal a prompt with line editing; from a pipe every line of stdin is one user message. The conversation lives
in memory only: no history file is written, because what is typed here may be about patients.
Deliberately absent: sampling (the same question gives the same answer), tools, saving.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from qmedtune import ui
from qmedtune.evaluation.generation import stream
from qmedtune.evaluation.open_model import OpenModel, Quantization, locate, open_model
from qmedtune.evaluation.scoring import max_positions, prompt_texts
from qmedtune.terminal import printable

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) leaves"
Message = dict[str, str]


def chat(
    name: str,
    *,
    base: str | None = None,
    template: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    quantization: Quantization | None = None,
    offline: bool = False,
) -> None:
    """Read user messages from stdin until it ends or /quit; answers go to stdout. `system` opens each conversation."""
    location = locate(name, base=base, template=template, offline=offline)
    opened = open_model(location, quantization)
    length = min(max_new_tokens, max_positions(opened.model) // 2)
    ui.note(f"{name}, template {location.template.name}. {HELP}. A language model, not medical advice.")
    converse(opened, user_lines(), sys.stdout, length, system=system)


def user_lines() -> Iterator[str]:
    """Lines of stdin; on a terminal with a prompt and line editing."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - importing it gives input() its line editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def converse(
    opened: OpenModel, lines: Iterator[str], out: TextIO, max_new_tokens: int, *, system: str | None = None
) -> None:
    """One answer per non-empty line. Commands begin with a slash."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(opening)
        elif text.startswith("/"):
            ui.note(HELP)
        elif text:
            messages = _remembered(opened, [*messages, {"role": "user", "content": text}], len(opening), max_new_tokens)
            messages.append({"role": "assistant", "content": answer(opened, messages, out, max_new_tokens)})


def answer(opened: OpenModel, messages: list[Message], out: TextIO, max_new_tokens: int) -> str:
    """Write the next answer to `out` as it grows, and return it."""
    [prompt] = prompt_texts(opened.tokenizer, opened.template, [messages])
    pieces = []
    for piece in stream(opened.model, opened.tokenizer, prompt, max_new_tokens):
        pieces.append(piece)
        out.write(printable(piece))
        out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


def _remembered(opened: OpenModel, messages: list[Message], opening: int, max_new_tokens: int) -> list[Message]:
    """The conversation without its oldest exchanges where it no longer fits the model's positions."""
    room = max_positions(opened.model) - max_new_tokens
    kept = messages
    while len(kept) > opening + 1:
        [prompt] = prompt_texts(opened.tokenizer, opened.template, [kept])
        if len(prompt.ids) <= room:
            break
        kept = kept[:opening] + kept[opening + 2 :]
    if len(kept) < len(messages):
        ui.warn("the beginning of the conversation no longer fits and is forgotten")
    return kept
