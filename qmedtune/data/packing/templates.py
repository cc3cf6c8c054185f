"""Templates: how messages become text, and which text is the answer. What becomes of the text is in framing.py.

Half of the field's irreproducible scores come from a prompt that differs between training and use, so the object is
saved with the adapter (template.json) and nothing else in the project writes prompts. What a run's cleaning did to a
turn is part of it. `framing.fit` makes the form of a template for one tokenizer, which is still text alone and also
writes the Jinja template of a merged folder. Adding special tokens to a vocabulary is not done here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from qmedtune.data.hygiene.clean import clean
from qmedtune.data.packing import chat_template
from qmedtune.data.packing.chat_template import ChatSource, Message, Segments
from qmedtune.errors import DataError, RecipeError
from qmedtune.model_files import read_json
from qmedtune.model_settings import read_settings

FILE = "template.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
VERSION = 2  # of template.json; 1 (qmedtune 0.1) tokenised every segment by itself
MARK = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Template:
    """Text around the parts of a conversation. `{content}` and `{input}` stand for a message's parts.

    opening:    text before the first user message when there is no system message
    opening_input, user_input: used instead when the (first) user message carries an Alpaca `input`
    answer:     text between a user message and the response; all of it is asked
    lead:       text that opens every response and belongs to it, because its tokens may reach into the answer
    end:        closes a response; supervised with it
    between:    text after a response's end and before the next user message
    eos:        the end-of-sequence token follows every response ("turn") or the conversation only ("document")
    stop:       strings that end a generated answer
    apart:      what the original encodes by itself: nothing ("joint": the conversation is one text), every "answer",
                every "message"; "segment" is version 1, kept so that what was trained with it is asked with it
    cleaning:   kind of text that every turn is cleaned as (clean.py), as the run's data were; "" where they were not
    source:     a tokenizer's own Jinja template; then `tokens` are its special tokens and the rest is unused
    bos, final: in the form for one tokenizer (framing.fit), what opens a conversation and what closes it; bos None:
                the tokenizer's own
    """

    name: str
    system: str = "{content}\n\n"
    opening: str = ""
    opening_input: str = ""
    user: str = "{content}"
    user_input: str = "{content}\n\n{input}"
    answer: str = "\n"
    lead: str = ""
    end: str = ""
    between: str = "\n\n"
    eos: Literal["turn", "document", "never"] = "turn"
    stop: tuple[str, ...] = ()
    apart: Literal["joint", "answer", "message", "segment"] = "joint"
    cleaning: str = ""
    source: str = ""
    tokens: tuple[tuple[str, str], ...] = ()
    bos: str | None = None
    final: str = ""
    version: int = VERSION

    @property
    def chat(self) -> ChatSource:
        """The tokenizer's own template behind a template with a `source`."""
        return ChatSource(self.source, self.tokens)

    def cleaned(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the run's cleaning left those of its data. White space around a turn is never part of it."""
        found: list[Message] = []
        for message in messages:
            found.append(self._cleaned_message(message))
        return found

    def _cleaned_message(self, message: Message) -> Message:
        found = {}
        for key, value in message.items():
            found[key] = self._clean(key, value)
        return found

    def _clean(self, key: str, value: str) -> str:
        if key not in ("content", "input"):
            return value
        if self.cleaning:
            return clean(value, self.cleaning)
        return value.strip()

    def render(self, messages: Sequence[Message]) -> Segments:
        """(text, supervised) in order; supervised segments are responses with their end marker.

        Begins and ends with what is asked where the last message is no response. End-of-sequence tokens are no text
        of these templates: framing.py adds them. A `source` prints its own, but for the bos that opens it.
        """
        if not self.source:
            return self._segments(messages)
        [segments] = chat_template.split(self.chat, [messages])
        bos = dict(self.tokens).get("bos_token", "")
        if segments:
            return [(segments[0][0].removeprefix(bos), False), *segments[1:]]
        return []

    def _segments(self, messages: Sequence[Message]) -> Segments:
        segments: Segments = []
        pending = ""
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                answer = self.lead + message["content"] + self.end
                segments += [(pending + self.answer, False), (answer, True)]
                pending = self.between
            else:
                pending += self._before_answer(message, first=position == 0)
        asks = not messages or messages[-1]["role"] != "assistant"
        if asks:
            return [*segments, (pending + self.answer, False)]
        return segments

    def prompt(self, messages: Sequence[Message], eos_token: str = "") -> str:
        """The text to continue when the next response is wanted. `eos_token` closes earlier responses."""
        if self.eos == "turn" and not self.source:
            eos = eos_token
        else:
            eos = ""
        return "".join(text + eos * supervised for text, supervised in self.render(messages))

    def _before_answer(self, message: Message, first: bool) -> str:
        given = message.get("input", "")
        if message["role"] == "system":
            return self.system.format(content=message["content"])
        opening, form = self.opening, self.user
        if given:
            opening, form = self.opening_input, self.user_input
        if not first:
            opening = ""
        return opening + form.format(content=message["content"], input=given)

    def jinja(self) -> str:
        """The same template as a Jinja chat template, for the merged model's tokenizer."""
        if self.source:
            return chat_template.frozen(self.source)
        if self.eos == "turn":
            eos = " + eos_token"
        else:
            eos = ""
        if self.bos is None:
            bos = "{{ bos_token }}"
        else:
            bos = f"{{{{- {json.dumps(self.bos)} }}}}"
        return (
            bos + "{%- for message in messages %}"
            "{%- set given = message['input'] if message['input'] is defined and message['input'] else '' %}"
            "{%- if message['role'] == 'assistant' %}"
            f"{{{{- {json.dumps(self.answer + self.lead)} + message['content'] | trim }}}}"
            f"{{{{- {json.dumps(self.end)}{eos} }}}}"
            f"{{%- if not loop.last or add_generation_prompt %}}{{{{- {json.dumps(self.between)} }}}}"
            f"{{%- elif {json.dumps(self.final)} %}}{{{{- {json.dumps(self.final)} }}}}{{%- endif %}}"
            "{%- elif message['role'] == 'system' %}"
            f"{{{{- {_jinja_form(self.system)} }}}}"
            "{%- elif given %}"
            f"{{%- if loop.first %}}{{{{- {json.dumps(self.opening_input)} }}}}{{%- endif %}}"
            f"{{{{- {_jinja_form(self.user_input)} }}}}"
            "{%- else %}"
            f"{{%- if loop.first %}}{{{{- {json.dumps(self.opening)} }}}}{{%- endif %}}"
            f"{{{{- {_jinja_form(self.user)} }}}}"
            "{%- endif %}{%- endfor %}"
            f"{{%- if add_generation_prompt %}}{{{{- {json.dumps(self.answer)} }}}}{{%- endif %}}"
        )


def _jinja_form(form: str) -> str:
    """A form as a Jinja expression: literals joined with the message's parts."""
    parts = {"{content}": "message['content'] | trim", "{input}": "given | trim"}
    pieces = re.split(r"({content}|{input})", form)
    return " + ".join(f"({parts[piece]})" if piece in parts else json.dumps(piece) for piece in pieces if piece)


ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_OPENING_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
INSTRUCTION = "### Instruction:\n{content}\n\n"
INPUT = "### Input:\n{input}\n\n"

# Text that ends a heading is asked or, where its last characters may join the answer's first in one token, part of the
# answer (`framing.fit`): "Assistant: " asks with "Assistant:" and learns " Yes".
TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", opening=ALPACA_OPENING, opening_input=ALPACA_OPENING_INPUT, user=INSTRUCTION,
                 user_input=INSTRUCTION + INPUT, answer="### Response:\n", stop=("### Instruction:",)),
        # As Stanford's own script has it, and ChatDoctor, AlpaCare and PMC-LLaMA after it: no line ends the heading.
        Template("stanford_alpaca", opening=ALPACA_OPENING, opening_input=ALPACA_OPENING_INPUT, user=INSTRUCTION,
                 user_input=INSTRUCTION + INPUT, answer="### Response:", stop=("### Instruction:",)),
        # MedAlpaca prints the input heading also where the input is empty.
        Template("medalpaca", opening=ALPACA_OPENING_INPUT, opening_input=ALPACA_OPENING_INPUT,
                 user=INSTRUCTION + "### Input:\n\n\n", user_input=INSTRUCTION + INPUT, answer="### Response:\n",
                 stop=("### Instruction:",)),
        # Nothing but the task's text: the form of models that know none (`for_base`).
        Template("plain", answer="\n\n"),
        Template("chatml", system="<|im_start|>system\n{content}<|im_end|>\n",
                 user="<|im_start|>user\n{content}<|im_end|>\n",
                 user_input="<|im_start|>user\n{content}\n\n{input}<|im_end|>\n",
                 answer="<|im_start|>assistant\n", end="<|im_end|>", between="\n", eos="document",
                 stop=("<|im_end|>", "<|im_start|>")),
        # ChatML with the role names of Meditron's supervised stage. Its Megatron-LLM encodes message by message.
        Template("meditron", system="<|im_start|>system\n{content}<|im_end|>\n",
                 user="<|im_start|>question\n{content}<|im_end|>\n",
                 user_input="<|im_start|>question\n{content}\n\n{input}<|im_end|>\n",
                 answer="<|im_start|>answer\n", end="<|im_end|>\n", between="", eos="document", apart="message",
                 stop=("<|im_end|>", "<|im_start|>")),
        Template("human_assistant", user="Human: {content}\n", user_input="Human: {content}\n\n{input}\n",
                 answer="Assistant: ", between="\n", stop=("\nHuman:",)),
        # Me-LLaMA's wrap of one prompt. The trainer of its lab (BELLE's) encodes prompt and answer apart, and puts
        # nothing between turns but the end token.
        Template("me_llama", user="Human: \n{content}\n\n", user_input="Human: \n{content}\n\n{input}\n\n",
                 answer="Assistant: \n", between="", apart="answer", stop=("\nHuman:", "Human: \n")),
        Template("patient_doctor", user="Patient: {content}\n", user_input="{content}\n\nPatient: {input}\n",
                 answer="ChatDoctor: ", between="\n", stop=("\nPatient:",)),
        Template("question_answer", user="Question: {content}\n", user_input="{input}\nQuestion: {content}\n",
                 answer="Answer: ", between="\n\n", stop=("\nQuestion:",)),
    )
}  # fmt: skip


def load(name: str | Path, tokenizer_dir: Path | None = None) -> Template:
    """A template by its name, from a template.json or from a folder that holds one; `chat` is the tokenizer's own.

    Raises RecipeError for a name that does not exist.
    """
    if name == "chat":
        return _of_tokenizer(tokenizer_dir)
    if name in TEMPLATES:
        return TEMPLATES[str(name)]
    if Path(name).is_dir():
        path = Path(name) / FILE
    else:
        path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return _read(path)
    close = get_close_matches(str(name), [*TEMPLATES, "chat"], n=1)
    if close:
        hint = f"did you mean {close[0]!r}? "
    else:
        hint = ""
    raise RecipeError(
        f"template: {str(name)!r} is unknown\n{hint}allowed: {', '.join(TEMPLATES)}, chat, or a template.json"
    )


def default(name: str | None, tokenizer_dir: Path) -> Template:
    """The template of a source that may name none: then the tokenizer's own chat template, else `plain`."""
    if name is None:
        if chat_source(tokenizer_dir):
            name = "chat"
        else:
            name = "plain"
    return load(name, tokenizer_dir)


def for_base(template: Template) -> Template:
    """As it asks a model that was trained on no template: in `plain`, examples are parted by a blank line alone, which
    then ends an answer too (such a model never learnt where one ends); an end token between them would end the text."""
    if template.name == "plain":
        return replace(template, eos="never", stop=("\n\n",))
    return template


def save(template: Template, folder: Path) -> None:
    """Write template.json."""
    (folder / FILE).write_text(json.dumps(asdict(template), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> Template:
    """A saved template. Those of qmedtune 0.1 tell no version; they tokenised every segment by itself."""
    allowed = ", ".join(Template.__dataclass_fields__)
    fields = read_json(path)
    if "version" in fields:
        fields = fields
    else:
        fields = _of_version_1(fields)
    if unknown := sorted(fields.keys() - Template.__dataclass_fields__.keys()):
        raise DataError(f"{path}: not a template (unknown key {unknown[0][:80]!r})\nallowed keys: {allowed}")
    if fields["version"] not in (1, VERSION):
        raise DataError(
            f"{path}: version {str(fields['version'])[:20]!r}; this qmedtune reads 1 and {VERSION}\n"
            "update qmedtune, or name the template that the model was trained with (--template)"
        )
    try:
        found = TypeAdapter(Template).validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "name"
        raise DataError(f"{path}: not a template (`{where}`: {first['msg']})\nallowed keys: {allowed}") from None
    _check_forms(path, found)
    return found


def _of_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in fields.items():
        if key not in ("bos", "eos_token"):
            kept[key] = value
    tokens = [["bos_token", fields.get("bos", "")], ["eos_token", fields.get("eos_token", "")]]
    return kept | {"apart": "segment", "tokens": tokens if fields.get("source") else [], "version": 1}


def _check_forms(path: Path, template: Template) -> None:
    """DataError where a saved template could not be split into turns: a form that leaves out what is said."""
    wanted = {
        "system": ["{content}"],
        "user": ["{content}"],
        "user_input": ["{content}", "{input}"],
        "opening": [],
        "opening_input": [],
    }
    for key, parts in wanted.items():
        form = getattr(template, key)
        found = re.findall(r"{[^}]*}", form)
        if sorted(found) != parts or form.count("{") != len(parts) or form.count("}") != len(parts):
            raise DataError(
                f"{path}: `{key}` must be text with {' and '.join(parts) or 'no {...}'}, each once\n"
                "mend it, or name a template of qmedtune"
            )


def chat_source(tokenizer_dir: Path) -> str | None:
    """The Jinja source of a tokenizer's chat template, None where it has none."""
    own = tokenizer_dir / "chat_template.jinja"
    if own.is_file():
        return _text(own)
    path = tokenizer_dir / "tokenizer_config.json"
    if path.is_file():
        found = read_settings(path).get("chat_template")
    else:
        found = None
    if isinstance(found, list):
        named = []
        for entry in found:
            if isinstance(entry, dict) and entry.get("name") == "default":
                named.append(entry)
        if named:
            found = named[0].get("template")
        else:
            found = None
    if found is not None and not isinstance(found, str):
        raise RecipeError(f"{path}: chat_template is no text\nmend it, or name a template of qmedtune")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8\nname a template of qmedtune, or mend the file") from error


def _of_tokenizer(tokenizer_dir: Path | None) -> Template:
    if tokenizer_dir:
        source = chat_source(tokenizer_dir)
    else:
        source = None
    if tokenizer_dir is None or source is None:
        raise RecipeError(
            f"template: chat: the tokenizer in {tokenizer_dir} has no chat template of its own\n"
            f"allowed: {', '.join(TEMPLATES)}"
        )
    file = tokenizer_dir / "tokenizer_config.json"
    if file.is_file():
        config = read_settings(file)
    else:
        config = {}
    named = {}
    for key in SPECIAL:
        named[key] = special(config, key)
    return Template("chat", source=source, tokens=tuple((key, token) for key, token in named.items() if token))


def special(config: dict[str, Any], key: str) -> str:
    """A special token's text out of tokenizer_config.json, where it is a string, an object or null."""
    value = config.get(key)
    if isinstance(value, dict):
        return value["content"]
    return value or ""


def check(template: Template, vocabulary: Container[str]) -> None:
    """RecipeError where a tokenizer's own template speaks in marks that this model's tokenizer does not have, does
    not end, or cannot be split into turns.

    Marks of qmedtune's templates may be plain text (a model is trained on them); those of a `source` are tokens.
    """
    if not template.source:
        return
    found = chat_template.form(template.chat)
    own = dict(template.tokens)
    ends = []
    for key in ("bos_token", "eos_token"):
        if key in own:
            ends.append(own[key])
    if missing := [mark for mark in (*ends, *MARK.findall(found.prompt + found.end)) if mark not in vocabulary]:
        raise RecipeError(
            f"template: {template.name} does not fit this model: its tokenizer has no token {missing[0]!r}\n"
            f"name the template that the model was trained with: {', '.join(TEMPLATES)}, chat, or a template.json"
        )
