"""One template object for training, evaluation and chat: how messages become text, and which text is the answer.

Half of the field's irreproducible scores come from a prompt that differs between training and use, so the object is
saved with the adapter (template.json) and nothing else in the project writes prompts. A template splits a
conversation into (text, supervised) segments; each segment is tokenised by itself, so that the tokens a model sees
when it has to answer are exactly those it was trained after. Adding special tokens to a vocabulary is not done here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qmedtune.errors import DataError, RecipeError

Message = dict[str, str]
Segments = list[tuple[str, bool]]
FILE = "template.json"
MARK = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Template:
    """Text around the parts of a conversation. `{content}` and `{input}` stand for a message's parts.

    opening:    text before the first user message when there is no system message
    opening_input, user_input: used instead when the (first) user message carries an Alpaca `input`
    answer:     text between a user message and the response
    end:        closes a response; supervised with it
    between:    text after a response's end and before the next user message
    eos:        the end-of-sequence token follows every response ("turn") or the conversation only ("document")
    source:     a tokenizer's own Jinja template; then `bos` and `eos_token` are its tokens and the rest is unused
    """

    name: str
    system: str = "{content}\n\n"
    opening: str = ""
    opening_input: str = ""
    user: str = "{content}"
    user_input: str = "{content}\n\n{input}"
    answer: str = "\n"
    end: str = ""
    between: str = "\n\n"
    eos: Literal["turn", "document"] = "turn"
    stop: tuple[str, ...] = ()
    source: str = ""
    bos: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Message]) -> Segments:
        """(text, supervised) in order; supervised segments are responses with their end marker.

        Segments alternate, starting unsupervised. The end-of-sequence token is no text: pack.py adds it.
        """
        if self.source:
            return _render_source(self, messages)
        segments: Segments = []
        pending = ""
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                segments += [(pending + self.answer, False), (message["content"] + self.end, True)]
                pending = self.between
            else:
                pending += self._before_answer(message, first=position == 0)
        return segments

    def prompt(self, messages: Sequence[Message], eos_token: str = "") -> str:
        """The text to continue when the next response is wanted. `eos_token` closes earlier responses."""
        if self.source:
            return _call_source(self, messages, add_generation_prompt=True)
        eos = eos_token if self.eos == "turn" else ""
        text = ""
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                text += self.answer + message["content"] + self.end + eos + self.between
            else:
                text += self._before_answer(message, first=position == 0)
        return text + self.answer

    def _before_answer(self, message: Message, first: bool) -> str:
        given = message.get("input", "")
        if message["role"] == "system":
            return self.system.format(content=message["content"])
        opening = (self.opening_input if given else self.opening) if first else ""
        form = self.user_input if given else self.user
        return opening + form.format(content=message["content"], input=given)

    def jinja(self) -> str:
        """The same template as a Jinja chat template, for the merged model's tokenizer."""
        if self.source:
            return self.source
        eos = " + eos_token" if self.eos == "turn" else ""
        closing = json.dumps(self.end)
        return (
            "{{ bos_token }}"
            "{%- for message in messages %}"
            "{%- if message['role'] == 'assistant' %}"
            f"{{{{- {json.dumps(self.answer)} + message['content'] + {closing}{eos} }}}}"
            f"{{%- if not loop.last or add_generation_prompt %}}{{{{- {json.dumps(self.between)} }}}}{{%- endif %}}"
            "{%- elif message['role'] == 'system' %}"
            f"{{{{- {_jinja_form(self.system)} }}}}"
            "{%- else %}"
            f"{{%- if loop.first %}}{{{{- {json.dumps(self.opening)} }}}}{{%- endif %}}"
            f"{{{{- {_jinja_form(self.user)} }}}}"
            "{%- endif %}{%- endfor %}"
            f"{{%- if add_generation_prompt %}}{{{{- {json.dumps(self.answer)} }}}}{{%- endif %}}"
        )


def _jinja_form(form: str) -> str:
    before, _, after = form.partition("{content}")
    return f"{json.dumps(before)} + message['content'] + {json.dumps(after)}"


ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_OPENING_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
INSTRUCTION = "### Instruction:\n{content}\n\n"
INPUT = "### Input:\n{input}\n\n"

# ChatML puts the role names of Meditron's supervised stage, system/question/answer, into the same frame.
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
        Template("chatml", system="<|im_start|>system\n{content}<|im_end|>\n",
                 user="<|im_start|>user\n{content}<|im_end|>\n",
                 user_input="<|im_start|>user\n{content}\n\n{input}<|im_end|>\n",
                 answer="<|im_start|>assistant\n", end="<|im_end|>", between="\n", eos="document",
                 stop=("<|im_end|>", "<|im_start|>")),
        Template("meditron", system="<|im_start|>system\n{content}<|im_end|>\n",
                 user="<|im_start|>question\n{content}<|im_end|>\n",
                 user_input="<|im_start|>question\n{content}\n\n{input}<|im_end|>\n",
                 answer="<|im_start|>answer\n", end="<|im_end|>\n", between="", eos="document",
                 stop=("<|im_end|>", "<|im_start|>")),
        Template("human_assistant", user="Human: {content}\n", user_input="Human: {content}\n\n{input}\n",
                 answer="Assistant: ", between="\n", stop=("\nHuman:",)),
        # Me-LLaMA's wrap of one prompt; the blank line between turns is ours.
        Template("me_llama", user="Human: \n{content}\n\n", user_input="Human: \n{content}\n\n{input}\n\n",
                 answer="Assistant: \n", between="\n\n", stop=("\nHuman:",)),
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
    path = Path(name) / FILE if Path(name).is_dir() else Path(name)
    if path.is_file() and path.suffix == ".json":
        return _read(path)
    close = get_close_matches(str(name), [*TEMPLATES, "chat"], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(
        f"template: {str(name)!r} is unknown\n{hint}allowed: {', '.join(TEMPLATES)}, chat, or a template.json"
    )


def default(name: str | None, tokenizer_dir: Path) -> Template:
    """The template of a source that may name none: then the tokenizer's own chat template, else `alpaca`."""
    if name is None:
        name = "chat" if chat_source(tokenizer_dir) else "alpaca"
    return load(name, tokenizer_dir)


def save(template: Template, folder: Path) -> None:
    """Write template.json."""
    (folder / FILE).write_text(json.dumps(asdict(template), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> Template:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Template(**{**fields, "stop": tuple(fields.get("stop", ()))})
    except (ValueError, TypeError) as error:
        allowed = ", ".join(Template.__dataclass_fields__)
        raise DataError(f"{path}: not a template ({type(error).__name__})\nallowed keys: {allowed}") from error


def chat_source(tokenizer_dir: Path) -> str | None:
    """The Jinja source of a tokenizer's chat template, None where it has none."""
    own = tokenizer_dir / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config = tokenizer_dir / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _of_tokenizer(tokenizer_dir: Path | None) -> Template:
    source = chat_source(tokenizer_dir) if tokenizer_dir else None
    if tokenizer_dir is None or source is None:
        raise RecipeError(
            f"template: chat: the tokenizer in {tokenizer_dir} has no chat template of its own\n"
            f"allowed: {', '.join(TEMPLATES)}"
        )
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    return Template("chat", source=source, bos=special(config, "bos_token"), eos_token=special(config, "eos_token"))


def special(config: dict[str, Any], key: str) -> str:
    """A special token's text out of tokenizer_config.json, where it is a string, an object or null."""
    value = config.get(key)
    return value["content"] if isinstance(value, dict) else value or ""


def _merge_input(message: Message) -> Message:
    given = message.get("input")
    content = f"{message['content']}\n\n{given}" if given else message["content"]
    return {"role": message["role"], "content": content}


def check(template: Template, vocabulary: Container[str]) -> None:
    """RecipeError where a tokenizer's own template speaks in marks that this model's tokenizer does not have.

    Marks of qmedtune's templates may be plain text (a model is trained on them); those of a `source` are tokens.
    """
    if not template.source:
        return
    text = _call_source(template, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    marks = [mark for mark in (template.bos, template.eos_token, *MARK.findall(text)) if mark]
    if missing := [mark for mark in marks if mark not in vocabulary]:
        raise RecipeError(
            f"template: {template.name} does not fit this model: its tokenizer has no token {missing[0]!r}\n"
            f"name the template that the model was trained with: {', '.join(TEMPLATES)}, chat, or a template.json"
        )


def _call_source(template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The tokenizer's own template, without the leading bos text (pack.py adds the bos id)."""
    text = _compiled(template.source)(
        messages=[_merge_input(m) for m in messages],
        bos_token=template.bos, eos_token=template.eos_token, add_generation_prompt=add_generation_prompt,
    )  # fmt: skip
    return text.removeprefix(template.bos) if template.bos else text


def _render_source(template: Template, messages: Sequence[Message]) -> Segments:
    """Segments by difference: what each assistant message adds after the generation prompt is supervised."""
    segments: Segments = []
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _call_source(template, messages[:position], add_generation_prompt=True)
        after = _call_source(template, messages[: position + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "template: chat: this tokenizer's template rewrites earlier turns: responses cannot be told apart\n"
                f"use a template of qmedtune: {', '.join(TEMPLATES)}"
            )
        response = after[len(before) :]
        kept = response.rstrip()
        segments += [(before[len(done) :], False), (kept, True)]
        done = before + kept
    return segments


@lru_cache(maxsize=8)
def _compiled(source: str) -> Callable[..., str]:
    from datetime import datetime

    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise DataError(f"template: chat: the tokenizer's template refuses this conversation\n{message[:200]}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime(2024, 7, 26).strftime(form),
    }
    return environment.from_string(source).render
