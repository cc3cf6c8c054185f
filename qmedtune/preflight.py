"""What can be known before training: asked by `plan` of a sample of each source, and by `run` at its start.

What fails here would fail after hours otherwise: a base or tokenizer that cannot be used, a chat template that cannot
be rendered, records that are cut or damaged, an evaluation file that does not parse. Each check raises the error that
the step itself would raise, or says what is missing and the way on. Loads no weights, and for `plan` no torch. Not
here: room (planning/capacity.py), and whole sources: all data steps come before the first training step (steps.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune.data.packing import templates
from qmedtune.errors import DataError, RecipeError
from qmedtune.planning import evaluation_time
from qmedtune.planning.estimate import SampledEstimate
from qmedtune.planning.sample import Sample
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.resolved import ResolvedRecipe, ResolvedSft

if TYPE_CHECKING:
    from qmedtune.tasks import Task

Messages = Sequence[Mapping[str, Any]]

# Standard errors below the seen share from which a sample of more records is judged: about one false alarm in 1,000.
SURE = 3.1
MOST_TURNS = 3  # conversations of more turns have the shape of this many
PARSED_BYTES = 32 << 20  # of evaluation files in sum: `plan` answers in 3 s; `run` parses all
ASKED_ITEMS = 200  # prompts rendered per task by `plan`; records of a dataset without files that `run` looks at


def check_base(recipe: Recipe, folder: Path) -> None:
    """RecipeError where the base cannot be loaded, trained or merged; headers and configurations are read alone."""
    from qmedtune.model_stack import read_model

    if recipe.stages[0].kind != "pretrain":
        read_model(folder)


def check_tokenizer(folder: Path) -> None:
    """The tokenizer loads in the fast format, names the tokens that frame a document, and fits the base."""
    from qmedtune.data.packing.framing import check_padding
    from qmedtune.data.packing.tokens import load_codec

    check_padding(load_codec(folder))


def check_templates(recipe: ResolvedRecipe, folder: Path, samples: Mapping[str, Sample]) -> None:
    """Each instruction source's template speaks this tokenizer's marks and renders a conversation of each shape."""
    for _, name in taught(recipe):
        template = templates.default(recipe.data[name].template, folder)
        found = samples[name].records if name in samples else []
        conversations: list[Messages] = []
        for record in found:
            conversations.append(record["messages"])
        for messages in (_QUESTION, *shapes(conversations)):
            with_messages(template, messages, f"data.{name}.template", folder)


def taught(recipe: ResolvedRecipe) -> Iterator[tuple[ResolvedSft, str]]:
    """Each instruction source of each sft stage."""
    for stage in recipe.stages:
        if stage.sft:
            for name in stage.sft.sources:
                yield stage.sft, name


def with_messages(template: templates.Template, messages: Messages, where: str, folder: Path) -> None:
    """Frame one conversation for training and its last question for use. The error names `where`, and no text."""
    from qmedtune.data.packing.framing import frame_in

    plain = [dict(message) for message in messages]
    answered = plain[-1]["role"] == "assistant"
    try:
        frame = frame_in(template, folder)
        if answered:
            frame.train([plain])
        frame.ask([plain[:-1] if answered else plain])
    except (DataError, RecipeError) as error:
        roles = ", ".join(message["role"] for message in plain[:6])
        place = f"{folder}: " if template.source and str(folder) not in str(error) else ""
        raise type(error)(f"{place}{error}\n{where}: with a conversation of {roles}") from error


def shapes(conversations: Iterable[Messages]) -> list[Messages]:
    """The first conversation of each shape: which roles follow each other (turns beyond MOST_TURNS alike), and whether
    an input stands apart."""
    found: dict[tuple, Messages] = {}
    for messages in conversations:
        roles: list[str] = []
        has_input = False
        for message in messages:
            roles.append(message["role"])
            has_input = has_input or bool(message.get("input"))
        shape = tuple(roles[: 2 * MOST_TURNS + 1])
        found.setdefault((shape, has_input), messages)
    return list(found.values())


def check_damage(recipe: Recipe, samples: Mapping[str, Sample]) -> None:
    """DataError where a sample has surely more damaged records than `hygiene.max_bad_fraction`, or nothing else."""
    for name, sample in samples.items():
        bad, good = sum(sample.damaged.values()), len(sample.records)
        if not bad or not surely_above(bad, bad + good, recipe.hygiene.max_bad_fraction, whole=sample.whole):
            continue
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in sample.damaged.most_common(2))
        raise DataError(
            f"{name}: {bad:,} of the first {bad + good:,} records cannot be used: {reasons}\n"
            f"allowed: {recipe.hygiene.max_bad_fraction:.1%} (`hygiene.max_bad_fraction`)\n"
            f"name the right columns (`data.{name}.columns`) or format, or mend the files"
        )


def check_truncation(
    recipe: ResolvedRecipe, measured: Mapping[str, SampledEstimate], samples: Mapping[str, Sample]
) -> None:
    """DataError where surely more records of an sft stage are cut at `seq_len` than `max_truncated_fraction`."""
    for section, name in taught(recipe):
        if name not in samples:
            continue
        lengths, allowed = measured[name].lengths, section.max_truncated_fraction
        cut, whole = int((lengths > section.seq_len).sum()), len(lengths) == len(samples[name].records)
        if cut and surely_above(cut, len(lengths), allowed, whole=whole and samples[name].whole):
            raise DataError(
                f"{name}: {cut:,} of {len(lengths):,} sampled records exceed seq_len {section.seq_len} "
                f"(allowed: {allowed:.0%}, `max_truncated_fraction`)\n"
                f"raise `seq_len` (longest seen: {int(lengths.max()):,} tokens) or shorten the records"
            )


def surely_above(found: int, of: int, allowed: float, *, whole: bool) -> bool:
    """Whether more than `allowed` of all are like the `found` `of` a sample: exactly if it is the `whole`, else where
    the lower end of Wilson's interval at SURE standard errors lies above."""
    share = found / of
    if whole:
        return share > allowed
    middle = share + SURE**2 / (2 * of)
    width = SURE * math.sqrt(share * (1 - share) / of + (SURE / (2 * of)) ** 2)
    return (middle - width) / (1 + SURE**2 / of) > allowed


@dataclass(frozen=True)
class Benchmarks:
    """What was parsed, and for each that was not the reason."""

    tasks: list[Task]
    left: list[str]


def check_evaluation(recipe: Recipe, folder: Path | None, *, within_bytes: int | None = None) -> Benchmarks:
    """Every evaluation file parses, and its questions can be asked with the template (where the tokenizer is here).

    With `within_bytes` (`plan`) files that are not here or beyond it are not parsed, and ASKED_ITEMS questions are
    rendered.
    """
    found = Benchmarks([], [])
    room = within_bytes or 0
    for section in recipe.evaluate.tasks:
        if within_bytes is not None:
            if why := _left_out(section, room):
                found.left.append(why)
                continue
            room -= _file_bytes(section)
        task = _parsed(recipe, section)
        found.tasks.append(task)
        if folder is not None:
            items = list(task.asked)[: None if within_bytes is None else ASKED_ITEMS]
            _check_questions(recipe, folder, section, [item.messages for item in items])
    return found


def _parsed(recipe: Recipe, section: TaskSection) -> Task:
    from qmedtune.tasks import load_task, world_of

    try:
        return load_task(section, recipe.items_seed, world_of(recipe))
    except DataError as error:
        if len(str(error).splitlines()) > 1:
            raise
        raise DataError(
            f"{error}\na benchmark is read whole or not at all: mend the file, or take the task out"
        ) from error


def _check_questions(recipe: Recipe, folder: Path, section: TaskSection, questions: list[Messages]) -> None:
    template = asked_with(recipe, folder)
    for messages in shapes(questions):
        with_messages(template, messages, f"evaluate.tasks: {section.label}", folder)


def asked_with(recipe: Recipe, folder: Path) -> templates.Template:
    """The template that evaluation asks with: the recipe's, else that of the last sft stage, else that of the model
    which is mixed in (as far as it is here), else the tokenizer's."""
    if recipe.evaluate.template:
        return templates.load(recipe.evaluate.template, folder)
    learnt = None
    for stage in recipe.stages:
        if stage.sft:
            learnt = stage.sft.sources[0]
    if learnt is not None:
        return templates.default(recipe.data[learnt].template, folder)
    if recipe.merge.other is not None and Path(recipe.merge.other).expanduser().exists():
        from qmedtune.evaluation.open_model import locate

        return locate(recipe.merge.other, offline=True).template
    return templates.default(None, folder)


def asking(recipe: Recipe, folder: Path | None, *, builtin: bool) -> evaluation_time.Ids:
    """What a question makes the model read: as the evaluation frames it, where the tokenizer is here; else words, each
    a token of the tiny bases (`builtin`) and TOKENS_PER_WORD of others."""
    if folder is None:
        per_word = 1.0 if builtin else evaluation_time.TOKENS_PER_WORD
        return lambda item: evaluation_time.words_of(item, per_word)
    from qmedtune.data.packing.framing import frame_in

    frame = frame_in(asked_with(recipe, folder), folder)
    return lambda item: frame.ask([item.messages])[0].ids


def _left_out(section: TaskSection, room: int) -> str:
    """Why `plan` does not parse a benchmark; empty where it does."""
    try:
        too_large = _file_bytes(section) > room
    except DataError as error:
        return f"{section.label}: not found here ({str(error).splitlines()[0]})"
    return f"{section.label}: parsed when the run starts, not by plan (over 32 MiB)" if too_large else ""


def _file_bytes(section: TaskSection) -> int:
    from qmedtune.tasks.shots import split_files

    return sum(file.stat().st_size for file in split_files(section.path, section.split)) if section.path else 0


def check_start(recipe: ResolvedRecipe, folder: Path, *, scored: bool) -> None:
    """By `run`, before its first step: all but whole sources, which its data steps read before anything is trained.
    `scored`: the run is to evaluate."""
    from qmedtune.model import load_tokenizer
    from qmedtune.planning.sample import sample_source

    check_base(recipe, folder)
    check_tokenizer(folder)
    load_tokenizer(folder)
    spoken: set[str] = set()
    for _, name in taught(recipe):
        spoken.add(name)
    samples: dict[str, Sample] = {}
    for name in sorted(spoken):
        samples[name] = sample_source(recipe.data[name], ASKED_ITEMS)
    check_templates(recipe, folder, samples)
    if scored:
        check_evaluation(recipe, folder)


_QUESTION: Messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
