"""One contender of `qmedtune bench train`, in its own process.

All build the same random LLaMA from the same seed, begin with the same adapter and read the same rows. Times are taken
around optimiser steps, on a GPU after synchronising. Deliberately not here: the peers (train_peers.py).
"""

from __future__ import annotations

import functools
import inspect
import re
import resource
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qmedtune.bench import random_bases
from qmedtune.bench.job import Job
from qmedtune.bench.rounds import anonymous_bytes
from qmedtune.recipe import AdapterSection, ModelSection, WarmupSection
from qmedtune.resolved import ResolvedCpt

DTYPE = torch.bfloat16
Row = dict[str, np.ndarray]


def packed_row(job: Job, vocab: int, number: int) -> Row:
    """Row `number` as packing gives it: documents of half to one and a half times `job.document` tokens, so that their
    count changes from row to row, or one document where that is the whole row."""
    rng = np.random.default_rng([job.seed, number])
    ids, positions = rng.integers(8, vocab, job.seq_len), np.arange(job.seq_len)
    while job.document < job.seq_len and positions.max() >= (longest := 3 * job.document // 2):
        start = int(positions.argmax()) - int(positions.max())
        cut = start + int(rng.integers(max(1, job.document // 2), longest + 1))
        positions[cut:] -= positions[cut]
    return {"input_ids": ids, "labels": np.where(positions == 0, -100, ids), "position_ids": positions}


def packed_rows(job: Job, vocab: int) -> Any:  # a list[Row]: indexed as trainer.Rows is
    return [packed_row(job, vocab, number) for number in range(job.rows * job.steps)]


class Clock(TrainerCallback):
    """Times, losses, memory and the adapters' first gradient, of a Trainer or a loop that calls `begin` and `tick`."""

    def __init__(self, job: Job) -> None:
        self.job, self.created = job, time.perf_counter()
        self.marks: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.gradient: dict[str, Tensor] = {}
        self.more: dict[str, Any] = {}
        self.anonymous = 0

    def begin(self) -> None:
        self.marks, self.cpu = [time.perf_counter()], [time.process_time()]

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.anonymous = max(self.anonymous, anonymous_bytes())

    def keep_gradient(self, model: nn.Module) -> None:
        if self.job.shape == "tiny" and not self.gradient:
            for name, parameter in model.named_parameters():
                key = adapter_key(name)
                if key and parameter.grad is not None:
                    self.gradient[key] = parameter.grad.float().cpu().clone()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.keep_gradient(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def adapter_key(name: str) -> str:
    """`0.q_proj.A` from a parameter name of PEFT's or of the bare loop's; "" for anything else."""
    found = re.search(r"layers\.(\d+)\.\w+\.(\w+_proj)\.(?:lora_)?([ABab])(?:\.|$)", name)
    if not found:
        return ""
    return f"{found[1]}.{found[2]}.{found[3].upper()}"


@torch.no_grad()
def seed_adapters(model: nn.Module) -> None:
    """The same values for everybody, B not zero, so that A has a gradient too."""
    for name, parameter in model.named_parameters():
        if key := adapter_key(name):
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            scale = 0.01
            if key.endswith("A"):
                scale = parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def model_folder(job: Job, models: Path) -> Path:
    """A random LLaMA of the job's shape with a small tokenizer, made where it is not there yet: small ones in 16 bit,
    others in NF4 as bitsandbytes stores it."""
    folder = models / job.shape.replace(":", "-")
    if (folder / "tokenizer.json").is_file():
        return folder
    write = random_bases.write_nf4_model
    if job.shape in random_bases.SMALL:
        write = random_bases.write_model
    from qmedtune import tiny

    shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut
    write(random_bases.SHAPES[job.shape], folder)
    tiny.build_tokenizer(tiny.world_of("builtin:micro")).save_pretrained(str(folder))
    return folder


# ----------------------------------------------------------------------------------------------------------- qmedtune


def section_of(job: Job) -> ResolvedCpt:
    return ResolvedCpt(
        mix={"bench": 1.0},
        seq_len=job.seq_len,
        batch=job.rows,
        min_steps=1,
        micro_batch=job.micro_batch,
        lr=job.lr,
        embedding_lr=job.lr,
        warmup=WarmupSection(steps=0),
        schedule="constant",
        gradient_checkpointing=job.checkpointing,
        optimizer="adamw",
    )


def adapted(job: Job, folder: Path, kernels: str, attention: str = "auto") -> Any:
    """The base with its adapter and kernels, as a stage makes it."""
    from qmedtune import model as models
    from qmedtune.planning.machine import this_machine
    from qmedtune.planning.numerics import numerics

    section = ModelSection(base=str(folder), compute_dtype="bfloat16", attention=attention)  # pyright: ignore
    decided = numerics(section, full=False, seq_len=job.seq_len, machine=this_machine())
    base = models.load_base(folder, section, attention=decided.attention)
    adapter = AdapterSection(r=job.r, alpha=job.alpha, train_embeddings=job.train_embeddings)
    model = models.attach_adapter(base, adapter, [], continued=True)
    models.install_kernels(model, kernels)
    seed_adapters(model)
    return model


def facts_of(job: Job) -> Any:
    """What the planner reads of the job's shape."""
    from qmedtune.llama_shape import facts_from_config

    return facts_from_config(job.shape, random_bases.config_of(random_bases.SHAPES[job.shape]), "shape")


def setup_of(job: Job) -> Any:
    """The planner's view of qmedtune's run: within a stated budget with the layers it chooses, else all layers kept or
    all recomputed."""
    from qmedtune.planning import fit, memory
    from qmedtune.planning.machine import card_of

    facts = facts_of(job)
    setup = memory.Setup(
        job.seq_len, job.micro_batch, job.checkpointing, "adamw", "bfloat16", rank=job.r,
        train_embeddings=job.train_embeddings, attention="varlen",
    )  # fmt: skip
    if job.memory_gib:
        setup = fit.with_layers(facts, setup, card_of(job.memory_gib), fit.FILLED * job.memory_gib * 2**30)
    return setup


def layers_of(job: Job) -> dict[str, int]:
    """Layers by way, of `setup_of`."""
    from qmedtune.planning import memory

    return {way: count for way, count in memory.layers_by_way(facts_of(job), setup_of(job)).items() if count}


def qmedtune(job: Job, folder: Path, clock: Clock, kernels: str, *, attention: str = "auto") -> None:
    from qmedtune import model as models
    from qmedtune.modeling import activations
    from qmedtune.training.trainer import Material, QTrainer, trainer_arguments

    model, section = adapted(job, folder, kernels, attention), section_of(job)
    clock.more["layers"] = layers_of(job)
    activations.set_ways(model, clock.more["layers"])
    arguments = trainer_arguments(
        folder / "out",
        section,
        seed=job.seed,
        save_every=10**9,
        autocast=None,
        deterministic=False,
        checkpointing=False,
    )
    rows = packed_rows(job, model.config.vocab_size)
    trainer = QTrainer(Material(model, models.load_tokenizer(folder), rows, section), arguments, [clock])
    trainer.train()
    clock.more["micro_batch"] = trainer.micro_batch
    clock.more["data_share"] = trainer.data_seconds / (clock.marks[-1] - clock.marks[0])


# Functions that fused.py calls with a path, by what is left out.
ABLATED = {
    "without-linears": ("lora.linear",),
    "without-norms": ("rms_norm", "add_rms_norm"),
    "without-rope": ("rotary_qkv",),
    "without-swiglu": ("swiglu",),
}


def by_reference(operation: Callable) -> Callable:
    """`operation` with its `path` always "reference"."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments["path"] = "reference"
        return operation(*given.args, **given.kwargs)

    return call


def ablated(job: Job, folder: Path, clock: Clock, left_out: str) -> None:
    """qmedtune with one operation by its plain reference: replaced in this process alone."""
    from qmedtune.modeling import fused, loss

    for dotted in ABLATED.get(left_out, ()):
        place, _, name = dotted.rpartition(".")
        owner = fused
        if place:
            owner = getattr(fused, place)
        setattr(owner, name, by_reference(getattr(owner, name)))
    if left_out == "without-loss":
        loss.head_nll = lambda hidden, weight, targets, path: loss._chunked_nll(hidden, weight, targets)
    attention = "auto"
    if left_out == "without-varlen":
        attention = "sdpa"
    qmedtune(job, folder, clock, "auto", attention=attention)


# ------------------------------------------------------------------------------------------------------- what is told


def limit_memory(gib: float | None) -> None:
    """Let this process allocate what a card of `gib` would leave it: less what context and driver hold."""
    if not gib or not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    held = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * 2**30 - held) / total))


def memory_figures() -> dict[str, int]:
    """Peaks in bytes: allocated by torch, reserved by its allocator, held on the device in all (context included); of
    the host, resident. Without a GPU the first is the resident size too."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not torch.cuda.is_available():
        return {"peak_memory_bytes": host, "host_bytes": host}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_bytes": total - free + max(0, torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()),
        "host_bytes": host,
    }


def card_state() -> dict[str, str]:
    """Clock, temperature and power of the card right after the last step, as the driver tells them."""
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu,power.draw", "--format=csv,noheader"]
    return {"card": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()}


def figures(job: Job, clock: Clock) -> dict[str, Any]:
    steps = np.diff(clock.marks)
    assert len(steps) == job.steps == len(clock.losses), f"{len(steps)} steps, {len(clock.losses)} losses"
    rows = packed_rows(job, random_bases.SHAPES[job.shape]["vocab"])
    labels = [int((row["labels"][1:] != -100).sum()) for row in rows[job.warmup_steps * job.rows :]]
    supervised = sum(labels) / len(labels)
    per_step = float(np.median(steps[job.warmup_steps :]))
    cpu_s = float(np.median(np.diff(clock.cpu)[job.warmup_steps :]))
    return {
        "tokens_per_s": job.rows * supervised / per_step,
        "all_tokens_per_s": job.rows * job.seq_len / per_step,
        "cpu_s": cpu_s,
        "first_step_s": float(steps[0]),
        "load_s": clock.marks[0] - clock.created,
        **memory_figures(),
        "host_anonymous_bytes": clock.anonymous,
        "losses": [round(float(loss), 6) for loss in clock.losses],
        **card_state(),
        **clock.more,
    }
