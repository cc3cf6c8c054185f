"""Base and final model side by side: the same question, the template of the training, answers as they grow.

Both models are loaded with the first question, into this process. Not while a run of this folder is under way: the
memory that they take could be what its training needs. Questions and answers are kept nowhere.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qmedtune import base
from qmedtune.errors import QmedtuneError
from qmedtune.recipe import ModelSection
from qmedtune.watching.runs import Seen, Shelf

if TYPE_CHECKING:
    from qmedtune.evaluation.open_model import OpenModel

MAX_QUESTION, MAX_ANSWER = 20_000, 512  # characters; tokens
LOOK_S = 2.0


class Piece(NamedTuple):
    """Of an answer as it grows: `side` is base, final or error."""

    side: str
    text: str


class ModelPair:
    """The two models of one run, of which one process needs one at a time."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._busy = threading.Lock()
        self._opened: tuple[Path, OpenModel, OpenModel] | None = None
        self._looking: threading.Thread | None = None

    def why_not(self, seen: Seen) -> str | None:
        """Why nothing can be asked now, in words."""
        if any(other.status == "running" for other in self._shelf.all()):
            return "A run is under way: two more models would take its memory. Ask when it has ended."
        if seen.status != "finished":
            return "This run has not finished: there is no final model yet."
        return None

    def ask(self, seen: Seen, question: str) -> Iterator[Piece]:
        """The answers, in turns: a piece of base, a piece of final."""
        why = self.why_not(seen)
        if why is None and not self._busy.acquire(blocking=False):
            why = "Another question is being answered. Ask again in a moment."
        if why is not None:
            yield Piece("error", why)
            return
        try:
            yield from self._answers(seen, question[:MAX_QUESTION])
        except QmedtuneError as error:
            yield Piece("error", str(error))
        except Exception as error:  # its message may quote what was asked
            yield Piece("error", f"The models could not answer ({type(error).__name__}).")
        finally:
            self._busy.release()

    def _answers(self, seen: Seen, question: str) -> Iterator[Piece]:
        from qmedtune.data.packing.framing import codec_of, frame_of
        from qmedtune.evaluation.generation import stream
        from qmedtune.evaluation.scoring import max_positions
        from qmedtune.evaluation.shorten import fitted

        growing: dict[str, Iterator[str]] = {}
        for side, opened in zip(("base", "final"), self._models(seen), strict=True):
            length = min(MAX_ANSWER, max_positions(opened.model) // 2)
            frame = frame_of(opened.template, codec_of(opened.tokenizer))
            room = max_positions(opened.model) - length
            asked = fitted(frame, [{"role": "user", "content": question}], room)
            if asked.left_out:
                yield Piece(side, f"[{asked.left_out:,} tokens of the question's middle were left out]\n")
            growing[side] = stream(opened.model, opened.tokenizer, asked.asked, length)
        while growing:
            for side in list(growing):
                piece = next(growing[side], None)
                if piece is None:
                    del growing[side]
                elif piece:
                    yield Piece(side, piece)

    def _make_room(self) -> None:
        """Let the models go once a run begins."""
        while self._opened is not None:
            time.sleep(LOOK_S)
            if any(other.status == "running" for other in self._shelf.all()):
                with self._busy:
                    self._opened = None
                _free_memory()

    def _models(self, seen: Seen) -> tuple[OpenModel, OpenModel]:
        """Base and final, opened once."""
        from qmedtune.evaluation.open_model import locate, open_model

        if self._opened is None or self._opened[0] != seen.folder:
            self._opened = None  # the room of one pair is needed for the next
            final = locate(str(seen.folder), offline=True)
            section = ModelSection.model_validate(seen.run.recipe["model"])
            start = replace(final, name="base", kind="model", base=base.identify(section, offline=True).make())
            self._opened = seen.folder, open_model(start, "none"), open_model(final, "none")
            if self._looking is None or not self._looking.is_alive():
                self._looking = threading.Thread(target=self._make_room, daemon=True)
                self._looking.start()
        _, base_model, final_model = self._opened
        return base_model, final_model


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
