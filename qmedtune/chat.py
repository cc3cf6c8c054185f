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
from qmedtune.allowed import Quantization
from qmedtune.data.packing.framing import Prompt, codec_of, frame_of
from qmedtune.evaluation.generation import stream
from qmedtune.evaluation.open_model import OpenModel, locate, open_model
from qmedtune.evaluation.scoring import max_positions
from qmedtune.evaluation.shorten import Fitted, fitted
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
            asked = _fitted(opened, [*messages, {"role": "user", "content": text}], max_new_tokens)
            messages = asked.messages
            messages.append({"role": "assistant", "content": answer(opened, asked.asked, out, max_new_tokens)})


def answer(opened: OpenModel, prompt: Prompt, out: TextIO, max_new_tokens: int) -> str:
    """Write the next answer to `out` as it grows, and return it."""
    pieces = []
    for piece in stream(opened.model, opened.tokenizer, prompt, max_new_tokens):
        pieces.append(piece)
        out.write(printable(piece))
        out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


def _fitted(opened: OpenModel, messages: list[Message], max_new_tokens: int) -> Fitted:
    """The conversation as it fits the model's positions; what was left out is told."""
    room = max_positions(opened.model) - max_new_tokens
    found = fitted(frame_of(opened.template, codec_of(opened.tokenizer)), messages, room)
    if found.forgotten:
        ui.warn("the beginning of the conversation no longer fits and is forgotten")
    if found.left_out:
        ui.warn(
            f"the message is too long: this model takes {room:,} tokens, and {found.left_out:,} of its middle "
            "were left out"
        )
    return found
