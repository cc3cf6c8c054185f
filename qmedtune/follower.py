"""A process of a run that does not lead it: it waits, trains along when it is called, and ends with the run.

`python -m qmedtune.follower STORE RANK SIZE LEADER` is what `run --gpus` starts; under torchrun the command line comes
here with the ranks above 0. Nothing is written and nothing printed here: what goes wrong is told to rank 0, which says
it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmedtune import peers
from qmedtune.errors import QmedtuneError, RunError
from qmedtune.evaluation.turns import Turns
from qmedtune.interrupt import SIGNALS
from qmedtune.peers import Message, Reply
from qmedtune.pulse import BEAT_S, Pulse
from qmedtune.record import versions

if TYPE_CHECKING:
    from qmedtune.resolved import ResolvedRecipe


def main(words: list[str]) -> int:
    """Of a process that `run --gpus` has started: STORE RANK SIZE LEADER."""
    path, rank, size, leader = words[0], int(words[1]), int(words[2]), int(words[3])
    threading.Thread(target=_end_with, args=(leader,), daemon=True).start()
    from qmedtune.process import prepare

    prepare()
    peers.take_gpu(rank)
    import torch.distributed as dist

    return follow(dist.FileStore(path, size), rank, size)


def follow_torchrun() -> int:
    """Of a process of torchrun whose rank is not 0. It shares its terminal with rank 0, and says nothing there."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    store, rank, size = peers.torchrun_store()
    return follow(store, rank, size)


def _end_with(leader: int) -> None:
    """End this process as soon as the one that started it is gone, whatever it waits for: a sum with a dead GPU process
    would wait for hours."""
    while os.getppid() == leader:
        time.sleep(peers.WATCH_S)
    os._exit(1)


def _end_without_pulse(store: Any, rank: int) -> None:
    """The same where rank 0 hangs, or its machine is gone with the store."""
    pulse = Pulse(store, rank, [0])
    try:
        while not pulse.beat():
            time.sleep(BEAT_S)
    except RuntimeError:
        time.sleep(peers.GRACE_S)  # at the end of a run the store goes before this process does
    os._exit(1)


def follow(store: Any, rank: int, size: int) -> int:
    """Serve until the run ends; its exit code."""
    threading.Thread(target=_end_without_pulse, args=(store, rank), daemon=True).start()
    for number in SIGNALS:  # of a terminal they reach every process: rank 0 decides, and the others follow
        signal.signal(number, signal.SIG_IGN)
    store.set(f"hello/{rank}", json.dumps(versions(), sort_keys=True))
    member = _Member(store, rank, size)
    number = 1
    while True:
        message = _next(store, number)
        if message is None:
            return 1
        if message.end is not None:
            peers.leave()
            return message.end
        try:
            member.do(message, number)
        except Exception as error:
            fault = Reply(fault=_told(error))  # once training has begun, rank 0 reads it when this process is gone
            store.set(f"ready/{number}/{rank}", json.dumps(vars(fault)))
            return getattr(error, "exit_code", 1)
        number += 1


def _next(store: Any, number: int) -> Message | None:
    """The next job; None when the process that leads is gone."""
    key = f"job/{number}"
    try:
        while not store.check([key]):
            time.sleep(peers.POLL_S)
        return Message(**json.loads(store.get(key)))
    except RuntimeError:  # the store went with its process
        return None


def _told(error: Exception) -> str:
    """Messages of foreign exceptions are not passed on: they can quote clinical text."""
    if isinstance(error, QmedtuneError):
        return str(error)
    return f"{type(error).__name__} (give the command with one process to see more)"


def _check_seen(message: Message) -> None:
    """RunError where this machine does not see what it is told to read."""
    for path in (*message.paths.values(), *message.stack.adapters):
        if not path.exists():
            raise RunError(
                f"{platform.node()} does not see {path}: run folder and base must lie where all nodes see them (--out)"
            )


class _Member:
    """What a follower keeps from job to job."""

    def __init__(self, store: Any, rank: int, size: int):
        from qmedtune.training.shared_base import SharedBase

        self.store, self.rank, self.size = store, rank, size
        self.shared = SharedBase()

    def do(self, message: Message, number: int) -> None:
        from qmedtune import hub

        if message.join:
            peers.join(self.store, self.rank, self.size)
            return
        _check_seen(message)
        with hub.closed():
            if message.scores:
                self._score(message)
                self._answer(number, Reply("scored"))
            else:
                self._train(message, number)

    def _answer(self, number: int, answer: Reply) -> None:
        self.store.set(f"ready/{number}/{self.rank}", json.dumps(vars(answer)))

    def _recipe(self, message: Message) -> ResolvedRecipe:
        """Nothing of it is `auto` any more but what this machine computes in."""
        from qmedtune.planning.machine import this_machine
        from qmedtune.planning.resolve import resolve
        from qmedtune.recipe import Recipe

        machine = replace(this_machine(), cards=self.size)  # rank 0 has judged what the host has to hold
        recipe, _ = resolve(Recipe.model_validate(message.recipe), machine, judged=True)
        return recipe

    def _train(self, message: Message, number: int) -> None:
        from qmedtune.group import Group
        from qmedtune.train import StageInputs, TrainingJob, follow_stage

        recipe, folders = self._recipe(message), message.paths
        inputs = StageInputs(message.stack, folders["tokens"], folders.get("validation"))
        job = TrainingJob(recipe, message.index, inputs, folders["out"])
        group = Group(self.rank, self.size, job.stage.cards.sharded)
        follow_stage(job, self.shared, group, lambda computes: self._answer(number, Reply(computes)))

    def _score(self, message: Message) -> None:
        import torch

        from qmedtune.evaluate import EvaluatedModels, score_along
        from qmedtune.evaluation.measure import release_memory

        self.shared.drop()
        recipe, folders = self._recipe(message), message.paths
        inputs = EvaluatedModels(
            message.stack,
            merged=folders.get("merged"),
            mixed=recipe.merge.other is not None or recipe.merge.weighs,
            origin=folders.get("origin"),
            untrained=folders.get("untrained"),
            validation=folders.get("validation"),
        )
        with suppress(torch.OutOfMemoryError):  # on a card that others use too; what is missing rank 0 makes itself
            score_along(recipe, inputs, folders["out"], Turns(self.rank, self.size))
        release_memory()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
