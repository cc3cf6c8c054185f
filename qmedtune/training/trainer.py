"""QTrainer: TRL's SFTTrainer, fed with our packed rows, made exact.

What is ours and why: the rows are walked in the order that packing laid out; an optimiser step loops over its
micro-batches itself, so that running out of memory halves them and retries the same batch with the same gradient;
weights that are trained stay fp32 (SFTTrainer casts them to bf16 at the start, and back to fp32 on resume: another
run); checkpoints are checkpoints.py's: the trained weights alone, sealed, nothing pickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from qmedtune import store, ui
from qmedtune.errors import DataError, RunError
from qmedtune.group import ALONE, Group
from qmedtune.model import EMBEDDINGS, trainable
from qmedtune.modeling import fused
from qmedtune.modeling.collation import Rows, collate, supervised_weight
from qmedtune.modeling.loss import token_nll
from qmedtune.resolved import ResolvedTraining
from qmedtune.results import Json, MadeWith
from qmedtune.training import checkpoints


def learning_rate_factor(section: ResolvedTraining, total_steps: int):
    """Step -> factor on the peak learning rate: linear warm-up, then the schedule down to `min_lr_ratio`, reached at
    the horizon (which may lie beyond the last step, or before it). A warm-up ratio is one of the horizon."""
    horizon = section.horizon_steps or max(1, round(total_steps * (section.horizon_ratio or 1)))
    warmup = section.warmup.steps if section.warmup.steps is not None else round((section.warmup.ratio or 0) * horizon)
    floor = section.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, horizon - warmup))
        shape = {"cosine": 0.5 * (1 + float(np.cos(np.pi * done))), "linear": 1 - done, "constant": 1.0}
        return floor + (1 - floor) * shape[section.schedule]

    return factor


def parameter_groups(model: torch.nn.Module, section: ResolvedTraining) -> list[dict[str, Any]]:
    """Adapters and embeddings apart, since embeddings take another learning rate."""
    embeddings: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in trainable(model).items():
        if any(module in EMBEDDINGS for module in name.split(".")):
            embeddings.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = []  # torch's form
    if rest:
        groups.append({"params": rest, "lr": section.lr})
    if embeddings:
        groups.append({"params": embeddings, "lr": section.embedding_lr})
    return groups


def make_optimizer(model: torch.nn.Module, section: ResolvedTraining) -> torch.optim.Optimizer:
    groups = parameter_groups(model, section)
    options = {"betas": section.betas, "eps": section.adam_eps, "weight_decay": section.weight_decay}
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes as bnb

    kind = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[section.optimizer]
    return kind(groups, **options)


@dataclass(frozen=True)
class Material:
    """What is trained, on which rows, and how: `section` says batch, micro-batch, rates and optimiser."""

    model: Any
    tokenizer: Any
    rows: Rows
    section: ResolvedTraining


class QTrainer(SFTTrainer):
    """TRL's SFTTrainer on packed rows, with the summed token loss and checkpoints of this project.

    The one subclass of the project. `nll` is what a micro-batch's summed loss is computed by, from the model and the
    collated arrays."""

    nll: Callable[..., Tensor] = staticmethod(token_nll)

    def __init__(
        self,
        material: Material,
        args: SFTConfig,
        callbacks: list[TrainerCallback],
        *,
        keep: int = 1,
        made_with: MadeWith | None = None,
        group: Group = ALONE,
    ):
        """`keep` checkpoints stay; `made_with` is told in each of them. `group`: who trains along."""
        self.group = group
        model, tokenizer, rows, section = material.model, material.tokenizer, material.rows, material.section
        self.section, self.keep, self.made_with = section, keep, made_with
        self.stage = Path(str(args.output_dir)).parent
        self.trained_model: Any = model
        self.micro_batch = section.micro_batch
        self.warnings: list[str] = []  # of the step in hand, for the log
        self.tokens_seen = 0
        self.data_seconds = 0.0  # waited for rows in all
        self.save_seconds: list[float] = []  # each checkpoint
        self.step_seconds: list[float] = []  # each forward and backward pass of a batch
        pad_id = tokenizer.pad_token_id
        self.trained_parameters = list(trainable(model).values())
        exact = [(parameter, parameter.data) for parameter in self.trained_parameters]
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"row": range(len(rows))}),
            data_collator=lambda picked: collate([rows[p["row"]] for p in picked], pad_id),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        exact_sums()
        for parameter, values in exact:  # of a quantised base, SFTTrainer has rounded them to bf16
            parameter.data = values.to(parameter.device, torch.float32)

    def _send_telemetry(self) -> None:
        """TRL's own tells the Hub about model and GPU. Nothing leaves this machine."""

    # -- order, optimiser, schedule

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        dataset: Any = train_dataset or self.train_dataset
        return SequentialSampler(dataset)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.trained_model, self.section)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        factor = learning_rate_factor(self.section, num_training_steps)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss_context_manager(self) -> Any:
        """Autocast where fp32 weights are trained in 16 bit. transformers leaves it to accelerate, which wraps
        `model.forward`; our loss calls the layers below that. An adapter's base is in the compute dtype already."""
        casts = not hasattr(self.trained_model, "peft_config")
        return self.accelerator.autocast() if casts else nullcontext()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.perf_counter() - started
        return samples

    # -- one optimiser step

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """The whole batch, in micro-batches, its loss a mean over all its supervised tokens."""
        started = time.perf_counter()
        model.train()
        inputs = self._prepare_inputs(inputs)
        supervised = supervised_weight(inputs)
        self.tokens_seen += int(inputs["lengths"].sum())
        if supervised == 0:
            return self._nothing_to_learn(inputs["labels"])
        drawn = checkpoints.random_states()
        ours = self.group.share(inputs)
        loss = self._accumulate(model, ours, supervised)
        while self.group.any(loss is None):
            self._halve()
            model.zero_grad()
            checkpoints.set_random_states(drawn)  # dropout draws what it would have drawn at the smaller size
            loss = self._accumulate(model, ours, supervised)
        assert loss is not None
        loss = self.group.add_up(loss, self.trained_parameters)
        if not torch.isfinite(loss):
            self._diverged("loss", float(loss))
        self.step_seconds.append(time.perf_counter() - started)
        return loss

    def _nothing_to_learn(self, labels: Tensor) -> Tensor:
        """A last batch of one-token pieces has no label, and no gradient; anywhere else it is a broken mask."""
        if self.state.global_step + 1 < self.state.max_steps:
            raise DataError(f"step {self.state.global_step + 1}: no token of this batch is supervised\ncheck `loss_on`")
        return torch.zeros((), device=labels.device)

    def _accumulate(self, model: torch.nn.Module, inputs: dict[str, Tensor], supervised: float) -> Tensor | None:
        """Forward and backward over all micro-batches; None when memory ran out."""
        total = torch.zeros((), device=inputs["labels"].device)
        lengths = inputs["lengths"].tolist()  # asked for once: each question to a GPU waits for what it has to do
        arrays = {name: x for name, x in inputs.items() if name != "lengths"}
        unchanged: AbstractContextManager[None] = nullcontext()
        if len(lengths) > self.micro_batch:
            unchanged = fused.steady(model)
        try:
            with unchanged:
                for start in range(0, len(lengths), self.micro_batch):
                    rows = slice(start, start + self.micro_batch)
                    micro, longest = {name: x[rows] for name, x in arrays.items()}, max(lengths[rows])
                    with self.compute_loss_context_manager():
                        loss = self.nll(model, **{name: x[:, :longest] for name, x in micro.items()}) / supervised
                    self.accelerator.backward(loss)
                    total += loss.detach()
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            if self.group.sharded:
                raise self._out_of_step() from error
            return None
        return total

    def _halve(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.micro_batch == 1:
            raise torch.OutOfMemoryError("one row at a time")
        before, self.micro_batch = self.micro_batch, self.micro_batch // 2
        warning = f"out of memory: micro-batch {before} -> {self.micro_batch} rows, same batch, same optimiser step"
        self.warnings.append(warning)
        ui.warn(warning)

    def _out_of_step(self) -> RunError:
        """The others are in the middle of a pass that needs this process: none of them can begin it again."""
        return RunError(
            f"step {self.state.global_step + 1}: out of memory with {self.micro_batch} rows at a time; with a base "
            "that is sharded they cannot be halved in the middle of a step\n"
            f"the last sealed checkpoint is kept; state micro_batch: {max(1, self.micro_batch // 2)} in the stage, or "
            "gradient_checkpointing: true, and give the same command again"
        )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        # With fp16 loss scaling a non-finite norm is routine: the scaler skips the update and lowers the scale.
        if self.accelerator.scaler is None and not np.isfinite(float(norm)):
            self._diverged("gradient norm", float(norm))
        return norm

    def _diverged(self, what: str, value: float) -> None:
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler else float("nan")
        step = self.state.global_step + 1
        raise RunError(
            f"step {step}: {what} is {value}; no update was made (learning rate {rate:.2e}, batch {step - 1})\n"
            "the last sealed checkpoint is kept; try a lower lr, or max_grad_norm below 1.0"
        )

    # -- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self.group.leads:
            return
        started = time.perf_counter()
        states = checkpoints.states_of(self.optimizer, self.lr_scheduler, self.accelerator.scaler)
        facts: Json = {"tokens": self.tokens_seen}
        if self.made_with is not None:
            facts["made_with"] = self.made_with.as_json()
        weights, step = trainable(self.trained_model), self.state.global_step
        self.state.log_history.clear()  # metrics.jsonl has it all; this would grow with every step
        checkpoint = checkpoints.Checkpoint(step, weights, states, self.state, facts)
        checkpoints.save(self.stage, checkpoint, keep=self.keep)
        self.save_seconds.append(time.perf_counter() - started)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.load_trained(self.trained_model, Path(resume_from_checkpoint) / checkpoints.WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_scaler(Path(checkpoint), self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.group.leads:
            checkpoints.load_random(Path(checkpoint))


def exact_sums() -> None:
    """16-bit products sum in fp32 throughout: cuBLAS may otherwise add partial sums of fp16 and bf16 in 16 bit. And
    `deterministic` does not write NaN into all new memory, which its algorithms do not need (each buffer once more)."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def trainer_arguments(
    stage: Path,
    section: ResolvedTraining,
    *,
    seed: int,
    save_every: int,
    autocast: str | None,
    deterministic: bool,
    checkpointing: bool,
) -> SFTConfig:
    """SFTConfig with everything that it would otherwise change behind our back switched off. `stage`: its folder.

    `autocast` is None where nothing is cast: fp32, or fp32 adapters on a base in bf16. "bfloat16" and "float16" cast
    the fp32 weights of a full stage for its products; "float16" scales the loss, for adapters too.
    `checkpointing`: transformers' own, for layers that are not ours (modeling/activations.py).
    """
    arguments = SFTConfig(
        output_dir=str(stage / store.SCRATCH),
        per_device_train_batch_size=section.batch,
        gradient_accumulation_steps=1,  # QTrainer loops over micro-batches itself
        num_train_epochs=1,  # packing laid out all epochs
        learning_rate=section.lr,
        max_grad_norm=section.max_grad_norm,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=autocast == "bfloat16",
        fp16=autocast == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        save_strategy=SaveStrategy.STEPS,
        save_steps=save_every,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        full_determinism=deterministic,
    )
    # A run takes one GPU: on a machine with several, Trainer would multiply the batch and wrap the model by itself.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
