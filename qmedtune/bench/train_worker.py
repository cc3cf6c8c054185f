"""One contender of `qmedtune bench train`, in its own process: `python -m qmedtune.bench.train_worker`.

All build the same random LLaMA from the same seed and read the same rows. Times are taken around optimiser steps, on a
GPU after synchronising.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from qmedtune.bench import shapes
from qmedtune.bench.train import Job
from qmedtune.recipe import AdapterSection, CptSection, ModelSection, WarmupSection
from qmedtune.train import peak_memory_bytes, quiet_libraries
from qmedtune.training import activations
from qmedtune.training.trainer import QTrainer, collate, trainer_arguments

DTYPE = torch.bfloat16
DOCUMENTED_BATCH = 8  # rows per device: the default of transformers' and TRL's trainers


class RandomRows:
    """Packed rows of documents of equal length, from a seed; every contender reads the same."""

    def __init__(self, job: Job, vocab: int):
        self.job, self.vocab = job, vocab

    def __len__(self) -> int:
        return self.job.rows * self.job.steps

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.job.seed, row])
        ids = rng.integers(8, self.vocab, self.job.seq_len)
        positions = np.arange(self.job.seq_len) % self.job.document
        return {"input_ids": ids, "labels": np.where(positions == 0, -100, ids), "position_ids": positions}


class Clock(TrainerCallback):
    """Times and losses of the optimiser steps of a Trainer."""

    def __init__(self) -> None:
        self.marks: list[float] = [time.perf_counter()]
        self.losses: list[float] = []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def model_folder(job: Job, scratch: Path) -> Path:
    """A random LLaMA of the job's shape with a small tokenizer, made once per comparison: 16 bit for the tiny one,
    which not every contender reads from NF4 on a CPU, else NF4 as bitsandbytes stores it."""
    folder = scratch / job.shape
    if (folder / "tokenizer.json").is_file():
        return folder
    from qmedtune import tiny

    (shapes.write_model if job.shape == "tiny" else shapes.write_nf4_model)(shapes.SHAPES[job.shape], folder)
    tiny.build_tokenizer(tiny.world_of("builtin:micro")).save_pretrained(str(folder))
    return folder


def section_of(job: Job) -> CptSection:
    return CptSection(
        mix={"bench": 1.0},
        seq_len=job.seq_len,
        batch=job.rows,
        micro_batch=job.micro_batch,
        lr=job.lr,
        embedding_lr=job.lr,
        warmup=WarmupSection(steps=0),
        schedule="constant",
        gradient_checkpointing=job.checkpointing,
        optimizer="adamw",
    )


# ----------------------------------------------------------------------------------------------------- contenders


def qmedtune(job: Job, folder: Path, clock: Clock, kernels: str) -> None:
    from qmedtune import model as models

    base = models.load_base(folder, ModelSection(base=str(folder), compute_dtype="bfloat16"), seq_len=job.seq_len)
    adapter = AdapterSection(r=job.r, alpha=job.alpha, train_embeddings=job.train_embeddings)
    model = models.attach_adapter(base, adapter, [], continued=True)
    models.install_kernels(model, kernels)
    section = section_of(job)
    layers = len(base.model.layers)
    ways = {"offload": layers} if job.memory_gib else {"recompute" if job.checkpointing else "keep": layers}
    activations.set_ways(model, ways)
    arguments = trainer_arguments(
        folder / "out",
        section,
        seed=job.seed,
        save_every=10**9,
        autocast=None,
        deterministic=False,
        checkpointing=False,
    )
    rows = RandomRows(job, base.config.vocab_size)
    trainer = QTrainer(model, arguments, rows, section, models.load_tokenizer(folder), 1, {}, [clock])
    trainer.train()


def trl(job: Job, folder: Path, clock: Clock, *, checkpointing: bool, quantized: bool = True) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    if quantized:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bit, dtype=DTYPE, device_map={"": _device()}
        )
    else:
        from qmedtune import model as models

        model = models.load_base(folder, ModelSection(base=str(folder), compute_dtype="bfloat16"))
    lora = LoraConfig(
        r=job.r,
        lora_alpha=int(job.alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"] if job.train_embeddings else None,
    )
    _sft(job, folder, clock, model, AutoTokenizer.from_pretrained(folder), lora, checkpointing=checkpointing)


def _sft(job: Job, folder: Path, clock: Clock, model: Any, tokenizer: Any, lora: Any, *, checkpointing: bool) -> None:
    """TRL's trainer over the job's rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.rows // job.micro_batch,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=job.seq_len,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=job.seed,
    )
    rows = RandomRows(job, model.config.vocab_size)
    data = Dataset.from_list([{name: x.tolist() for name, x in rows[i].items()} for i in range(len(rows))])
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        peft_config=lora,
        processing_class=tokenizer,
        data_collator=_stack,
        callbacks=[clock],
    )
    trainer.train()


def unsloth(job: Job, folder: Path, clock: Clock) -> None:
    """Its own loader, LoRA and checkpointing, under TRL's trainer: as its documentation says."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]  (first: it patches the others)

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=job.seq_len, load_in_4bit=True, dtype=DTYPE
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names += ["embed_tokens", "lm_head"] if job.train_embeddings else []
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.r,
        lora_alpha=int(job.alpha),
        target_modules=names,
        use_gradient_checkpointing="unsloth" if job.checkpointing else False,
    )
    _sft(job, folder, clock, model, tokenizer, None, checkpointing=job.checkpointing)


def _stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


class NaiveLora(nn.Module):
    """What one writes in five lines: y = x W' + s x A' B', all in bf16."""

    def __init__(self, weight: torch.Tensor, job: Job):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a = nn.Parameter(torch.randn(job.r, weight.shape[1], dtype=DTYPE, device=weight.device) * 0.02)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], job.r, dtype=DTYPE, device=weight.device))
        self.scale = job.alpha / job.r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + self.scale * ((x @ self.a.t()) @ self.b.t())


def torch_loop(job: Job, folder: Path, clock: Clock) -> None:
    from qmedtune import model as models

    model: Any = models.load_base(folder, ModelSection(base=str(folder), compute_dtype="bfloat16"))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NaiveLora(module.weight.data, job))
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.requires_grad_(job.train_embeddings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    model.train()
    for batch in _batches(job, model.config.vocab_size):
        loss = model(**{name: x.to(_device()) for name, x in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.tick()


def _batches(job: Job, vocab: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = RandomRows(job, vocab)
    for start in range(0, len(rows), job.rows):
        batch = collate([rows[i] for i in range(start, start + job.rows)], pad_id=0)
        del batch["lengths"]
        yield batch


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


CONTENDERS: dict[str, Callable[[Job, Path, Clock], None]] = {
    "torch-loop": torch_loop,
    "trl": lambda job, folder, clock: trl(
        replace(job, micro_batch=DOCUMENTED_BATCH), folder, clock, checkpointing=True
    ),
    "trl-tuned": lambda job, folder, clock: trl(job, folder, clock, checkpointing=False),
    "sft-trainer": lambda job, folder, clock: trl(job, folder, clock, checkpointing=False, quantized=False),
    "unsloth": unsloth,
    "qmedtune-reference": lambda job, folder, clock: qmedtune(job, folder, clock, "reference"),
    "qmedtune": lambda job, folder, clock: qmedtune(job, folder, clock, "auto"),
}


def main() -> None:
    contender, text, scratch, target = sys.argv[1:5]
    job = Job(**json.loads(text))
    quiet_libraries()
    folder = model_folder(job, Path(scratch))
    if job.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_gib * 2**30 / total))
    clock = Clock()
    CONTENDERS[contender](job, folder, clock)
    steps = np.diff(clock.marks)
    timed = steps[job.warmup_steps :]
    tokens = job.rows * job.seq_len
    result = {
        "tokens_per_s": tokens / float(np.median(timed)),
        "first_step_s": float(steps[0]),
        "peak_memory_bytes": peak_memory_bytes(),
        "loss": {"first": clock.losses[0], "last": clock.losses[-1]},
    }
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
