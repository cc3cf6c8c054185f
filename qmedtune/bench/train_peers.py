"""The peers of `qmedtune bench train`: what a user would install or write instead, by its documented interface.

Each trains the job's rows from the job's adapter (train_worker.py) and lets the clock tick once per optimiser step.
Unsloth is used as its documentation says, Axolotl's kernels as Axolotl applies them itself (0.19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qmedtune.bench.job import Job
from qmedtune.bench.train import REFERENCE
from qmedtune.bench.train_worker import DTYPE, Clock, packed_rows, seed_adapters
from qmedtune.recipe import ModelSection

DOCUMENTED_BATCH = 8  # rows per device: the default of transformers' and TRL's trainers


# ---------------------------------------------------------------------------------------------- TRL, PEFT, bitsandbytes


def best_attention() -> str:
    return "flash_attention_2" if torch.cuda.is_available() and find_spec("flash_attn") else "sdpa"


def four_bit_model(folder: Path, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bit, dtype=DTYPE, device_map={"": _device()}, attn_implementation=attention
    )


def dequantised_model(folder: Path, dtype: str = "bfloat16") -> Any:
    """The same NF4 values in plain linears."""
    from qmedtune import model as models

    model = models.load_base(folder, ModelSection(base=str(folder), compute_dtype=dtype))  # pyright: ignore
    models.dequantize_linears(model, models.DTYPES[dtype])  # on a CPU they are by now
    return model


def lora_config(job: Job) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=job.r,
        lora_alpha=int(job.alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"] if job.train_embeddings else None,
    )


def trl(job: Job, folder: Path, clock: Clock) -> None:
    job = replace(job, micro_batch=min(DOCUMENTED_BATCH, job.rows), checkpointing=True)
    sft(job, folder, clock, four_bit_model(folder), lora=lora_config(job))


def trl_tuned(job: Job, folder: Path, clock: Clock) -> None:
    sft(job, folder, clock, four_bit_model(folder, best_attention()), lora=lora_config(job))


def trl_liger(job: Job, folder: Path, clock: Clock) -> None:
    sft(job, folder, clock, four_bit_model(folder, best_attention()), lora=lora_config(job), use_liger_kernel=True)


def trl_compiled(job: Job, folder: Path, clock: Clock) -> None:
    sft(job, folder, clock, four_bit_model(folder, "flex_attention"), lora=lora_config(job), torch_compile=True)


def sft_trainer(job: Job, folder: Path, clock: Clock) -> None:
    sft(job, folder, clock, dequantised_model(folder), lora=lora_config(job))


def sft(
    job: Job, folder: Path, clock: Clock, model: Any, *, lora: Any = None, tokenizer: Any = None, **options: Any
) -> None:
    """TRL's trainer over the job's rows; `options` are SFTConfig's."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.rows // job.micro_batch,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        gradient_checkpointing=job.checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=job.seq_len,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        seed=job.seed,
        **options,
    )
    rows = [_lists(row) for row in packed_rows(job, model.config.vocab_size)]
    trainer: Any = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(folder),
        data_collator=_stack,
        callbacks=[clock],
    )
    seed_adapters(trainer.model)
    trainer.train()


def _lists(row: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in row.items()}


def _stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    stacked = {}
    for name in rows[0]:
        stacked[name] = torch.tensor([row[name] for row in rows])
    return stacked


# ------------------------------------------------------------------------------------------------ Unsloth and Axolotl


def unsloth(job: Job, folder: Path, clock: Clock) -> None:
    """Its own loader, LoRA and checkpointing, under TRL's trainer: as its documentation says. It was imported first."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

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
    sft(job, folder, clock, model, tokenizer=tokenizer)


def axolotl(job: Job, folder: Path, clock: Clock) -> None:
    """LLaMA's attention class is patched before loading, the linears of the PEFT model after: Axolotl's own order."""
    from axolotl.monkeypatch import lora_kernels  # pyright: ignore[reportMissingImports]
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]
    from peft import get_peft_model

    wanted = dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), True)
    config = DictDefault({"base_model": str(folder), **wanted})
    lora_kernels.patch_self_attn_lora(config)
    model = get_peft_model(four_bit_model(folder, best_attention()), lora_config(job))
    lora_kernels.apply_lora_kernel_patches(model, config)
    sft(job, folder, clock, model)


# ------------------------------------------------------------------------------------------------------ the bare loop


class NaiveLora(nn.Module):
    """What one writes in five lines: y = x W' + s x A' B', all in the weight's dtype."""

    def __init__(self, weight: torch.Tensor, job: Job):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a = nn.Parameter(weight.new_zeros(job.r, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], job.r))
        self.scale = job.alpha / job.r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + self.scale * ((x @ self.a.t()) @ self.b.t())


def peft_loop(job: Job, folder: Path, clock: Clock, four_bit: bool = False) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    if four_bit:
        base = four_bit_model(folder)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, device_map={"": _device()})
    model = get_peft_model(base, lora_config(job))
    seed_adapters(model)
    _loop(model, job, clock)


def torch_loop(job: Job, folder: Path, clock: Clock, dtype: str = "bfloat16") -> None:
    model = dequantised_model(folder, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NaiveLora(module.weight.data, job))
    seed_adapters(model)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.requires_grad_(job.train_embeddings)
    _loop(model, job, clock)


def _loop(model: Any, job: Job, clock: Clock) -> None:
    """AdamW over the job's batches; what is trained wants a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batches = list(_batches(job, model.config.vocab_size))
    clock.begin()
    for batch in batches:
        loss = _accumulated(model, batch, job.micro_batch)
        clock.keep_gradient(model)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss)
        clock.tick()


def _accumulated(model: Any, batch: dict[str, torch.Tensor], micro_batch: int) -> float:
    """Forward and backward over a batch; its loss, a mean over its supervised tokens."""
    supervised, total = int((batch["labels"][:, 1:] != -100).sum()), 0.0
    for start in range(0, len(batch["labels"]), micro_batch):
        micro = {name: x[start : start + micro_batch].to(_device()) for name, x in batch.items()}
        share = int((micro["labels"][:, 1:] != -100).sum()) / supervised
        loss = model(**micro, use_cache=False).loss * share
        loss.backward()
        total += float(loss.detach())
    return total


def _batches(job: Job, vocab: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = packed_rows(job, vocab)
    for start in range(0, len(rows), job.rows):
        picked = rows[start : start + job.rows]
        batch: dict[str, torch.Tensor] = {}
        for name in picked[0]:
            batch[name] = torch.from_numpy(np.stack([row[name] for row in picked]))
        yield batch


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


PEERS: dict[str, Callable[[Job, Path, Clock], None]] = {
    REFERENCE: partial(torch_loop, dtype="float32"),
    "torch-loop": torch_loop,
    "peft": peft_loop,
    "peft-nf4": partial(peft_loop, four_bit=True),
    "trl": trl,
    "trl-tuned": trl_tuned,
    "trl-liger": trl_liger,
    "trl-compiled": trl_compiled,
    "sft-trainer": sft_trainer,
    "unsloth": unsloth,
    "axolotl": axolotl,
}
