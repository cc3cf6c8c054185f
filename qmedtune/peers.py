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
from qmedtune.record import versions

if TYPE_CHECKING:
    from qmedtune.group import Group
    from qmedtune.train import TrainingJob

POLL_S = 0.05
WATCH_S = 1.0  # how often each side looks whether the other is still there
# How long one waits for the others in a step: longer than the longest validation. That a process has ended is seen by
# its connection, at once.
PATIENCE = timedelta(hours=12)
MEETING = timedelta(minutes=5)  # for all processes of torchrun to be there
GRACE_S = 20.0  # for the others to end by themselves
# Read by accelerate and transformers, which would wrap the model and share out the rows in their own way.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Message:
    """One training stage for the others, or (`end`) the exit code of the run."""

    recipe: Mapping[str, object] = field(default_factory=dict)
    index: int = 0
    folders: Mapping[str, str] = field(default_factory=dict)
    adapters: Sequence[str] = ()
    end: int | None = None


@dataclass(frozen=True)
class Reply:
    """Of a process that was called: how it computes, or what is wrong with it."""

    computes: str = ""
    fault: str = ""


class Peers:
    """The others, seen from rank 0. `processes` are those that we started, by rank."""

    def __init__(self, store: Any, size: int, processes: dict[int, subprocess.Popen[bytes]] | None = None):
        self.store, self.size, self.processes = store, size, processes or {}
        self.number = 0
        self.grouped = False
        self.over = threading.Event()
        if self.processes:
            threading.Thread(target=self._watch, daemon=True).start()

    def call(self, message: Message) -> Group:
        """Tell the others about a stage. They are ready when `wait` returns."""
        from qmedtune.group import Group

        self.number += 1
        self.store.set(f"job/{self.number}", json.dumps(vars(message)))
        return Group(0, self.size)

    def wait(self) -> list[str]:
        """Until all are ready to train; how each computes. Raises RunError with what the first that is not has said."""
        computing: list[str] = []
        for rank in range(1, self.size):
            answer = Reply(**json.loads(self._answer(f"ready/{self.number}/{rank}", rank)))
            if answer.fault:
                raise RunError(f"process {rank + 1} of {self.size}: {answer.fault}\nall processes of the run end")
            computing.append(answer.computes)
        if not self.grouped:
            join(self.store, 0, self.size)
            self.grouped = True
        return computing

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
        """End this process where another has ended in the middle of a run and nothing else notices: a sum with a dead
        GPU process would wait for hours. Over gloo the sum itself fails, well within GRACE_S."""
        while not self.over.wait(WATCH_S):
            ended = [process for process in self.processes.values() if process.poll() is not None]
            if ended and not self.over.wait(GRACE_S):
                ui.error_panel([
                    "another process of this run ended, and the one that leads did not get free of it",
                    "what is sealed stays; the same command goes on from the last checkpoint",
                ])  # fmt: skip
                os._exit(1)

    def end(self, code: int) -> None:
        """The run is over: the others end too, at the latest after GRACE_S."""
        self.over.set()
        self.number += 1
        with suppress(RuntimeError):  # torchrun's store may be gone, and the others with it
            self.store.set(f"job/{self.number}", json.dumps(vars(Message(end=code))))
        if self.grouped:
            leave()
        until = time.monotonic() + GRACE_S
        for process in self.processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
    adapters = [str(adapter.resolve()) for adapter in start.adapters]
    return _peers.call(Message(job.recipe.model_dump(mode="json", by_alias=True), job.index, folders, adapters))


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
    store, _, size = torchrun_store()
    return Peers(store, size)


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
    if not gpus.isdecimal() or int(gpus) < 1:
        raise RecipeError(f"--gpus {gpus}: not a number of GPUs\nallowed: 1, 2, ... or auto")
    size = int(gpus)
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
