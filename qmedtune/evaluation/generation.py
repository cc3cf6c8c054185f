"""Greedy answers: batched for evaluation and prediction, streamed for chat, from one decoding loop.

Prompts of similar length share a batch; an answer that ends (end token, stop string, length) leaves the batch at once.
transformers' `generate` is not used: it cannot drop ended rows, and its per-token overhead is most of the time of a
tiny model on a CPU. Deliberately absent: sampling and beam search (an evaluation must repeat to the token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from qmedtune.data.packing.framing import Asked, codec_of
from qmedtune.evaluation.forward import (
    Shared,
    hidden_states,
    max_positions,
    next_logits,
    prefill,
    read_shared,
)
from qmedtune.evaluation.scoring import BATCH_TOKENS, Progress, encode, fit, padded_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ended = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Answer:
    """A greedy continuation without its end token or stop string. `truncated`: its prompt was cut."""

    text: str
    tokens: int
    ended: Ended
    truncated: bool


@dataclass(frozen=True)
class Ending:
    """Where an answer ends: at an end token, or where one of the strings `stop` appears in its text.

    lead: what opens an answer of this template and is none of its words
    """

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    stop: tuple[str, ...]
    lead: str = ""

    def reason(self, tokens: list[int]) -> Ended | None:
        if tokens[-1] in self.eos:
            return "eos"
        # the last token can only have completed a stop string within this many tokens (a character has <= 4 bytes)
        reach = 4 * max(map(len, self.stop), default=0) + 8
        text = self._decode(tokens[-reach:])
        return None if self._stopped(text, begins=len(tokens) <= reach) is None else "stop"

    def text(self, tokens: list[int]) -> str:
        text = self._decode([token for token in tokens if token not in self.eos])
        text = text[: self._stopped(text, begins=True)].strip()
        return text.removeprefix(self.lead.strip()).lstrip()

    def _stopped(self, text: str, begins: bool) -> int | None:
        """Where the first stop string is. A blank line before an answer's first word ends nothing."""
        first = len(text) - len(text.lstrip()) if begins else 0
        places = [text.find(stop, 0 if stop.strip() else first) for stop in self.stop]
        return min((place for place in places if place >= 0), default=None)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def ending(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Asked], stop: Sequence[str]
) -> Ending:
    """End tokens of the tokenizer, of the model (LLaMA-3 lists several) and of the template; stop strings likewise."""
    named = [tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
    eos = {token for name in named for token in (name if isinstance(name, list) else [name])}
    asked = next((prompt for prompt in prompts if isinstance(prompt, Asked)), None)
    if asked is not None:
        eos, stop = eos | asked.ends, list(dict.fromkeys([*stop, *asked.stop]))
    ids = frozenset(token for token in eos if isinstance(token, int))
    return Ending(tokenizer, ids, tuple(stop), asked.lead if asked else "")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Asked],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[Answer]:
    """Greedy answers in the order given. What is `Asked` brings its own ends; all of it is of one template."""
    end = ending(model, tokenizer, prompts, stop)
    room = max_positions(model) - max_new_tokens
    marks = codec_of(tokenizer).special_ids
    rows = [fit(row, room, marks) for row in encode(tokenizer, prompts)]
    answers: dict[int, Answer] = {}
    shared = read_shared(model, [row for row, _ in rows]) if rows else None
    for batch in padded_batches([len(row) + max_new_tokens for row, _ in rows], batch_tokens):
        for position, tokens, ended in _decode(model, [rows[i][0] for i in batch], max_new_tokens, end, shared):
            if ended:
                i = batch[position]
                answers[i] = Answer(end.text(tokens), len(tokens), ended, rows[i][1])
        if progress:
            progress(len(batch))
    return [answers[i] for i in range(len(rows))]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Asked,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """One greedy answer as it grows: pieces whose concatenation is `generate`'s text.

    Held back: white space and what may still become a stop string or a character of several tokens.
    """
    end = ending(model, tokenizer, [prompt], stop)
    room, marks = max_positions(model) - max_new_tokens, codec_of(tokenizer).special_ids
    row, _ = fit(encode(tokenizer, [prompt])[0], room, marks)
    shown = ""
    for _, tokens, ended in _decode(model, [row], max_new_tokens, end):
        text = end.text(tokens)
        if not ended:
            text = settled(text, end.stop)
        if text.startswith(shown):
            yield text[len(shown) :]
            shown = text


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that later tokens cannot change."""
    text = text.rstrip("\ufffd")
    held = (size for s in stop for size in range(len(s) - 1, 0, -1) if text.endswith(s[:size]))
    return text[: len(text) - max(held, default=0)].rstrip()


def _decode(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, end: Ending, shared: Shared | None = None
) -> Iterator[tuple[int, list[int], Ended | None]]:
    """Yield (row, its tokens so far, why it ended or None) for every new token; ended rows leave the batch."""
    assert not model.training
    with torch.no_grad():
        prefix = prefill(model, prompts, shared)
    logits = next_logits(model, prefix.last)
    mask, positions, cache = prefix.mask, prefix.lengths, prefix.cache
    live, rows = list(range(len(prompts))), [list[int]() for _ in prompts]
    for step in range(1, max_new_tokens + 1):
        new, keep = logits.argmax(-1), []
        for place, token in enumerate(new.tolist()):
            tokens = rows[live[place]]
            tokens.append(token)
            ended = end.reason(tokens) or ("length" if step == max_new_tokens else None)
            keep += [] if ended else [place]
            yield live[place], tokens, ended
        if not keep:
            return
        with torch.no_grad():
            if len(keep) < len(live):
                live, kept = [live[place] for place in keep], torch.tensor(keep, device=new.device)
                cache.batch_select_indices(kept)
                new, mask, positions = new[kept], mask[kept], positions[kept]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
            logits = next_logits(model, hidden_states(model, new[:, None], mask, positions[:, None], cache)[:, -1])
            positions = positions + 1
