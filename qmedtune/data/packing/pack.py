"""Packing: token shards and the whole training order of a stage, with a ledger that adds up exactly.

A row is a list of pieces of documents; attention never crosses a piece because its position ids restart at 0 (what
transformers isolates by, given no attention mask), and a piece's first token is never a label because the shifted
loss would predict it from its neighbour. Padding and batching are the trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from qmedtune import store, ui
from qmedtune.batches import batch_rows
from qmedtune.data.packing import borders, framing, mix, templates
from qmedtune.data.packing.conversations import encode_conversations
from qmedtune.data.packing.fertility import fertility
from qmedtune.data.packing.ledger import Corpus, Draws, packing_facts
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import (
    FULL_WEIGHT,
    KEPT,
    LENGTH,
    Codec,
    Encoder,
    encode_texts,
    load_codec,
    shard_array,
    shard_mask,
    write_shards,
)  # fmt: skip
from qmedtune.errors import DataError
from qmedtune.recipe import ClassifySection, SftSection, SourceSection
from qmedtune.resolved import ResolvedCpt, ResolvedPretrain, ResolvedRecipe, ResolvedTraining
from qmedtune.results import HeldOut, Packing, Part

IGNORED = -100
CLEANING = "instructions"  # the kind of text that per_record.py cleans conversations as
META = "packed.json"


@dataclass(frozen=True)
class StageToPack:
    """Stage `index` (from 0) of a recipe, the folder of the base's tokenizer, and each source's folder by its name."""

    recipe: ResolvedRecipe
    index: int
    tokenizer_dir: Path
    inputs: Mapping[str, Path]


@dataclass(frozen=True)
class Tokenising:
    """How the sources of a stage become tokens."""

    recipe: ResolvedRecipe
    section: ResolvedTraining
    tokenizer_dir: Path
    codec: Codec


def pack_stage(stage: StageToPack, out: Path) -> Packing:
    """Tokenise the sources of a stage and lay out its rows below `out`. Returns the ledger.

    An SFT stage's template goes to `out/template.json`, for generation to use the very one of training.
    Identities, in tokens, per source and in sum:
    read = kept + dropped, kept = seen + never_sampled, trained = sum over documents of kept x times drawn, and
    with `chunking: overlap` the tokens that chunks share once more (`overlapped`).
    """
    recipe, index, tokenizer_dir, inputs = stage.recipe, stage.index, stage.tokenizer_dir, stage.inputs
    section = recipe.stages[index].section
    codec = load_codec(tokenizer_dir)
    how = Tokenising(recipe, section, tokenizer_dir, codec)
    corpora = []
    for name in recipe.stages[index].sources:
        corpora.append(tokenise(how, name, inputs[name] / "train.jsonl", out))
    template = None
    if isinstance(section, SftSection):
        _check_truncation(section, corpora)
        template = stage_template(recipe, index, tokenizer_dir)
        templates.save(template, out)
    rng = np.random.default_rng([recipe.seed, index])
    if isinstance(section, SftSection | ClassifySection):
        plan = epochs(section.epochs, corpora, rng)
    else:
        plan = _mixture(section, corpora, rng)
    packed = write_rows(section, plan, rng, out)
    folders = {name: inputs[name] for name in packed.mixture}
    quiet = [name for name in folders if recipe.data[name].may_identify]
    mixture: dict[str, Part] = {}
    for name, found in fertility(codec, folders, quiet).items():
        mixture[name] = packed.mixture[name].model_copy(update={"fertility": found})
    packed = packed.model_copy(update={"mixture": mixture})
    if template is not None:
        return packed.model_copy(update={"template": template.name})
    return packed.model_copy(update={"borders": borders.described(codec)})


def stage_template(recipe: ResolvedRecipe, index: int, tokenizer_dir: Path) -> Template:
    """The template of an SFT stage: that of its first source. Says so where the others have another."""
    names = recipe.stages[index].sources
    found = {}
    for name in names:
        found[name] = source_template(recipe, name, tokenizer_dir)
    first = found[names[0]]
    if any(template != first for template in found.values()):
        ui.warn(f"{recipe.stage_names()[index]}: several templates; {first.name} of {names[0]} is used after training")
    return first


def source_template(recipe: ResolvedRecipe, name: str, tokenizer_dir: Path) -> Template:
    """The template that the conversations of a source are trained in, with the cleaning that the run gave them."""
    template = templates.default(recipe.data[name].template, tokenizer_dir)
    if template.version < templates.VERSION:
        ui.warn(
            f"data.{name}.template: {template.name} is of qmedtune 0.1, which encoded every segment by itself; for a "
            f'new training set "version": {templates.VERSION} and leave out "apart" in its file'
        )
    return replace(template, cleaning=CLEANING if recipe.hygiene.clean else "")


def tokenise(how: Tokenising, name: str, path: Path, out: Path, *, max_tokens: int | None = None) -> Corpus:
    """The records of `path`, of source `name`, as shards below `out/tokens`; with `max_tokens` the first of them, up to
    the one that reaches it."""
    recipe, section, codec, tokenizer_dir = how.recipe, how.section, how.codec, how.tokenizer_dir
    source = recipe.data[name]
    if source.kind == "instructions":
        template = source_template(recipe, name, tokenizer_dir)
        if isinstance(section, SftSection):
            weight = prompt_weight(section.loss_on)
        else:
            weight = 0.0
        encode = partial(encode_conversations, codec, template=template, prompt_weight=weight, limit=section.seq_len)
        depends_on = [framing.VERSION, asdict(template), weight, section.seq_len]
    else:
        cuts = source.chunking == "truncate" or isinstance(section, ClassifySection)
        if cuts:
            limit = section.seq_len
        else:
            limit = None
        encode, depends_on = partial(encode_texts, codec, limit=limit), [borders.described(codec), limit]
    key = store.sha256_json([*depends_on, store.sha256_file(tokenizer_dir / "tokenizer.json"), codec.eos_token])
    with ui.progress_bar(f"tokenise {name}", None, "documents") as progress:
        shards = write_shards(path, out / "tokens" / name, Encoder(encode, key), progress.update, max_tokens=max_tokens)
    tables: list[np.ndarray] = []
    for shard in shards:
        tables.append(shard_array(shard, "documents"))
    documents = np.zeros((0, 3), np.int64)
    if tables:
        documents = np.concatenate(tables)
    if max_tokens is None:
        cap = source.max_tokens
    else:
        cap = None
    draws = draw_tokens(source, documents[:, KEPT], section.seq_len, cap=cap, seed=recipe.seed)
    return Corpus(name, shards, documents, draws, shared_tokens(source, section.seq_len))


def draw_tokens(source: SourceSection, kept: np.ndarray, seq_len: int, *, cap: int | None, seed: int) -> np.ndarray:
    """Tokens that one draw of each document takes, int64: all that were kept, with `chunking: window` at most a row of
    them, with `overlap` those that chunks share once more, and none of the documents left out by `cap` tokens (the
    others are a seeded choice; at least one is taken)."""
    taken = kept.copy()
    if cap is not None and kept.sum() > cap:
        order = np.random.default_rng([seed, len(kept)]).permutation(len(kept))
        beyond = np.cumsum(kept[order]) > cap
        beyond[np.argmax(kept[order] > 0)] = False
        taken[order[beyond]] = 0
    if source.chunking == "overlap":
        shared = shared_tokens(source, seq_len)
        return taken + shared * (mix.chunk_counts(taken, seq_len, shared) - 1)
    if source.chunking == "window":
        return np.minimum(taken, seq_len)
    return taken


def shared_tokens(source: SourceSection, seq_len: int) -> int:
    """What neighbouring chunks of `chunking: overlap` have in common."""
    return max(1, int(source.overlap * seq_len))


def prompt_weight(loss_on: str | float) -> float:
    """`response` -> 0, `all` -> 1, a number -> itself: the loss weight of prompt tokens."""
    if isinstance(loss_on, str):
        return {"response": 0.0, "all": 1.0}[loss_on]
    return float(loss_on)


def _check_truncation(section: SftSection, corpora: list[Corpus]) -> None:
    for corpus in corpora:
        cut = int((corpus.kept < corpus.documents[:, LENGTH]).sum())
        if len(corpus.documents) and cut / len(corpus.documents) > section.max_truncated_fraction:
            longest = int(corpus.documents[:, LENGTH].max())
            raise DataError(
                f"{corpus.name}: {cut:,} of {len(corpus.documents):,} records exceed seq_len {section.seq_len} "
                f"(allowed: {section.max_truncated_fraction:.0%}, `max_truncated_fraction`)\n"
                f"raise `seq_len` (longest record: {longest:,} tokens) or shorten the records"
            )


def _mixture(section: ResolvedCpt | ResolvedPretrain, corpora: list[Corpus], rng: np.random.Generator) -> Draws:
    usable = {}
    for corpus in corpora:
        usable[corpus.name] = np.flatnonzero(corpus.draws)
    lengths = {}
    for corpus in corpora:
        lengths[corpus.name] = corpus.draws[usable[corpus.name]]
    wanted = mix.targets(section, lengths)
    picks: list[np.ndarray] = []
    counts: list[int] = []
    for name in lengths:
        pick = usable[name][mix.draw(lengths[name], wanted[name].tokens, rng)]
        picks.append(pick)
        counts.append(len(pick))
    order = mix.interleave(counts, rng)
    source = np.repeat(np.arange(len(picks), dtype=np.int16), counts)[order]
    share: dict[str, float] = {}
    capped: list[str] = []
    for name, target in wanted.items():
        share[name] = target.share
        if target.capped:
            capped.append(name)
            ui.warn(f"mix: {name} is capped by max_repeats, its share of the mixture falls short")
    return Draws(corpora, source, np.concatenate(picks)[order], share, capped)


def epochs(count: float, corpora: list[Corpus], rng: np.random.Generator) -> Draws:
    """Every usable record once per epoch, all sources shuffled together; a last part of an epoch where asked."""
    usable: list[np.ndarray] = []
    counts: list[int] = []
    tokens: dict[str, int] = {}
    for corpus in corpora:
        documents = np.flatnonzero(corpus.draws)
        usable.append(documents)
        counts.append(len(documents))
        tokens[corpus.name] = int(corpus.draws.sum())
    source = np.repeat(np.arange(len(usable)), counts)
    document = np.concatenate(usable)
    if not len(document):
        raise DataError("sft: no record with a response is left\nlook at rejects.jsonl and raise `seq_len`")
    whole, part = divmod(count, 1)
    orders = []
    for _ in range(int(whole)):
        orders.append(rng.permutation(len(document)))
    orders.append(rng.permutation(len(document))[: round(part * len(document))])
    order = np.concatenate(orders)
    total = sum(tokens.values())
    share: dict[str, float] = {}
    for name, count in tokens.items():
        share[name] = count / total
    return Draws(corpora, source[order], document[order], share, [])


def write_rows(
    section: ResolvedTraining, plan: Draws, rng: np.random.Generator, out: Path, *, whole: bool = False
) -> Packing:
    """Packs the draws, writes pieces, rows, the document table and packed.json; returns the ledger.

    whole: documents are not split over rows, as in SFT.
    """
    seq_len = section.seq_len
    np.save(out / "documents.npy", _table(plan.corpora))
    shards: list[str] = []
    sources: list[str] = []
    for corpus in plan.corpora:
        sources.append(corpus.name)
        for shard in corpus.shards:
            shards.append(shard.relative_to(out).as_posix())
    units = _units(plan, seq_len, rng)
    rows = _rows(section, units[:, 2], whole, rng)
    pieces = rows.pieces.copy()
    pieces[:, 1] += units[rows.pieces[:, 0], 1]
    pieces[:, 0] = plan.numbers[units[rows.pieces[:, 0], 0]]
    np.save(out / "pieces.npy", pieces)
    np.save(out / "rows.npy", rows.bounds)
    meta = {"seq_len": seq_len, "shards": shards, "sources": sources, "first_document": plan.firsts.tolist()}
    if isinstance(section, SftSection) and 0 < (weight := prompt_weight(section.loss_on)) < 1:
        meta["prompt_weight"] = weight
    (out / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
    return packing_facts(plan, rows, pieces, seq_len)


def _units(plan: Draws, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """(U, 3) int32 of (draw, start, length): what is laid into rows, a draw each, or each chunk of one with overlap."""
    kept_by_source: list[np.ndarray] = []
    shared_by_source: list[int] = []
    for corpus in plan.corpora:
        kept_by_source.append(corpus.kept)
        shared_by_source.append(corpus.shared_tokens)
    kept, drawn = np.concatenate(kept_by_source)[plan.numbers], plan.tokens
    shared = np.array(shared_by_source)[plan.source]
    counts = 1 + np.maximum(drawn - kept, 0) // shared
    units = mix.chunks(counts, np.where(counts > 1, kept, drawn), seq_len, shared)
    # A window's place is drawn anew each time; 0 for all others.
    units[:, 1] += rng.integers(0, np.where(counts > 1, 0, kept - drawn) + 1)[units[:, 0]]
    return units.astype(np.int32)


def _rows(section: ResolvedTraining, lengths: np.ndarray, whole: bool, rng: np.random.Generator) -> mix.RowLayout:
    if not isinstance(section, SftSection):
        return mix.fill_rows(lengths, section.seq_len, split=not whole)
    if section.packing or whole:
        return mix.fill_rows(lengths, section.seq_len, split=False)
    batch = batch_rows(section, len(lengths))
    return mix.single_rows(mix.buckets(lengths, batch, rng), lengths)


def _table(corpora: list[Corpus]) -> np.ndarray:
    """(D, 3) int64: shard number, first token within it, length; over all sources in order."""
    parts: list[np.ndarray] = []
    for corpus in corpora:
        for shard in corpus.shards:
            lengths = shard_array(shard, "documents")[:, LENGTH]
            ends = np.cumsum(lengths)
            parts.append(np.stack([np.full(len(ends), len(parts)), ends - lengths, lengths], axis=1))
    if parts:
        return np.concatenate(parts)
    return np.zeros((0, 3), np.int64)


def pack_validation(recipe: ResolvedRecipe, tokenizer_dir: Path, inputs: Mapping[str, Path], out: Path) -> HeldOut:
    """Held-out text of every source that is validated on, each packed once into `out/<source>/`.

    At most `validate.max_tokens` each, in file order; rows as long as those of the stage that trains on the source
    (else of the first stage).
    """
    codec = load_codec(tokenizer_dir)
    packed: dict[str, Packing] = {}
    for name in dict.fromkeys([*recipe.validation.on, *recipe.evaluate.perplexity]):
        path, folder = inputs[name] / "heldout.jsonl", out / name
        limit = recipe.validation.max_tokens
        section = _reader_of(recipe, name)
        how = Tokenising(recipe, section, tokenizer_dir, codec)
        corpus = tokenise(how, name, path, folder, max_tokens=limit)
        usable = np.flatnonzero(corpus.kept)
        if not len(usable):
            raise DataError(
                f"{name}: nothing is held out, so it cannot be validated on\nset data.{name}.holdout above 0"
            )
        if recipe.data[name].chunking == "overlap":
            corpus = replace(corpus, draws=corpus.kept)  # perplexity counts each token once
        plan = Draws([corpus], np.zeros(len(usable), np.int64), usable, {name: 1.0}, [])
        packed[name] = write_rows(section, plan, np.random.default_rng(0), folder, whole=True)
    return HeldOut.model_validate(packed)


def _reader_of(recipe: ResolvedRecipe, name: str) -> ResolvedTraining:
    stages = []
    for stage in recipe.stages:
        if name in stage.sources:
            stages.append(stage.section)
    if stages:
        return stages[0]
    return recipe.stages[0].section


class PackedRows:
    """The rows of a packed folder, read through memory maps: RAM does not grow with the corpus.

    rows[i] -> {"input_ids", "labels", "position_ids"}, int64 arrays of the row's own length, and "weights" (float32)
    where prompts carry a part of the loss.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.seq_len: int = meta["seq_len"]
        self.sources: list[str] = meta["sources"]
        self._first_document = np.array(meta["first_document"])
        self._pieces = np.load(folder / "pieces.npy", mmap_mode="r")
        self._bounds = np.load(folder / "rows.npy", mmap_mode="r")
        self._documents = np.load(folder / "documents.npy", mmap_mode="r")
        shards = []
        for name in meta["shards"]:
            shards.append(folder / name)
        self._tokens = []
        for shard in shards:
            self._tokens.append(shard_array(shard, "tokens"))
        # Until 0.1 the mask held the weight itself, in steps of 1/255.
        self._prompt_weight: float | None = meta.get("prompt_weight")
        self._masks = []
        for shard in shards:
            self._masks.append(shard_mask(shard))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def pieces(self, row: int) -> np.ndarray:
        """(P, 3) int64 of (document, start, length), in the row's order."""
        return self._pieces[self._bounds[row] : self._bounds[row + 1]]

    @property
    def num_documents(self) -> int:
        return len(self._documents)

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, int64, with bos and eos."""
        return self._documents[:, 2]

    def source_of(self, document: int) -> str:
        return self.sources[int(np.searchsorted(self._first_document, document, side="right")) - 1]

    def record_of(self, document: int) -> tuple[str, int]:
        """A document's source, and its record's number there in the order of train.jsonl."""
        place = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return self.sources[place], document - int(self._first_document[place])

    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64."""
        return np.add.reduceat(self._pieces[:, 2], self._bounds[:-1])

    def drawn_documents(self) -> np.ndarray:
        """Documents that any row holds a part of, int64, in order."""
        return np.unique(self._pieces[:, 0])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._item([self._piece(*map(int, piece)) for piece in self.pieces(row)])

    def part(self, document: int, start: int, length: int) -> dict[str, np.ndarray]:
        """Tokens of one document as a row of their own."""
        return self._item([self._piece(document, start, length)])

    def _item(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        ids, weights, positions = (np.concatenate(column) for column in zip(*parts, strict=True))
        item = {"input_ids": ids, "labels": np.where(weights > 0, ids, IGNORED), "position_ids": positions}
        if ((weights > 0) & (weights < FULL_WEIGHT)).any():
            item["weights"] = self._loss_weights(weights)
        return item

    def _loss_weights(self, mask: np.ndarray) -> np.ndarray:
        """Of each token, float32."""
        if self._prompt_weight is None:
            part = mask / FULL_WEIGHT
        else:
            part = np.float32(self._prompt_weight)
        return np.where(mask == FULL_WEIGHT, 1.0, np.where(mask > 0, part, 0.0)).astype(np.float32)

    def _piece(self, document: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard, first, _ = self._documents[document]
        where = slice(first + start, first + start + length)
        tokens, mask = self._tokens[shard], self._masks[shard]
        if mask is None:
            weights = np.full(length, FULL_WEIGHT, np.uint8)
        else:
            weights = mask[where].copy()
        weights[0] = 0
        return tokens[where].astype(np.int64), weights, np.arange(length)


class WholeDocuments:
    """The documents behind packed rows, each from its beginning: a text is judged with all that stands before it, not
    in rows of the training length. Longer ones come in windows that begin with the last token of the one before, so
    that every token but the first is predicted once. Items are as those of PackedRows. documents: those that are read;
    None: all of which the rows hold a part."""

    def __init__(self, rows: PackedRows, max_tokens: int, documents: Iterable[int] | None = None):
        self._rows = rows
        lengths = rows.document_lengths()
        if documents is None:
            documents = rows.drawn_documents()
        self._windows: list[tuple[int, int, int]] = []
        for document in documents:
            self._windows += windows(int(document), int(lengths[document]), max_tokens)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document, start, length = self._windows[index]
        return self._rows.part(document, start, length)


def windows(document: int, length: int, max_tokens: int) -> list[tuple[int, int, int]]:
    """(document, start, length) of each window; a document of one token predicts nothing and has none."""
    starts = range(0, length - 1, max_tokens - 1)
    found: list[tuple[int, int, int]] = []
    for start in starts:
        found.append((document, start, min(max_tokens, length - start)))
    return found
