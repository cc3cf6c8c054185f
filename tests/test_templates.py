"""Templates: what is supervised, the same prompt everywhere, and tokenizers' own chat templates."""

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from toy_tokenizers import byte_level, save

from qmedtune.data.packing import templates
from qmedtune.errors import DataError, RecipeError

TURNS = [
    {"role": "user", "content": "What {is} it?"},
    {"role": "assistant", "content": "A cold."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Rest."},
]
SYSTEM = {"role": "system", "content": "You are a doctor."}
LLAMA3 = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def test_alpaca_is_the_published_text():
    (prompt, quiet), (answer, loud) = templates.load("alpaca").render(TURNS[:2])
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat {is} it?\n\n### Response:\n"
    )
    assert (quiet, answer, loud) == (False, "A cold.", True)


def test_alpaca_with_input_has_its_own_form():
    ((prompt, _), _) = templates.load("alpaca").render([{**TURNS[0], "input": "Fever."}, TURNS[1]])
    assert "paired with an input" in prompt
    assert prompt.endswith("### Instruction:\nWhat {is} it?\n\n### Input:\nFever.\n\n### Response:\n")


def test_medalpaca_prints_the_input_heading_even_without_input():
    assert "### Input:\n\n" in templates.load("medalpaca").prompt(TURNS[:1])


@pytest.mark.parametrize("name", templates.TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_one_text_in_training_generation_and_jinja(name, system):
    template = templates.load(name)
    messages = ([SYSTEM] if system else []) + TURNS
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template.jinja())
    eos = "</s>" if template.eos == "turn" else ""
    trained = "".join(text + (eos if supervised else "") for text, supervised in template.render(messages))
    prompt = template.prompt(messages[:-1], "</s>")
    assert trained.startswith(prompt)
    shown = jinja.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    asked = jinja.render(messages=messages[:-1], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert (shown, asked) == ("<s>" + trained, "<s>" + prompt)
    supervised = [text for text, loud in template.render(messages) if loud]
    assert supervised == ["A cold." + template.end, "Rest." + template.end]


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_saved_templates_come_back(tmp_path, name):
    templates.save(templates.load(name), tmp_path)
    assert templates.load(tmp_path) == templates.load(tmp_path / "template.json") == templates.load(name)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'chatml'"):
        templates.load("chatlm")


def test_a_damaged_template_file_is_named(tmp_path):
    (tmp_path / "template.json").write_text('{"name": "x", "answr": "y"}')
    with pytest.raises(DataError, match=r"template.json: not a template"):
        templates.load(tmp_path)


def test_a_tokenizers_own_template_marks_responses(tmp_path):
    folder = save(byte_level(), tmp_path, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3)
    template = templates.load("chat", folder)
    segments = template.render([SYSTEM, *TURNS])
    assert [text for text, loud in segments if loud] == ["A cold.<|eot_id|>", "Rest.<|eot_id|>"]
    assert not segments[0][0].startswith("<|begin_of_text|>")  # pack.py adds its id
    assert "".join(text for text, _ in segments) == (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a doctor.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat {is} it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cold.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRest.<|eot_id|>"
    )


def test_chat_template_file_beside_the_tokenizer_wins(tmp_path):
    folder = save(byte_level(), tmp_path)
    assert templates.default(None, folder).name == "plain"
    (folder / "chat_template.jinja").write_text(LLAMA3)
    assert templates.default(None, folder).source == LLAMA3


def test_a_template_that_rewrites_history_is_refused(tmp_path):
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = save(byte_level(), tmp_path, chat_template=source)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        templates.load("chat", folder).render(TURNS)


def test_a_template_cannot_reach_python(tmp_path):
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    folder = save(byte_level(), tmp_path, chat_template=source)
    with pytest.raises(RecipeError, match="SecurityError"):
        templates.load("chat", folder).prompt(TURNS[:1])


def test_template_json_is_readable(tmp_path):
    templates.save(templates.load("alpaca"), tmp_path)
    assert json.loads((tmp_path / "template.json").read_text())["answer"] == "### Response:\n"
