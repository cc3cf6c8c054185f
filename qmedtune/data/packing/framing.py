"""The one way from a conversation to tokens: training, evaluation, examples, prediction, chat and the merged folder.

A conversation becomes one text, which is cut where answers begin. Each piece is encoded behind the text before it, so
the tokens are those of the whole text encoded at once, as the originals and transformers' `apply_chat_template` do it.
What is asked ends at such a cut: it is the beginning of what was trained by construction, whatever the answer is.

Two rules keep tokens from crossing a cut. A template's form for one tokenizer (`fit`) leaves to the answer what may
join its first letters: of "Assistant: " the space, because LLaMA's tokenizers join it to the next word. What joins all
the same (an answer that opens with a rare sign) is encoded apart there. At an answer's end there is no cut: a token
that holds its last character is supervised.

A template that encodes apart (`Template.apart`) writes the space that SentencePiece puts before each text by itself.
Special tokens that a user spells are broken up, so that they never become tokens.
Deliberately absent: documents without turns (tokens.py), padding, truncation of prompts (evaluation/scoring.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from qmedtune.data.packing import chat_template, templates
from qmedtune.data.packing.borders import document_borders
from qmedtune.data.packing.chat_template import Message, Segments
from qmedtune.data.packing.crossing import held_characters
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import Codec, load_codec
from qmedtune.errors import DataError, RecipeError

VERSION = 2  # raise when the same conversation would become other tokens
CONTEXT = 64  # characters before a cut that its piece is encoded behind; the longest token of LLaMA-3's has 128
ANCHORS = ("\n", "a\n", ":", "a")  # texts that a piece can follow without joining them
TAILS = ("x", "x.", "x?", "x:", "x)", "x9")  # how a user's text may end

Conversation = Sequence[Message]
_IN_MEMORY: WeakKeyDictionary[Any, Codec] = WeakKeyDictionary()


@dataclass(frozen=True)
class Framed:
    """A conversation as it is trained: ids with their marks, and 1 for every id of an answer or its end mark."""

    ids: list[int]
    supervised: list[int]


@dataclass(frozen=True)
class Prompt:
    """A conversation as it is asked: the beginning of what is trained, up to the next answer, as ids and as text."""

    ids: list[int]
    text: str = field(repr=False)
    frame: Frame = field(repr=False, compare=False)

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a generated answer."""
        return self.frame.ends

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a generated answer."""
        return self.frame.template.stop

    @property
    def lead(self) -> str:
        """What opens a generated answer and is none of its words."""
        return self.frame.lead

    def answer(self, text: str) -> list[int]:
        """The ids that training puts behind `ids` for this answer, without its end."""
        return self.frame.answer_ids(self.text[-CONTEXT:], text)


@dataclass(frozen=True)
class Frame:
    """A template in its form for one tokenizer, and that tokenizer. Make it with `frame_of`."""

    template: Template
    codec: Codec

    def train(self, conversations: Sequence[Conversation]) -> list[Framed]:
        """Every conversation as it is trained, with its end-of-sequence mark. Each ends with an answer."""
        texts = []
        for segments in self._segments(conversations):
            texts.append(self._text(segments, closed=True))
        return self._framed(texts)

    def ask(self, conversations: Sequence[Conversation]) -> list[Prompt]:
        """Every conversation as it is asked, up to its next answer. Each ends with a question."""
        texts = []
        for segments in self._segments(conversations):
            texts.append(self._text(segments, closed=False))
        framed = self._framed(texts)
        found: list[Prompt] = []
        for own, text in zip(framed, texts, strict=True):
            found.append(Prompt(own.ids, text.text, self))
        return found

    def asked_text(self, text: str) -> Prompt:
        """What asks with a text that `ask` made before: for tools that hand on text alone."""
        return Prompt(self.codec.encode_spans([text])[0][0], text, self)

    @cached_property
    def lead(self) -> str:
        """What opens an answer's text behind what is asked."""
        if self.template.source:
            return chat_template.form(self.template.chat).lead
        return self.template.lead

    @cached_property
    def end_mark(self) -> str:
        """What closes an answer's text, before any end-of-sequence token."""
        if self.template.source:
            return chat_template.form(self.template.chat).end
        return self.template.end

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer: the tokens of the template's end mark, eos, and the end of a document."""
        marks = []
        for token in self.codec.special_tokens:
            if token in self.end_mark:
                marks.append(token)
        named = set()
        for token in marks:
            named.add(self.codec.vocabulary[token])
        return frozenset({*named, self.codec.eos_id, document_borders(self.codec).end})

    def answer_ids(self, context: str, text: str) -> list[int]:
        """Ids of an answer behind the last characters of its prompt, up to its end mark."""
        [message] = self.template.cleaned([{"role": "assistant", "content": self.codec.defuse(text)}])
        answer = self.lead + message["content"]
        if self.template.apart == "segment":
            return self.codec.encode([answer], markers=True)[0]
        [framed] = self._encoded([_Piece(context, answer + self._closing(), len(answer))])
        return framed.ids[: sum(framed.supervised)]

    # ---- text

    def _segments(self, conversations: Sequence[Conversation]) -> list[Segments]:
        safe = []
        for messages in conversations:
            safe.append(self._safe(messages))
        if self.template.source:
            return chat_template.split(self.template.chat, safe)
        found: list[Segments] = []
        for messages in safe:
            found.append(self.template._segments(messages))
        return found

    def _safe(self, messages: Conversation) -> list[Message]:
        found: list[Message] = []
        for message in self.template.cleaned(messages):
            found.append(self._defused(message))
        return found

    def _defused(self, message: Message) -> Message:
        found = {}
        for key, value in message.items():
            found[key] = value if key == "role" else self.codec.defuse(value)
        return found

    def _closing(self) -> str:
        """What follows an answer's words at once."""
        return self.end_mark + (self._turn_eos or self.template.final)

    @property
    def _turn_eos(self) -> str:
        """The end-of-sequence token, where a template of qmedtune ends every answer with it."""
        own = self.template.eos == "turn" and not self.template.source
        if own:
            return self.codec.eos_token
        return ""

    def _text(self, segments: Segments, closed: bool) -> _Text:
        """The segments as one text with the marks that a template of qmedtune leaves to the tokenizer."""
        parts, spans, at = [], [], 0
        for text, supervised in [(self.template.bos or "", False), *segments]:
            if supervised:
                text += self._turn_eos
                spans.append((at, at + len(text)))
            parts.append(text)
            at += len(text)
        if closed and self.template.final:
            if self.template.source:  # white space after an answer without an end mark would stand before its end
                parts = ["".join(parts)[: spans[-1][1]]]
            parts.append(self.template.final)
            spans[-1] = (spans[-1][0], spans[-1][1] + len(self.template.final))
        return _Text("".join(parts), spans)

    # ---- tokens

    def _framed(self, texts: list[_Text]) -> list[Framed]:
        if self.template.apart == "segment":
            result: list[Framed] = []
            for text in texts:
                result.append(_by_segment(self.codec, text))
            return result
        pieces = []
        for text in texts:
            pieces.append(text.pieces())
        encoded = iter(self._encoded(list(chain.from_iterable(pieces))))
        found: list[Framed] = []
        for some in pieces:
            found.append(_joined(list(islice(encoded, len(some)))))
        return found

    def _encoded(self, pieces: list[_Piece]) -> list[Framed]:
        """Each piece behind its context, in one call of the tokenizer; what joins its context by itself."""
        found = self.codec.encode_spans([piece.context + piece.text for piece in pieces])
        result: list[Framed] = []
        for piece, both in zip(pieces, found, strict=True):
            result.append(self._cut(piece, *both))
        return result

    def _cut(self, piece: _Piece, ids: list[int], starts: list[int]) -> Framed:
        """The ids behind those of the context, which must be what they are alone: else an anchor is in its place."""
        before, known = piece.context, _ids(self.codec, piece.context)
        for anchor in (*ANCHORS, ""):
            if ids[: len(known)] == known:
                break
            before, known = anchor, _ids(self.codec, anchor)
            [(ids, starts)] = self.codec.encode_spans([before + piece.text])
        if piece.loud:
            until = len(before) + piece.loud
        else:
            until = 0
        return Framed(ids[len(known) :], [int(start < until) for start in starts[len(known) :]])


@dataclass(frozen=True)
class _Piece:
    """Text from one cut to the next, what stands before it, and how many of its characters are supervised."""

    context: str
    text: str
    loud: int


@dataclass(frozen=True)
class _Text:
    """A whole conversation as text, and where its answers with their end marks stand in it."""

    text: str
    spans: list[tuple[int, int]]

    def pieces(self) -> list[_Piece]:
        starts = [0, *(start for start, _ in self.spans if start)]
        ends = dict(self.spans)
        found: list[_Piece] = []
        for a, b in zip(starts, [*starts[1:], len(self.text)], strict=True):
            found.append(_Piece(self.text[max(0, a - CONTEXT) : a], self.text[a:b], ends.get(a, a) - a))
        return found


def _joined(parts: list[Framed]) -> Framed:
    ids = chain.from_iterable(part.ids for part in parts)
    supervised = chain.from_iterable(part.supervised for part in parts)
    return Framed(list(ids), list(supervised))


def _by_segment(codec: Codec, text: _Text) -> Framed:
    """As qmedtune 0.1 encoded: every segment by itself, and its end-of-sequence mark as an id."""
    edges = sorted({0, len(text.text), *chain.from_iterable(text.spans)})
    loud = set()
    for start, _ in text.spans:
        loud.add(start)
    parts = zip(edges, edges[1:], strict=False)
    encoded = []
    for start, end in parts:
        encoded.append((start in loud, codec.encode([text.text[start:end]], markers=True)[0]))
    return _joined([Framed(ids, [int(supervised)] * len(ids)) for supervised, ids in encoded])


@lru_cache(maxsize=256)
def _ids(codec: Codec, context: str) -> list[int]:
    if context:
        return codec.encode_spans([context])[0][0]
    return []


# ---- a template's form for one tokenizer -----------------------------------------------------------------------------


@lru_cache(maxsize=32)
def frame_of(template: Template, codec: Codec) -> Frame:
    """The frame of a template for a tokenizer. RecipeError where the two do not fit."""
    check(template, codec)
    return Frame(fit(template, codec), codec)


def frame_in(template: Template, tokenizer_dir: Path) -> Frame:
    """The frame of a template for the tokenizer of a model folder. The error names the folder whose template it is."""
    codec = load_codec(tokenizer_dir)
    try:
        return frame_of(template, codec)
    except (DataError, RecipeError) as error:
        if not template.source:
            raise
        raise type(error)(f"{tokenizer_dir}: {error}") from error


def codec_of(tokenizer: Any) -> Codec:
    """The codec of a loaded transformers tokenizer: that of the folder it came from, as training reads it.

    transformers rebuilds LLaMA-2's tokenizer in another form than its file has (a text that begins with a space, and
    one behind a special token, then differ by a token), so its own is taken only where there is no file.
    """
    folder = Path(str(tokenizer.name_or_path))
    if tokenizer.name_or_path and (folder / "tokenizer.json").is_file():
        return load_codec(folder)
    if tokenizer not in _IN_MEMORY:
        made = Codec(tokenizer.backend_tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token)
        _IN_MEMORY[tokenizer] = made
    return _IN_MEMORY[tokenizer]


def check(template: Template, codec: Codec) -> None:
    """Refuse before anything is trained or asked: a template that speaks in tokens that the tokenizer does not have,
    does not end or cannot be split into turns, and a tokenizer that pads with its bos. Cheap; RecipeError.
    """
    check_padding(codec)
    templates.check(template, codec.vocabulary)


def check_padding(codec: Codec) -> None:
    """RecipeError where a tokenizer's bos is also its pad."""
    if codec.bos_id is not None and codec.pad_id == codec.bos_id:
        token = codec.backend.id_to_token(codec.bos_id)
        raise RecipeError(
            f"tokenizer_config.json: pad_token is the bos token {token!r}: whoever pads hides where a text begins\n"
            "name another token as pad_token there (the eos token will do: losses never look at padding)"
        )


def fit(template: Template, codec: Codec) -> Template:
    """The template with all that hangs on the tokenizer written into its texts; still a template, and plain text."""
    if codec.bos_id is not None:
        bos = codec.backend.id_to_token(codec.bos_id)
    else:
        bos = ""
    if template.source:
        end = chat_template.form(template.chat).end
        if _is_mark(codec, end):
            final = ""
        else:
            final = codec.eos_token
        return replace(template, final=final)
    if template.apart == "segment":
        return replace(template, bos=bos)
    return _held(_spaced(_closed(template, codec), codec), codec)


def _is_mark(codec: Codec, end: str) -> bool:
    """Whether an answer's end is, or ends with, a token of its own."""
    return any(end.endswith(token) for token in codec.special_tokens)


def _closed(template: Template, codec: Codec) -> Template:
    """With bos, but not before a text that opens with it, and with eos, but not after an end mark that is eos."""
    borders = document_borders(codec)
    if borders.start is not None:
        bos = codec.backend.id_to_token(borders.start)
    else:
        bos = ""
    if codec.bos_id is not None:
        own = codec.backend.id_to_token(codec.bos_id)
    else:
        own = ""
    if own:
        opens = all(form.startswith(own) for form in (template.system, template.opening + template.user))
    else:
        opens = False
    if opens:
        bos = ""
    if template.end.strip() == codec.eos_token:
        return replace(template, bos=bos, eos="never")
    if template.eos == "document":
        return replace(template, bos=bos, eos="never", final=codec.eos_token)
    return replace(template, bos=bos)


def _spaced(template: Template, codec: Codec) -> Template:
    """With the space that SentencePiece puts before a text, where the original encodes texts apart."""
    if template.apart == "joint" or not _puts_a_space(codec):
        return template
    if template.apart == "answer":
        return replace(template, lead=" ")
    if any(template.answer.startswith(token) for token in codec.special_tokens):
        return template  # a mark of its own parts the messages
    spaced = {"system": template.system + " ", "answer": " " + template.answer, "between": template.between + " "}
    return replace(template, **spaced)


def _puts_a_space(codec: Codec) -> bool:
    alone, before, spaced = codec.encode(["B", "\n", "\n B"], markers=True)
    return spaced == before + alone and codec.encode(["\nB"], markers=True)[0] != spaced


def _held(template: Template, codec: Codec) -> Template:
    """With the end of what is asked left to the answer where it may join it."""
    users = []
    for tail in TAILS:
        users.append(template.user.format(content=tail))
    held = held_characters(codec, [user + template.answer for user in users], template.lead)
    kept = len(template.answer) - held
    if held == 0 or kept < 0:
        return template
    return replace(template, answer=template.answer[:kept], lead=template.answer[kept:] + template.lead)


# ---- the merged folder -----------------------------------------------------------------------------------------------


GENERATION = "generation_config.json"


def publish(frame: Frame, folder: Path) -> None:
    """Write into a model folder what others need to ask as it was trained: the Jinja template in the tokenizer's form,
    as its only one, and the marks that end an answer, beside those that the base names."""
    (folder / "chat_template.jinja").write_text(frame.template.jinja(), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = _json(path)
    if config.pop("chat_template", None) is not None:
        _write_json(path, config)
    known = _json(folder / GENERATION)
    named = known.get("eos_token_id", [])
    ends = {*(named if isinstance(named, list) else [named]), *frame.ends} - {None}
    if frame.codec.bos_id is None:
        bos = {}
    else:
        bos = {"bos_token_id": frame.codec.bos_id}
    _write_json(folder / GENERATION, bos | known | {"eos_token_id": sorted(ends)})


def _json(path: Path) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_template(out: Path, template: Path) -> None:
    """The template of training becomes the tokenizer's only chat template, and stays readable as template.json."""
    trained = templates.load(template)
    templates.save(trained, out)
    if (out / "tokenizer.json").is_file():
        publish(frame_in(trained, out), out)
