"""One way from a conversation to tokens: what is asked begins what is trained, and the merged folder's Jinja agrees.

pytest tests/test_framing.py                # every template and tokenizer, three shapes of conversation
pytest -m slow tests/test_framing.py        # all shapes
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import KINDS, tokenizer

from qmedtune.data import chat_template, framing, templates
from qmedtune.data.framing import Frame, Framed

NAMES = (*templates.TEMPLATES, "chat")
QUESTIONS = ("What is it?", "And now", "Is it 5 mg/day?\n\nOr 10:", "Wieso, weshalb (und warum)")
ANSWERS = ("A cold.", "Yes", "12 mg of it, twice.\n\n- with food\n- not alone", "é: Ruhe und Wärme")
SYSTEM = {"role": "system", "content": "You are a doctor."}
GIVEN = "Fever of 39.5 °C\n  since Monday"
Messages = list[dict[str, str]]


def conversation(turns: int, system: bool, shots: int, given: bool) -> Messages:
    """`shots` solved examples, then `turns` turns; the last message is an answer."""
    messages = [SYSTEM] if system else []
    for turn in range(shots + turns):
        user = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
        answer = {"role": "assistant", "content": ANSWERS[turn % len(ANSWERS)]}
        messages += [user | ({"input": GIVEN} if given and turn == 0 else {}), answer]
    return messages


ALL = [conversation(*shape) for shape in product((1, 2, 3, 4), (False, True), (0, 1, 3), (False, True))]
QUICK = [conversation(4, True, 0, True), conversation(1, False, 0, False), conversation(2, False, 3, False)]


def frame(kind: str, name: str) -> tuple[Frame, Path]:
    """A template in a tokenizer's form; skipped where the tokenizer has no chat template."""
    folder = tokenizer(kind)
    if name == "chat" and not templates.chat_source(folder):
        pytest.skip(f"{kind} has no chat template")
    return framing.frame_in(templates.load(name, folder), folder), folder


def published(made: Frame, folder: Path, where: Path) -> Any:
    """What transformers makes of the merged folder's tokenizer and template."""
    from transformers import AutoTokenizer

    merged = shutil.copytree(folder, where / "merged")
    framing.publish(made, merged)
    return AutoTokenizer.from_pretrained(merged)


def rendered(public: Any, messages: Messages, ask: bool) -> list[int]:
    found = public.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=True)
    return found["input_ids"]


def supervised_texts(made: Frame, trained: Framed) -> Iterator[str]:
    for loud, run in groupby(zip(trained.supervised, trained.ids, strict=True), key=lambda pair: pair[0]):
        if loud:
            yield made.codec.backend.decode([token for _, token in run], skip_special_tokens=False).strip()


def wanted_texts(made: Frame, messages: Sequence[dict[str, str]]) -> list[str]:
    template = made.template
    own = template.eos == "turn" and not template.source
    end = made.end_mark + (made.codec.eos_token if own else "")
    answers = [made.lead + m["content"] + end for m in messages if m["role"] == "assistant"]
    return [*answers[:-1], answers[-1] + template.final]


def squeezed(text: str) -> str:
    return "".join(text.split())


def check(made: Frame, public: Any, messages: Messages) -> None:
    if made.template.source:  # a tokenizer's own template knows no `input`
        messages = [chat_template._merged(message) for message in messages]
    [trained] = made.train([messages])
    shown = rendered(public, messages, ask=False)
    assert trained.ids[: len(shown)] == shown
    assert trained.ids[len(shown) :] in ([], [made.codec.eos_id])
    assert [*map(squeezed, supervised_texts(made, trained))] == [*map(squeezed, wanted_texts(made, messages))]
    for place in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        [asked] = made.ask([messages[:place]])
        answer = asked.answer(messages[place]["content"])
        assert trained.ids[: len(asked.ids) + len(answer)] == asked.ids + answer
        assert all(trained.supervised[len(asked.ids) : len(asked.ids) + len(answer)])
        assert asked.ids == rendered(public, messages[:place], ask=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_asked_is_the_beginning_of_trained_and_of_what_the_merged_folder_says(tmp_path, kind, name):
    made, folder = frame(kind, name)
    public = published(made, folder, tmp_path)
    for messages in QUICK:
        check(made, public, messages)
