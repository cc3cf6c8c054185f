"""The other processes of a run: started by `run --gpus N`, or by torchrun, and told by this one what to do.

The process of rank 0 runs the recipe as a single one does. The others wait (follower.py) and are called for each
training stage: they get the resolved recipe and the folders, build the same model, say that they are ready, and train
along (group.py). Words go through a torch.distributed store: a file in a private folder where we start the processes
ourselves, torchrun's own where it has. Torch is imported only where there are others.

Deliberately not here: anything about training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune import ui
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.turns import Turns
from qmedtune.model_stack import ModelStack
from qmedtune.planning.machine import number_of_cards
from qmedtune.pulse import BEAT_S, Pulse
from qmedtune.record import versions

if TYPE_CHECKING:
    from qmedtune.evaluate import EvaluatedModels
    from qmedtune.group import Group
    from qmedtune.resolved import ResolvedRecipe
    from qmedtune.train import TrainingJob

POLL_S = 0.05
WATCH_S = 1.0  # how often each side looks whether the other is still there
# How long a sum waits for the others at most: longer than rank 0 saves a checkpoint or judges documents. That a process
# ended or hangs is seen before (_watch, pulse.py).
PATIENCE = timedelta(hours=2)
MEETING = timedelta(minutes=5)  # for all processes of torchrun to be there
GRACE_S = 20.0  # for the others to end by themselves
RECORD_S = 60.0  # for this one to see it by itself, and to write its report
# Read by accelerate and transformers, which would wrap the model and share out the rows in their own way.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Message:
    """One training stage for the others, or the evaluation (`scores`); the word to open the connections (`join`), or
    (`end`) the run's exit code."""

    join: bool = False
    scores: bool = False
    recipe: Mapping[str, object] = field(default_factory=dict)
    index: int = 0
    folders: Mapping[str, str] = field(default_factory=dict)
    adapters: Sequence[str] = ()
    end: int | None = None

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(folder) for name, folder in self.folders.items()}

    @property
    def stack(self) -> ModelStack:
        """The model that is trained on, or that was trained."""
        return ModelStack(Path(self.folders["base"]), tuple(map(Path, self.adapters)))


@dataclass(frozen=True)
class Reply:
    """Of a process that was called: how it computes, or what is wrong with it."""

    computes: str = ""
    fault: str = ""


class Peers:
    """Follower processes of data-parallel training.

    The others, seen from rank 0. `processes` are those that we started, by rank; `here`: how many of all are on this
    machine, all where it is not said.
    """

    def __init__(
        self, store: Any, size: int, processes: dict[int, subprocess.Popen[bytes]] | None = None, here: int = 0
    ):
        self.store, self.size, self.processes = store, size, processes or {}
        self.here = here or size
        self.number = 0
        self.grouped = False
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def call(self, message: Message, *, sharded: bool) -> Group:
        """Tell the others about a stage. They are ready when `wait` returns."""
        from qmedtune.group import Group

        if not self.grouped:
            self._tell(Message(join=True))
            join(self.store, 0, self.size)
            self.grouped = True
        self._tell(message)
        return Group(0, self.size, sharded)

    def share(self, message: Message) -> Turns:
        """Tell the others what is to be scored; what of it is whose."""
        self._tell(message)
        return Turns(0, self.size, self.wait_for)

    def _tell(self, message: Message) -> None:
        self.number += 1
        self.store.set(f"job/{self.number}", json.dumps(vars(message)))

    def wait(self) -> list[str]:
        """Until all are ready to train; how each computes. Raises RunError with what the first that is not has said."""
        return [self._done(f"ready/{self.number}/{rank}", rank) for rank in range(1, self.size)]

    def wait_for(self, file: Path) -> None:
        """Until `file` is there, or all the others have done what they were told. Raises RunError like `wait`."""
        while not file.exists():
            done = 0
            for rank in range(1, self.size):
                key = f"ready/{self.number}/{rank}"
                process = self.processes.get(rank)
                if self.store.check([key]) or (process is not None and process.poll() is not None):
                    self._done(key, rank)
                    done += 1
            if done == self.size - 1:
                return
            time.sleep(POLL_S)

    def _done(self, key: str, rank: int) -> str:
        """What a process has answered. Raises RunError with its fault, or where it has ended."""
        answer = Reply(**json.loads(self._answer(key, rank)))
        if answer.fault:
            fault = answer.fault.splitlines()[0]
            raise RunError(f"process {rank + 1} of {self.size}: {fault}\nall processes of the run end")
        return answer.computes

    def greet(self) -> None:
        """Until all are there, with the same versions. Raises RunError."""
        ours = json.dumps(versions(), sort_keys=True)
        for rank in range(1, self.size):
            theirs = self._answer(f"hello/{rank}", rank)
            if theirs != ours:
                names = _differing(json.loads(ours), json.loads(theirs))
                raise RunError(
                    f"process {rank + 1} of {self.size} has other versions: {names}\n"
                    "one run needs one environment: install the same packages for all of its processes"
                )

    def _answer(self, key: str, rank: int) -> str:
        process = self.processes.get(rank)
        while not self.store.check([key]):
            if process is not None and process.poll() is not None and not self.store.check([key]):
                raise RunError(
                    f"process {rank + 1} of {self.size} ended by itself (exit code {process.returncode})\n"
                    "what is sealed stays; the same command goes on from there"
                )
            time.sleep(POLL_S)
        return self.store.get(key).decode()

    def _watch(self) -> None:
        """End this process where another has ended, or gives no sign of life, in the middle of a run and nothing else
        notices: a sum with a dead GPU process would wait for hours. Over gloo the sum itself fails, and what happened
        is recorded within RECORD_S."""
        pulse, until_beat = Pulse(self.store, 0, range(1, self.size)), 0.0
        while not self.over.wait(WATCH_S):
            ended = [rank for rank, process in self.processes.items() if process.poll() is not None]
            until_beat -= WATCH_S
            if until_beat <= 0 and not ended:
                until_beat = BEAT_S
                ended = _silent(pulse)
            if ended and not self.over.wait(RECORD_S):
                ui.error_panel([
                    f"another process of this run ended, or hangs (process {ended[0] + 1} of {self.size})",
                    *self._last_words(ended[0]),
                    "what is sealed stays; the same command goes on from the last checkpoint",
                ])  # fmt: skip
                os._exit(1)

    def _last_words(self, rank: int) -> list[str]:
        """What a process has said is wrong with it, before it ended."""
        key = f"ready/{self.number}/{rank}"
        with suppress(RuntimeError):
            if self.store.check([key]):
                return Reply(**json.loads(self.store.get(key))).fault.splitlines()
        return []

    def end(self, code: int) -> None:
        """The run is over: the others end too, at the latest after GRACE_S."""
        self.over.set()
        with suppress(RuntimeError):  # torchrun's store may be gone, and the others with it
            self._tell(Message(end=code))
        if self.grouped:
            leave()
        until = time.monotonic() + GRACE_S
        for process in self.processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _silent(pulse: Pulse) -> list[int]:
    try:
        return pulse.beat()
    except RuntimeError:  # torchrun's store went with its machine: torchrun ends this process
        return []


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    said = []
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            said.append(f"{name} {theirs.get(name)}, here {ours.get(name)}")
    return "; ".join(said)


_peers: Peers | None = None
_alone = False


def call(job: TrainingJob) -> Group:
    """The group that trains a stage; this process alone where there are no others."""
    from qmedtune.group import ALONE

    if _peers is None or _alone:
        return ALONE
    start, tokens = job.inputs.start, job.inputs.tokens
    folders = {"out": str(job.out.resolve()), "base": str(start.base.resolve()), "tokens": str(tokens.resolve())}
    if job.inputs.validation is not None:
        folders["validation"] = str(job.inputs.validation.resolve())
    adapters = [str(adapter.resolve()) for adapter in start.adapters]
    message = Message(recipe=_told(job.recipe), index=job.index, folders=folders, adapters=adapters)
    return _peers.call(message, sharded=job.stage.cards.sharded)


@contextmanager
def scoring(recipe: ResolvedRecipe, inputs: EvaluatedModels, out: Path, *, worth: bool) -> Iterator[Turns]:
    """Who scores which part of an evaluation. Where it is `worth` it the others score too; they are done when the block
    ends."""
    if _peers is None or _alone or not worth:
        yield Turns()
        return
    folders = {"out": str(out.resolve()), "base": str(inputs.trained.base.resolve())}
    for name in ("merged", "origin", "untrained", "validation"):
        folder: Path | None = getattr(inputs, name)
        if folder is not None:
            folders[name] = str(folder.resolve())
    adapters = [str(adapter.resolve()) for adapter in inputs.trained.adapters]
    told = _told(recipe)
    yield _peers.share(Message(scores=True, recipe=told, folders=folders, adapters=adapters))
    _peers.wait()


def _told(recipe: ResolvedRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True) | {"shard": recipe.shard}  # also where it is false


def number() -> int:
    """How many processes this run has, this one included."""
    return 1 if _peers is None else _peers.size


def number_here() -> int:
    """How many of them are on this machine."""
    return 1 if _peers is None else _peers.here


def wait(group: Group) -> list[str]:
    """Until all of the group are ready to train; how each of the others computes."""
    if _peers is None or group.size == 1:
        return []
    return _peers.wait()


@contextmanager
def alone() -> Iterator[None]:
    """What is trained inside is trained by this process: a built-in base has the same bytes everywhere."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def called(gpus: str | None) -> Iterator[None]:
    """The other processes, for the run inside: those of torchrun, or so many that there are `gpus` in all."""
    global _peers
    if under_torchrun():
        found = _of_torchrun()
    else:
        size = _number_of(gpus)
        found = _started(size) if size > 1 else None
    if found is None:
        yield
        return
    _peers = found
    code = 1
    try:
        found.greet()
        yield
        code = 0
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        _peers = None
        found.end(code)


# ---- how they come to be ---------------------------------------------------------------------------------------------


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun (or `accelerate launch`, or Slurm's) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def torchrun_rank() -> int:
    return int(os.environ["RANK"])


def torchrun_store() -> tuple[Any, int, int]:
    """(store, rank, size) of torchrun; this process is then one on one GPU for all libraries that look."""
    import torch.distributed as dist

    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"torchrun: the processes did not meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}\n"
            "check that all nodes reach that port; on one machine take `torchrun --standalone`, or `--gpus N`"
        ) from error
    take_gpu(int(os.environ.get("LOCAL_RANK", rank)))
    for name in TORCHRUN:
        os.environ.pop(name, None)
    return dist.PrefixStore("qmedtune", store), rank, size


def _of_torchrun() -> Peers:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    store, _, size = torchrun_store()
    return Peers(store, size, here=here)


def take_gpu(place: int) -> None:
    """Make the GPU at this place of those that are visible the only one. Before torch looks for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    elif place < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place]


def _number_of(gpus: str | None) -> int:
    """How many processes `--gpus` asks for. Raises RecipeError for what is no number, or more than there are cards."""
    if gpus is None or gpus == "1":
        return 1
    import torch

    there = torch.cuda.device_count()
    if gpus == "auto":
        return max(1, there)
    size = number_of_cards(gpus)
    if there == 0:
        ui.note(f"no CUDA device: {size} processes share the CPU, which tests this and is not faster")
    elif size > there:
        raise RecipeError(f"--gpus {size}: this machine has {there}\nallowed: up to {there}, or auto")
    return size


def _started(size: int) -> Peers:
    """Processes of this machine that wait to be called; they end with this one."""
    import torch.distributed as dist

    folder = Path(tempfile.mkdtemp(prefix="qmedtune-peers-"))  # 0700: who can write there can call
    processes = {}
    for rank in range(1, size):
        words = [sys.executable, "-m", "qmedtune.follower", str(folder / "store"), str(rank), str(size)]
        words.append(str(os.getpid()))
        environment = os.environ | {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
        processes[rank] = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    take_gpu(0)
    return _Local(dist.FileStore(str(folder / "store"), size), size, processes, folder)


class _Local(Peers):
    """Those that we started, and the folder that they share."""

    def __init__(self, store: Any, size: int, processes: dict[int, subprocess.Popen[bytes]], folder: Path):
        super().__init__(store, size, processes)
        self.folder = folder

    def end(self, code: int) -> None:
        super().end(code)
        shutil.rmtree(self.folder, ignore_errors=True)


def join(store: Any, rank: int, size: int) -> None:
    """Open the connections between the processes: NCCL between GPUs, gloo otherwise."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    connections = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=connections, rank=rank, world_size=size, timeout=PATIENCE)


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
