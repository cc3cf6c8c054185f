"""A model folder's own Jinja chat template: rendered apart, and split into what is asked and what is answered.

The template is somebody else's program. It runs in Jinja's immutable sandbox in a process of its own, whose memory and
time the operating system bounds: a loop or a giant string ends that process, never this one. It is given what
transformers' renderer gives it (special tokens, `tojson`, loop controls, `{% generation %}`), but for the date, which
stands still: a model that is asked tomorrow reads the prompt that it was trained on.
Deliberately absent: tools and documents (no message of ours carries any), and tokens (framing.py).
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import chain, islice
from os.path import commonprefix
from pathlib import Path
from typing import IO

from qmedtune.errors import DataError, RecipeError

Message = dict[str, str]
Segments = list[tuple[str, bool]]
Call = tuple[list[Message], bool]  # messages, add_generation_prompt

SECONDS = 10  # for a batch of conversations: thousands of renderings take well below one
MAX_SOURCE = 1 << 20  # characters; the longest template in wide use has about 15,000
MEMORY_BYTES = 1 << 30  # of the rendering process, its Python and Jinja included
MAX_TEXT = 1 << 24  # characters that one conversation may become; a row of 128k tokens has about 2**19
BATCH = 256  # conversations per request
PROBE = "Xq7Zk3"  # an answer that no template writes itself
DATE = "2024-07-26"  # what `strftime_now` tells: the date that Llama 3.1's own template falls back to
DATE_FORM = re.compile(r"strftime_now\(\s*(['\"])(?P<form>.*?)\1\s*\)")
WAY_ON = "name a template of qmedtune in the recipe (`data.<source>.template`) or with --template"
REWRITES = (
    "template: chat: the tokenizer's template rewrites earlier turns, or asks in another form than it answers in:\n"
    "responses cannot be told apart, and a model could not be asked with what it was trained on\n" + WAY_ON
)


@dataclass(frozen=True)
class ChatSource:
    """A chat template's Jinja text with the special tokens that it may print: (name, token) pairs, `bos_token` ..."""

    text: str
    tokens: tuple[tuple[str, str], ...] = ()


def frozen(text: str) -> str:
    """The template with its date standing still, for the merged folder: a macro takes the renderer's clock away."""
    forms = sorted({match["form"] for match in DATE_FORM.finditer(text)})
    if not forms:
        return text
    day = date.fromisoformat(DATE)
    cases = "".join(
        f"{{%- {'if' if i == 0 else 'elif'} form == {json.dumps(form)} -%}}{day.strftime(form)}"
        for i, form in enumerate(forms)
    )
    macro = f"{{%- macro strftime_now(form) -%}}{cases}{{%- else -%}}{DATE}{{%- endif -%}}{{%- endmacro -%}}"
    return macro + "\n" + text


# ---- the process that renders ----------------------------------------------------------------------------------------


class Renderer:
    """A running process that renders one template. Ends with this process, or when it exceeds a bound."""

    def __init__(self, source: ChatSource):
        self.source = source
        self.process: subprocess.Popen[bytes] | None = None
        if len(source.text) > MAX_SOURCE:
            raise RecipeError(f"template: chat: {len(source.text):,} characters; at most {MAX_SOURCE:,}\n{WAY_ON}")

    def render(self, calls: Sequence[Call]) -> list[str]:
        """The text of each call, in order. RecipeError beyond a bound, DataError where the template refuses."""
        texts: list[str] = []
        for start in range(0, len(calls), BATCH):
            texts += self._answer(calls[start : start + BATCH])
        return texts

    def _answer(self, calls: Sequence[Call]) -> list[str]:
        reply = self._exchange({"calls": calls})
        if "refused" in reply:
            why = f"refuses this conversation\n{reply['refused']}"
            raise DataError(f"template: chat: the tokenizer's template {why}\n{WAY_ON}")
        if "broken" in reply:
            raise RecipeError(f"template: chat: the tokenizer's template fails: {reply['broken']}\n{WAY_ON}")
        return reply["texts"]

    def _exchange(self, request: dict) -> dict:
        requests, answers = self._running()
        try:
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            line = _read_line(answers)
        except (BrokenPipeError, TimeoutError):
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            raise RecipeError(
                f"template: chat: the tokenizer's template does not end: stopped after {SECONDS} s or "
                f"{MEMORY_BYTES >> 20} MiB\n{WAY_ON}"
            )
        return json.loads(line)

    def _running(self) -> tuple[IO[bytes], IO[bytes]]:
        """The pipes of requests and of answers."""
        process, first = self.process, {}
        if process is None or process.poll() is not None:
            command = [sys.executable, "-I", str(Path(__file__).with_name("chat_renderer.py"))]
            # Its own session: Ctrl-C is for this process, which then closes its pipe.
            self.process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            first = {"source": self.source.text, "tokens": dict(self.source.tokens), "date": DATE}
            first |= {"memory_bytes": MEMORY_BYTES, "max_text": MAX_TEXT}
        assert process.stdin and process.stdout
        if first:
            process.stdin.write(json.dumps(first).encode() + b"\n")
        return process.stdin, process.stdout

    def __del__(self) -> None:
        self.close()  # Python keeps a running process and its pipes, which would keep it waiting for requests for ever

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _read_line(answers: IO[bytes]) -> bytes:
    """One line of the process; TimeoutError where it takes longer than `SECONDS` in all."""
    line, until = b"", time.monotonic() + SECONDS
    with selectors.DefaultSelector() as ready:
        ready.register(answers, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not ready.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            piece = answers.read1(1 << 20)  # type: ignore[attr-defined]
            if not piece:
                return line
            line += piece
    return line


@lru_cache(maxsize=4)
def renderer(source: ChatSource) -> Renderer:
    return Renderer(source)


# ---- from texts to segments ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a template puts around an answer, found by rendering one.

    prompt: the question that it was found with, as it is asked
    header: what stands before an answer although `add_generation_prompt` did not print it; part of what is asked
    lead: what comes between that and the answer's words; a space joins the first of them
    end: what stands behind an answer, without the white space at its end
    """

    prompt: str
    header: str
    lead: str
    end: str


@lru_cache(maxsize=16)
def form(source: ChatSource) -> Form:
    """RecipeError where the template shows no answer, DataError where its answers do not follow its own prompt."""
    asked = [{"role": "user", "content": "?"}]
    answered = [*asked, {"role": "assistant", "content": PROBE}]
    plain, prompt, whole = renderer(source).render([(asked, False), (asked, True), (answered, False)])
    before, found, end = whole.partition(PROBE)
    if not found:
        raise RecipeError(f"template: chat: the tokenizer's template does not print the answers\n{WAY_ON}")
    if not before.startswith(prompt):
        raise DataError(REWRITES)
    opening = before[len(prompt) :]
    if prompt == plain:
        header = opening.rstrip(" ")
    else:
        header = ""
    return Form(prompt, header, opening[len(header) :], end.rstrip())


def split(source: ChatSource, conversations: Sequence[Sequence[Message]]) -> list[Segments]:
    """Each conversation as (text, supervised) segments that add up to what the template prints.

    A conversation that ends with a question ends with what asks for its answer. An answer is supervised where the
    template shows it as it was asked for: templates that change earlier turns (they strip reasoning) train the last
    answer alone. DataError where not even that one follows its own prompt.
    """
    plans = []
    for messages in conversations:
        plans.append(_Plan.of(messages))
    calls = list(chain.from_iterable(plan.calls for plan in plans))
    texts = iter(renderer(source).render(calls))
    found = form(source)
    result: list[Segments] = []
    for plan in plans:
        result.append(_segments(plan, found, list(islice(texts, len(plan.calls)))))
    return result


def _merged(message: Message) -> Message:
    """Chat templates know no `input`."""
    given = message.get("input")
    if given:
        content = f"{message['content']}\n\n{given}"
    else:
        content = message["content"]
    return {"role": message["role"], "content": content}


@dataclass(frozen=True)
class _Plan:
    """What is rendered of a conversation: all of it, and per answer its prompt and what the template shows up to it."""

    answers: list[str]
    asks: bool
    calls: list[Call]

    @classmethod
    def of(cls, conversation: Sequence[Message]) -> _Plan:
        messages = []
        for message in conversation:
            messages.append(_merged(message))
        places = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                places.append(i)
        asks = not places or places[-1] != len(messages) - 1
        calls: list[Call] = [(messages, asks)]
        for place in places:
            calls += [(messages[:place], True), (messages[: place + 1], False)]
        return cls([messages[place]["content"].strip() for place in places], asks, calls)


def _segments(plan: _Plan, found: Form, texts: list[str]) -> Segments:
    whole = texts[0] + (found.header if plan.asks else "")
    segments: Segments = []
    done = 0
    for number, answer in enumerate(plan.answers):
        last = number == len(plan.answers) - 1 and not plan.asks
        shown = whole
        if not last:
            shown = commonprefix([whole, texts[2 + 2 * number]])  # an end mark that only the last has is not in both
        span = _answer_span(whole, shown, texts[1 + 2 * number] + found.header, answer)
        if span is None and last:
            raise DataError(REWRITES)
        if span is not None and span[0] >= done:
            segments += [(whole[done : span[0]], False), (whole[slice(*span)], True)]
            done = span[1]
    if whole[done:]:
        return [*segments, (whole[done:], False)]
    return segments


def _answer_span(whole: str, shown: str, prompt: str, answer: str) -> tuple[int, int] | None:
    """Where an answer with its end mark stands in `shown`, the beginning of the whole text up to it; None where its
    prompt or its words do not."""
    if not whole.startswith(prompt):
        return None
    start = whole.find(answer, len(prompt))
    if start < 0 or start + len(answer) > len(shown):
        return None
    end = len(shown.rstrip())
    return len(prompt), max(end, start + len(answer))
