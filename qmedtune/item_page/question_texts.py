"""The questions behind a run's items, out of the benchmark's file as the recipe names it: what may be shown of them.

Text of a benchmark that may hold patients' words is left out unless it is asked for, and so is text of a file that has
changed since. Deliberately absent: answers (answers.py), anything of training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qmedtune.errors import QmedtuneError
from qmedtune.item_page.answers import Answered
from qmedtune.recipe import Recipe, TaskSection
from qmedtune.tasks import Item, load_task, world_of

# Exam questions, published abstracts, questions of laymen, an invented world. Whatever else a benchmark is made of
# (notes, dialogues, reports, files of one's own) counts as clinical.
PUBLIC = frozenset(
    (
        "facts", "pubmedqa", "medqa", "medmcqa", "mmlu", "mmlu_medical", "mmlu_meditron", "mmlu_general",
        "mmlu_pro_health", "medxpertqa", "medbullets", "careqa", "arc", "bionli", "ddi2013", "hoc", "pubmed_summary",
        "meqsum", "medquad", "liveqa", "medicationqa", "bioasq", "bioasq_yesno",
    )
)  # fmt: skip
PAGE_BYTES = 140_000  # of text on the page, so that it stays below 300 kB
CUT = " …"
SHORTEST, LONGEST = 240, 1500  # characters of one item


@dataclass(frozen=True)
class RequestedItems:
    """What is shown: text at all, that which may be clinical, all of it however much it is."""

    text: bool = True
    clinical: bool = False
    whole: bool = False


@dataclass(frozen=True)
class TaskQuestions:
    """Of one task. by_id: options and, where they may be shown, texts; why: what is left out, and how it is got."""

    by_id: Mapping[str, Item] = field(default_factory=dict[str, Item])
    texts: bool = False
    why: str = ""


def questions(
    recipe: Recipe, section: TaskSection, items: Sequence[Answered], requested: RequestedItems
) -> TaskQuestions:
    """Options even where text is not shown: the label of an option is no text of a source."""
    try:
        task = load_task(section, recipe.items_seed, world_of(recipe))
    except (QmedtuneError, OSError) as error:
        return TaskQuestions(why=f"Without text: its file cannot be read here ({str(error).splitlines()[0]}).")
    by_id = {item.id: item for item in task.items}
    if not _are_those(by_id, items):
        return TaskQuestions(why="Without text: its file is not the one that was asked, or holds other items now.")
    if not requested.text:
        return TaskQuestions(by_id, why="Without text, as asked.")
    if section.task not in PUBLIC and not requested.clinical:
        told = "Without text: it may hold patients' words. `qmedtune items RUN --clinical-text` shows it."
        return TaskQuestions(by_id, why=told)
    return TaskQuestions(by_id, texts=True)


def _are_those(by_id: Mapping[str, Item], items: Sequence[Answered]) -> bool:
    for item in items:
        found = by_id.get(item.id)
        if found is None or (item.gold is not None and found.options[found.gold] != item.gold):
            return False
    return True


def parts_of(item: Item) -> list[str]:
    """The question, then its passages; without the list of options, which the page shows by itself."""
    if item.stated:
        return list(item.stated)
    asked: list[str] = []
    for message in item.messages:
        if message["role"] == "user":
            asked.append(message["content"])
            if message.get("input"):
                asked.append(message["input"])
    return asked


class Shortener:
    """Cuts texts so that all of a page stay within PAGE_BYTES: each to its share, and none where that is used up."""

    def __init__(self, num_items: int, *, whole: bool) -> None:
        self.whole, self.cut, self.left_out = whole, 0, 0
        self._each = min(LONGEST, max(SHORTEST, PAGE_BYTES // max(num_items, 1) - len(CUT.encode())))
        self._room = PAGE_BYTES

    def of(self, item: Item) -> list[str] | None:
        """Question and passages as they are shown; None where there is no room left."""
        parts = parts_of(item)
        if self.whole:
            return parts
        if self._room <= 0:
            self.left_out += 1
            return None
        room, kept = self._each - sum(map(len, item.texts)), []
        for part in parts:
            if room <= 0:
                break
            kept.append(_cut(part, room))
            room -= len(part)
        if kept != parts:
            self.cut += 1
        kept = kept or [_cut(parts[0], SHORTEST // 2)]
        self._room -= sum(len(part.encode()) for part in kept) + sum(len(text.encode()) for text in item.texts)
        return kept


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    return text[:room].rstrip() + CUT
