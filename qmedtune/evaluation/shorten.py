"""A conversation that is longer than its room: oldest exchanges go first, then the middle of the last message.

The template, the system message and both ends of the message stay: an instruction stands at its beginning or at its
end, and a prompt cut from the left loses the template. What was left out is counted, for the caller to tell. Not for
benchmarks, which are cut as published (scoring.fit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmedtune.data.packing.framing import Frame, Prompt
from qmedtune.errors import RecipeError

MARK = " [...] "  # stands where text was left out
Message = dict[str, str]


@dataclass(frozen=True)
class Fitted:
    """What is asked, and the messages that it is made of. forgotten: messages dropped from the beginning; left_out:
    tokens missing from the middle of the last one."""

    asked: Prompt
    messages: list[Message]
    forgotten: int = 0
    left_out: int = 0

    @property
    def whole(self) -> bool:
        return not self.forgotten and not self.left_out


def fitted(frame: Frame, messages: Sequence[Message], room_tokens: int) -> Fitted:
    """The conversation in at most `room_tokens`. RecipeError where not even an empty question fits."""
    kept = list(messages)
    opening = 0
    while opening < len(kept) - 1 and kept[opening]["role"] == "system":
        opening += 1
    while True:
        [asked] = frame.ask([kept])
        if len(asked.ids) <= room_tokens:
            return Fitted(asked, kept, len(messages) - len(kept))
        if len(kept) <= opening + 1:
            break
        gone = min(2, len(kept) - opening - 1)  # a question and its answer
        kept = kept[:opening] + kept[opening + gone :]
    return _without_middle(frame, kept, room_tokens, forgotten=len(messages) - len(kept), whole=asked)


def _without_middle(
    frame: Frame, messages: list[Message], room_tokens: int, *, forgotten: int, whole: Prompt
) -> Fitted:
    """The most characters of the last message that fit, by halving."""
    last = messages[-1]
    key = "input" if last.get("input") else "content"
    best: Fitted | None = None
    fewest, most = 0, len(last[key])
    while fewest <= most:
        length = (fewest + most) // 2
        tried = [*messages[:-1], {**last, key: _ends_of(last[key], length)}]
        [asked] = frame.ask([tried])
        if len(asked.ids) <= room_tokens:
            best = Fitted(asked, tried, forgotten, len(whole.ids) - len(asked.ids))
            fewest = length + 1
        else:
            most = length - 1
    if best is None:
        raise RecipeError(
            f"template, system message and instruction leave no room for a question in {room_tokens:,} tokens\n"
            "shorten them, or take a smaller --max-new-tokens"
        )
    return best


def _ends_of(text: str, length: int) -> str:
    """So many characters of both ends, whole words where there are some."""
    half = length // 2
    head, tail = text[:half], text[len(text) - half :]
    if " " in head.strip():
        head = head[: head.rstrip().rfind(" ")]
    if " " in tail.strip():
        tail = tail[len(tail) - len(tail.lstrip()) :].partition(" ")[2]
    return f"{head.strip()}{MARK}{tail.strip()}".strip()
