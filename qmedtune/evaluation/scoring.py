"""What a model says about text: log-likelihoods of options and perplexity of packed rows (answers: generation.py).

A prompt is a `Prompt` (framing.py: the tokens of training), or plain text as it stands, behind one bos.

A batch of prompts, sorted by length, goes through the model once (forward.py); options and the tokens
of answers continue from its key/value cache. All options of an item share one row behind the prompt
under a tree mask, so a 20-way question costs one pass over its prompt, and one-token options cost nothing more.
Scores equal the naive one-by-one ones (tests: 1e-5 in fp32). Needs an attention that takes masks (sdpa or eager).
Deliberately absent: metrics (tasks/), loading (model.py), flash attention (its varlen path cannot take a tree mask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from qmedtune.data.packing.borders import document_borders
from qmedtune.data.packing.framing import Prompt, codec_of, frame_of
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import Codec
from qmedtune.errors import DataError
from qmedtune.modeling.collation import Rows
from qmedtune.modeling.forward import (
    Prefix,
    Shared,
    check_numbers,
    exact_logits,
    hidden_states,
    max_positions,
    prefill,
    read_shared,
)
from qmedtune.modeling.loss import rows_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # padded tokens per forward pass: with an 8B LLaMA in bf16 about 1 GiB of key/value cache
LOGIT_ROWS = 1024  # rows of the vocabulary matrix at a time: 1024 x 128,256 x 4 bytes = 0.5 GB for LLaMA-3

Boundary = Literal["segment", "joint"]
Progress = Callable[[int], None]
"""Called with the number of items (or tokens) done since the last call."""


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedItem:
    """One item as tokens. `truncated`: the beginning of the prompt was cut to fit the model's positions."""

    prompt: list[int]
    options: list[list[int]]
    truncated: bool

    @property
    def cost_tokens(self) -> int:
        """Tokens that a forward pass reads at most (the last token of an option is only predicted)."""
        tokens = len(self.prompt)
        for option in self.options:
            tokens += len(option) - 1
        return tokens


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Prompt]) -> list[list[int]]:
    """Token ids: those that training begins with; of a text, as a document's, behind the mark that opens documents."""
    codec = codec_of(tokenizer)
    start = document_borders(codec).start
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    plain = iter(codec.encode(texts, markers=True))  # one call: a tokenizer reads a batch in parallel
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(_opened(next(plain), start, codec))
        else:
            encoded.append(list(prompt.ids))
    return encoded


def _opened(row: list[int], start: int | None, codec: Codec) -> list[int]:
    """Behind `start`, but where the text spells a mark of its own there."""
    if start is None or (row and row[0] in codec.special_ids):
        return row
    return [start, *row]


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase, template: Template, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[Prompt]:
    """What asks for the next answer of each conversation. Special tokens spelled in a message are defused."""
    return frame_of(template, codec_of(tokenizer)).ask(conversations)


def encode_choice(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Prompt,
    options: Sequence[str],
    max_tokens: int,
    *,
    boundary: Boundary = "segment",
) -> EncodedItem:
    """Split prompt + option into tokens. What is a `Prompt` has them from its template; of a text:

    segment: each by itself
    joint: as lm-evaluation-harness does: tokenised together, white space at the end of the prompt moved to the option.
    After a prompt that ends in ":\\n" (Alpaca) LLaMA-3's tokenizer then leaves the option behind ":" instead of the
    token ":\\n" that the model was trained after: right for few-shot prompts to a base, wrong for a tuned model.
    """
    if boundary == "segment":
        start = encode(tokenizer, [prompt])[0]
        tails = _tails(tokenizer, prompt, options)
    else:
        start, tails = _joint(tokenizer, prompt, options)
    longest = 0
    for option, tail in zip(options, tails, strict=True):
        if not tail:
            raise DataError(f"option {option!r} adds no token behind its prompt: it is empty or only white space")
        longest = max(longest, len(tail))
    kept, truncated = fit(start, max_tokens - longest, codec_of(tokenizer).special_ids)
    return EncodedItem(kept, tails, truncated)


def _tails(tokenizer: PreTrainedTokenizerBase, prompt: str | Prompt, options: Sequence[str]) -> list[list[int]]:
    if isinstance(prompt, str):
        return codec_of(tokenizer).encode(list(options), markers=True)
    tails = []
    for option in options:
        tail: list[int] = []
        if option.strip():
            tail = prompt.answer(option)
        tails.append(tail)
    return tails


def _joint(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Prompt, options: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """(tokens of the prompt without the white space at its end, those that each option adds)."""
    text = prompt
    if not isinstance(text, str):
        text = text.text
    texts = [text.rstrip()]
    for option in options:
        texts.append(text + option)
    start, *wholes = encode(tokenizer, texts)
    return start, [whole[len(start) :] for whole in wholes]


def fit(prompt: list[int], room_tokens: int, marks: frozenset[int]) -> tuple[list[int], bool]:
    """Cut the beginning of a prompt that is too long, keeping the mark that opens it: (tokens, whether it was cut).

    marks: ids of special tokens
    """
    if len(prompt) <= room_tokens:
        return prompt, False
    head = []
    if prompt[0] in marks:
        head = prompt[:1]
    if room_tokens <= len(head):
        raise DataError("an answer is as long as the model's positions: no room is left for its prompt")
    return head + prompt[len(prompt) - room_tokens + len(head) :], True


def padded_batches(costs: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar cost, dearest first: largest cost x count <= budget, at least one item each."""
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    while order:
        count = max(1, budget // max(1, costs[order[0]]))
        yield order[:count]
        order = order[count:]


# ---- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceScores:
    """Log-likelihoods of the options of one multiple-choice item.

    sums: log p(option | prompt) in nats; per_character: the same over the option's characters (`acc_norm`).
    """

    sums: list[float]
    per_character: list[float]
    truncated: bool


@torch.no_grad()
def choice_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt],
    options: Sequence[Sequence[str]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    boundary: Boundary = "segment",
) -> list[ChoiceScores]:
    """Log-likelihood of every option of every prompt, in the order given. `boundary`: see `encode_choice`."""
    assert not model.training
    room = max_positions(model)
    items, kept, costs = [], [], []
    for prompt, texts in zip(prompts, options, strict=True):
        item = encode_choice(tokenizer, prompt, texts, room, boundary=boundary)
        items.append(item)
        kept.append(item.prompt)
        costs.append(item.cost_tokens)
    shared = read_shared(model, kept)
    found: dict[int, ChoiceScores] = {}
    for batch in padded_batches(costs, batch_tokens):
        sums = _score(model, [items[index] for index in batch], shared)
        for index, values in zip(batch, sums, strict=True):
            found[index] = _choice_scores(values, options[index], truncated=items[index].truncated)
        if progress:
            progress(len(batch))
    return [found[index] for index in range(len(items))]


def _choice_scores(sums: list[float], options: Sequence[str], *, truncated: bool) -> ChoiceScores:
    per_character = []
    for value, option in zip(sums, options, strict=True):
        per_character.append(value / len(option))
    return ChoiceScores(sums, per_character, truncated)


def _score(model: PreTrainedModel, batch: list[EncodedItem], shared: Shared | None) -> list[list[float]]:
    """log p of every option of every item: first tokens from the prompts' pass, the others from one pass more."""
    prefix = prefill(model, [item.prompt for item in batch], shared)
    logits = exact_logits(model, prefix.last)
    check_numbers(logits[:, 0])
    first = logits.log_softmax(-1)
    sums, trees = [], []
    num_options, num_later = 0, 0
    for row, item in enumerate(batch):
        tokens = [option[0] for option in item.options]
        sums.append(first[row, torch.tensor(tokens, device=first.device)])
        tree = option_tree(item.options)
        trees.append(tree)
        num_options = max(num_options, len(item.options))
        num_later += len(tree.tokens)
    if num_later:
        rest = _tree_logprobs(model, prefix, trees, num_options)
        for row, item in enumerate(batch):
            sums[row] = sums[row] + rest[row, : len(item.options)]
    return [values.tolist() for values in sums]


@dataclass(frozen=True)
class OptionTree:
    """Options as a trie: node i reads tokens[i] at depths[i] behind the prompt and sees its ancestors and itself.

    edges: (node, token to predict, option) for the second and later tokens of every option.
    """

    tokens: list[int]
    depths: list[int]
    ancestors: list[list[int]]
    edges: list[tuple[int, int, int]]


def option_tree(options: Sequence[Sequence[int]]) -> OptionTree:
    """Share what options have in common ("It treats ..."): every distinct beginning is read once."""
    nodes: dict[tuple[int, ...], int] = {}  # beginning of an option -> node that reads its last token
    tree = OptionTree(tokens=[], depths=[], ancestors=[], edges=[])
    for index, option in enumerate(options):
        above: list[int] = []
        for size in range(1, len(option)):
            path = tuple(option[:size])
            if path not in nodes:
                nodes[path] = len(nodes)
                tree.tokens.append(path[-1])
                tree.depths.append(size - 1)
                tree.ancestors.append([*above, nodes[path]])
            above.append(nodes[path])
            tree.edges.append((nodes[path], option[size], index))
    return tree


def _tree_logprobs(model: PreTrainedModel, prefix: Prefix, trees: list[OptionTree], num_options: int) -> torch.Tensor:
    """Summed log p of the second and later tokens of every option: float32 [B, num_options]."""
    device, width = prefix.mask.device, max(len(tree.tokens) for tree in trees)
    # Filled on the CPU and moved once: a tensor made on a GPU element by element waits for it each time.
    ids = torch.zeros(len(trees), width, dtype=torch.int64)
    depths = torch.zeros_like(ids)
    seen = torch.zeros(len(trees), width, width, dtype=torch.bool)
    edges = []
    for row, tree in enumerate(trees):
        size = len(tree.tokens)
        ids[row, :size] = torch.tensor(tree.tokens, dtype=torch.int64)
        depths[row, :size] = torch.tensor(tree.depths, dtype=torch.int64)
        for node, ancestors in enumerate(tree.ancestors):
            seen[row, node, ancestors] = True
        for edge in tree.edges:
            edges.append((row, *edge))
    prompts = prefix.mask[:, None, :].expand(-1, width, -1)
    mask = torch.cat([prompts, seen.to(device)], dim=-1)[:, None]
    positions = prefix.lengths[:, None] + depths.to(device)
    hidden = hidden_states(model, ids.to(device), mask, positions, cache=prefix.cache)
    rows, nodes, targets, options = torch.tensor(edges, device=device).unbind(-1)
    logprobs = _token_logprobs(model, hidden[rows, nodes], targets)
    sums = torch.zeros(len(trees), num_options, device=device)
    return sums.index_put((rows, options), logprobs, accumulate=True)


def _token_logprobs(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) per row: hidden [N, H], targets [N] -> float32 [N], `LOGIT_ROWS` rows at a time."""
    parts = []
    for rows, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = exact_logits(model, rows)
        parts.append(logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(parts)


# ---- perplexity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    perplexity = exp(nll / tokens); nll: summed negative log-likelihood in nats over the predicted tokens of text.

    marks, mark_nll: the same of the marks that close documents or answers, which are no text: how surprising an
    end mark is says more about the mark than about the text (borders.py)
    """

    perplexity: float
    nll: float
    tokens: int
    marks: int = 0
    mark_nll: float = 0.0


def perplexity(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    marks: frozenset[int] = frozenset(),
) -> Perplexity:
    """Token-weighted perplexity of packed rows ({"input_ids", "labels", "position_ids"} per row, labels unshifted).

    Documents in a row are isolated by their restarting positions; a label of -100 is not counted, and one of `marks`
    (ids of special tokens) is counted apart. DataError where nothing is to be predicted.
    """
    assert not model.training
    nll, mark_nll = 0.0, 0.0
    tokens, num_marks = 0, 0
    special = torch.tensor(sorted(marks), dtype=torch.int64, device=model.device)
    lengths = []
    for index in range(len(rows)):
        lengths.append(len(rows[index]["input_ids"]))
    for found in rows_nll(model, rows, padded_batches(lengths, batch_tokens)):
        check_numbers(found.nll)
        is_mark = torch.isin(found.labels, special)
        values = found.nll.double()  # fp32 sums of 10^6 tokens would be off in the fourth digit
        mark_nll += values[is_mark].sum().item()
        nll += values[~is_mark].sum().item()
        num_marks += int(is_mark.sum())
        tokens += int((~is_mark).sum())
        if progress:
            progress(sum(lengths[index] for index in found.rows))
    if not tokens:
        raise DataError("no token to predict in the held-out rows: hold out more text (`holdout`)")
    return Perplexity(float(np.exp(nll / tokens)), nll, tokens, num_marks, mark_nll)
