"""A tokenizer's own chat template: split as it is, of whatever kind, and bounded in time, memory and size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import save
from tokenizers import AddedToken
from toy_tokenizers import byte_level

from qmedtune.data.packing import chat_template, framing, templates
from qmedtune.data.packing.chat_template import ChatSource, frozen, split
from qmedtune.data.packing.framing import Frame
from qmedtune.errors import DataError, RecipeError

ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content"
MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
NO_BOS = ROLES + " + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
NO_PROMPT = ROLES + " + '<|end|>\n' }}{% endfor %}"
END_ONCE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% elif messages[-1].role == 'assistant' %}"
    "{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if not loop.last and m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|' + m.role + '|>\n' + text + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}\n" + NO_BOS
PADDED = "{{ pad_token }}{{ unk_token }}" + NO_BOS
GENERATION = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
KINDS = {"no_bos": NO_BOS, "no_prompt": NO_PROMPT, "end_once": END_ONCE, "strips": STRIPS, "dated": DATED,
         "padded": PADDED, "generation": GENERATION}  # fmt: skip
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "<think>Hm.</think>A cold."},
    {"role": "user", "content": "And now"},
    {"role": "assistant", "content": "Rest."},
]


def folder_of(tmp_path: Path, source: str) -> Path:
    made = byte_level()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return save(made, tmp_path / "model", **named, chat_template=source)


def framed(tmp_path: Path, source: str) -> tuple[Frame, Any]:
    """The template, and what transformers makes of the folder that a merge leaves."""
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path, source)
    frame = framing.frame_in(templates.load("chat", folder), folder)
    framing.publish(frame, folder)
    return frame, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_asked_with_what_it_was_trained_on(tmp_path, kind):
    frame, public = framed(tmp_path, KINDS[kind])
    [trained] = frame.train([CHAT])
    text = public.apply_chat_template(CHAT, tokenize=False)
    assert trained.ids == public(text, add_special_tokens=False)["input_ids"]
    for place in (1, 3):
        [asked] = frame.ask([CHAT[:place]])
        if kind != "strips" or place == 3:  # a stripped answer is not what was asked for
            assert trained.ids[: len(asked.ids)] == asked.ids
        if kind != "no_prompt":  # a prompt that the template does not write itself
            assert asked.ids == public.apply_chat_template(CHAT[:place], add_generation_prompt=True)["input_ids"]


def supervised(frame: Frame) -> list[str]:
    [trained] = frame.train([CHAT])
    runs, previous = [], 0
    for token, loud in zip(trained.ids, trained.supervised, strict=True):
        if loud:
            runs.append([token]) if not previous else runs[-1].append(token)
        previous = loud
    return [frame.codec.backend.decode(run, skip_special_tokens=False).strip() for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_their_ends_alone_are_supervised(tmp_path, kind):
    frame, _ = framed(tmp_path, KINDS[kind])
    first, last = "<think>Hm.</think>A cold.<|end|>", "Rest.<|end|>"
    wanted = {"strips": [last], "end_once": ["<think>Hm.</think>A cold.", "Rest.\n</s>"]}.get(kind, [first, last])
    assert supervised(frame) == wanted


def test_an_answer_without_an_end_mark_is_given_eos(tmp_path):
    frame, _ = framed(tmp_path, NO_END)
    assert supervised(frame) == ["<think>Hm.</think>A cold.", "Rest.</s>"]
    assert frame.ends == {frame.codec.eos_id}


def test_an_end_mark_that_is_not_eos_ends_answers_and_stands_in_generation_config(tmp_path):
    frame, _ = framed(tmp_path, NO_BOS)
    mark = frame.codec.backend.token_to_id("<|end|>")
    assert frame.ends == {mark, frame.codec.eos_id}
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == sorted(frame.ends)


def test_the_date_stands_still_in_training_and_in_the_merged_folder(tmp_path):
    frame, public = framed(tmp_path, DATED)
    [asked] = frame.ask([CHAT[:1]])
    assert asked.text.startswith("26 Jul 2024 2024\n")
    assert public.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == asked.text
    assert frozen(NO_BOS) == NO_BOS


BOMBS = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 99999999999 }}",
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "a wide field": "{{ 'a'.center(9999999999) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a list": "{{ range(99999) | list * 99999 }}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_that_never_ends_or_explodes_is_an_error_in_time(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    folder = folder_of(tmp_path, BOMBS[kind])
    begun = time.monotonic()
    with pytest.raises(RecipeError, match="does not end|fails: "):
        framing.frame_in(templates.load("chat", folder), folder)
    assert time.monotonic() - begun < 30


def test_a_template_that_explodes_only_on_some_text_ends_there_and_the_next_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    trap = "{% if 'boom' in messages[0].content %}" + BOMBS["a loop"] + "{% endif %}"
    frame, _ = framed(tmp_path, trap + NO_BOS)
    with pytest.raises(RecipeError, match="does not end"):
        frame.ask([[{"role": "user", "content": "boom"}]])
    monkeypatch.setattr(chat_template, "SECONDS", 30)  # a busy machine starts a process in seconds
    assert frame.ask([[{"role": "user", "content": "fine"}]])[0].text.endswith("<|assistant|>\n")


def test_a_refusal_is_quoted_only_in_the_templates_own_words():
    own = ChatSource("{{ raise_exception('roles must alternate') }}")
    leaking = ChatSource("{{ raise_exception('no: ' + messages[0].content) }}")
    with pytest.raises(DataError, match="roles must alternate"):
        split(own, [CHAT])
    with pytest.raises(DataError) as error:
        split(leaking, [[{"role": "user", "content": "Mrs Doe"}]])
    assert "Doe" not in str(error.value)


UNUSABLE = {
    "no answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "another form": NO_BOS.replace("'<|assistant|>\n' }}{% endif", "'<|assistant|>\n<think>' }}{% endif"),
    "no syntax": "{% for m in messages %}",
    "too long": "{# " + "x" * (1 << 20) + " #}" + NO_BOS,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_template_that_cannot_be_split_into_turns_is_refused_with_the_way_on(tmp_path, kind):
    folder = folder_of(tmp_path, UNUSABLE[kind])
    with pytest.raises((RecipeError, DataError), match=r"name a template of qmedtune"):
        framing.frame_in(templates.load("chat", folder), folder)


def test_a_template_that_is_not_used_any_more_leaves_no_process():
    one = chat_template.Renderer(ChatSource(NO_BOS))
    assert one.render([([{"role": "user", "content": "fine"}], False)])
    process = one.process
    assert process is not None and process.poll() is None
    del one
    assert process.poll() is not None
