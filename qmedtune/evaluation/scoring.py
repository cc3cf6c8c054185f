"""What a model says about text: log-likelihoods of options and perplexity of packed rows (answers: generation.py).

A prompt is `Asked` (framing.py: the tokens of training), or plain text as it stands, behind one bos.

A batch of prompts, sorted by length, goes through the model once (forward.py); options and the tokens
of answers continue from its key/value cache. All options of an item share one row behind the prompt
under a tree mask, so a 20-way question costs one pass over its prompt, and one-token options cost nothing more.
Scores equal the naive one-by-one ones (tests: 1e-5 in fp32). Needs an attention that takes masks (sdpa or eager).
Deliberately absent: metrics (tasks/), loading (model.py), flash attention (its varlen path cannot take a tree mask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from qmedtune.data.packing.borders import document_borders
from qmedtune.data.packing.framing import Asked, codec_of, frame_of
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import Codec
from qmedtune.errors import DataError
from qmedtune.evaluation.forward import (
    Prefix,
    Shared,
    check_numbers,
    exact_logits,
    hidden_states,
    max_positions,
    prefill,
    read_shared,
)
from qmedtune.training.loss import label_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # padded tokens per forward pass: with an 8B LLaMA in bf16 about 1 GiB of key/value cache
LOGIT_ROWS = 1024  # rows of the vocabulary matrix at a time: 1024 x 128,256 x 4 bytes = 0.5 GB for LLaMA-3

Boundary = Literal["segment", "joint"]
Progress = Callable[[int], None]
"""Called with the number of items (or tokens) done since the last call."""


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One item as tokens. `truncated`: the beginning of the prompt was cut to fit the model's positions."""

    prompt: list[int]
    options: list[list[int]]
    truncated: bool

    @property
    def cost_tokens(self) -> int:
        """Tokens that a forward pass reads at most (the last token of an option is only predicted)."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Asked]) -> list[list[int]]:
    """Token ids: those that training begins with; of a text, as a document's, behind the mark that opens documents."""
    codec = codec_of(tokenizer)
    start = document_borders(codec).start
    plain = iter(codec.encode([prompt for prompt in prompts if isinstance(prompt, str)], markers=True))
    return [_opened(next(plain), start, codec) if isinstance(p, str) else list(p.ids) for p in prompts]


def _opened(row: list[int], start: int | None, codec: Codec) -> list[int]:
    """Behind `start`, but where the text spells a mark of its own there."""
    return row if start is None or (row and row[0] in codec.special_ids) else [start, *row]


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase, template: Template, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[Asked]:
    """What asks for the next answer of each conversation. Special tokens spelled in a message are defused."""
    return frame_of(template, codec_of(tokenizer)).ask(conversations)


def encode_choice(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Asked,
    options: Sequence[str],
    max_tokens: int,
    boundary: Boundary = "segment",
) -> Choice:
    """Split prompt + option into tokens. What is `Asked` has them from its template; of a text:

    segment: each by itself
    joint: as lm-evaluation-harness does: tokenised together, white space at the end of the prompt moved to the option.
    After a prompt that ends in ":\\n" (Alpaca) LLaMA-3's tokenizer then leaves the option behind ":" instead of the
    token ":\\n" that the model was trained after: right for few-shot prompts to a base, wrong for a tuned model.
    """
    if boundary == "segment":
        start = encode(tokenizer, [prompt])[0]
        tails = _tails(tokenizer, prompt, options)
    else:
        text = prompt if isinstance(prompt, str) else prompt.text
        start, *wholes = encode(tokenizer, [text.rstrip(), *(text + option for option in options)])
        tails = [whole[len(start) :] for whole in wholes]
    if not all(tails):
        option = options[[bool(tail) for tail in tails].index(False)]
        raise DataError(f"option {option!r} adds no token behind its prompt: it is empty or only white space")
    kept, truncated = fit(start, max_tokens - max(map(len, tails)), codec_of(tokenizer).special_ids)
    return Choice(kept, tails, truncated)


def _tails(tokenizer: PreTrainedTokenizerBase, prompt: str | Asked, options: Sequence[str]) -> list[list[int]]:
    if isinstance(prompt, str):
        return codec_of(tokenizer).encode(list(options), markers=True)
    return [prompt.answer(option) if option.strip() else [] for option in options]


def fit(prompt: list[int], room_tokens: int, marks: frozenset[int]) -> tuple[list[int], bool]:
    """Cut the beginning of a prompt that is too long, keeping the mark that opens it: (tokens, whether it was cut).

    marks: ids of special tokens
    """
    if len(prompt) <= room_tokens:
        return prompt, False
    head = prompt[:1] if prompt[0] in marks else []
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
    """sums: log p(option | prompt) in nats; per_character: the same over the option's characters (`acc_norm`)."""

    sums: list[float]
    per_character: list[float]
    truncated: bool


@torch.no_grad()
def choice_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Asked],
    options: Sequence[Sequence[str]],
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    boundary: Boundary = "segment",
) -> list[ChoiceScores]:
    """Log-likelihood of every option of every prompt, in the order given. `boundary`: see `encode_choice`."""
    assert not model.training
    room = max_positions(model)
    items = [encode_choice(tokenizer, p, o, room, boundary) for p, o in zip(prompts, options, strict=True)]
    sums: list[list[float]] = [[] for _ in items]
    shared = read_shared(model, [item.prompt for item in items]) if items else None
    for batch in padded_batches([item.cost_tokens for item in items], batch_tokens):
        for index, scores in zip(batch, _score(model, [items[i] for i in batch], shared), strict=True):
            sums[index] = scores
        if progress:
            progress(len(batch))
    found = []
    for each, texts, item in zip(sums, options, items, strict=True):
        per_character = [value / len(text) for value, text in zip(each, texts, strict=True)]
        found.append(ChoiceScores(each, per_character, item.truncated))
    return found


def _score(model: PreTrainedModel, batch: list[Choice], shared: Shared | None) -> list[list[float]]:
    prefix = prefill(model, [item.prompt for item in batch], shared)
    logits = exact_logits(model, prefix.last)
    check_numbers(logits[:, 0])
    first = logits.log_softmax(-1)
    sums = []
    for row, item in enumerate(batch):
        tokens = [option[0] for option in item.options]
        sums.append(first[row, torch.tensor(tokens, device=first.device)])
    trees = [option_tree(item.options) for item in batch]
    if any(tree.tokens for tree in trees):
        rest = _tree_logprobs(model, prefix, trees, max(map(len, sums)))
        sums = [s + r[: len(s)] for s, r in zip(sums, rest, strict=True)]
    return [s.tolist() for s in sums]


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
    nodes: dict[tuple[int, ...], int] = {}
    edges = []
    for index, option in enumerate(options):
        for size in range(1, len(option)):
            node = nodes.setdefault(tuple(option[:size]), len(nodes))
            edges.append((node, option[size], index))
    ancestors = []
    for path in nodes:
        ancestors.append([nodes[path[:size]] for size in range(1, len(path) + 1)])
    return OptionTree([path[-1] for path in nodes], [len(path) - 1 for path in nodes], ancestors, edges)


def _tree_logprobs(model: PreTrainedModel, prefix: Prefix, trees: list[OptionTree], num_options: int) -> torch.Tensor:
    """Summed log p of the second and later tokens of every option: float32 [B, num_options]."""
    device, width = prefix.mask.device, max(len(tree.tokens) for tree in trees)
    ids = torch.tensor([tree.tokens + [0] * (width - len(tree.tokens)) for tree in trees], device=device)
    depths = torch.tensor([tree.depths + [0] * (width - len(tree.depths)) for tree in trees], device=device)
    seen = torch.zeros(len(trees), width, width, dtype=torch.bool)
    for row, tree in enumerate(trees):
        for node, ancestors in enumerate(tree.ancestors):
            seen[row, node, ancestors] = True
    mask = torch.cat([prefix.mask[:, None, :].expand(-1, width, -1), seen.to(device)], dim=-1)[:, None]
    hidden = hidden_states(model, ids, mask, prefix.lengths[:, None] + depths, prefix.cache)
    edges = [(row, *edge) for row, tree in enumerate(trees) for edge in tree.edges]
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
    """perplexity = exp(nll / tokens); nll: summed negative log-likelihood in nats over the predicted tokens of text.

    marks, mark_nll: the same of the marks that close documents or answers, which are no text: how surprising an
    end mark is says more about the mark than about the text (borders.py)
    """

    perplexity: float
    nll: float
    tokens: int
    marks: int = 0
    mark_nll: float = 0.0


class Rows(Protocol):
    """Packed rows: PackedRows, or a list of the same dictionaries."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]: ...


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    rows: Rows,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    marks: frozenset[int] = frozenset(),
) -> Perplexity:
    """Token-weighted perplexity of packed rows ({"input_ids", "labels", "position_ids"} per row, labels unshifted).

    Documents in a row are isolated by their restarting positions; a label of -100 is not counted, and one of `marks`
    (ids of special tokens) is counted apart.
    """
    assert not model.training
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    special = torch.tensor(sorted(marks), dtype=torch.int64, device=model.device)
    lengths = [len(rows[i]["input_ids"]) for i in range(len(rows))]
    for batch in padded_batches(lengths, batch_tokens):
        padded = padded_rows([rows[i] for i in batch], model.device)
        found = label_nll(model, **padded)
        check_numbers(found)
        labels = padded["labels"][:, 1:]
        is_mark = torch.isin(labels[labels != -100], special)
        for kind, chosen in enumerate((~is_mark, is_mark)):
            sums[kind] += found[chosen].double().sum().cpu()
            counts[kind] += int(chosen.sum())
        if progress:
            progress(sum(lengths[i] for i in batch))
    (nll, mark_nll), (tokens, count) = sums.tolist(), counts.tolist()
    if not tokens:
        raise DataError("no token to predict in the held-out rows: hold out more text (`holdout`)")
    return Perplexity(float(np.exp(nll / tokens)), nll, tokens, count, mark_nll)


def padded_rows(rows: list[dict[str, np.ndarray]], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as right-padded int64 tensors [B, T]; padding (documents of one token) predicts nothing."""
    width = max(len(row["input_ids"]) for row in rows)

    def table(key: str, fill: int) -> torch.Tensor:
        padded = [np.pad(row[key], (0, width - len(row[key])), constant_values=fill) for row in rows]
        return torch.from_numpy(np.stack(padded)).to(device)

    return {
        "input_ids": table("input_ids", 0),
        "labels": table("labels", -100),
        "position_ids": table("position_ids", 0),
    }
