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

from qmedtune.data.packing.framing import Prompt, codec_of
from qmedtune.evaluation.scoring import BATCH_TOKENS, Progress, encode, fit, padded_batches
from qmedtune.modeling.forward import (
    Shared,
    hidden_states,
    max_positions,
    next_logits,
    prefill,
    read_shared,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ended = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Continuation:
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
        longest = max((len(stop) for stop in self.stop), default=0)
        reach = 4 * longest + 8
        text = self._decode(tokens[-reach:])
        if self._stopped(text, begins=len(tokens) <= reach) is None:
            return None
        return "stop"

    def text(self, tokens: list[int]) -> str:
        text = self._decode([token for token in tokens if token not in self.eos])
        text = text[: self._stopped(text, begins=True)].strip()
        return text.removeprefix(self.lead.strip()).lstrip()

    def _stopped(self, text: str, begins: bool) -> int | None:
        """Where the first stop string is. A blank line before an answer's first word ends nothing."""
        first = len(text) - len(text.lstrip()) if begins else 0
        places = []
        for stop in self.stop:
            place = text.find(stop, 0 if stop.strip() else first)
            if place >= 0:
                places.append(place)
        return min(places, default=None)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def ending(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Prompt], stop: Sequence[str]
) -> Ending:
    """End tokens of the tokenizer, of the model (LLaMA-3 lists several) and of the template; stop strings likewise."""
    eos: set[int] = set()
    for named in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        for token in named if isinstance(named, list) else [named]:
            if isinstance(token, int):
                eos.add(token)
    for prompt in prompts:
        if isinstance(prompt, Prompt):  # all of them are of one template
            both = dict.fromkeys([*stop, *prompt.stop])
            return Ending(tokenizer, frozenset(eos | prompt.ends), tuple(both), prompt.lead)
    return Ending(tokenizer, frozenset(eos), tuple(stop))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[Continuation]:
    """Greedy answers in the order given. What is a `Prompt` brings its own ends; all of it is of one template."""
    end = ending(model, tokenizer, prompts, stop)
    room = max_positions(model) - max_new_tokens
    marks = codec_of(tokenizer).special_ids
    rows, cut, costs = [], [], []
    for ids in encode(tokenizer, prompts):
        row, truncated = fit(ids, room, marks)
        rows.append(row)
        cut.append(truncated)
        costs.append(len(row) + max_new_tokens)
    answers: dict[int, Continuation] = {}
    shared = read_shared(model, rows)
    for batch in padded_batches(costs, batch_tokens):
        for position, tokens, ended in _decode(
            model, [rows[index] for index in batch], max_new_tokens, end, shared=shared
        ):
            if ended:
                index = batch[position]
                answers[index] = Continuation(end.text(tokens), len(tokens), ended, cut[index])
        if progress:
            progress(len(batch))
    return [answers[index] for index in range(len(rows))]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Prompt,
    max_new_tokens: int,
    *,
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
    held = 0  # characters that may be the beginning of a stop string
    for string in stop:
        for size in range(held + 1, len(string)):
            if text.endswith(string[:size]):
                held = size
    return text[: len(text) - held].rstrip()


def _decode(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, end: Ending, *, shared: Shared | None = None
) -> Iterator[tuple[int, list[int], Ended | None]]:
    """Yield (row, its tokens so far, why it ended or None) for every new token; ended rows leave the batch."""
    assert not model.training
    with torch.no_grad():
        prefix = prefill(model, prompts, shared)
    logits = next_logits(model, prefix.last)
    mask, positions, cache = prefix.mask, prefix.lengths, prefix.cache
    live = list(range(len(prompts)))
    rows: list[list[int]] = [[] for _ in prompts]
    for step in range(1, max_new_tokens + 1):
        new, keep = logits.argmax(-1), []
        for place, token in enumerate(new.tolist()):
            tokens = rows[live[place]]
            tokens.append(token)
            ended = end.reason(tokens)
            if not ended and step == max_new_tokens:
                ended = "length"
            if not ended:
                keep.append(place)
            yield live[place], tokens, ended
        if not keep:
            return
        with torch.no_grad():
            if len(keep) < len(live):
                live, kept = [live[place] for place in keep], torch.tensor(keep, device=new.device)
                cache.batch_select_indices(kept)
                new, mask, positions = new[kept], mask[kept], positions[kept]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
            logits = next_logits(
                model, hidden_states(model, new[:, None], mask, positions[:, None], cache=cache)[:, -1]
            )
            positions = positions + 1
